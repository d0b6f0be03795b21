"""One rank of a run, from joining the job to leaving it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch

from engine.config import Config
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.process import joined_mesh
from engine.distributed.topology import Topology
from engine.kernels.table import describe
from engine.train.corpora import Corpora
from engine.train.journal import Journal
from engine.train.loop import Trainer
from engine.train.run_folder import CONFIG_FILE, DOCTOR_FILE, locked


def run_rank(config: Config, topology: Topology, launched: LaunchEnvironment | None, doctor_report: str,
             stop_requested: Callable[[], bool]) -> bool:
    """Trains; False when it was stopped by a request, after saving."""
    directory = Path(config.run.dir)
    first = launched is None or launched.rank == 0
    with locked(directory) if first else nullcontext(True) as exclusive:
        corpora = Corpora.open(config)
        with joined_mesh(launched, topology, config.run.device,
                     checked=config.parallel.debug_collectives) as mesh:
            trainer = Trainer.start(config, mesh, corpora, stop_requested)
            try:
                if mesh.rank == 0:
                    (directory / CONFIG_FILE).write_text(config.dump(), encoding="utf-8")
                    report = [doctor_report, "\nOperations of this run", *describe(trainer.state.model.operations)]
                    (directory / DOCTOR_FILE).write_text("\n".join(report) + "\n", encoding="utf-8")
                    _introduce(trainer.journal, config, corpora, mesh.device, exclusive)
                finished = trainer.run()
                if mesh.rank == 0:
                    _say_goodbye(trainer.journal, config, finished)
            finally:
                trainer.close()
    return finished


def _introduce(journal: Journal, config: Config, corpora: Corpora, device: torch.device, exclusive: bool) -> None:
    """What is about to run, in a few lines."""
    parallel = config.parallel
    journal.note(f"{config.parallel.world_size} processes on {device.type}: tensor {parallel.tensor} × pipeline "
                 f"{parallel.pipeline} × context {parallel.context} × data {parallel.data_size}, schedule "
                 f"{parallel.schedule}, ZeRO {parallel.zero}, {config.num_microbatches} microbatches of "
                 f"{config.batch.micro} × {config.data.seq_len} tokens")
    for share in corpora.train.report(config.steps * config.batch.global_):
        journal.note(f"corpus {share.name}: {share.source_tokens:,} tokens, {share.share:.1%} of the samples, "
                     f"{share.epochs:.2f} epochs by the last step")
    if not exclusive:
        journal.warning(f"the file system of {config.run.dir} has no locks: see to it that no other run uses it")


def _say_goodbye(journal: Journal, config: Config, finished: bool) -> None:
    directory, resume = config.run.dir, config.checkpoint.resume
    if finished:
        journal.note(f'next: octant generate {directory} --prompt "…"   or   octant report {directory}')
    else:
        how = "the same command" if resume == "auto" else f"checkpoint.resume=auto (it is {resume})"
        journal.note(f"stopped on request at a saved step; {how} goes on from there ({directory})")
