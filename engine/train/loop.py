"""The loop.

    trainer = Trainer.start(config, mesh, corpora, stop_requested)    # model, and the checkpoint to go on from
    trainer.run()                                                     # steps, evaluation, checkpoints, metrics

A step is: load this rank's microbatches; run the schedule; sum loss and gradient norm over everybody; clip and update;
publish the new weights.  The host reads nothing of it back from the device except on steps that are logged; a request
to stop is read one step late, when its value has long arrived.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.write import CheckpointWriter, SaveReport
from engine.config import Config
from engine.distributed.mesh import Mesh
from engine.errors import WorkerError
from engine.metrics.console import Console
from engine.metrics.peaks import peak_tflops
from engine.metrics.sinks import Sink, open_sinks
from engine.metrics.throughput import throughput
from engine.model.flops import flops_per_token
from engine.optim.adamw import AdamW
from engine.optim.gradients import StepSums, clip_divisor, sum_over_world
from engine.optim.schedule import learning_rate
from engine.parallel.parallelize import parallelize
from engine.parallel.replicas import check_replicas
from engine.train.batches import load_step
from engine.train.corpora import Corpora
from engine.train.late_flag import LateFlag
from engine.train.objectives import objective_of
from engine.train.start import take_over
from engine.train.state import TrainState


@dataclass
class Trainer:
    """A run in progress on this rank.

    Attributes:
        console, sinks: where progress goes; on rank 0 only.
        stop_requested: asked in every step; when any rank says yes, all save and stop.
    """

    config: Config
    mesh: Mesh
    corpora: Corpora
    state: TrainState
    writer: CheckpointWriter
    console: Console | None
    sinks: list[Sink]
    stop_requested: Callable[[], bool]
    saved_step: int = -1

    @staticmethod
    def start(config: Config, mesh: Mesh, corpora: Corpora, stop_requested: Callable[[], bool]) -> Trainer:
        """Builds this rank's part of the run and takes over the checkpoint it goes on from, if there is one.

        Raises:
            CheckpointError: a checkpoint was asked for, or is there, and none can be used.
            ConfigError: `run.objective` cannot be trained.
        """
        model = parallelize(config, mesh, objective=objective_of(config))
        model.initialise(config.run.seed)
        state = TrainState(model, AdamW(model.buckets, config.optim, model.operations))
        directory = Path(config.run.dir)
        group = dist.group.WORLD if mesh.world.size > 1 else None
        notes = take_over(state, config, corpora, group)
        writer = CheckpointWriter(directory / CHECKPOINTS, config.checkpoint.keep or None, config.checkpoint.async_,
                                  group)
        console, sinks = None, []
        if mesh.rank == 0:
            sinks = open_sinks(config.log, directory, state.step)
            console = Console(config.steps, first_step=state.step)
            for note in notes:
                console.note(note)
        return Trainer(config, mesh, corpora, state, writer, console, sinks, stop_requested,
                       saved_step=state.step if state.step else -1)

    def run(self) -> bool:
        """Trains to `config.steps`; False when it stopped earlier because it was asked to.

        The state at the end, whichever it is, has been saved.

        Raises:
            WorkerError: on rank 0: it could not be saved.
        """
        if self.state.step >= self.config.steps and self.console is not None:
            self.console.note(f"nothing to do: step {self.state.step} of {self.config.steps} is done; raise `steps`")
        every, stopped, asked = self.config.checkpoint.every, False, LateFlag(self.mesh.device)
        check_every = self.config.parallel.check_replicas_every
        seconds, steps = 0.0, 0                      # since the last logged step, evaluation and saving left out
        while self.state.step < self.config.steps and not stopped:
            start = time.perf_counter()
            lr, divisor, sums = self._step()
            done, steps = self.state.step, steps + 1
            record: dict[str, Any] | None = None
            if done % self.config.log.every == 0 or done == self.config.steps:
                record, stopped = self._record(lr, divisor, sums)
            else:
                stopped = asked.exchange(sums.flag)
            seconds += time.perf_counter() - start
            if record is not None:
                record |= self._speed(seconds / steps)
                seconds, steps = 0.0, 0
            if check_every and done % check_every == 0:
                check_replicas(self.state.model, done)
            evaluate = self.config.eval.every and self.corpora.valid and done % self.config.eval.every == 0
            evaluation = self._evaluate() if evaluate else None
            self._log(record, evaluation)
            if every and done % every == 0 and done < self.config.steps:
                self._save()
            self._report_saves(self.writer.poll())
        if self.saved_step != self.state.step:
            self._save()
        self._report_saves(self.writer.wait(), last=True)
        return self.state.step >= self.config.steps

    def _step(self) -> tuple[float, float | torch.Tensor, StepSums]:
        """One step; returns its learning rate, what its loss was divided by, and the totals on the device."""
        config, state = self.config, self.state
        objective = state.model.objective
        batches = load_step(self.corpora.train, state.consumed_samples, config, self.mesh, objective)
        own = state.model.forward_backward(batches.microbatches, 1 / batches.divisor)
        sums = sum_over_world(own, state.model.buckets, self.mesh, num_sums=len(objective.sums),
                              flag=self.stop_requested(), reproducible=config.parallel.reproducible)
        lr = learning_rate(state.step + 1, config.steps, config.optim)
        found_inf = torch.isfinite(sums.grad_norm).logical_not().float()
        state.optimizer.step(lr, clip_divisor(sums.grad_norm, config.optim.grad_clip), found_inf)
        state.model.publish()
        state.step += 1
        state.consumed_samples += config.batch.global_
        return lr, batches.divisor, sums

    def _record(self, lr: float, divisor: float | torch.Tensor, sums: StepSums) -> tuple[dict[str, Any], bool]:
        """The metrics of the step just done, and whether anybody asked to stop; waits for the device."""
        state, device = self.state, self.mesh.device
        *totals, grad_norm, flag = torch.cat((sums.sums, torch.stack((sums.grad_norm, sums.flag)))).tolist()
        numbers = state.model.objective.numbers(totals, float(divisor))
        record = {"step": state.step, **numbers, "grad_norm": grad_norm, "lr": lr,
                  "tokens": state.consumed_samples * self.config.data.seq_len,
                  "consumed_samples": state.consumed_samples,
                  "memory_bytes": peak_memory_bytes(device),
                  "skipped": state.step - state.optimizer.num_steps()}
        return record, flag > 0

    def _speed(self, step_seconds: float) -> dict[str, Any]:
        """The metrics that follow from the mean duration of the latest steps."""
        config, device = self.config, self.mesh.device
        known = device.type == "cuda" and config.precision.compute == "bf16"        # peaks are those of bf16
        peak = peak_tflops(torch.cuda.get_device_name(device)) if known else None
        speed = throughput(config.batch.global_ * config.data.seq_len, step_seconds,
                           flops_per_token(config.model, config.data.seq_len), self.mesh.world.size, peak)
        return {"step_seconds": step_seconds, **speed.record()}

    def _evaluate(self) -> dict[str, float]:
        """The objective's numbers of `eval.batches` global batches of the held-out corpora, always the same ones."""
        model, config = self.state.model, self.config
        totals, divisor = torch.zeros(len(model.objective.sums), device=self.mesh.device), 0.0
        assert self.corpora.valid is not None
        for batch in range(config.eval.batches):
            batches = load_step(self.corpora.valid, batch * config.batch.global_, config, self.mesh, model.objective)
            totals += sum_over_world(model.evaluate(batches.microbatches), [], self.mesh, num_sums=len(totals),
                                     reproducible=config.parallel.reproducible).sums
            divisor += float(batches.divisor)
        numbers = model.objective.numbers(totals.tolist(), divisor)
        return {f"valid_{name}": value for name, value in numbers.items()}

    def _log(self, record: dict[str, Any] | None, evaluation: dict[str, float] | None) -> None:
        if self.console is None or (record is None and evaluation is None):
            return
        if record is not None:
            self.console.step(record)
        if evaluation is not None:
            self.console.evaluation(self.state.step, evaluation["valid_loss"])
        row = (record or {"step": self.state.step}) | (evaluation or {})
        for sink in self.sinks:
            try:
                sink.log(row)
            except OSError as error:                 # a full disk: what it spoils is the log, not the training
                self.console.warning(f"metrics of step {self.state.step} could not be written: {error}")

    def _save(self) -> None:
        metadata = self.state.metadata(self.config, self.corpora.fingerprint())
        self.writer.save(self.state.step, self.state.pieces(), metadata)
        self.saved_step = self.state.step

    def _report_saves(self, reports: list[SaveReport], last: bool = False) -> None:
        if self.console is None:
            return
        for report in reports:
            if report.warning is not None:
                self.console.warning(f"step {report.step} was saved, but {report.warning}")
            if report.error is None:
                self.console.checkpoint(report.step, report.path, report.stalled_seconds)
            elif last and report.step == self.state.step:
                raise WorkerError(f"step {report.step}, the last one, was not saved: {report.error}")
            else:
                self.console.warning(f"step {report.step} was not saved: {report.error}")

    def close(self) -> None:
        """Closes what writes to files."""
        if self.console is not None:
            self.console.close()
        for sink in self.sinks:
            with contextlib.suppress(OSError):       # what a full disk refused has been reported
                sink.close()


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that tensors took on this rank's GPU; on a CPU, that the process took."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
