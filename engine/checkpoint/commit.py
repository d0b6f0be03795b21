"""All or nothing, over many ranks, without a collective.

The ranks meet in the directory that is being written:

    every rank    writes `rank-00003.safetensors`, fsyncs it, then leaves the empty file `rank-00003.SIZE-HASH.done`
                  (what it holds was settled before) or `rank-00003.failed` (why not)
    first rank    waits for all of them by listing the directory; it opens none of what may be thousands of files.  All
                  done: it writes the manifest, fsyncs the directory, renames it: committed.  One failed, or time is
                  up: it renames the directory away and deletes it: withdrawn.
    other ranks   wait until the directory has gone from its writing name, and look whether it is the one
                  (by inode) that now bears the final name.

Why not collectives: this runs in a background thread while the main thread trains, and two threads must not use one
group; a rank whose disk has failed can still be told from a rank that is dead; and a directory that the ranks do not
share is noticed, where a collective would commit a checkpoint with most of its files elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.checkpoint.folder import leftover_path, make_directory, prune, publish
from engine.checkpoint.manifest import (
    MANIFEST_NAME,
    Manifest,
    StoredFile,
    encode_manifest,
)
from engine.checkpoint.plan import Division
from engine.checkpoint.shard import Entry, WrittenFile, file_bytes, write_shard
from engine.writing import sync_directory

POINTS = ("directory made", "shard created", "chunk written", "shard written", "shard synced", "rank done",
          "manifest written", "directory synced", "renamed", "pruned")
NOTHING = "nothing"                 # in the place of size and hash where a rank writes no file
DONE = re.compile(rf"rank-(\d{{5,}})\.(?:(\d+)-([0-9a-f]{{64}})|{NOTHING})\.done")
OTHERS_PATIENCE_SECONDS = 60.0      # the other ranks wait longer than the first, which decides


class SaveFailed(Exception):
    """This save is off; the message says why.  Training can go on."""


@dataclass(frozen=True)
class Save:
    """One attempt at a checkpoint, seen from one rank."""

    final: Path
    save_id: str
    step: int
    rank: int
    world_size: int
    keep: int | None
    timeout_seconds: float
    on_point: Callable[[str], None]
    milestones: int = 0

    @property
    def writing(self) -> Path:
        return leftover_path(self.final, "writing", self.save_id)

    @property
    def file(self) -> Path:
        return self.writing / f"rank-{self.rank:05d}.safetensors"

    @property
    def failed(self) -> Path:
        """Where this rank says why it failed."""
        return self.writing / f"rank-{self.rank:05d}.failed"


@dataclass(frozen=True)
class Pruned:
    """Older checkpoints after a commit: those deleted, and what went wrong with it."""

    removed: tuple[Path, ...] = ()
    warning: str | None = None


def begin(save: Save) -> None:
    """The first rank's opening move, before any other rank goes on."""
    make_directory(save.writing)
    save.on_point("directory made")


def write_and_commit(save: Save, entries: Sequence[Entry], fetch: Callable[[Entry], torch.Tensor],
                     metadata: dict[str, Any], division: Division, pool: Executor) -> Pruned:
    """Writes this rank's file and sees the save through; `division` says which file holds what.

    Returns:
        What was done to older checkpoints (first rank only).

    Raises:
        SaveFailed: on every rank, if it failed on any; nothing is left of it.
    """
    try:
        inode = save.writing.stat().st_ino
        _write_part(save, entries, fetch, pool)
    except Exception as error:
        _remove_part(save)
        reason = explain(error, save.file, entries) if save.rank == 0 or save.writing.exists() else _withdrawn(save)
        _tell_failure(save, reason)
        if save.rank == 0:
            _withdraw(save)
        raise SaveFailed(reason) from error
    if save.rank != 0:
        _await_outcome(save, inode)
        return Pruned()
    try:
        _commit(save, _await_parts(save), metadata, division)
    except Exception as error:
        _withdraw(save)
        raise SaveFailed(explain(error, save.writing, entries)) from error
    return _prune(save)


def explain(error: Exception, path: Path, entries: Sequence[Entry]) -> str:
    """The reason with the path, and the numbers that matter when a disk is full."""
    if isinstance(error, SaveFailed):
        return str(error)
    if not isinstance(error, OSError):
        return f"{path}: {type(error).__name__}: {error}"
    needed = file_bytes(entries)
    message = f"{error.filename or path}: {error.strerror or error}; this rank needs {needed:,} bytes"
    with contextlib.suppress(OSError):
        room = os.statvfs(path.parent.parent)
        message += f", {room.f_bavail * room.f_frsize:,} are free on the file system"
    return message


def _write_part(save: Save, entries: Sequence[Entry], fetch: Callable[[Entry], torch.Tensor], pool: Executor) -> None:
    file: WrittenFile | None = None
    if entries:
        file = write_shard(save.file, entries, fetch, pool, save.on_point)
    what = NOTHING if file is None else f"{file.num_bytes}-{file.sha256}"
    (save.writing / f"rank-{save.rank:05d}.{what}.done").touch(exist_ok=False)
    save.on_point("rank done")


def _remove_part(save: Save) -> None:
    """Makes room: where the disk is full, the marker must still fit."""
    with contextlib.suppress(OSError):
        save.file.unlink()


def _tell_failure(save: Save, reason: str) -> None:
    """The marker appears with its text, as the first rank may be reading; where no text fits on the disk, without."""
    with contextlib.suppress(OSError):
        unfinished = save.failed.with_suffix(".failing")
        try:
            unfinished.write_text(reason)
        finally:
            unfinished.rename(save.failed)


def _await_parts(save: Save) -> list[StoredFile]:
    """The first rank waits for every rank's marker, and takes the markers away; the files written, by rank."""
    for _ in _patience(save.timeout_seconds, save.world_size):
        names = [entry.name for entry in os.scandir(save.writing)]
        if failed := sorted(name for name in names if name.endswith(".failed")):
            raise SaveFailed("; ".join(f"rank {int(name[5:].partition('.')[0])}: "
                                       f"{(save.writing / name).read_text() or 'unknown'}" for name in failed))
        done = {int(found[1]): found for found in map(DONE.fullmatch, names) if found}
        if len(done) == save.world_size:
            for found in done.values():
                (save.writing / found[0]).unlink()
            return [StoredFile(f"rank-{found[1]}.safetensors", int(found[2]), found[3])
                    for _, found in sorted(done.items()) if found[2]]
    waiting = [rank for rank in range(save.world_size) if rank not in done]
    some = ", ".join(map(str, waiting[:8])) + (", …" if len(waiting) > 8 else "")
    raise SaveFailed(f"{save.writing}: {len(waiting)} of {save.world_size} ranks (rank {some}) did not finish within "
                     f"{save.timeout_seconds:,.0f} s; do all nodes share this file system?")


def _commit(save: Save, files: Sequence[StoredFile], metadata: dict[str, Any], division: Division) -> None:
    """Manifest in, fsync, rename."""
    write_manifest(save.writing, Manifest(save.step, metadata, tuple(files), division.files))
    save.on_point("manifest written")
    sync_directory(save.writing)
    save.on_point("directory synced")
    publish(save.writing, save.final, save.save_id)
    save.on_point("renamed")


def write_manifest(directory: Path, manifest: Manifest) -> None:
    with open(directory / MANIFEST_NAME, "xb") as file:
        file.write(encode_manifest(manifest))
        file.flush()
        os.fsync(file.fileno())


def _prune(save: Save) -> Pruned:
    """The save is committed: whatever goes wrong here does not undo it."""
    pruned = Pruned()
    if save.keep is not None:
        try:
            pruned = Pruned(tuple(prune(save.final, save.keep, save.save_id, save.milestones)))
        except OSError as error:
            pruned = Pruned((), f"an older checkpoint could not be deleted: {error}")
    save.on_point("pruned")
    return pruned


def _withdraw(save: Save) -> None:
    """Takes the directory out of sight in one step, so that late ranks find nowhere to write, then deletes it."""
    deleted = leftover_path(save.final, "deleted", save.save_id)
    with contextlib.suppress(OSError):
        save.writing.rename(deleted)
    shutil.rmtree(deleted, ignore_errors=True)


def _await_outcome(save: Save, inode: int) -> None:
    """The other ranks wait for the first one's decision."""
    for _ in _patience(save.timeout_seconds + OTHERS_PATIENCE_SECONDS, save.world_size):
        if not save.writing.exists():
            with contextlib.suppress(FileNotFoundError):
                if save.final.stat().st_ino == inode:
                    return
            raise SaveFailed(_withdrawn(save))
    raise SaveFailed(f"{save.final}: rank 0 did not decide within {save.timeout_seconds:,.0f} s")


def _withdrawn(save: Save) -> str:
    return f"{save.final}: another rank failed, so the save was withdrawn; rank 0 says why"


def _patience(seconds: float, world_size: int) -> Iterator[None]:
    """Yields until time is up, sleeping in between: never longer than a twentieth of the time waited so far, and at
    most a quarter of a second, or more where thousands of ranks ask the file system.
    """
    start = time.monotonic()
    while (waited := time.monotonic() - start) <= seconds:
        yield
        time.sleep(min(max(0.001, waited / 20), 0.25 + world_size / 1000))
    yield
