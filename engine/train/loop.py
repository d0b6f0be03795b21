"""The loop.

    trainer = Trainer.start(config, mesh, corpora, stop_requested)    # model, and the checkpoint to go on from
    trainer.run()                                                     # steps, and whatever is due after each

A step is: load this rank's microbatches; run the schedule; sum loss and gradient norm over everybody; clip and update;
publish the new weights; hear what became of it.  The host reads nothing of it back from the device except on steps that
are logged; a request to stop is read one step late, when its value has long arrived (`engine.train.tally`).

What else there is to do, and when the run is saved and ends, is the same for every run (`engine.train.running`).  Every
part of a step runs as a phase with a name (`engine.metrics.phases`).

A step that cannot be taken, because its gradient is not finite or because not one label counts in it, is *skipped*: it
uses up its samples and changes nothing else; so is one whose gradient is larger than `reliability.max_grad_norm`, and a
spike, where the configuration says so (`engine.reliability.spikes`).  All ranks see the same all-reduced numbers, so
all skip, and after `reliability.max_skips` in a row all go back (`GoBack`), or give up.  A gradient that fp16 could not
hold, for which the loss is scaled less from then on (`engine.optim.loss_scale`), does not count there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NoReturn

import torch

from engine.align.reward import MEAN, STD
from engine.checkpoint.best import BestWeights, keeps_best
from engine.checkpoint.metadata import SCALE
from engine.config import Config
from engine.config.phases import OF_CORPORA
from engine.distributed.mesh import Mesh
from engine.errors import DataError, WorkerError
from engine.kernels.table import Operations
from engine.metrics.peaks import peak_tflops
from engine.metrics.phases import Phases, Taken
from engine.metrics.throughput import throughput
from engine.model.flops import flops_per_token
from engine.optim.gradients import clip_divisor, sum_over_world, unusable
from engine.optim.loss_scale import LOSS_SCALE, LossScale
from engine.optim.schedule import LearningRates
from engine.parallel.parallelize import ParallelModel
from engine.reliability.spikes import SPIKES, SpikeMonitor
from engine.train.batches import Loader, noisy
from engine.train.corpora import Corpora
from engine.train.evaluation import evaluate
from engine.train.hooks import Hook
from engine.train.journal import peak_memory_bytes
from engine.train.objectives import objective_of
from engine.train.reference import informed, passes, with_reference
from engine.train.rewinding import GoBack, plan_rewind
from engine.train.role import Role, RoleState
from engine.train.running import Running, Tools
from engine.train.start import Kept, take_over
from engine.train.state import TrainState
from engine.train.tally import UNLOGGED, Line, Tally, Verdict


def kept(tally: Tally, spikes: SpikeMonitor, loss_scale: LossScale | None) -> dict[str, Kept]:
    """What a run keeps on the device beside its weights, by where a checkpoint's metadata have it."""
    return {UNLOGGED: tally, SPIKES: spikes, **({} if loss_scale is None else {LOSS_SCALE: loss_scale})}


@dataclass(kw_only=True)
class Trainer(Running):
    """A run that learns from a corpus.

    Attributes:
        tasks: asks the questions of `eval.tasks`.
        best: keeps the weights of the lowest held-out loss.
        loss_scale: of fp16; None: the loss is differentiated as it is.
        spiked: the step of a spike that the run is to go back for.
        logged_samples: how many were consumed when the last line was logged.
        places: inputs computed since the line before the last.
    """

    corpora: Corpora
    loader: Loader
    tally: Tally
    spikes: SpikeMonitor
    loss_scale: LossScale | None
    learning_rates: LearningRates
    tasks: Callable[[ParallelModel], dict[str, float]] | None = None
    best: BestWeights | None = None
    evaluated: tuple[int, dict[str, float]] = (-1, {})           # the latest evaluation: its step, its numbers
    spiked: int | None = None
    logged_samples: int = 0
    places: float = 0.0

    def __post_init__(self) -> None:
        config = self.config
        self.hooks = (
            Hook("check_replicas", self._compare_replicas, every=config.parallel.check_replicas_every),
            Hook("evaluate", self._evaluate, every=config.eval.every if self.corpora.valid else 0,
                 when=lambda step: self._is_last(step) and self._measures_scores()),
            Hook("evaluate", self._ask, every=self._tasks_every()),
            Hook("log", self._log, when=lambda _: bool(self.row)),
            Hook("anomaly", self._go_back, when=lambda _: self._anomaly() is not None),
            *self._saving_hooks(),
        )

    @staticmethod
    def start(config: Config, mesh: Mesh, corpora: Corpora, stop_requested: Callable[[], bool],
              stamped: bool = False, phases: Phases | None = None) -> Trainer:
        """Builds this rank's part of the run and takes over the checkpoint it goes on from, if there is one.

        Args:
            stamped: lines carry the time of day.
            phases: of this run, where somebody listens to them already.

        Raises:
            RequestError: the run's folder cannot be written, or a place for metrics cannot be used.
            CheckpointError: a checkpoint was asked for, or is there, and none can be used.
            ConfigError: `run.objective` cannot be trained.
        """
        phases, directory = phases or Phases(mesh.device), Path(config.run.dir)
        state = TrainState((RoleState.on(mesh, Role.of(config, objective_of(config)), config),))
        model, group = state.model, mesh.world.group
        tally = Tally(len(model.objective.sums), mesh.device)
        spikes = SpikeMonitor(config.reliability.spike, mesh.device)
        loss_scale = LossScale.of(config, mesh.device)
        said: list[str] = []
        corpora = with_reference(state, config, corpora, group, said.append)
        notes = said + take_over(state, kept(tally, spikes, loss_scale), config, corpora, group)
        tally.step = state.step
        state.end_ids = tuple(sorted({*state.end_ids, *corpora.end_ids}))
        tools = Tools.of(config, mesh, state.step, model.buckets, phases, stamped, notes)
        drops = config.adapter is not None and config.adapter.dropout > 0
        samples = noisy(corpora.train.sample, config.run.seed) if drops else corpora.train.sample
        loader = Loader(samples, config, mesh, model.objective, uses=len(model.chunks) * passes(model),
                        ahead=True, sizes=config.ramp)
        return Trainer(config=config, mesh=mesh, corpora=corpora, state=state, tools=tools, phases=phases,
                       loader=loader, stop_requested=stop_requested, tally=tally, spikes=spikes, loss_scale=loss_scale,
                       learning_rates=LearningRates.of(config),
                       tasks=resolve_name("engine.generate.tasks:Exam").of(config) if config.eval.tasks else None,
                       best=BestWeights(directory, group) if keeps_best(config) and corpora.valid else None,
                       saved_step=state.step if state.step else -1, logged_samples=state.consumed_samples)

    @property
    def operations(self) -> Operations:
        return self.state.model.operations

    def _step(self) -> None:
        """One step, and what the host hears of it."""
        config, state, model, phase = self.config, self.state, self.state.model, self.phases
        with phase("load"):
            batches = self.loader.step(state.consumed_samples)
        divisor = batches.divisor
        scale = 1 / (divisor if isinstance(divisor, int) else divisor.clamp(min=1))
        scaler, differentiated = self.loss_scale, scale
        if scaler is not None:
            differentiated = scale * scaler.value
        with phase("forward_backward"):
            own = model.accumulate(informed(model, batches.microbatches), differentiated)
        with phase("reduce"):
            model.finish_reduction()
            sums = sum_over_world(own, model.buckets, self.mesh, num_sums=len(model.objective.sums),
                                  flag=self._flag(), reproducible=config.parallel.reproducible)
            sums = sums if scaler is None else scaler.unscaled(sums)
        with phase("update"):
            lr = self.learning_rates(state.step + 1, state.consumed_samples + batches.num_samples)
            skipped = unusable(sums.grad_norm, config.reliability.max_grad_norm)
            too_large = skipped & sums.grad_norm.isfinite()
            if not isinstance(divisor, int):
                skipped |= divisor == 0
            loss, limit = sums.sums[0] * scale, config.reliability.spike
            z = self.spikes.z(loss, sums.grad_norm)
            is_spike = z > (limit.z if limit else math.inf)
            if limit is not None and limit.action == "skip":
                skipped |= is_spike
            clip = clip_divisor(sums.grad_norm, config.optim.grad_clip)
            state.optimizer.step(lr, clip if scaler is None else clip * scaler.value, skipped.float())
            anomalous = skipped if scaler is None else skipped & ~scaler.update(sums.grad_norm)
        with phase("publish"):
            model.publish()
        state.step += 1
        state.consumed_samples += batches.num_samples
        with phase("read"):
            self.spikes.remember(loss, sums.grad_norm, skipped)
            self.tally.add(sums, divisor, anomalous.float(), z, is_spike.float(), too_large, batches.places)
            self._hear(lr)

    def _hear(self, lr: float) -> None:
        """Reads what became of the step: all of it where it is logged, else one step late whether to go on."""
        before = self.verdict
        if self.state.step in (1, self.config.steps) or self.state.step % self.config.log.every == 0:
            line, self.verdict = self.tally.read()
            self.row, self.places = self._record(line, lr), line.places
        else:
            self.verdict = self.tally.late()
        self._tell(before, self.verdict)

    def _tell(self, before: Verdict, now: Verdict) -> None:
        super()._tell(before, now)
        if now.too_large > before.too_large:
            self.journal.incident("too_large", now.step, {"steps": now.too_large - before.too_large},
                                  f"step {now.step} changed nothing: its gradient norm is above "
                                  f"reliability.max_grad_norm({self.config.reliability.max_grad_norm:g})")
        if now.spikes > before.spikes:
            step, limit = now.step - now.spike_age, self.config.reliability.spike
            assert limit is not None
            self.journal.incident("spike", step, {"z": round(now.spike_z, 2), "action": limit.action},
                                  f"step {step}: loss or gradient norm is {now.spike_z:.1f} robust standard deviations "
                                  f"above the median of {limit.window} steps (reliability.spike: {limit.action})")
            self.spiked = step if limit.action == "rewind" else None

    def _finish(self) -> None:
        """Saves the state; but a run that has come to its end without an update has failed."""
        if self.state.step >= self.config.steps and self.state.optimizer.num_steps() == 0:
            self.verdict = self.tally.read()[1]
            self._give_up(self.verdict.skips_in_a_row)
        super()._finish()

    def _is_last(self, step: int) -> bool:
        return step >= self.config.steps or self.verdict.stop

    def _measures_scores(self) -> bool:
        """Whether the last weights are evaluated in any case, because of the scale of their scores."""
        scores = self.state.model.objective.head == "score"
        return scores and self.corpora.valid is not None and self.config.eval.every > 0

    def _record(self, line: Line, lr: float) -> dict[str, Any]:
        """The metrics of the step just done, but for those of time."""
        state, numbers = self.state, self.state.model.objective.numbers
        known = numbers(line.totals, line.divisor) if line.divisor else numbers([float("nan")] * len(line.totals), 1.0)
        return {"step": state.step, **known, "grad_norm": line.grad_norm, "lr": lr,
                "tokens": state.consumed_samples * self.config.data.seq_len,
                "consumed_samples": state.consumed_samples, "memory_bytes": peak_memory_bytes(self.mesh.device),
                "skipped": state.step - state.optimizer.num_steps(),
                **({} if self.loss_scale is None else {LOSS_SCALE: self.loss_scale.value.item()})}

    def _speed(self, taken: Taken) -> dict[str, Any]:
        """The metrics that follow from the time since the last line: means of a step, and sums of what came besides."""
        config, device, seconds = self.config, self.mesh.device, taken.in_steps / taken.steps
        known = device.type == "cuda" and config.precision.compute == "bf16"        # peaks are those of bf16
        peak = peak_tflops(torch.cuda.get_device_name(device)) if known else None
        rows = (self.state.consumed_samples - self.logged_samples) * self.state.model.objective.rows_per_sample
        self.logged_samples = self.state.consumed_samples
        flops = flops_per_token(config.model, round(self.places / rows), adapter=config.adapter)
        speed = throughput(self.places / taken.steps, seconds, flops, self.mesh.world.size, peak)
        split = OF_CORPORA.timing(taken.by_phase, taken.steps)
        return {"step_seconds": seconds, **speed.record(), **split}

    def _evaluate(self) -> None:
        assert self.corpora.valid is not None
        numbers = evaluate(self.state.model, self.corpora.valid, self.corpora.num_evaluated(self.config))
        self.evaluated = self.state.step, numbers
        self.row = (self.row or {"step": self.state.step}) | {f"valid_{name}": x for name, x in numbers.items()}
        if self.best is not None:
            metadata = self.state.metadata(self.config, self.corpora.fingerprint()) | self._scale()
            self._report_saves(self.best.offer(self.state.step, numbers["loss"], self.state.model_pieces(), metadata))

    def _tasks_every(self) -> int:
        """After how many steps questions are asked; 0: never."""
        config = self.config.eval
        return 0 if self.tasks is None else config.every if config.tasks_every is None else config.tasks_every

    def _ask(self) -> None:
        assert self.tasks is not None
        numbers = self.tasks(self.state.model)
        self.row = (self.row or {"step": self.state.step}) | numbers
        self.journal.note(f"step {self.state.step}  " + "  ".join(f"{name} {x:.4f}" for name, x in numbers.items()))

    def _metadata(self) -> dict[str, Any]:
        return self.state.metadata(self.config, self.corpora.fingerprint()) | {
            **{key: each.state() for key, each in kept(self.tally, self.spikes, self.loss_scale).items()},
            **self._scale()}

    def _scale(self) -> dict[str, Any]:
        """What the scores of a reward model are on held-out samples, where that is known of these very weights."""
        step, numbers = self.evaluated
        return {SCALE: {"mean": numbers[MEAN], "std": numbers[STD]}} if MEAN in numbers and step == self.state.step \
            else {}

    def _anomaly(self) -> int | None:
        """The step since which things have gone wrong; None: they have not, or not for long enough."""
        config, now = self.config.reliability, self.verdict
        most = 1 if config.on_nonfinite == "stop" and now.counts else config.max_skips
        if 0 < most <= now.skips_in_a_row:
            return now.step - now.skips_in_a_row + 1
        return self.spiked

    def _go_back(self) -> NoReturn:
        """Leaves the loop on every rank: back to an earlier checkpoint, or for good."""
        anomaly, skips = self._anomaly(), self.verdict.skips_in_a_row
        assert anomaly is not None
        self._report_saves(self.writer.wait())
        why = f"a spike at step {anomaly}" if anomaly == self.spiked else f"{skips} steps skipped from {anomaly} on"
        hopeless = self.state.optimizer.num_steps() == 0 or not self.verdict.counts
        if not hopeless and self.config.reliability.on_nonfinite != "stop":
            plan = plan_rewind(self.config, anomaly, self.state.step, why, self.mesh.world.group)
            if plan is not None:
                raise GoBack(plan)
        self._give_up(skips)

    def _give_up(self, skips: int) -> NoReturn:
        """Ends the run on every rank, with weights and checkpoints as they are."""
        step, updates = self.state.step, self.state.optimizer.num_steps()
        if self.spiked is not None and not skips:
            raise WorkerError(f"gave up after step {step}: the loss or the gradient's norm spiked at step "
                              f"{self.spiked}, and going back has been tried (reliability.rewind): look at the data, "
                              "lower optim.lr, or set reliability.spike.action to warn")
        what = f"gave up after step {step}: {skips} step{'s' * (skips > 1)} in a row had "
        if not self.verdict.counts:
            raise DataError(f"{what}not one label that counts. With data.document_mask the first token of a document "
                            "is no label: use longer documents, or set it to false")
        remedy = "lower optim.lr, or go back and leave samples out (octant rewind)" if updates \
            else "no update was ever made: check the weights that the run began with, and its data"
        limit = self.config.reliability.max_grad_norm
        larger = "" if limit is None else f", or larger than reliability.max_grad_norm({limit:g}),"
        raise WorkerError(f"{what}a gradient that is not finite{larger} and changed nothing (reliability.max_skips: "
                          f"{self.config.reliability.max_skips}); {remedy}. Nothing was saved in place of the last "
                          "good checkpoint")

    def close(self) -> None:
        """Closes what reads and writes files."""
        self.loader.close()
        super().close()
