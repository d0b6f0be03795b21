"""What a job's step takes here: tokens a second, MFU, memory, and time by cause, for any layout on any processes.

The step is the trainer's own with made-up samples (`engine.train.made_up`).  After some steps to warm up, steps are
timed as they are, and the median of what the slowest rank took counts; then a few are watched (`engine.bench.stalls`)
to see what the time goes into.  Shares are those of the rank that computes most, which sets the pace of a pipeline, and
they are told of the timed step.

Memory is the most that tensors took on any rank: what the GPU's allocator counted; on a CPU, where nobody counts, what
torch reports of building the model and its first step.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from engine.bench.harness import cpu_name
from engine.bench.stalls import Stalls
from engine.config import Config
from engine.distributed.agree import gather_json
from engine.distributed.arithmetic import arithmetic
from engine.distributed.mesh import Mesh
from engine.metrics.peaks import peak_tflops
from engine.train.made_up import made_up_trainer, steps_only, take_step

WATCHED = 2                                # steps that are looked into


@dataclass(frozen=True)
class Measured:
    """A layout's step.

    Attributes:
        seconds: of each timed step, on the slowest rank.
        causes: seconds by cause of a step (`engine.bench.stalls.CAUSES`); they add up to the median.
        memory_bytes: of tensors, at most, on the fullest rank.
    """

    seconds: tuple[float, ...]
    causes: dict[str, float]
    memory_bytes: int

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)


def measure(config: Config, mesh: Mesh, steps: int, warmup: int,
            say: Callable[[str], None] = lambda line: None) -> Measured:
    """Takes steps of the resolved `config`; every rank of the mesh calls this.

    Args:
        warmup: steps before the first that counts, at least one.
        say: told what is going on, on the first rank.
    """
    config, group = steps_only(config, warmup + steps + WATCHED), mesh.world.group
    tell = say if mesh.rank == 0 else lambda line: None
    with tempfile.TemporaryDirectory() as folder, arithmetic(deterministic=config.parallel.reproducible), \
            _most_memory(mesh.device) as peak:
        tell(f"building the model, and {warmup} steps to warm up")
        trainer = made_up_trainer(config, mesh, Path(folder), ahead=True)
        try:
            take_step(trainer)
            memory = peak()
            for _ in range(warmup - 1):
                take_step(trainer)
            trainer.phases.taken()
            tell(f"{steps} steps to be timed")
            for _ in range(steps):
                take_step(trainer)
            each = trainer.phases.taken().each
            stalls = Stalls(mesh, trainer.phases)
            with stalls.watching():
                for _ in range(WATCHED):
                    take_step(trainer)
            causes = stalls.split()
            memory = max(memory, peak())
        finally:
            trainer.close()
    told = gather_json([each, causes, memory], group)
    seconds = tuple(max(step) for step in zip(*(rank[0] for rank in told), strict=True))
    busiest: dict[str, float] = max((rank[1] for rank in told), key=lambda causes: causes["compute"])
    whole = sum(busiest.values())
    return Measured(seconds, {cause: passed / whole * median(seconds) for cause, passed in busiest.items()},
                    max(rank[2] for rank in told))


def about(device: torch.device) -> tuple[str, float | None, int | None]:
    """Name of a device, its dense bf16 peak in TFLOP/s, its memory in bytes; None where it is a CPU or not known."""
    if device.type != "cuda":
        return cpu_name(), None, None
    name = torch.cuda.get_device_name(device)
    return name, peak_tflops(name), torch.cuda.get_device_properties(device).total_memory


@contextmanager
def _most_memory(device: torch.device) -> Iterator[Callable[[], int]]:
    """Yields what tells the most bytes of tensors so far; on a CPU those up to the first time it is asked."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        yield lambda: torch.cuda.max_memory_allocated(device)
        return
    profiler, known = profile(activities=[ProfilerActivity.CPU], profile_memory=True), list[int]()
    with _without_stderr():
        profiler.start()

    def peak() -> int:
        if not known:
            with _without_stderr():
                profiler.stop()
            results = getattr(profiler.profiler, "kineto_results", None)
            reports = sorted((event.start_ns(), event.nbytes()) for event in results.events()
                             if event.name() == "[memory]") if results is not None else []
            known.append(max(accumulate(nbytes for _, nbytes in reports), default=0))
        return known[0]

    try:
        yield peak
    finally:
        peak()


@contextmanager
def _without_stderr() -> Iterator[None]:
    """The profiler's library writes a line there whenever it starts and stops."""
    kept = os.dup(2)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
