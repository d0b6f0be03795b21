"""What a run does around its steps, whatever a step is.

    while not done: a step, then whatever is due after it           each under its name (`engine.metrics.phases`)
    at the end      a last save

`Running` has the table of hooks (`engine.train.hooks`), hears of requests to stop and to save, hands records to the
journal, and saves.  What a step is, and what a checkpoint holds besides tensors, is for those who inherit to say:
`engine.train.loop.Trainer` learns from a corpus, `engine.rl.loop.Learner` from texts of its own.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.metadata import COMPARED
from engine.checkpoint.resume import set_aside_uncompared
from engine.checkpoint.write import CheckpointWriter, SaveReport
from engine.config import Config
from engine.config.phases import phases_of
from engine.distributed.mesh import Mesh
from engine.distributed.pieces import Piece
from engine.errors import WorkerError
from engine.kernels.table import Operations
from engine.metrics.console import Console
from engine.metrics.goodput import Goodput
from engine.metrics.phases import Phases, Taken
from engine.metrics.sinks import open_sinks
from engine.parallel.data.buckets import Bucket
from engine.parallel.replicas import ReplicasDiffer, differences, require_equal
from engine.reliability.inject import Injector
from engine.reliability.stragglers import Stragglers
from engine.reliability.wishes import Wishes
from engine.train.garbage import collected_on_schedule
from engine.train.hooks import Hook
from engine.train.journal import Journal
from engine.train.profile import StepProfiler
from engine.train.run_folder import writing
from engine.train.start import copies_of
from engine.train.state import TrainState
from engine.train.tally import SAVE, STOP, Verdict


@dataclass(frozen=True)
class Tools:
    """What a run writes, tells and hears with.

    Attributes:
        journal: where progress goes; mute but on rank 0.
        wishes: what people ask for by files; on rank 0.
        goodput: the account of the run's time, as rank 0 keeps it.
    """

    writer: CheckpointWriter
    journal: Journal
    profiler: StepProfiler
    wishes: Wishes
    stragglers: Stragglers = field(default_factory=lambda: Stragglers(None, None))
    goodput: Goodput = field(default_factory=Goodput)

    @staticmethod
    def of(config: Config, mesh: Mesh, step: int, buckets: Sequence[Bucket], phases: Phases, stamped: bool,
           notes: Sequence[str]) -> Tools:
        """Those of a run that goes on from `step`.

        Args:
            buckets: memory in which faults may be injected.
            phases: gets listeners.
            stamped: lines carry the time of day.
            notes: what a person should know.

        Raises:
            RequestError: the run's folder cannot be written, or a place for metrics cannot be used.
        """
        directory, faults = Path(config.run.dir), config.reliability.inject or ()
        injector = Injector(faults, mesh.rank, directory, buckets, phases_of(config.run.objective).in_step[0])
        writer = CheckpointWriter(directory / CHECKPOINTS, config.checkpoint.keep or None, config.checkpoint.async_,
                                  mesh.world.group, milestones=config.checkpoint.keep_every,
                                  copies=copies_of(config, mesh.world.group), on_point=injector.at_point)
        journal, goodput = Journal(), Goodput()
        if mesh.rank == 0:
            goodput = Goodput.going_on(directory, step)
            with writing(directory):
                sinks = open_sinks(config, directory, step)
            journal = Journal(Console(config.steps, first_step=step, stamped=stamped), sinks, directory)
            for note in notes:
                journal.note(note)
        profiler = StepProfiler(config.profile, directory, mesh.device, mesh.rank, journal.note)
        if faults:
            journal.warning(f"FAULTS WILL BE INJECTED: {'; '.join(map(str, faults))}")
            phases.listeners.append(injector)
        if config.profile.steps and mesh.rank in config.profile.ranks:
            phases.listeners.append(profiler)
        stragglers = Stragglers(config.reliability.straggler_factor, mesh.world.group)
        return Tools(writer, journal, profiler, Wishes(directory), stragglers, goodput)


@dataclass(kw_only=True)
class Running(ABC):
    """A run in progress on this rank.

    Attributes:
        mesh: over all ranks of the job.
        stop_requested: asked in every step; when any rank says yes, all save and stop.
        hooks: what is due after steps, in order.
        asked_to_save: they ask for a save now, as all ranks have heard.
        row: the record of the step just done, as far as it is known.
        verdict: what is known of the latest steps, the same on all ranks.
    """

    config: Config
    mesh: Mesh
    state: TrainState
    tools: Tools
    stop_requested: Callable[[], bool]
    phases: Phases
    saved_step: int = -1
    asked_to_save: bool = False
    verdict: Verdict = field(default_factory=Verdict)
    row: dict[str, Any] = field(default_factory=dict)
    hooks: tuple[Hook, ...] = ()

    @property
    def writer(self) -> CheckpointWriter:
        return self.tools.writer

    @property
    def journal(self) -> Journal:
        return self.tools.journal

    @property
    def wishes(self) -> Wishes:
        return self.tools.wishes

    @property
    @abstractmethod
    def operations(self) -> Operations:
        """What this rank computes with."""

    @abstractmethod
    def _step(self) -> None:
        """One step, and what the host hears of it: `state.step`, `verdict`, and `row` where it is logged."""

    def _pieces(self) -> list[Piece]:
        """This rank's part of what a checkpoint holds in tensors."""
        return self.state.pieces()

    @abstractmethod
    def _metadata(self) -> dict[str, Any]:
        """What a checkpoint holds besides tensors; rank 0's counts."""

    @abstractmethod
    def _speed(self, taken: Taken) -> dict[str, Any]:
        """The metrics that follow from the time since the last line: means of a step, and sums of what came besides."""

    def run(self) -> bool:
        """Goes on to `config.steps`; False when it stopped earlier because it was asked to.

        The state at the end, whichever it is, has been saved.

        Raises:
            GoBack: because of an anomaly the run is to go on from an earlier step.
            WorkerError: too many steps in a row were skipped; on rank 0: the state could not be saved.
            DataError: the same, because nothing counted in them.
        """
        if self.state.step >= self.config.steps:
            self.journal.note(f"nothing to do: step {self.state.step} of {self.config.steps} is done; raise `steps`")
        with collected_on_schedule() as collect:
            while self.state.step < self.config.steps and not self.verdict.stop:
                with self.phases.step(self.state.step + 1), self._counting_waits():
                    self._step()
                for hook in self.hooks:
                    if hook.due(self.state.step):
                        with self.phases(hook.phase):
                            hook.run()
                collect(self.state.step)
        with self.phases("save"):
            self._finish()
        return self.state.step >= self.config.steps

    def _flag(self) -> float:
        """What this rank tells all others in a step."""
        if self.mesh.rank == 0:
            self.wishes.look()
        return STOP * (self.stop_requested() or self.wishes.stop) + SAVE * self.wishes.save

    def _tell(self, before: Verdict, now: Verdict) -> None:
        """Notes what has happened between two verdicts."""
        self.asked_to_save = now.saves > before.saves
        if now.skips > before.skips:
            self.journal.incident("skip", now.step, {"steps": now.skips - before.skips, "in_a_row": now.skips_in_a_row})

    def _log(self) -> None:
        """Completes the record and hands it out."""
        if "lr" in self.row:                             # of a step, not of an evaluation alone
            taken = self.phases.taken()
            self.row |= self._speed(taken) | self._pace(taken)
        self.journal.log(self.row)
        self.row = {}

    @contextmanager
    def _counting_waits(self) -> Iterator[None]:
        """Within it, the time in which this rank waits for others is counted."""
        if (waits := self.mesh.world.waits) is None:
            yield
            return
        waits.on = True
        yield
        waits.on = False

    def _pace(self, taken: Taken) -> dict[str, float]:
        """Who was slow, and where the time went; every rank must call this."""
        waits, stragglers = self.mesh.world.waits, self.tools.stragglers
        waited = 0.0 if waits is None else waits.taken() / taken.steps
        began = time.perf_counter()
        pace = stragglers.compare(taken.in_steps / taken.steps, waited)
        compared = time.perf_counter() - began           # waiting, but for microseconds
        if pace.newly:
            self.journal.incident("straggler", self.state.step, {"ranks": list(pace.newly), **pace.record()},
                                  stragglers.words(pace))
        return pace.record() | self.tools.goodput.record(taken, pace.waiting * taken.steps, compared)

    def _save(self) -> None:
        self.wishes.saving()
        self._compare_replicas()
        self.writer.save(self.state.step, self._pieces(), self._metadata() | {COMPARED: True})
        self.saved_step = self.state.step

    def _compare_replicas(self) -> None:
        """Ends the run on every rank, before anything is saved, where copies of its state are none any more.

        Raises:
            ReplicasDiffer: the next start goes on from the newest checkpoint whose copies were equal.
        """
        found: list[str] = []
        for each in self.state.roles:
            if each.model is not None and each.optimizer is not None:
                with each.at_work(learning=True):
                    found += differences(each.model, each.optimizer.moments)
        try:
            require_equal(found, self.state.step, self.mesh.world)
        except ReplicasDiffer as error:
            self._report_saves(self.writer.wait())
            if self.mesh.rank == 0:
                set_aside_uncompared(self.writer.directory)
            self.journal.incident("replicas", self.state.step, {"what": str(error)})
            raise

    def _finish(self) -> None:
        """Saves the state where the latest save is of an earlier one."""
        if self.saved_step != self.state.step:
            self._save()
        self._report_saves(self.writer.wait(), last=True)

    def account(self) -> dict[str, float]:
        """Where the time went up to now, over all starts of the run; on rank 0."""
        return self.tools.goodput.record(self.phases.taken(), 0.0)

    def _report_saves(self, reports: Sequence[SaveReport], last: bool = False) -> None:
        for report in reports:
            if last and report.error is not None and report.step == self.state.step and self.mesh.rank == 0:
                raise WorkerError(f"step {report.step}, the last one, was not saved: {report.error}")
            self.journal.save(report)

    def _saving_hooks(self) -> tuple[Hook, ...]:
        """When the state is saved, and when it is heard how that went."""
        every, at = self.config.checkpoint.every, self.config.checkpoint.keep_every
        return (Hook("save", self._save, every=every,
                     when=lambda step: self.asked_to_save or (at > 0 and step % at == 0)),
                Hook("save", lambda: self._report_saves(self.writer.poll()), every=1))

    def close(self) -> None:
        """Closes what reads and writes files."""
        self.tools.profiler.close()
        self.journal.close()
