"""The memory of every pipeline stage: what stays, and the worst moment of a step.

    parameters, gradients, optimizer    between steps (`engine.plan.state`)
    activations                         what forward passes keep for their backward passes, at the worst moment
    workspace                           what comes and goes around them then: a kernel's results, gathered weights and
                                        gradient buckets on their way (ZeRO 2 and 3), messages between stages

The worst moment is found by walking the stage's own program (`engine.schedules`): a forward pass adds what its chunk
keeps, a backward pass takes it away again, layer by layer, and each layer has peaks of its own (`engine.plan.layer`).
With a split backward pass (B, W) what the weight gradients need stays from B to W.

Not in it is what a device's allocator and libraries take besides: `MARGIN` of the total, and `CONTEXT`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod

from engine.config import Config
from engine.plan.layer import FP32, LayerBytes, Sizes, embedding_bytes, head_bytes, layer_bytes
from engine.plan.state import StageState, StateBytes, Unit, dealt_layers, stage_state
from engine.schedules.action import Action, Kind
from engine.schedules.lowering import hoist_receives, lower
from engine.schedules.program import Program
from engine.schedules.table import build_schedule, recipe

# Of what PyTorch's caching allocator reserves, this share is in no tensor: rounding to 512 bytes and 2 MiB, and holes.
MARGIN = 0.03
CONTEXT = 1.2 * 2**30                      # a CUDA context, cuBLAS and NCCL: what a process takes before any tensor


@dataclass(frozen=True)
class StageMemory:
    """Bytes on a rank of one stage.

    Attributes:
        terms: what activations and workspace are made of at the worst moment, by name.
        when: the action in which that moment is.
    """

    state: StateBytes
    activations: float
    workspace: float
    terms: dict[str, float] = field(compare=False)
    when: str = ""

    @property
    def total(self) -> float:
        """Bytes of tensors."""
        return self.state.total + self.activations + self.workspace

    @property
    def needed(self) -> float:
        """Bytes of a GPU's memory, with margin and context."""
        return self.total * (1 + MARGIN) + CONTEXT

    @property
    def largest(self) -> tuple[str, float]:
        """The largest single term and its bytes."""
        everything = {"parameters": self.state.parameters, "gradients": self.state.gradients,
                      "optimizer state": self.state.optimizer, "casts of weights": self.state.casts} | self.terms
        return max(everything.items(), key=lambda item: item[1])


def stage_memory(config: Config, stage: int, *, on_gpu: bool = True, even: bool = False) -> StageMemory:
    """Of stage `stage` of a resolved configuration; `even` as of `dealt_layers`."""
    return _Walk(config, stage_state(config, stage, even=even), stage, Sizes.of(config, on_gpu), even).memory()


def all_stages(config: Config, *, on_gpu: bool = True, even: bool = False) -> list[StageMemory]:
    """One for each pipeline stage."""
    return [stage_memory(config, stage, on_gpu=on_gpu, even=even) for stage in range(config.parallel.pipeline)]


@dataclass(frozen=True)
class _Moment:
    """Bytes of one instant: kept activations, and what is there besides them."""

    kept: float
    passing: float
    terms: dict[str, float]

    @property
    def total(self) -> float:
        return self.kept + self.passing


class _Chunk:
    """One chunk's passes, unit by unit."""

    def __init__(self, walk: _Walk, number: int) -> None:
        self.units = [unit for unit in walk.state.units if unit.chunk == number]
        recomputed = walk.recomputed[number]
        layers = iter(recomputed)
        self.bytes = [walk.bytes_of(unit, next(layers) if unit.what == "layer" else "none") for unit in self.units]
        self.walk = walk
        angles = walk.sizes.tokens / walk.config.batch.micro * walk.config.model.head_dim * walk.sizes.width
        self.once = {"rotary angles": angles}
        self.kept = sum(sum(each.kept.values()) for each in self.bytes) + sum(self.once.values())

    @cached_property
    def forward(self) -> _Moment:
        """The worst moment of a forward pass; what it keeps in the end is in it."""
        return max(self._forward(), key=lambda moment: moment.total)

    @cached_property
    def backward(self) -> _Moment:
        """The worst moment of a backward pass; what its forward pass kept is in it."""
        return max(self._backward(), key=lambda moment: moment.total)

    def _forward(self) -> Iterator[_Moment]:
        done = dict(self.once)
        for i, each in enumerate(self.bytes):
            around = self.walk.gathered(self.units, i, i + 1, backward=False)
            if self.units[i].what == "head" and self.walk.sizes.ahead:         # its weights' gradient comes already
                around |= self.walk.reducing(self.units, i)
            yield self._moment(done, each.forward.at_peak, around)
            done = _sum(done, each.kept)

    def _backward(self) -> Iterator[_Moment]:
        before = [self.once]
        for each in self.bytes:
            before.append(_sum(before[-1], each.kept))
        over: dict[str, float] = {}
        for i in reversed(range(len(self.bytes))):
            around = self.walk.gathered(self.units, i, i - 1, backward=True) | self.walk.reducing(self.units, i)
            yield self._moment(_sum(before[i], over), self.bytes[i].backward.at_peak, around)
            over = _sum(over, self.bytes[i].left)

    def _moment(self, others: dict[str, float], now: dict[str, float], around: dict[str, float]) -> _Moment:
        kept = sum(others.values())
        return _Moment(kept, sum(now.values()) + sum(around.values()), _sum(_sum(others, now), around))

    @cached_property
    def until_weights(self) -> float:
        """What B leaves for W."""
        return sum(sum(each.left.values()) for each in self.bytes)


class _Walk:
    """A stage's program with a counter."""

    def __init__(self, config: Config, state: StageState, stage: int, sizes: Sizes, even: bool) -> None:
        self.config, self.state, self.stage, self.sizes = config, state, stage, sizes
        split = recipe(config.parallel.schedule).splits_backward
        kinds: set[str] = {"none", config.parallel.recompute}
        self.layers = {kind: layer_bytes(sizes, kind, split=split) for kind in kinds}
        self.ends = {"embedding": embedding_bytes(sizes), "head": head_bytes(sizes)}
        placement, deal = dealt_layers(config, even)
        self.num_chunks = len(placement)
        mine = [chunk for chunk, owner in enumerate(placement) if owner == stage]
        limit = config.parallel.recompute_layers
        left = limit[stage] if isinstance(limit, tuple) else limit
        left = config.model.num_layers if left is None else left
        self.recomputed: dict[int, list[str]] = {}
        for chunk in mine:
            count = min(left, len(deal[chunk]))
            left -= count
            self.recomputed[chunk] = [*[config.parallel.recompute] * count, *["none"] * (len(deal[chunk]) - count)]
        self.chunks = {chunk: _Chunk(self, chunk) for chunk in mine}

    def bytes_of(self, unit: Unit, recompute: str) -> LayerBytes:
        return self.layers[recompute] if unit.what == "layer" else self.ends[unit.what]

    def memory(self) -> StageMemory:
        """Walks the program: what every action adds to and takes from what is held between actions."""
        mail = _Mail(self)
        held = waiting = 0.0
        worst, when, at_worst, others, messages = -1.0, "", _Moment(0, 0, {}), 0.0, 0.0
        for action in stage_program(*self._schedule(), self.stage):
            mail.before(action)
            if action.kind in (Kind.F, Kind.B, Kind.BW):
                chunk = self.chunks[action.chunk]
                forward = action.kind is Kind.F
                moment = chunk.forward if forward else chunk.backward
                besides = held + waiting - (0 if forward else chunk.kept)
                if besides + mail.held + moment.total > worst:
                    worst, when, at_worst = besides + mail.held + moment.total, str(action), moment
                    others, messages = besides, mail.held
                held += chunk.kept if forward else -chunk.kept
                waiting += chunk.until_weights if action.kind is Kind.B else 0
            elif action.kind is Kind.W:
                waiting -= self.chunks[action.chunk].until_weights
            mail.after(action)
        terms = at_worst.terms | {"other microbatches": others, "messages": messages}
        return StageMemory(self.state.bytes, others + at_worst.kept, at_worst.passing + messages,
                           {name: size for name, size in terms.items() if size}, when)

    def _schedule(self) -> tuple[str, int, int, int]:
        """With no more microbatches than it takes for the numbers in flight to come round."""
        parallel = self.config.parallel
        enough = 2 * parallel.pipeline * (1 + parallel.virtual_stages)
        microbatches = self.config.num_microbatches
        few = microbatches if parallel.schedule == "gpipe" else min(microbatches, enough)
        return parallel.schedule, parallel.pipeline, few, parallel.virtual_stages

    def gathered(self, units: list[Unit], now: int, soon: int, *, backward: bool) -> dict[str, float]:
        """ZeRO 3: the weights of a unit and of the next, whole."""
        if self.config.parallel.zero < 3:
            return {}
        both = [units[i] for i in {now, soon} if 0 <= i < len(units)]
        return {"gathered weights": float(sum(unit.gathered_bytes(self.config, backward=backward) for unit in both))}

    def reducing(self, units: list[Unit], now: int) -> dict[str, float]:
        """Gradient buckets that fill or are on their way: two at a time, besides the one that fills."""
        parallel = self.config.parallel
        ranks, several = parallel.data_size * parallel.context, self.config.num_microbatches > 1
        narrow = 2 if self.config.precision.grad_reduce == "bf16" and ranks > 1 else 0
        per_element = (FP32 if parallel.zero >= 2 else 0) + narrow
        filled, full = sum(_elements(unit) for unit in units[now:]), 0
        seen: list[int] = []
        complete: list[int] = []
        for size in self.state.buckets:
            full += size
            if full - size < filled:
                seen.append(size)
            if several or full <= filled or now == 0:            # those of the microbatch before wait for their turn
                complete.append(size)
        if not per_element or (parallel.zero < 2 and not parallel.reproducible and now > 0 and several and not narrow):
            seen = []
        live = _most_of_three(seen) * per_element
        if parallel.reproducible and ranks > 1:                  # everybody's of this shard, to be added in one order
            live += _most_of_three(complete) * (narrow or FP32) * (1 if parallel.zero else ranks)
        return {"gradient buckets": live} if live else {}


class _Mail:
    """Hidden states and gradients between chunks: from when a buffer is posted, or a result is ready, to their use."""

    def __init__(self, walk: _Walk) -> None:
        self.size, self.last, self.here = walk.sizes.hidden, walk.num_chunks - 1, walk.chunks
        self.arrived = self.outgoing = self.sent = 0

    @property
    def held(self) -> float:
        """Bytes besides what the passes themselves count."""
        return (self.arrived + self.outgoing + self.sent) * self.size

    def before(self, action: Action) -> None:
        self.arrived += action.kind in (Kind.RECV_F, Kind.RECV_B)
        if action.kind is Kind.F and action.chunk > 0:
            self.arrived -= 1                                  # it is the chunk's input now

    def after(self, action: Action) -> None:
        if action.kind in (Kind.SEND_F, Kind.SEND_B):
            self.outgoing, self.sent = self.outgoing - 1, 1    # kept until the next message is sent
            return
        if action.kind in (Kind.B, Kind.BW) and action.chunk < self.last:
            self.arrived -= 1
        to = action.chunk + (1 if action.kind is Kind.F else -1)
        if action.kind in (Kind.F, Kind.B, Kind.BW) and 0 <= to <= self.last:
            if to in self.here:
                self.arrived += 1
            else:
                self.outgoing += 1


@lru_cache(maxsize=256)
def _lowered(schedule: str, stages: int, microbatches: int, chunks: int) -> tuple[Program, ...]:
    return lower(build_schedule(schedule, stages, microbatches, chunks)).programs


def stage_program(schedule: str, stages: int, microbatches: int, chunks: int, stage: int) -> Program:
    """What the executor of a stage is given: a receive is posted before the computation in front of it."""
    return hoist_receives(_lowered(schedule, stages, microbatches, chunks)[stage])


def _most_of_three(sizes: list[int]) -> int:
    """Of buckets in the order in which they are reduced."""
    return sum(sorted(sizes[-4:])[-3:])


def _elements(unit: Unit) -> int:
    return sum(prod(spec.local_shape) for spec in unit.specs)


def _sum(a: dict[str, float], b: dict[str, float]) -> dict[str, float]:
    return {name: a.get(name, 0.0) + b.get(name, 0.0) for name in {**a, **b}}
