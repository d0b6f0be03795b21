"""Impossible layouts are refused here, before any process starts, with the equation that does not hold."""

from __future__ import annotations

from collections.abc import Iterator

from engine.config.placement import (
    as_role,
    learns_from_own_texts,
    overall_problems,
    placed,
    processes_needed,
    roles_asked,
)
from engine.config.problems import listed
from engine.config.schema import Config
from engine.config.support import unsupported
from engine.errors import ConfigError
from engine.schedules.table import chunk_problem, recipe

# A block of FP8 numbers with one scale is never divided; tensor cores take multiples of 16 anyway.
FP8_BLOCK = {"tensorwise": 16, "rowwise": 16, "blockwise": 128, "mxfp8": 32, "te": 16}
MOST_ACTIONS = 1 << 18            # stages × chunks × microbatches; every rank builds the schedule of all stages


def resolve_layout(config: Config, world_size: int) -> Config:
    """The configuration of a job of `world_size` processes: `parallel.data` is a number, and everything divides.

    Raises:
        ConfigError: with every equation that does not hold, one per line.
    """
    if learns_from_own_texts(config):
        return _resolve_roles(config, world_size)
    parallel = config.parallel
    problems: list[str] = []
    data = parallel.data if isinstance(parallel.data, int) else world_size // parallel.model_parallel_size
    if data < 1 or parallel.model_parallel_size * data != world_size:
        problems.append(
            f"tensor({parallel.tensor}) × context({parallel.context}) × pipeline({parallel.pipeline}) × "
            f"data({parallel.data}) does not make world size {world_size}: " + _world_remedy(config, world_size))
    else:
        config = config.with_changes(parallel={"data": data})
        problems += [*_batch_problems(config, data), *_schedule_problems(config)]
    problems += [*_shard_problems(config, data), *_reproducible_problems(config), *_tensor_problems(config),
                 *_fp8_problems(config),
                 *_pipeline_problems(config), *_sequence_problems(config)]
    found = {"this version cannot do that:": unsupported(config), "this layout cannot work:": problems}
    if any(found.values()):
        raise ConfigError("\n".join(f"{title}\n{listed(lines)}" for title, lines in found.items() if lines))
    return config


def world_size_of(config: Config) -> int:
    """The processes of a job whose layout is resolved."""
    needed = processes_needed(config) if learns_from_own_texts(config) else None
    return needed or config.parallel.world_size


def role_configs(config: Config, world_size: int) -> dict[str, tuple[range, Config]]:
    """Every role's ranks, and the run's configuration as it sees it, by name; the actor is the first.

    Raises:
        ConfigError: a placement is impossible; with every equation that does not hold, one per line.
    """
    asked = roles_asked(config, world_size)
    problems = [*unsupported(config), *overall_problems(config, asked, world_size)]
    found: dict[str, tuple[range, Config]] = {}
    for role in asked:
        try:
            found[role.name] = role.ranks, resolve_layout(as_role(config, role), len(role.ranks))
        except ConfigError as error:
            problems += [f"{role.where}: {line.strip().removeprefix('- ')}" for line in str(error).splitlines()[1:]]
    if problems:
        raise ConfigError(f"this placement cannot work:\n{listed(problems)}")
    return found


def _resolve_roles(config: Config, world_size: int) -> Config:
    """The same for a run with roles: everyone's ranks and layout are written out."""
    layouts = {name: own.parallel for name, (_, own) in role_configs(config, world_size).items()}
    return placed(config, layouts, roles_asked(config, world_size))


def _world_remedy(config: Config, world_size: int) -> str:
    size = config.parallel.model_parallel_size
    if isinstance(config.parallel.data, int):
        return f"start {size * config.parallel.data} processes, or set parallel.data to auto"
    return f"one copy of the model takes {size} processes; start a multiple of {size} (asked: {world_size})"


def _batch_problems(config: Config, data: int) -> Iterator[str]:
    batch = config.batch
    unit = batch.micro * data
    sizes = [(f"batch.ramp's {size} from {tokens:,} tokens on", size) for tokens, size in batch.ramp[:-1]]
    for name, size in (*sizes, (f"batch.global({batch.global_})", batch.global_)):
        if size % unit:
            yield (f"{name} is not batch.micro({batch.micro}) × data({data}) × a whole number of microbatches: make it "
                   f"a multiple of {unit}")


def _schedule_problems(config: Config) -> Iterator[str]:
    parallel, num_microbatches = config.parallel, config.num_microbatches
    actions = parallel.pipeline * parallel.virtual_stages * num_microbatches
    if actions > MOST_ACTIONS:
        yield (f"batch.global({config.batch.global_:,}) is {num_microbatches:,} microbatches for each pipeline; × "
               f"pipeline({parallel.pipeline}) × virtual_stages({parallel.virtual_stages}) that is {actions:,} forward "
               f"passes in one step, and {MOST_ACTIONS:,} is the most: raise batch.micro or parallel.data, or lower "
               "batch.global")


def _shard_problems(config: Config, data: int) -> Iterator[str]:
    parallel = config.parallel
    replicas = data * parallel.context
    if parallel.zero_shard and replicas % parallel.zero_shard:
        yield (f"parallel.zero_shard({parallel.zero_shard}) does not divide data({data}) × context({parallel.context}) "
               f"= {replicas} ranks: 0 shards over all of them")


def _reproducible_problems(config: Config) -> Iterator[str]:
    parallel = config.parallel
    if parallel.reproducible and parallel.zero_shard:
        yield "parallel.reproducible adds gradients in one order over all ranks: set parallel.zero_shard to 0"
    if parallel.reproducible and recipe(parallel.schedule).splits_backward:
        yield (f"parallel.reproducible needs the gradients of one microbatch at a time, and {parallel.schedule} defers "
               "some of them: use 1f1b, interleaved or gpipe")


def _tensor_problems(config: Config) -> Iterator[str]:
    tensor = config.parallel.tensor
    for name in ("num_heads", "num_kv_heads", "ffn_hidden_size"):
        size = getattr(config.model, name)
        if size % tensor and not (name == "num_kv_heads" and tensor % size == 0):
            yield (f"model.{name}({size}) is not divisible by parallel.tensor({tensor})"
                   + (", nor the other way round" if name == "num_kv_heads" else ""))


def _fp8_problems(config: Config) -> Iterator[str]:
    model, tensor, precision = config.model, config.parallel.tensor, config.precision
    if precision.fp8 == "off":
        return
    if not precision.fp8_layers(model.num_layers):
        yield (f"precision.fp8_skip{list(precision.fp8_skip)} leaves none of model.num_layers({model.num_layers}) to "
               f"precision.fp8: {precision.fp8}: skip fewer")
    block, divided = FP8_BLOCK[precision.fp8], f" / tensor({tensor})" if tensor > 1 else ""
    for name, size, parts in (("hidden_size", model.hidden_size, 1), ("ffn_hidden_size", model.ffn_hidden_size, tensor),
                              ("num_heads × head_dim", model.num_heads * model.head_dim, tensor),
                              ("(num_heads + 2 × num_kv_heads) × head_dim",
                               (model.num_heads + 2 * max(model.num_kv_heads, tensor)) * model.head_dim, tensor)):
        step = block if parts > 1 else 16
        if size % parts == 0 and size // parts % step:
            yield (f"model.{name}({size})" + (f"{divided} = {size // parts}" if parts > 1 else "") +
                   f" is not a multiple of {step}, which precision.fp8: {precision.fp8} needs: change it, or set "
                   "precision.fp8 to " + ("off" if step == 16 else "tensorwise or rowwise"))


def _pipeline_problems(config: Config) -> Iterator[str]:
    parallel, chunks = config.parallel, config.parallel.virtual_stages
    if problem := chunk_problem(parallel.schedule, chunks, "parallel.virtual_stages"):
        yield problem
    if isinstance(parallel.recompute_layers, tuple) and len(parallel.recompute_layers) != parallel.pipeline:
        yield (f"parallel.recompute_layers names {len(parallel.recompute_layers)} stages, the pipeline has "
               f"{parallel.pipeline}: give one number per stage, or one for all")
    if config.model.num_layers < parallel.pipeline * chunks:
        yield (f"model.num_layers({config.model.num_layers}) < pipeline({parallel.pipeline}) × "
               f"virtual_stages({chunks}) = {parallel.pipeline * chunks}: every chunk needs a layer")


def _sequence_problems(config: Config) -> Iterator[str]:
    parallel, seq_len = config.parallel, config.data.seq_len
    if parallel.context > 1 and seq_len % (2 * parallel.context):
        yield (f"data.seq_len({seq_len}) is not divisible by 2 × context({parallel.context}) = "
               f"{2 * parallel.context} (each rank takes one early and one late piece)")
    elif parallel.sequence and (seq_len // parallel.context) % parallel.tensor:
        part = f"data.seq_len({seq_len})" + (f" / context({parallel.context})" if parallel.context > 1 else "")
        yield f"{part} is not divisible by tensor({parallel.tensor}): change it, or set parallel.sequence to false"
