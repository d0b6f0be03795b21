"""Names on disk, and the renames that move a checkpoint from one state to the next.

    step-00000500                   committed
    step-00000500.corrupt           was committed, no longer verifies; kept for a person to look at
    .step-00000500.writing-<id>     being written, or left by a process that was killed while it wrote
    .step-00000500.replaced-<id>    the former checkpoint of a step that is being saved again
    .step-00000500.deleted-<id>     being deleted

A name changes by one rename, so at every moment a directory is in exactly one state.  Only names without a suffix are
ever read.  `tidy` brings a folder in which a process was killed back to committed checkpoints only.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from engine.checkpoint.manifest import MANIFEST_NAME
from engine.errors import CheckpointError
from engine.instead import instead_of_checkpoint
from engine.writing import sync_directory

CHECKPOINTS = "checkpoints"         # where a run keeps them, in its own folder
BEST = "best"                       # and where the weights of its lowest held-out loss
COMMITTED = re.compile(r"step-(\d{8,})")
LEFTOVER = re.compile(r"\.(step-\d{8,})\.(writing|replaced|deleted)-([0-9a-f]+)")


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def leftover_path(final: Path, state: str, save_id: str) -> Path:
    """The hidden neighbour of `final` in one of the three passing states."""
    return final.parent / f".{final.name}.{state}-{save_id}"


def committed_steps(directory: Path) -> dict[int, Path]:
    """Committed checkpoints by step, ascending.  Whether they are whole is for the reader to say."""
    if not directory.is_dir():
        return {}
    matches = [(COMMITTED.fullmatch(entry.name), entry) for entry in directory.iterdir()]
    return dict(sorted((int(match[1]), entry) for match, entry in matches if match and entry.is_dir()))


def checkpoints_at(path: Path) -> list[Path]:
    """What `path` means on a command line: a checkpoint, a folder of them, or a run's folder; oldest first."""
    if (path / MANIFEST_NAME).exists() or COMMITTED.fullmatch(path.name):
        return [path]
    inner = path / CHECKPOINTS
    return list(committed_steps(inner if inner.is_dir() else path).values())


def no_checkpoint(path: Path) -> CheckpointError:
    """The refusal of a path at which `checkpoints_at` finds none."""
    instead = instead_of_checkpoint(path) or f"; give a folder with {MANIFEST_NAME}, or a run's that has saved one"
    return CheckpointError(f"{path}: no checkpoint there{instead}")


def corrupt_checkpoints(directory: Path) -> list[Path]:
    """Checkpoints that were set aside."""
    return sorted(directory.glob("step-*.corrupt*")) if directory.is_dir() else []


def tidy(directory: Path, keep_id: str | None = None) -> list[str]:
    """Removes what killed processes left behind; puts back a checkpoint that was about to be replaced.

    Only for the process that writes checkpoints here.  `keep_id`: the save in flight, which is left alone.

    Returns:
        What was done, for people.
    """
    done = []
    for entry in sorted(directory.iterdir()) if directory.is_dir() else []:
        match = LEFTOVER.fullmatch(entry.name)
        if match is None or match[3] == keep_id:
            continue
        final = directory / match[1]
        if match[2] == "replaced" and not final.exists():
            entry.rename(final)
            done.append(f"put {final.name} back: saving it again was interrupted")
        else:
            shutil.rmtree(entry, ignore_errors=True)
            done.append(f"removed {entry.name}, left by an interrupted save")
    if done:
        sync_directory(directory)
    return done


def publish(writing: Path, final: Path, save_id: str) -> None:
    """Commits: `writing` becomes `final`, which lasts from the moment this returns.

    A checkpoint of the same name steps aside first and is deleted after; `tidy` puts it back if we die in between.
    """
    replaced = leftover_path(final, "replaced", save_id)
    exists = final.exists()
    if exists:
        final.rename(replaced)
    try:
        writing.rename(final)
    except OSError:
        if exists:
            replaced.rename(final)
        raise
    sync_directory(final.parent)
    if exists:
        shutil.rmtree(replaced, ignore_errors=True)


def prune(newest: Path, keep: int, save_id: str, milestones: int = 0) -> list[Path]:
    """Deletes the oldest checkpoints before `newest` so that `keep` remain with it.  Later steps are not touched.

    Args:
        milestones: multiples of so many steps stay however many they are; 0: there are none.

    Returns:
        What was deleted.
    """
    committed = list(committed_steps(newest.parent).items())
    older = committed[:[path for _, path in committed].index(newest)]
    surplus = [path for step, path in older[:max(0, len(older) - (keep - 1))] if not milestones or step % milestones]
    for path in surplus:
        discard(path, save_id)
    return surplus


def discard(path: Path, save_id: str) -> None:
    """Deletes a checkpoint: first its name, in one step, then its files, so that no half of it is ever found."""
    deleted = leftover_path(path, "deleted", save_id)
    path.rename(deleted)
    sync_directory(path.parent)
    shutil.rmtree(deleted, ignore_errors=True)


def set_aside(path: Path) -> Path:
    """Renames a damaged checkpoint so that it is not tried again; returns its new name."""
    for number in range(1, 1000):
        target = path.with_name(path.name + ".corrupt" + (f"-{number}" if number > 1 else ""))
        if not target.exists():
            path.rename(target)
            sync_directory(path.parent)
            return target
    raise OSError(f"{path.parent} holds a thousand corrupt copies of {path.name}")


def make_directory(path: Path) -> None:
    """Makes a new directory.  Those above it that are missing are made to last; `path` itself is not, before `publish`.

    Raises:
        FileExistsError: `path` is there already.
    """
    missing = [parent for parent in path.parents if not parent.is_dir()]
    for parent in reversed(missing):
        parent.mkdir(exist_ok=True)
        sync_directory(parent.parent)
    path.mkdir()
