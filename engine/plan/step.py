"""How long a step takes: what every action costs, composed by the schedule's own simulation.

Chunks differ: the first looks tokens up, the last multiplies with the whole vocabulary, and layers do not always
divide.  So every chunk has its own times of F, B and W, and the slowest stage sets the pace by itself.  Behind the
pipeline come what is left of the gradients' reduction when the last backward pass is over, the update, and the
gathering of the new weights.  Where the time goes is told for the slowest stage; what it does not compute is the
bubble.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

from engine.config import Config
from engine.model.flops import AttentionCount, flops_per_token
from engine.plan.cost import Clock, Group, Pass, UnitCost
from engine.plan.devices import Device
from engine.plan.practice import OCTANT, Practice
from engine.plan.state import StageState, cut_specs, dealt_layers, shards_of, stage_state, width_of
from engine.schedules.action import Action, Kind
from engine.schedules.simulate import Costs, simulate
from engine.schedules.table import build_schedule

CAUSES = ("compute", "recompute", "tensor_comm", "pipeline_comm", "pipeline_bubble", "data_comm", "optimizer")


@dataclass(frozen=True)
class StepTime:
    """A prediction.

    Attributes:
        seconds: of one step.
        breakdown: by cause (`CAUSES`); their sum is `seconds`.
        mfu, mfu_full: with causal attention, and with the whole score matrix.
        bubble: share of the step in which the slowest stage waits for others.
    """

    seconds: float
    breakdown: dict[str, float]
    mfu: float
    mfu_full: float
    tokens_per_second: float

    @property
    def bubble(self) -> float:
        return self.breakdown["pipeline_bubble"] / self.seconds


@dataclass(frozen=True)
class _ChunkCost:
    forward: Pass
    backward: Pass
    weight: Pass

    @property
    def all(self) -> Pass:
        return self.forward + self.backward + self.weight

    def of(self, kind: Kind) -> float:
        return {Kind.F: self.forward.total, Kind.B: self.backward.total, Kind.W: self.weight.total,
                Kind.BW: self.backward.total + self.weight.total}[kind]


def step_time(config: Config, device: Device, practice: Practice = OCTANT, *, roughly: bool = False) -> StepTime:
    """Of a step of the resolved `config` on so many of the device.

    Args:
        roughly: without walking through the schedule: the slowest stage, and a bubble by formula.
    """
    clock, parallel = Clock(config, device, practice), config.parallel
    placement, _ = dealt_layers(config, practice.deals_evenly)
    chunks = _chunk_costs(config, clock)
    work = [0.0] * parallel.pipeline
    for chunk, stage in enumerate(placement):
        work[stage] += chunks[chunk].all.total
    slowest = max(range(parallel.pipeline), key=work.__getitem__)
    mine = [chunk for chunk, owner in enumerate(placement) if owner == slowest]
    near = parallel.tensor * parallel.context * parallel.data_size * 2 <= device.per_node
    hidden = clock.sizes.full / parallel.tensor if practice.scatters else clock.sizes.hidden
    message = clock.message(hidden, near) if parallel.pipeline > 1 else 0.0
    crossing = sum(2 for chunk in mine if chunk > 0 and placement[chunk - 1] != slowest)
    crossing += sum(2 for chunk in mine if chunk + 1 < len(placement) and placement[chunk + 1] != slowest)
    elapsed = _roughly if roughly else _elapsed
    pipeline = elapsed(config, lambda action: chunks[action.chunk].of(action.kind) + _waits(
        action, placement, message, practice), 0.0 if not practice.data_hidden else message)
    pipeline = _sharing(device, pipeline, sum(work) / len(work) * config.num_microbatches)
    pipeline += _informing(config, chunks, placement)
    count = config.num_microbatches
    total = sum((chunks[chunk].all for chunk in mine), Pass()) * count
    if refers_live(config):
        total += sum((chunks[chunk].forward for chunk in mine), Pass()) * count
    waiting = 0.0 if practice.data_hidden else message * crossing / 2 * count
    after, update = _after(config, clock, stage_state(config, 0, even=practice.deals_evenly), chunks[mine[0]])
    if (busy := total.total + waiting) > pipeline:         # of shared cores: the others were waiting meanwhile
        total, waiting = total * (pipeline / busy), waiting * pipeline / busy
    seconds = pipeline + after + update
    breakdown = dict(zip(CAUSES, (total.compute, total.recompute, total.tensor_comm, waiting,
                                  max(pipeline - total.total - waiting, 0.0), after, update), strict=True))
    tokens = config.batch.global_ * config.data.seq_len / seconds
    peak = device.peaks["fp32" if config.precision.compute == "fp32" else "bf16"] * parallel.world_size

    def mfu(attention: AttentionCount) -> float:
        return tokens * flops_per_token(config.model, config.data.seq_len, attention, config.adapter) / peak

    return StepTime(seconds, breakdown, mfu("causal"), mfu("full"), tokens)


def _sharing(device: Device, pipeline: float, work: float) -> float:
    """Where ranks share cores, who waits for a stage leaves its share to the others: all are done when the work of a
    rank on average is, but no sooner than if each had a core."""
    return max(work, pipeline / device.sharing) if device.sharing > 1 else pipeline


def refers_live(config: Config) -> bool:
    """Whether the model without its adapter says in every step what it thinks of the answers."""
    return config.run.objective == "dpo" and config.dpo.reference == "live"


def _informing(config: Config, chunks: list[_ChunkCost], placement: tuple[int, ...]) -> float:
    """Of a live reference: forward passes of all microbatches before the step's own, at the slowest stage's pace."""
    if not refers_live(config):
        return 0.0
    work = [0.0] * config.parallel.pipeline
    for chunk, stage in enumerate(placement):
        work[stage] += chunks[chunk].forward.total
    return config.num_microbatches * max(work) + sum(work) - max(work)


def _chunk_costs(config: Config, clock: Clock) -> list[_ChunkCost]:
    specs = cut_specs(config.model, config.adapter, config.parallel.tensor, config.parallel.sequence)
    plain, again = (clock.layer(specs["layer"], recompute) for recompute in ("none", config.parallel.recompute))
    ends = {"embedding": clock.embedding(), "head": clock.head(specs["head"])}
    placement, deal = dealt_layers(config, clock.practice.deals_evenly)
    limit = config.parallel.recompute_layers
    left = {stage: limit[stage] if isinstance(limit, tuple) else config.model.num_layers if limit is None else limit
            for stage in range(config.parallel.pipeline)}
    costs, known = [], dict[tuple[int, int, bool, bool], _ChunkCost]()
    for chunk, stage in enumerate(placement):
        count = min(left[stage], len(deal[chunk]))
        left[stage] -= count
        key = (count, len(deal[chunk]), chunk == 0, chunk == len(placement) - 1)
        if key not in known:
            here: list[tuple[UnitCost, int]] = [(again, count), (plain, len(deal[chunk]) - count)]
            here += [(ends["embedding"], 1)] * key[2] + [(ends["head"], 1)] * key[3]
            known[key] = _ChunkCost(*(sum((getattr(unit, name) * times for unit, times in here), Pass())
                                      for name in ("forward", "backward", "weight")))
        costs.append(known[key])
    return costs


def _waits(action: Action, placement: tuple[int, ...], message: float, practice: Practice) -> float:
    """Where messages are not sent under the next computation, a rank stands still for the one it takes in."""
    if practice.data_hidden or action.kind is Kind.W:
        return 0.0
    other = action.chunk + (-1 if action.kind is Kind.F else 1)
    return message if 0 <= other < len(placement) and placement[other] != placement[action.chunk] else 0.0


def _elapsed(config: Config, takes: Callable[[Action], float], message: float) -> float:
    """Of the pipeline.  Its middle repeats itself, so that of many microbatches only some are walked through."""
    parallel, count = config.parallel, config.num_microbatches
    stages, chunks = parallel.pipeline, parallel.virtual_stages
    if stages == 1:
        return count * sum(takes(Action(kind, 0, chunk)) for chunk in range(chunks) for kind in (Kind.F, Kind.BW))

    def walked(microbatches: int) -> float:
        schedule = build_schedule(parallel.schedule, stages, microbatches, chunks)
        return simulate(schedule, Costs(communication=message), takes).elapsed

    some = 3 * stages
    if count <= some + stages:
        return walked(count)
    periods, rest = divmod(count - some, stages)
    first = walked(some + rest)
    return first + periods * (walked(some + rest + stages) - first)


def _roughly(config: Config, takes: Callable[[Action], float], message: float) -> float:
    """As `_elapsed`: the pace of the slowest stage, and what of the others' passes a schedule does not hide."""
    parallel, (placement, _) = config.parallel, dealt_layers(config)
    work = [0.0] * parallel.pipeline
    for chunk, stage in enumerate(placement):
        work[stage] += takes(Action(Kind.F, 0, chunk)) + takes(Action(Kind.BW, 0, chunk))
    slowest = max(work)
    hidden = {"zb-h1": 3.0, "zb-h2": 20.0, "zb-v": 10.0}.get(parallel.schedule, float(parallel.virtual_stages))
    fill = (sum(work) - slowest) / hidden + 2 * (parallel.pipeline - 1) * message
    return config.num_microbatches * slowest + fill


def _after(config: Config, clock: Clock, state: StageState, chunk: _ChunkCost) -> tuple[float, float]:
    """Seconds that data parallelism adds, and those of the update, on the first stage."""
    parallel, practice, device = config.parallel, clock.practice, clock.device
    trained = sum(prod(spec.local_shape) for unit in state.units for spec in unit.specs if spec.trainable)
    group = Group.of(parallel.data_size * parallel.context, parallel.tensor, device.per_node)
    gradient = 2 if config.precision.grad_reduce == "bf16" else practice.gradient_bytes
    times = config.num_microbatches if parallel.zero >= 2 or parallel.reproducible else 1
    reduce = clock.collective(trained * gradient, group, 2 if parallel.zero == 0 else 1)
    gather = clock.collective(trained * width_of(config), group) if parallel.zero else 0.0
    forward, backward = (chunk.of(kind) * parallel.virtual_stages for kind in (Kind.F, Kind.BW))
    if parallel.zero >= 3:                 # everything is gathered forward and backward, a unit ahead
        whole, again = (clock.collective(sum(unit.gathered_bytes(config, backward=turn) for unit in state.units), group)
                        for turn in (False, True))
        left = times * (reduce + whole + again)
        if device.overlaps:
            left = max(left - times * (forward + backward), reduce / len(state.units) + whole)
    elif not device.overlaps:
        left = times * reduce + gather
    elif practice.data_hidden:             # the last bucket of the last microbatch has nothing to run under
        left = max(times * (reduce - backward), reduce / max(len(state.buckets), 1)) + gather
    else:
        left = times * reduce + gather
    shard = trained / shards_of(config)
    # gradient, master and moments are read, all but the gradient written, and the weights; the norm reads the gradient
    # once before
    masters = 2 * 4 if config.precision.masters == "fp32" else width_of(config)
    return left, clock.stream(shard * (4 * 6 + masters + width_of(config)), 4)


def with_reached(device: Device, **values: float) -> Device:
    """The device with some of its reached shares replaced: by what was measured, or while fitting."""
    return replace(device, reached=replace(device.reached, **values))
