"""Copies of checkpoints on the disks of the nodes, so that a restart need not wait for the shared file system.

Once a checkpoint is committed, each rank copies in the background what it would read again, the files that hold its
pieces, into a folder of its own:

    DIR/NAME-0f3a9c12/rank-00003/step-00000500/        manifest.json, rank-00003.safetensors …

Where there are several nodes it keeps besides what the rank at its place on the next node would read, in that rank's
folder.  A node that is replaced finds nothing on its disk, and gets it from its neighbour.

The shared copy stays the truth.  Which checkpoint is the newest is asked there, and what it is: a copy with another
manifest is none.  A restart reads the copies if every rank has all that it needs, and every file has the hash that the
manifest states, as in the shared copy; else all ranks read that one.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from engine.checkpoint.folder import committed_steps, leftover_path, make_directory, publish
from engine.checkpoint.manifest import MANIFEST_NAME
from engine.checkpoint.read import CheckpointReader
from engine.distributed.agree import Group, gather_json, rank_in
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError

KEEP = 2                                   # checkpoints in each folder
CHUNK_BYTES = 16 << 20                     # copied and sent at a time


class LocalCopies:
    """Those of one run.  Every rank of `group` must make one.

    Args:
        directory: on the node's own disk (`checkpoint.local`).
        run_dir: tells the runs apart that use it.
        host: this rank's node.
    """

    def __init__(self, directory: Path, run_dir: Path, group: Group, host: str | None = None) -> None:
        name = hashlib.sha256(str(run_dir.resolve()).encode()).hexdigest()[:8]
        self.folder = directory / f"{run_dir.resolve().name}-{name}"
        self._group, self._rank = group, rank_in(group)
        self.kept = kept_by(self._rank, gather_json(host or socket.gethostname(), group))

    def keep(self, checkpoint: Path, files_for: Callable[[int], Sequence[str]]) -> str | None:
        """Copies from a committed checkpoint what each rank of `kept` would read; what went wrong, if anything.

        No other rank takes part, so that it may run in the background.
        """
        try:
            for rank in self.kept:
                self._copy(checkpoint, self.folder / f"rank-{rank:05d}", files_for(rank))
        except OSError as error:
            return f"no copy of it is kept in {self.folder}: {error.strerror or error}"
        return None

    def _copy(self, checkpoint: Path, folder: Path, names: Sequence[str]) -> None:
        with _appearing(folder / checkpoint.name) as writing:
            for name in (*names, MANIFEST_NAME):
                with (checkpoint / name).open("rb") as source, (writing / name).open("xb") as target:
                    shutil.copyfileobj(source, target, CHUNK_BYTES)
                    target.flush()
                    os.fsync(target.fileno())
        for old in list(committed_steps(folder).values())[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def open(self, shared: CheckpointReader, pieces: Sequence[Piece]) -> tuple[CheckpointReader | None, str]:
        """A reader of the copies of a checkpoint; every rank of the group must call this.

        Args:
            pieces: what this rank is about to read.

        Returns:
            None where not all ranks can, and why, the same on all of them.
        """
        with contextlib.suppress(OSError):
            self._fetch(shared.path.name)
        reader, problem = None, ""
        try:
            reader = CheckpointReader(self.folder / f"rank-{self._rank:05d}" / shared.path.name)
            if reader.content != shared.content:
                problem = f"{reader.path} is the copy of another checkpoint"
            for found in reader.verify(files=reader.files_of(pieces))[:1]:
                problem = f"{reader.path / found.file}: {found.what}"
        except (CheckpointError, OSError) as error:
            problem = str(error)
        problems = [(rank, said) for rank, said in enumerate(gather_json(problem, self._group)) if said]
        if not problems:
            return reader, ""
        more = f" (and {len(problems) - 1} more ranks)" if len(problems) > 1 else ""
        return None, f"rank {problems[0][0]}: {problems[0][1]}{more}"

    def _fetch(self, name: str) -> None:
        """Ranks that find no copy get it from one that has kept it for them; all ranks go through the same list."""
        held = {rank: {each.name: each.stat().st_size for each in sorted((self.folder / f"rank-{rank:05d}" / name)
                                                                         .glob("[!.]*"))} for rank in self.kept}
        everyone = gather_json([[rank, files] for rank, files in held.items() if files], self._group)
        for rank, own in enumerate(everyone):
            offers = [(holder, files) for holder, kept in enumerate(everyone) for owner, files in kept
                      if owner == rank and holder != rank]
            if offers and not any(owner == rank for owner, _ in own):
                holder, files = offers[0]
                copy = self.folder / f"rank-{rank:05d}" / name
                if self._rank == holder:
                    _send(copy, files, rank, self._group)
                elif self._rank == rank:
                    _receive(copy, files, holder, self._group)


def kept_by(rank: int, hosts: Sequence[str]) -> tuple[int, ...]:
    """Whose files a rank keeps: its own, and those of the rank at its place on the next node, if there is one."""
    nodes = list(dict.fromkeys(hosts))
    ranks = {node: [each for each, host in enumerate(hosts) if host == node] for node in nodes}
    following = ranks[nodes[(nodes.index(hosts[rank]) + 1) % len(nodes)]]
    place = ranks[hosts[rank]].index(rank)
    return (rank,) if len(nodes) == 1 or place >= len(following) else (rank, following[place])


@contextlib.contextmanager
def _appearing(final: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end; of an earlier attempt nothing is left."""
    for old in final.parent.glob(".step-*"):
        shutil.rmtree(old, ignore_errors=True)
    save_id = secrets.token_hex(6)
    writing = leftover_path(final, "writing", save_id)
    make_directory(writing)
    try:
        yield writing
        publish(writing, final, save_id)
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _send(copy: Path, files: Mapping[str, int], rank: int, group: Group) -> None:
    """What cannot be read goes out as zeros, which have another hash."""
    for name, size in files.items():
        for start in range(0, size, CHUNK_BYTES):
            data = bytearray(min(CHUNK_BYTES, size - start))
            with contextlib.suppress(OSError), (copy / name).open("rb") as file:
                file.seek(start)
                file.readinto(data)
            dist.send(torch.frombuffer(data, dtype=torch.uint8), _in_job(rank, group), group=group)


def _receive(copy: Path, files: Mapping[str, int], holder: int, group: Group) -> None:
    """Takes all that is sent; what cannot be written is found to be missing."""
    with contextlib.ExitStack() as stack:
        writing = None
        with contextlib.suppress(OSError):
            writing = stack.enter_context(_appearing(copy))
        for name, size in files.items():
            for start in range(0, size, CHUNK_BYTES):
                data = torch.empty(min(CHUNK_BYTES, size - start), dtype=torch.uint8)
                dist.recv(data, _in_job(holder, group), group=group)
                with contextlib.suppress(OSError):
                    if writing is not None:
                        with (writing / name).open("ab") as file:
                            file.write(data.numpy().data)


def _in_job(rank: int, group: Group) -> int:
    assert group is not None
    return dist.get_global_rank(group, rank)
