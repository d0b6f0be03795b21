"""Saving: each rank writes its share of the boxes to one file; together they commit or withdraw.

A save that fails is a misfortune of the disk, not of the training: `CheckpointWriter` reports it and raises nothing.
What may be lost is one save; the previous checkpoint stays, because nothing is deleted before a newer one is committed.

Asynchronously, training waits for the copy to host memory only.  One save is in flight at most: a second waits for
the first, and its report says how long.
"""

from __future__ import annotations

import json
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.commit import Save, SaveFailed, begin, explain, write_and_commit
from engine.checkpoint.folder import checkpoint_name, tidy
from engine.checkpoint.local import LocalCopies
from engine.checkpoint.plan import Agreement, Division, Planner
from engine.checkpoint.shard import Entry, entry_of, file_bytes
from engine.checkpoint.staging import Staging
from engine.distributed.agree import Group, rank_in, size_of
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError

DEFAULT_TIMEOUT_SECONDS = 1800.0
SAVE_ID_BITS = 48

Source = Callable[[Entry], torch.Tensor]


@dataclass(frozen=True)
class SaveReport:
    """How a save went, on one rank.

    Args:
        path: the committed checkpoint, or None if the save failed.
        error: why it failed: path, reason, bytes needed.
        num_bytes: what this rank wrote.
        seconds: from the call to the commit.
        stalled_seconds: how long training stood still for it.
        waited_seconds: the part of `stalled_seconds` spent waiting for the save before it.
        removed: older checkpoints that were deleted (first rank only).
        warning: what went wrong after the commit: an older checkpoint that could not be deleted.
    """

    step: int
    path: Path | None
    error: str | None
    num_bytes: int
    seconds: float
    stalled_seconds: float
    waited_seconds: float
    removed: tuple[Path, ...] = ()
    warning: str | None = None


def no_point(_: str) -> None:
    """The default of `on_point`: named moments of a save pass unnoticed."""


def save(directory: Path, step: int, pieces: Sequence[Piece], metadata: dict[str, Any], *,
         group: Group = None, keep: int | None) -> Path:
    """Commits `directory/step-00000500/` and returns it.  Every rank of `group` must call this.

    Raises:
        CheckpointError: on every rank, if it failed on any.
    """
    writer = CheckpointWriter(directory, keep, False, group)
    writer.save(step, pieces, metadata)
    [report] = writer.wait()
    if report.path is None:
        raise CheckpointError(f"step {step} was not saved: {report.error}")
    return report.path


class CheckpointWriter:
    """Saves the state of one run.

    Args:
        directory: holds the run's checkpoints; every rank must see the same one.
        keep: how many checkpoints stay; None keeps all.
        milestones: those of multiples of so many steps stay besides; 0: there are none.
        asynchronous: write in the background.
        group: the ranks that save together; it must be able to move CPU tensors (gloo).  It is used inside `save`, by
            the calling thread only, so it may be a group that training uses too.
        timeout_seconds: how long a save may wait for the slowest rank's file.
        threads: for hashing and copying; None: up to 4.
        copies: keeps some of what has been committed on this node's disk; None: nobody does.
        on_point: told the name of each moment of `commit.POINTS` as it passes; tests kill the process there.
    """

    def __init__(self, directory: Path, keep: int | None, asynchronous: bool, group: Group = None, *,
                 milestones: int = 0, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS, threads: int | None = None,
                 copies: LocalCopies | None = None, on_point: Callable[[str], None] = no_point) -> None:
        if keep is not None and keep < 1:
            raise CheckpointError(f"checkpoint.keep = {keep}: at least 1 checkpoint must stay")
        threads = threads or min(4, os.cpu_count() or 1)
        self.directory = Path(directory)
        self._keep, self._milestones = keep, milestones
        self._asynchronous = asynchronous
        self._group = group
        self._rank, self._world_size = rank_in(group), size_of(group)
        self._timeout_seconds = timeout_seconds
        self._on_point, self._copies = on_point, copies
        self._planner = Planner(group)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="checkpoint-hash")
        self._staging = Staging(threads)
        self._thread: threading.Thread | None = None
        self._reports: deque[SaveReport] = deque()
        if self._rank == 0:
            tidy(self.directory)

    def save(self, step: int, pieces: Sequence[Piece], metadata: dict[str, Any]) -> None:
        """Saves, or begins to.  Every rank must call this at the same step; `metadata` counts on the first rank.

        How it went is told by `poll` or `wait`; a save that fails is a report with `error`, never an exception.

        Raises:
            ValueError: the ranks are at different steps; TypeError: `metadata` is not JSON.  Bugs in the caller.
        """
        start = time.monotonic()
        self._collect()
        waited = time.monotonic() - start
        metadata = json.loads(json.dumps(metadata))                 # the caller may change it while we write
        attempt, agreement, problem = self._begin(step, pieces)
        if not agreement.steps_agree:
            raise ValueError(f"rank {self._rank} saves step {step}, another rank another step")
        report = SaveReport(step, None, problem, 0, 0.0, 0.0, waited)
        if not agreement.all_ready:
            reason = problem or "rank 0 could not begin the save; its report says why"
            self._reports.append(_timed(replace(report, error=reason), start, stalled=True))
            return
        mine = [pieces[index] for index in agreement.mine]
        entries = [entry_of(piece) for piece in mine]
        tensors = [p.tensor for p in mine]
        if not self._asynchronous:
            report = self._write(attempt, entries, _source_of(entries, tensors), metadata, agreement.division, report)
            self._reports.append(_timed(report, start, stalled=True))
            return
        try:
            fetch = _source_of(entries, self._staging.copy(tensors))
        except (MemoryError, RuntimeError) as error:        # no room for the copies; the others must hear of it
            fetch = _no_source(error)
        report = _timed(report, start, stalled=True)

        def write() -> None:
            written = self._write(attempt, entries, fetch, metadata, agreement.division, report)
            self._reports.append(_timed(written, start, stalled=False))

        self._thread = threading.Thread(target=write, name=f"checkpoint-{step}", daemon=True)
        self._thread.start()

    def poll(self) -> list[SaveReport]:
        """Reports of saves that have finished since the last call; each is given once.  Costs nothing."""
        if self._thread is not None and not self._thread.is_alive():
            self._collect()
        return self._take()

    def wait(self) -> list[SaveReport]:
        """Waits for the save in flight; otherwise as `poll`.  Call it before the process ends."""
        self._collect()
        return self._take()

    def _collect(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _take(self) -> list[SaveReport]:
        return [self._reports.popleft() for _ in range(len(self._reports))]     # the thread may be adding one

    def _begin(self, step: int, pieces: Sequence[Piece]) -> tuple[Save, Agreement, str | None]:
        """The first rank makes the directory, then all settle who writes what."""
        save_id = secrets.randbits(SAVE_ID_BITS)
        attempt = self._attempt(step, f"{save_id:012x}")
        problem = None
        if self._rank == 0:
            try:
                tidy(self.directory)
                begin(attempt)
            except OSError as error:
                problem = explain(error, attempt.writing, [])
        agreement = self._planner.agree(step, pieces, save_id, ready=problem is None)
        return self._attempt(step, agreement.save_id), agreement, problem

    def _attempt(self, step: int, save_id: str) -> Save:
        return Save(self.directory / checkpoint_name(step), save_id, step, self._rank, self._world_size, self._keep,
                    self._timeout_seconds, self._on_point, self._milestones)

    def _write(self, attempt: Save, entries: Sequence[Entry], fetch: Source,
               metadata: dict[str, Any], division: Division, report: SaveReport) -> SaveReport:
        try:
            pruned = write_and_commit(attempt, entries, fetch, metadata, division, self._pool)
        except SaveFailed as error:
            return replace(report, error=str(error))
        warning = None if self._copies is None else self._copies.keep(attempt.final, division.files_for)
        return replace(report, path=attempt.final, num_bytes=file_bytes(entries), removed=pruned.removed,
                       warning=pruned.warning or warning)


def _source_of(entries: Sequence[Entry], tensors: Sequence[torch.Tensor]) -> Source:
    """Gives the tensor of an entry."""
    by_name = {entry.name: tensor for entry, tensor in zip(entries, tensors, strict=True)}
    return lambda entry: by_name[entry.name]


def _no_source(error: Exception) -> Source:
    def fetch(entry: Entry) -> torch.Tensor:
        raise error
    return fetch


def _timed(report: SaveReport, start: float, stalled: bool) -> SaveReport:
    seconds = time.monotonic() - start
    return replace(report, seconds=seconds, stalled_seconds=seconds if stalled else report.stalled_seconds)
