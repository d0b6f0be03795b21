"""Where to go on: the newest checkpoint whose every byte is what was written.

There is no pointer file that could name a checkpoint which is not there.  The folder is looked through from the newest
step down; the ranks share the hashing and settle the verdict together, so all resume from the same one.  A
damaged checkpoint is renamed, for a person to look at and not to be tried again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoint.folder import (
    checkpoints_at,
    committed_steps,
    corrupt_checkpoints,
    no_checkpoint,
    set_aside,
    tidy,
)
from engine.checkpoint.manifest import DamagedCheckpoint
from engine.checkpoint.metadata import COMPARED
from engine.checkpoint.read import CheckpointReader, read_manifest
from engine.distributed.agree import Group, gather_json, rank_in, share_bytes, share_json, size_of
from engine.errors import CheckpointError

Progress = Callable[[int], None]
Nearer = Callable[[CheckpointReader], CheckpointReader | None]


@dataclass(frozen=True)
class Skipped:
    """A checkpoint that was not used."""

    step: int
    path: Path
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        more = f" (and {len(self.reasons) - 1} more)" if len(self.reasons) > 1 else ""
        return f"step {self.step} skipped, now {self.path.name}: {self.reasons[0]}{more}"


def find_latest(directory: Path, group: Group = None, progress: Progress | None = None,
                nearer: Nearer | None = None) -> tuple[CheckpointReader | None, list[Skipped]]:
    """The newest checkpoint that verifies, and the newer ones that do not, set aside.

    Every rank of `group` must call this; all get the same answer.  None, if there never was a checkpoint.  Removes what
    killed processes left behind.

    Args:
        nearer: finds a copy of a checkpoint that is known by its manifest alone; that is taken then.

    Raises:
        CheckpointError: checkpoints are there, and none can be used.
    """
    directory = Path(directory)
    if rank_in(group) == 0:
        tidy(directory)
    steps = share_json(sorted(committed_steps(directory), reverse=True), group)
    damaged: list[tuple[int, Path, list[str]]] = []
    for step in steps:
        path = committed_steps(directory).get(step, directory / f"step-{step:08d}")
        if nearer is not None:
            with contextlib.suppress(CheckpointError):       # by all ranks alike, and said below
                copy = nearer(CheckpointReader(path, manifest=_shared_manifest(path, group)))
                if copy is not None:
                    return copy, [_skip(entry, group) for entry in damaged]
        reader, problems = open_verified(path, group, progress)
        if reader is not None:
            return reader, [_skip(entry, group) for entry in damaged]
        damaged.append((step, path, problems))
    aside = share_json([str(path) for path in corrupt_checkpoints(directory)], group)
    if damaged or aside:
        lines = [f"{path}: {'; '.join(problems)}" for _, path, problems in damaged]
        lines += [f"{path}: set aside before" for path in aside]
        raise CheckpointError(f"{directory} holds {len(lines)} checkpoints and none is whole; look at them, or start "
                              "anew in another run.dir or with checkpoint.resume=never\n  " + "\n  ".join(lines))
    return None, []


def open_verified(path: Path, group: Group = None,
                  progress: Progress | None = None) -> tuple[CheckpointReader | None, list[str]]:
    """Opens a checkpoint and hashes all of it, each rank a share; every rank gets the same verdict.

    Returns:
        The reader and no problems, or None and what is wrong.

    Raises:
        CheckpointError: it is not damaged but cannot be used: not there, unreadable, or of another format version.
    """
    reader, problems, refusal = None, [], None
    try:
        reader = CheckpointReader(path, manifest=_shared_manifest(path, group))
        share = rank_in(group), size_of(group)
        problems = [f"{problem.file}: {problem.what}" for problem in reader.verify(share, progress=progress)]
    except DamagedCheckpoint as error:
        problems = [str(error)]
    except (CheckpointError, OSError) as error:
        refusal = str(error)
    verdicts = gather_json({"problems": problems, "refusal": refusal}, group)
    for rank, verdict in enumerate(verdicts):
        if verdict["refusal"] is not None:
            raise CheckpointError(f"rank {rank}: {verdict['refusal']}")
    found = list(dict.fromkeys(problem for verdict in verdicts for problem in verdict["problems"]))
    return (None if found else reader), found


def set_aside_uncompared(directory: Path) -> list[Path]:
    """For a run whose copies were found to differ: what was saved since they were last known to be equal.

    Every save compares, so there are such checkpoints only where another version wrote them.  Where none was compared,
    none is better than the others, and all stay.

    Returns:
        Their names now.
    """
    suspect: list[Path] = []
    for path in reversed(committed_steps(directory).values()):
        with contextlib.suppress(CheckpointError, OSError):
            if CheckpointReader(path).metadata.get(COMPARED):
                return [set_aside(each) for each in suspect]
        suspect.append(path)
    return []


def _shared_manifest(path: Path, group: Group) -> bytes:
    """Read by the first rank and sent on: thousands of ranks need not all fetch it from the file system.

    Raises:
        DamagedCheckpoint, CheckpointError: on every rank, what the first has found.
    """
    data, damaged, refused = b"", None, None
    if rank_in(group) == 0:
        try:
            data = read_manifest(path)
        except DamagedCheckpoint as error:
            damaged = str(error)
        except (CheckpointError, OSError) as error:
            refused = str(error)
    damaged, refused = share_json([damaged, refused], group)
    if damaged is not None:
        raise DamagedCheckpoint(damaged)
    if refused is not None:
        raise CheckpointError(refused)
    return share_bytes(data, group)


def open_checkpoint(path: Path, progress: Progress | None = None, group: Group = None) -> CheckpointReader:
    """For whoever only reads: the checkpoint at `path`, or the newest of a run's folder.

    Every rank of `group` must call this; all get the same answer.  Touches nothing: damaged checkpoints stay where they
    are.  An older one is not taken for a damaged one: whoever asked would take its numbers for the newest's.

    Raises:
        CheckpointError: it is not there or not whole; an older one is named, to be asked for by its own path.
    """
    path = Path(path)
    found = [Path(name) for name in share_json([str(one) for one in checkpoints_at(path)], group)]
    if not found:
        raise no_checkpoint(path)
    newest, aside = found[-1], [Path(name) for name in share_json(_set_aside_later(found[-1], path), group)]
    if aside:
        raise CheckpointError(f"{aside[-1]}: the newest checkpoint was found damaged and set aside; {newest.name}, the "
                              f"newest that is left, is to be had by its own path: {newest}")
    reader, problems = open_verified(newest, group, progress)
    if reader is not None:
        return reader
    older = f"; the one before is to be had by its own path: {found[-2]}" if len(found) > 1 else ""
    raise CheckpointError(f"{newest}: damaged: {'; '.join(problems)}{older}")


def _set_aside_later(newest: Path, asked: Path) -> list[str]:
    """Damaged checkpoints of a later step than `newest`; none where that was asked for itself."""
    if newest == asked:
        return []
    return [str(path) for path in corrupt_checkpoints(newest.parent) if path.name > newest.name + ".corrupt"]


def _skip(entry: tuple[int, Path, list[str]], group: Group) -> Skipped:
    """The first rank renames; the others learn the new name."""
    step, path, problems = entry
    renamed = str(path)
    if rank_in(group) == 0:
        try:
            renamed = str(set_aside(path))
        except OSError as error:
            problems = [*problems, f"could not be set aside: {error}"]
    renamed, problems = share_json([renamed, problems], group)
    return Skipped(step, Path(renamed), tuple(problems))
