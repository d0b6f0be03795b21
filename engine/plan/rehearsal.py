"""One rank of any job, walked through before the job is queued.

It is the trainer itself: `Trainer` with the rank's own model, optimizer, program and batches, for a few steps.  Its
peers are not there, and its collectives do nothing, which changes neither its shapes nor its memory nor, but for the
waiting, its time.  Samples are made up, so the corpora need not be there either.

    on a GPU, or the CPU    real tensors: the seconds of every phase, and on a GPU the peak that the allocator counted
    on `pretend`            tensors without memory (`engine.plan.pretend`): the peak of their sizes; what would make the
                            host wait for the device, and what mixes devices, is an error with its place in the code

A step has as many microbatches as it takes for the schedule to come round; more of them change nothing but time.
"""

from __future__ import annotations

import linecache
import tempfile
import traceback
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine import __file__ as engine_file
from engine.config import Config
from engine.config.phases import OF_CORPORA
from engine.distributed.arithmetic import arithmetic
from engine.distributed.mesh import Mesh
from engine.distributed.process import pick_device
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.plan.pretend import DEVICE, Allocations, CopiedNumber, install, one_rank, pretending
from engine.train.made_up import made_up_trainer, steps_only, take_step

CODE = Path(engine_file).resolve().parent
OWN = (CODE, CODE.parent / "kernels")
READS = ("DataDependentOutputException", "DynamicOutputShapeException")
MIXES = "FakeTensorDeviceMismatchError"
STEPS = 3


@dataclass(frozen=True)
class Rehearsed:
    """What came of a rank.

    Attributes:
        coordinates: where it is.
        peak_bytes: of tensors, at most; None where nobody counts them (on the CPU).
        step_seconds: of a step without its peers, of as many microbatches as were walked through; None where tensors
            have no memory and nothing is computed.
        phases: seconds of each phase of such a step; where nothing is computed those of the host.
        faults: what went wrong, and where.
    """

    rank: int
    coordinates: dict[str, int]
    microbatches: int
    peak_bytes: int | None = None
    step_seconds: float | None = None
    phases: dict[str, float] = field(default_factory=dict)
    faults: tuple[str, ...] = ()

    def record(self) -> dict[str, Any]:
        """The object of `octant rehearse --json`."""
        return {"rank": self.rank, "coordinates": self.coordinates, "microbatches": self.microbatches,
                "peak_bytes": self.peak_bytes, "step_seconds": self.step_seconds, "phases": self.phases,
                "faults": list(self.faults)}


def rehearsal_of(config: Config) -> Config:
    """The job of the resolved `config` with a short step, and without what lies outside of it."""
    parallel = config.parallel
    enough = min(config.num_microbatches, parallel.pipeline * (2 if parallel.virtual_stages > 1 else 1) + 1)
    return steps_only(config, STEPS).with_changes(
        batch={"global": enough * config.batch.micro * parallel.data_size})


def positions(topology: Topology) -> list[int]:
    """One rank of every pipeline stage and tensor position: the others are copies of these."""
    return [topology.rank(pipeline=stage, tensor=tensor)
            for stage in range(topology.pipeline) for tensor in range(topology.tensor)]


def device_for(wanted: str) -> torch.device:
    """`auto`: a GPU where there is one, else `pretend`.

    Raises:
        RequestError: there is no GPU, or torch has not what `pretend` is made of.
    """
    if wanted == DEVICE or (wanted == "auto" and not torch.cuda.is_available()):
        install()
        return torch.device(DEVICE)
    return pick_device("cuda" if wanted == "auto" else wanted, 0)


def rehearse(config: Config, rank: int, device: torch.device) -> Rehearsed:
    """Rank `rank` of the job of the resolved `config`, for a few steps.

    Raises:
        RequestError: the job has no such rank, or does not fit the device's memory.
    """
    topology = Topology.of(config)
    if not 0 <= rank < topology.world_size:
        raise RequestError(f"there is no rank {rank}: the job has {topology.world_size:,} processes, ranks 0 to "
                           f"{topology.world_size - 1}")
    short = rehearsal_of(config)
    where = topology.coordinates(rank)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        stack.enter_context(arithmetic(deterministic=short.parallel.reproducible))
        mesh = stack.enter_context(one_rank(topology, rank, device))
        counted = None
        if device.type == DEVICE:
            stack.enter_context(pretending())
            counted = stack.enter_context(Allocations().counting())
        try:
            seconds, phases = _walk(short, mesh, Path(folder))
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise RequestError(f"rank {rank} does not fit {device}: {error}") from None
            if (fault := _fault(error)) is None:
                raise
            return Rehearsed(rank, where, short.num_microbatches, faults=(fault,))
        peak = counted.peak if counted is not None else _peak(device)
    return Rehearsed(rank, where, short.num_microbatches, peak, None if counted else seconds, phases)


def _walk(config: Config, mesh: Mesh, folder: Path) -> tuple[float, dict[str, float]]:
    """Builds the rank's trainer and takes its steps; seconds of one, and of its phases."""
    if mesh.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(mesh.device)
    trainer = made_up_trainer(config, mesh, folder)
    try:
        for step in range(1 if mesh.device.type == DEVICE else STEPS):
            if step == 1:
                trainer.phases.taken()                       # the first is not like the others: caches are filled
            take_step(trainer)
        taken = trainer.phases.taken()
    finally:
        trainer.close()
    by_phase = {name: taken.by_phase.get(name, 0.0) / taken.steps for name in OF_CORPORA.in_step}
    return taken.in_steps / taken.steps, by_phase


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def _fault(error: BaseException) -> str | None:
    """What a rehearsal is there to find, with its place in our code; None: something else."""
    kinds = {type(each).__name__ for each in _chain(error)}
    if kinds & set(READS):
        what = "the host reads a value back from the device, and waits for it"
    elif isinstance(error, CopiedNumber):
        what = str(error)
    elif MIXES in kinds or "on different devices" in str(error) or "different devices" in str(error):
        what = f"tensors of different devices meet: {str(error).splitlines()[0]}"
    else:
        return None
    return f"{what}: {_place(error)}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _place(error: BaseException) -> str:
    """The innermost line of ours on the way to the error: `engine/model/mlp.py:41, in forward: x.item()`."""
    frames: Sequence[traceback.FrameSummary] = [
        frame for frame in traceback.extract_tb(error.__traceback__)
        if any(Path(frame.filename).is_relative_to(root) for root in OWN) and
        Path(frame.filename).parent != Path(__file__).parent]
    frames = frames or traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    path = Path(last.filename)
    shown = path.relative_to(CODE.parent) if path.is_relative_to(CODE.parent) else path
    return f"{shown}:{last.lineno}, in {last.name}: {linecache.getline(last.filename, last.lineno or 0).strip()}"
