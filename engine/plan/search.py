"""The best layouts of a job on N of a device.

    every layout that divides       axes, micro batch, schedule and chunks, ZeRO, recompute
    roughly timed, fastest first    a bubble by formula instead of a walk through the schedule
    kept where it fits              memory of the fullest stages (`engine.plan.stages`), until enough do
    timed exactly, and sorted       by the schedule's simulation

Tensor parallelism stays inside a node.  ZeRO 2 and 3 send gradients for every microbatch, so they are tried where there
is no pipeline.  What is faster and does not fit is kept with the reason, and so is what the second lost by.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.config import Config, resolve_layout
from engine.errors import ConfigError, RequestError
from engine.plan.devices import Device
from engine.plan.job import Planned, layout_of
from engine.plan.memory import gib
from engine.plan.stages import CONTEXT, MARGIN, stage_memory
from engine.plan.state import stage_state
from engine.plan.step import step_time

SHOWN = 8                                  # layouts that are timed exactly
MICRO = (1, 2, 4, 8, 16)
LONG = 16_384                              # tokens of a sequence from which context parallelism is tried


@dataclass(frozen=True)
class Excluded:
    """A layout that would have been faster than the best, and why it is none."""

    config: Config
    why: str


@dataclass(frozen=True)
class Found:
    """What a search has come to.

    Attributes:
        best: those that fit, fastest first.
        excluded: some that would have been faster.
        tried: how many layouts there are.
    """

    best: list[Planned]
    excluded: list[Excluded]
    tried: int

    def why_the_second_lost(self) -> str | None:
        """The cause in which it loses most against the best."""
        if len(self.best) < 2:
            return None
        first, second = self.best[0].time, self.best[1].time
        lost = {cause: second.breakdown[cause] - first.breakdown[cause] for cause in first.breakdown}
        cause, seconds = max(lost.items(), key=lambda item: item[1])
        return (f"{second.seconds / first.seconds - 1:.1%} slower: {max(seconds, 0.0):.3g} s more of "
                f"{cause.replace('_', ' ')}")


def search(config: Config, num_devices: int, device: Device, memory: float | None = None) -> Found:
    """The best layouts of `config`, whose own is only asked for what is not searched.

    Args:
        memory: bytes of a device; None: what it has.

    Raises:
        RequestError: no layout divides, or none fits, with the nearest there is.
    """
    room = device.memory if memory is None else memory
    rough: list[tuple[float, int, Config]] = []
    for number, layout in enumerate(layouts(config, num_devices, device)):
        rough.append((step_time(layout, device, roughly=True).seconds, number, layout))
    if not rough:
        raise _none_divides(config, num_devices)
    fits: list[Config] = []
    excluded: list[Excluded] = []
    least: tuple[float, int, Config] | None = None
    for _, _, layout in sorted(rough, key=lambda row: row[:2]):
        need = _needed(layout, room)
        if least is None or (need, layout.batch.micro) < least[:2]:
            least = need, layout.batch.micro, layout
        if need > room:
            excluded.append(Excluded(layout, f"needs {gib(need)} of {gib(room)}"))
        elif _valid(layout, num_devices) is not None:
            fits.append(layout)
        if len(fits) == SHOWN:
            break
    if not fits and least is not None:
        smallest, enough = least[2], _enough(least[2], num_devices, room)
        alone = " for weights, gradients and optimizer state alone" * (_state(smallest) > room)
        more = "more devices" if enough is None else f"more devices ({enough:,} would do, with ZeRO 3)"
        raise RequestError(f"nothing fits {num_devices:,} × {device.name}: of {len(rough):,} layouts the smallest "
                           f"needs {gib(least[0])} of {gib(room)}{alone} ({words(smallest)}): use {more}, larger ones, "
                           "or train adapters (adapter.rank)")
    planned = sorted((Planned(layout, device) for layout in fits), key=lambda job: job.time.seconds)
    return Found(planned, excluded[:SHOWN], len(rough))


def at_half_the_memory(config: Config, num_devices: int, device: Device) -> Planned | None:
    """The best layout if devices had half of what they have; None: nothing fits."""
    try:
        return search(config, num_devices, device, device.memory / 2).best[0]
    except RequestError:
        return None


def layouts(config: Config, num_devices: int, device: Device) -> Iterator[Config]:
    """Every layout that divides, unresolved rules aside."""
    model = config.model
    tensors = [t for t in _divisors(min(device.per_node, num_devices)) if num_devices % t == 0
               and model.num_heads % t == model.ffn_hidden_size % t == 0
               and max(model.num_kv_heads, t) % min(model.num_kv_heads, t) == 0]
    contexts = [c for c in (1, 2, 4, 8, 16) if c == 1 or config.data.seq_len // c >= LONG // 4]
    for tensor in tensors:
        for context in contexts if config.data.seq_len >= LONG else [1]:
            for pipeline in _divisors(num_devices // tensor // context):
                if num_devices % (tensor * context) or pipeline > model.num_layers:
                    continue
                data = num_devices // (tensor * context * pipeline)
                yield from _with_rest(config, tensor, context, pipeline, data)


def _with_rest(config: Config, tensor: int, context: int, pipeline: int, data: int) -> Iterator[Config]:
    """A division of the devices with every schedule, micro batch, ZeRO level and recomputation."""
    layers = config.model.num_layers
    schedules = [("1f1b", 1)]
    if pipeline > 1:
        schedules += [("interleaved", v) for v in (2, 3, 4, 5, 6, 8, 10) if layers % (pipeline * v) == 0]
        schedules += [("zb-h1", 1)] + [("zb-v", 2)] * (layers >= 2 * pipeline)
    levels = [1] if data * context > 1 else [0]
    levels += [2, 3] if pipeline == 1 and data * context > 1 else []
    for micro in MICRO:
        if config.batch.global_ % (micro * data):
            continue
        batch = config.batch.model_copy(update={"micro": micro})
        for schedule, chunks in schedules:
            for zero in levels:
                for recompute in ("none", "selective", "full"):
                    parallel = config.parallel.model_copy(update={
                        "tensor": tensor, "context": context, "pipeline": pipeline, "data": data, "zero": zero,
                        "schedule": schedule, "virtual_stages": chunks, "recompute": recompute,
                        "recompute_layers": None, "zero_shard": 0})
                    yield config.model_copy(update={"parallel": parallel, "batch": batch})


def _needed(layout: Config, room: float) -> float:
    """Bytes of the fullest of the first and the last stage; of the state alone where that is too much already."""
    if (state := _state(layout)) > room:
        return state
    return max(stage_memory(layout, stage).needed for stage in _ends(layout))


def _state(layout: Config) -> float:
    """Bytes of a device for what stays between steps alone."""
    return max(stage_state(layout, stage).bytes.total for stage in _ends(layout)) * (1 + MARGIN) + CONTEXT


def _ends(layout: Config) -> list[int]:
    return sorted({0, layout.parallel.pipeline - 1})


def _enough(layout: Config, num_devices: int, room: float) -> int | None:
    """So many times as many devices, with more copies of the model, ZeRO 3 and all recomputed, fit; None: none do."""
    parallel, copies = layout.parallel, num_devices // (layout.parallel.tensor * layout.parallel.context)
    for factor in (2**power for power in range(1, 13)):
        if layout.batch.global_ % (copies * factor):
            return None
        divided = parallel.model_copy(update={"pipeline": 1, "schedule": "1f1b", "virtual_stages": 1, "zero": 3,
                                              "data": copies * factor, "recompute": "full"})
        larger = layout.model_copy(update={
            "parallel": divided, "batch": layout.batch.model_copy(update={"micro": 1})})
        if _needed(larger, room) <= room:
            return num_devices * factor
    return None


def _valid(layout: Config, num_devices: int) -> Config | None:
    """The layout where it breaks no rule of `engine.config.layout`."""
    try:
        return resolve_layout(layout, num_devices)
    except ConfigError:
        return None


def _none_divides(config: Config, num_devices: int) -> RequestError:
    """Nothing divides the batch: the nearest numbers of devices that would."""
    near = [n for n in range(num_devices - 1, 0, -1) if config.batch.global_ % n == 0][:1]
    near += [n for n in range(num_devices + 1, 2 * num_devices + 1) if config.batch.global_ % n == 0][:1]
    return RequestError(f"no layout of {num_devices:,} devices divides batch.global({config.batch.global_:,}) into "
                        f"whole microbatches and the {config.model.num_heads} heads of the model: the nearest numbers "
                        f"of devices that do are {' and '.join(f'{n:,}' for n in near)}")


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def words(layout: Config) -> str:
    """`tensor=8 pipeline=4 data=64 micro=1 interleaved×2 zero=1 recompute=none`."""
    parallel = layout.parallel
    axes = [f"{name}={getattr(parallel, name)}" for name in ("tensor", "context", "pipeline", "data")
            if getattr(parallel, name) > 1]
    chunks = f"×{parallel.virtual_stages}" if parallel.virtual_stages > 1 else ""
    schedule = [f"{parallel.schedule}{chunks}"] * (parallel.pipeline > 1)
    return " ".join([*axes, f"micro={layout.batch.micro}", *schedule, f"zero={parallel.zero}",
                     f"recompute={parallel.recompute}"])


def record(found: Found, half: Planned | None) -> dict[str, Any]:
    """The object of `octant plan --search --json`."""
    return {"candidates": [job.record() for job in found.best], "tried": found.tried,
            "excluded": [{"layout": layout_of(each.config), "why": each.why}
                         for each in found.excluded],
            "second_lost": found.why_the_second_lost(), "half_memory": None if half is None else half.record()}
