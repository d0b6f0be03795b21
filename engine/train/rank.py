"""One rank of a run, from joining the job to leaving it."""

from __future__ import annotations

import signal
from pathlib import Path
from types import FrameType

import torch

from engine.config import Config
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.process import joined_mesh
from engine.distributed.topology import Topology
from engine.metrics.console import Console
from engine.train.corpora import Corpora
from engine.train.loop import Trainer


class StopRequest:
    """Remembers that a signal asked this process to stop; the loop asks after each step."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def __call__(self) -> bool:
        return self._asked


def run_rank(config: Config, topology: Topology, launched: LaunchEnvironment | None, doctor_report: str) -> bool:
    """Trains; False when it was stopped by a request, after saving."""
    stop = StopRequest()
    corpora = Corpora.open(config)
    with joined_mesh(launched, topology, config.run.device) as mesh:
        directory = Path(config.run.dir)
        if mesh.rank == 0:
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "config.yaml").write_text(config.dump(), encoding="utf-8")
            (directory / "doctor.txt").write_text(doctor_report + "\n", encoding="utf-8")
        trainer = Trainer.start(config, mesh, corpora, stop)
        try:
            if trainer.console is not None:
                _introduce(trainer.console, config, corpora, mesh.device)
            finished = trainer.run()
            if trainer.console is not None:
                _say_goodbye(trainer.console, config, finished)
        finally:
            trainer.close()
    return finished


def _introduce(console: Console, config: Config, corpora: Corpora, device: torch.device) -> None:
    """What is about to run, in a few lines."""
    parallel = config.parallel
    console.note(f"{config.parallel.world_size} processes on {device.type}: tensor {parallel.tensor} × pipeline "
                 f"{parallel.pipeline} × context {parallel.context} × data {parallel.data_size}, schedule "
                 f"{parallel.schedule}, ZeRO {parallel.zero}, {config.num_microbatches} microbatches of "
                 f"{config.batch.micro} × {config.data.seq_len} tokens")
    for share in corpora.train.report(config.steps * config.batch.global_):
        console.note(f"corpus {share.name}: {share.source_tokens:,} tokens, {share.share:.1%} of the samples, "
                     f"{share.epochs:.2f} epochs by the last step")


def _say_goodbye(console: Console, config: Config, finished: bool) -> None:
    directory = config.run.dir
    if finished:
        console.note(f'next: octant generate {directory} --prompt "…"   or   octant report {directory}')
    else:
        console.note(f"stopped on request at a saved step; the same command goes on from there ({directory})")
