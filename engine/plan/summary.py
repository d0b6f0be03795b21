"""A job in one screen: the model, the layout, what a step consumes, and what the ranks of each pipeline stage hold.

Memory is that of the objects which a rank will build (`explain`), one rank for each stage: ranks of one stage differ by
padding only.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import Config
from engine.distributed.topology import Topology
from engine.model.flops import count_parameters
from engine.parallel.pipeline.timeline import timeline
from engine.plan.explain import Explanation, explain
from engine.plan.words import counted, memory_size, table
from engine.schedules.simulate import Timeline


def summary(config: Config) -> str:
    """The whole text for a resolved configuration, without a trailing newline."""
    topology = Topology.of(config)
    stages = [explain(config, topology.rank(pipeline=stage)) for stage in range(topology.pipeline)]
    drawn = timeline(config)
    sections = {"Model": _model(config), "Layout": _layout(config, drawn), "Step": _step(config),
                "Memory of a rank between steps, by pipeline stage": _memory(config, stages, drawn)}
    return "\n\n".join("\n".join([title, *(f"  {line}".rstrip() for line in lines)])
                       for title, lines in sections.items())


def _model(config: Config) -> Iterator[str]:
    model, counts = config.model, count_parameters(config.model)
    yield f"{counts.total:,} parameters, {counts.matmul:,} of them in matrix products"
    yield (f"{model.num_layers} layers, hidden size {model.hidden_size:,}, {model.num_heads} heads "
           f"({model.num_kv_heads} key-value) of {model.head_dim}, FFN {model.ffn_hidden_size:,}, vocabulary "
           f"{model.vocab_size:,}" + ", tied embeddings" * model.tie_embeddings)


def _layout(config: Config, drawn: Timeline) -> Iterator[str]:
    parallel = config.parallel
    yield (f"{parallel.world_size:,} process{'es' * (parallel.world_size > 1)}: tensor {parallel.tensor} × pipeline "
           f"{parallel.pipeline} × context {parallel.context} × data {parallel.data_size}"
           + ", sequence parallelism" * (parallel.sequence and parallel.tensor > 1))
    if parallel.pipeline > 1:
        chunks = f", {parallel.virtual_stages} chunks a stage" * (parallel.virtual_stages > 1)
        yield f"schedule {parallel.schedule}{chunks}: {drawn.bubble:.1%} of a step's time is its bubble"
    share = f", state shared by {parallel.zero_shard} ranks" if parallel.zero and parallel.zero_shard else ""
    layers = f" ({parallel.recompute_layers} layers of a stage)" if parallel.recompute_layers is not None else ""
    yield f"ZeRO {parallel.zero}{share}, recompute {parallel.recompute}{layers}, {config.precision.compute}"


def _step(config: Config) -> Iterator[str]:
    tokens = config.batch.global_ * config.data.seq_len
    total, parameters = tokens * config.steps, count_parameters(config.model).total
    yield f"{config.batch.global_:,} sequences × {config.data.seq_len:,} tokens = {tokens:,} tokens"
    yield (f"{config.num_microbatches:,} microbatch{'es' * (config.num_microbatches > 1)} of "
           f"{config.batch.micro:,} sequence{'s' * (config.batch.micro > 1)} for each copy of the model")
    yield f"{config.steps:,} steps: {counted(total)} tokens, {total / parameters:.3g} for each parameter"


def _layers(it: Explanation, chunk: int) -> str:
    """`embedding, 0 to 9`, `20 to 29`, `70 to 79, output`."""
    layers = it.layers[chunk]
    span = str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"
    return ", ".join(["embedding"] * (chunk == 0) + [span] + ["output"] * (chunk == len(it.placement) - 1))


def _memory(config: Config, stages: list[Explanation], drawn: Timeline) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("stage", "layers", "parameters", "gradients", "optimizer", "together")]
    for stage, it in enumerate(stages):
        sizes = (it.bytes.parameters, it.bytes.gradients, it.bytes.optimizer, it.bytes.total)
        rows.append((str(stage), ", ".join(_layers(it, chunk) for chunk in it.layers), *map(memory_size, sizes)))
    yield from table(rows, right=(0, 2, 3, 4, 5))
    most = max(drawn.peak_in_flight)
    yield (f"and within a step: activations of at most {most} microbatch{'es' * (most > 1)}"
           + " of one chunk" * (config.parallel.virtual_stages > 1))
