"""A job in one screen: the model, the layout, what a step consumes, what the ranks of each pipeline stage hold, and how
long it takes on a device.  Ranks of one stage differ by padding only.
"""

from __future__ import annotations

from collections.abc import Iterator

from engine.config import Config
from engine.model.flops import count_parameters
from engine.parallel.pipeline.timeline import timeline
from engine.plan.job import Planned
from engine.plan.state import dealt_layers
from engine.plan.text import counted, duration, memory_size, table
from engine.schedules.simulate import Timeline


def summary(job: Planned) -> str:
    """The whole text, without a trailing newline."""
    config, drawn = job.config, timeline(job.config)
    sections = {"Model": _model(config), "Layout": _layout(config, drawn), "Step": _step(config),
                "Memory of a rank at the worst moment of a step, by pipeline stage": _memory(config, job),
                f"On {job.world:,} × {job.device.name}": _fit(job)}
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


def _layers(config: Config, stage: int) -> str:
    """`embedding, 0 to 9`, `20 to 29`, `70 to 79, output`; several chunks one behind the other."""
    placement, deal = dealt_layers(config)
    parts = []
    for chunk in (chunk for chunk, owner in enumerate(placement) if owner == stage):
        layers = deal[chunk]
        parts += ["embedding"] * (chunk == 0)
        parts += [str(layers[0]) if len(layers) == 1 else f"{layers[0]} to {layers[-1]}"]
        parts += ["output"] * (chunk == len(placement) - 1)
    return ", ".join(parts)


def _memory(config: Config, job: Planned) -> Iterator[str]:
    rows: list[tuple[str, ...]] = [("stage", "layers", "parameters", "gradients", "optimizer", "activations",
                                    "workspace", "together")]
    for stage, it in enumerate(job.stages):
        sizes = (it.state.weights, it.state.gradients, it.state.optimizer, it.activations, it.workspace, it.total)
        rows.append((str(stage), _layers(config, stage), *map(memory_size, sizes)))
    yield from table(rows, right=(0, 2, 3, 4, 5, 6, 7))
    name, size = job.fullest.largest
    yield f"the largest term of the fullest stage: {name}, {memory_size(size)}, at {job.fullest.when}"


def _fit(job: Planned) -> Iterator[str]:
    time, steps = job.time, job.config.steps
    yield (f"{'fits' if job.fits else 'DOES NOT FIT'}: {memory_size(job.fullest.needed)}, "
           f"± {job.memory_error:.1%}, with the allocator's margin and a CUDA context; "
           f"{memory_size(job.device.memory)} are there")
    yield (f"{duration(time.seconds)} a step, ± {job.error:.0%}; {counted(round(time.tokens_per_second))} tokens a "
           f"second, MFU {time.mfu:.1%} (full attention {time.mfu_full:.1%})")
    yield f"{job.days:,.3g} days for {steps:,} steps, {job.days * 24 * job.world:,.0f} device-hours"
    largest = sorted(time.breakdown.items(), key=lambda item: -item[1])
    yield "of a step: " + ", ".join(f"{name.replace('_', ' ')} {part / time.seconds:.1%}" for name, part in largest
                                    if part > 0.0005 * time.seconds)
