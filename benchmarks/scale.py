"""What a rank sends when a job of N starts, resumes, saves and hangs, counted without the job.

    python -m benchmarks.scale                  # a Markdown table, for docs/operations.md

The engine's own functions run on the rank that has most to do, in a job that is not there: torch's fake backend, a
store that counts, and peers that say what this rank says.  So the numbers are of messages and bytes, in both
directions, not of seconds.  What must hold is in `tests/launching/test_scale.py`: no messages grow faster than the
logarithm of N, and no bytes by more than a kilobyte for each further rank.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from engine.checkpoint.manifest import Manifest, StoredFile, encode_manifest
from engine.checkpoint.plan import Planner
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import find_latest
from engine.config import WatchdogConfig
from engine.distributed import agree, announce
from engine.distributed.boxes import Box
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.ledger import Block, Ledger
from engine.distributed.mesh import Job
from engine.distributed.pieces import Piece
from engine.distributed.process import require_one_kind
from engine.distributed.topology import Topology
from engine.launching.preflight import STAGES
from engine.metrics.phases import Phases
from engine.reliability.watchdog import Report, Watchdog
from tests.kit.fake import fake_rank

SIZES = (64, 256, 1_024, 2_048)
STEPS = {"meeting": "the ranks meet in a store and settle their device", "groups": "process groups of the mesh",
         "resume": "the newest checkpoint is found and verified", "first save": "who writes what, at the first save",
         "save": "and at every other", "preflight": "a rank's part of trying the nodes",
         "hang": "a hang: report and verdict (files)"}


@dataclass
class Count:
    """Messages that a rank sends or asks for, and bytes that they hold in both directions."""

    messages: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: int, messages: int = 1) -> None:
        self.messages += messages
        self.num_bytes += num_bytes


class CountingStore(dist.Store):
    """A store in this process; every call is a message to the first rank."""

    def __init__(self, count: Count) -> None:
        super().__init__()
        self._inner, self._count = dist.HashStore(), count

    def set(self, key: str, value: Any) -> None:
        self._count.add(len(key) + len(value))
        self._inner.set(key, value)

    def get(self, key: str) -> bytes:
        value = self._inner.get(key)
        self._count.add(len(key) + len(value))
        return value

    def add(self, key: str, value: int) -> int:
        self._count.add(len(key) + 8)
        return self._inner.add(key, value)


@contextmanager
def counted(count: Count, world_size: int) -> Iterator[None]:
    """Within it messages to peers are counted, and every peer says what this rank says."""
    rounds = math.ceil(math.log2(world_size))

    def exchange(outgoing: torch.Tensor, incoming: torch.Tensor, distance: int, group: Any) -> torch.Tensor:
        count.add(outgoing.numel() * outgoing.element_size() + incoming.numel() * incoming.element_size())
        return incoming.copy_(outgoing[: len(incoming)])

    def broadcast(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> None:        # a tree's first rank sends so often
        count.add(tensor.numel() * tensor.element_size(), messages=rounds)

    with mock.patch.object(agree, "_exchange", exchange), mock.patch.object(dist, "broadcast", broadcast):
        yield


def count(world_size: int) -> dict[str, Count]:
    """What a rank of so many sends, by step (`STEPS`): the first, the last to come, one that is no judge."""
    counts = {name: Count() for name in STEPS}
    _meet(counts["meeting"], world_size)
    topology = Topology(pipeline=8, tensor=8, data=world_size // 64)
    with fake_rank(0, world_size) as job:
        with counted_groups(counts["groups"]):
            job.mesh(topology)
        with counted(counts["resume"], world_size), tempfile.TemporaryDirectory() as folder:
            _resume(Path(folder), job, world_size)
    with fake_rank(world_size - 1, world_size) as job:
        _save(counts["first save"], counts["save"], job, world_size)
    _preflight(counts["preflight"])
    _hang(counts["hang"], world_size)
    return counts


def _meet(count: Count, world_size: int) -> None:
    """The last one to arrive, who has most to do."""
    store = CountingStore(count)
    store._inner.set_timeout(timedelta(seconds=5))
    store._inner.add("arrived", world_size - 1)
    require_one_kind(store, LaunchEnvironment("slurm", world_size - 1, world_size, 0, "127.0.0.1", 0), "cuda")


@contextmanager
def counted_groups(count: Count) -> Iterator[None]:
    """Of each group that it is in a rank leaves its address, and fetches that of a peer when they first talk."""
    made = dist.new_group

    def new_group(ranks: list[int], *args: Any, **kwargs: Any) -> Any:
        if 0 in ranks:
            partners = 2                                                           # of a ring, or a tree's neighbours
            count.add((1 + partners) * ADDRESS_BYTES, messages=1 + 2 * partners)   # set; wait and get
        return made(ranks, *args, **kwargs)

    with mock.patch.object(dist, "new_group", new_group):
        yield


ADDRESS_BYTES = 160                        # of gloo's, key and value; measured with a store that counts
NAME_BYTES = 24                            # of a file in a listing


def _resume(folder: Path, job: Job, world_size: int) -> None:
    checkpoint = folder / "step-00000500"
    checkpoint.mkdir()
    files = tuple(StoredFile(f"rank-{rank:05d}.safetensors", 1 << 30, "0" * 64) for rank in range(world_size))
    blocks = [Block("w", "float32", (world_size, 64), Box.whole((world_size, 64)))]
    ledger = Ledger.of([blocks], [(0, _rows(rank)) for rank in range(world_size)])
    (checkpoint / "manifest.json").write_bytes(encode_manifest(Manifest(500, {}, files, ledger)))
    with mock.patch.object(CheckpointReader, "verify", lambda *args, **kwargs: []):
        reader, _ = find_latest(folder, job.world.group)
    assert reader is not None


def _rows(rank: int) -> Any:
    return torch.tensor([[64 * rank, 64 * (rank + 1)]]).numpy()


def _save(first: Count, later: Count, job: Job, world_size: int) -> None:
    """Of a rank with 300 tensors that is not the one of its kind which tells their names."""
    pieces = [Piece(f"layers.{n}.weight", (64, 64), Box.whole((64, 64)), torch.empty(64 * 64, device="meta"))
              for n in range(300)]
    planner = Planner(job.world.group)
    for count in (first, later):
        with counted(count, world_size), mock.patch.object(announce, "read_announcements",
                                                           lambda *_: Ledger.of([], [])):
            planner.agree(500, pieces, 1, True)


def _preflight(count: Count) -> None:
    """A line for each stage, and the node's own; the batch script reads them."""
    for stage in STAGES:
        count.add(len(json.dumps({"node": "gpu0007", "stage": stage, "speed": 640.123})))
    count.add(700)


def _hang(count: Count, world_size: int) -> None:
    """Files that a rank opens or lists, and what it reads of them, until there is a verdict."""
    with tempfile.TemporaryDirectory() as folder:
        logs = Path(folder) / "logs"
        logs.mkdir()
        report = Report(1, "gpu0007", 500, "reduce", 61.0, 60.0, "engine/parallel/data/buckets.py:250 reduce", True)
        watchdog = Watchdog(WatchdogConfig(), Phases(torch.device("cpu")), 1, world_size, Path(folder))
        glob, read = Path.glob, Path.read_text
        (logs / "rank-00000.verdict").write_text("forward_backward of step 500 took more than 60 s: " + "x" * 200)

        def counting_glob(path: Path, pattern: str) -> Any:
            count.add(NAME_BYTES * world_size)
            return glob(path, pattern)

        def counting_read(path: Path, *args: Any, **kwargs: Any) -> str:
            text = read(path, *args, **kwargs)
            count.add(len(text))
            return text

        with mock.patch.object(Path, "glob", counting_glob), mock.patch.object(Path, "read_text", counting_read):
            watchdog._agree(report)
        count.add(400)                                       # its own report


def table(sizes: tuple[int, ...] = SIZES, of: Callable[[int], dict[str, Count]] = count) -> str:
    """Messages and kilobytes of the busiest rank, by step and size of the job."""
    found = {size: of(size) for size in sizes}
    head = "| | " + " | ".join(f"{size:,} ranks" for size in sizes) + " |"
    rows = ["| " + what + " | " + " | ".join(
        f"{found[size][name].messages:,}, {found[size][name].num_bytes / 1e3:,.1f} kB" for size in sizes) + " |"
        for name, what in STEPS.items()]
    return "\n".join([head, "|---" + "|---:" * len(sizes) + "|", *rows])


if __name__ == "__main__":
    print(table())
