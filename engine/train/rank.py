"""One rank of a run, from joining the job to leaving it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from types import MappingProxyType

import torch

from engine.config import Config
from engine.config.objectives import OBJECTIVES
from engine.distributed.arithmetic import arithmetic
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.mesh import Job, Mesh
from engine.distributed.process import joined
from engine.distributed.topology import Topology
from engine.hints import hint
from engine.kernels.table import describe
from engine.metrics.events import about_this_start, append_event
from engine.metrics.phases import Phases
from engine.reliability.watchdog import watched
from engine.reliability.wishes import DONE_FILE
from engine.train.corpora import Corpora
from engine.train.journal import Journal
from engine.train.loop import Trainer
from engine.train.rewinding import GoBack, Plan, go_back
from engine.train.run_folder import CONFIG_FILE, DOCTOR_FILE, locked, writing
from engine.train.running import Running
from engine.writing import write_whole

# From a job that has come together to a run that can go: what listens to its phases is there already.
Begin = Callable[[Job, Phases], Running]


def run_rank(config: Config, topology: Topology, launched: LaunchEnvironment | None, doctor_report: str,
             stop_requested: Callable[[], bool], notes: Sequence[str] = (),
             prepared: Mapping[str, str] = MappingProxyType({})) -> bool:
    """Trains; False when it was stopped by a request, after saving.

    Args:
        topology: of the whole job.
        doctor_report: for the run's folder; rank 0's counts, as do its notes.
        notes: what else a person should know at the start.
        prepared: as `Corpora.open` takes it.

    Raises:
        RequestError: the run's folder cannot be written, or what the configuration asks for cannot be done.
    """
    directory = Path(config.run.dir)
    first = launched is None or launched.rank == 0
    stamped = launched is not None and launched.launcher != "octant"
    with locked(directory) if first else nullcontext(True) as exclusive:
        begin = OBJECTIVES[config.run.objective].begun_by
        start: Begin | None = None if begin is None else resolve_name(begin)(config, stop_requested, stamped)
        corpora = Corpora.open(config, prepared) if start is None else None
        said = [*notes, *([] if exclusive else [f"warning: the file system of {directory} has no locks: see to it that "
                                                "no other run uses it"])]
        with arithmetic(deterministic=config.parallel.reproducible), \
                joined(launched, config.run.device, checked=config.parallel.debug_collectives) as job:
            if corpora is not None:
                return keep_training(config, job.mesh(topology), corpora, stop_requested, stamped, doctor_report, said,
                                     prepared)
            assert start is not None
            return _train(config, job.mesh(topology), partial(start, job), stamped, doctor_report, said)


def keep_training(config: Config, mesh: Mesh, corpora: Corpora, stop_requested: Callable[[], bool],
                  stamped: bool = False, doctor_report: str = "", notes: Sequence[str] = (),
                  prepared: Mapping[str, str] = MappingProxyType({})) -> bool:
    """Trains to the end, however often the run goes back before an anomaly; arguments and result as of `run_rank`.

    Args:
        stamped: lines carry the time of day.
    """
    while True:
        start = partial(Trainer.start, config, mesh, corpora, stop_requested, stamped)
        try:
            return _train(config, mesh, start, stamped, doctor_report, notes)
        except GoBack as back:
            plan = back.plan                                 # and no more: the traceback holds the whole model
        config, notes = go_back(config, plan, mesh.world.group), _say_back(plan)
        corpora = Corpora.open(config, prepared)


def _train(config: Config, mesh: Mesh, start: Callable[[Phases], Running], stamped: bool, doctor_report: str,
           notes: Sequence[str]) -> bool:
    """From a checkpoint, or the beginning, to the end."""
    directory = Path(config.run.dir)
    phases = Phases(mesh.device)
    with watched(config.reliability.watchdog, phases, mesh.rank, mesh.world.size, directory):
        return _run(start(phases), directory, stamped, doctor_report, notes)


def _run(trainer: Running, directory: Path, stamped: bool, doctor_report: str, notes: Sequence[str]) -> bool:
    config, mesh = trainer.config, trainer.mesh
    try:
        if mesh.rank == 0:
            _write_about(trainer, directory, doctor_report)
            for note in (_about(mesh.device, config), *notes):
                trainer.journal.note(note)
        elif not stamped:
            _sign(mesh, "begins")
        finished = trainer.run()
        if mesh.rank == 0:
            if finished:
                with writing(directory):
                    write_whole(directory / DONE_FILE, f"{trainer.state.step}\n")
            trainer.journal.incident("end", trainer.state.step, {"finished": finished, "goodput": trainer.account()})
            trainer.journal.note(trainer.tools.goodput.text())
            _say_goodbye(trainer.journal, config, finished)
        elif not stamped:
            _sign(mesh, f"ends at step {trainer.state.step}")
    finally:
        trainer.close()
    return finished


def _write_about(trainer: Running, directory: Path, doctor_report: str) -> None:
    """What a run's folder says of this start."""
    with writing(directory):
        report = [doctor_report, "\nOperations of this run", *describe(trainer.operations)]
        write_whole(directory / DOCTOR_FILE, "\n".join(report) + "\n")           # first: the sign of a run
        write_whole(directory / CONFIG_FILE, trainer.config.dump())
        if trainer.state.step < trainer.config.steps:
            (directory / DONE_FILE).unlink(missing_ok=True)
        append_event(directory, "start", trainer.state.step,
                     about_this_start(trainer.mesh.world.size, device_name(trainer.mesh.device)))


def _say_back(plan: Plan) -> list[str]:
    return [f"went back from step {plan.from_step} to {plan.to_step} ({plan.why}); the data of steps {plan.first + 1} "
            f"to {plan.stop} are left out from now on"]


def _about(device: torch.device, config: Config) -> str:
    """What is known once the job has come together."""
    return f"training on {device_name(device)}, {config.precision.compute}"


def device_name(device: torch.device) -> str:
    """`cuda (NVIDIA A100-SXM4-80GB)`, `cpu (8 threads)`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type} ({name})"


def _sign(mesh: Mesh, what: str) -> None:
    """A line in the log of a rank that has nothing to tell otherwise."""
    where = ", ".join(f"{axis} {index}" for axis, index in mesh.topology.coordinates(mesh.rank).items())
    print(f"{datetime.now():%Y-%m-%d %H:%M:%S} rank {mesh.rank} ({where}) on {mesh.device} {what}", flush=True)


def _say_goodbye(journal: Journal, config: Config, finished: bool) -> None:
    directory, resume = config.run.dir, config.checkpoint.resume
    if finished:
        if config.model.head == "score":
            journal.note(hint("score", directory, "--data", (*config.data.valid, *config.data.train)[0].path))
        elif config.data.tokenizer is not None:
            journal.note(hint("generate", directory, "--prompt", "The"))
        journal.note(hint("report", directory))
    else:
        how = "the same command" if resume == "auto" else f"checkpoint.resume=auto (it is {resume})"
        journal.note(f"stopped on request at a saved step; {how} goes on from there ({directory})")
