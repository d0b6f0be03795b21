"""Commit, failure, retention and background saving."""

from __future__ import annotations

import os
import re
import resource
import stat
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from engine.checkpoint.commit import Save, _await_parts, begin
from engine.checkpoint.folder import committed_steps
from engine.checkpoint.manifest import StoredFile
from engine.checkpoint.plan import divide
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import find_latest
from engine.checkpoint.write import CheckpointWriter, SaveReport, save
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError
from tests.kit.distributed import run_distributed
from tests.kit.pieces import ledger_of_ranks


def pieces_at(step: int, rows: int = 8) -> list[Piece]:
    return [Piece(f"w{i}", (rows, 64), Box.whole((rows, 64)), torch.full((rows, 64), float(step + i)))
            for i in range(3)]


@contextmanager
def full_disk(limit_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond the limit: writes fail as on a full disk (EFBIG)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("asynchronous", (False, True), ids=("sync", "async"))
def test_full_disk(tmp_path: Path, asynchronous: bool) -> None:
    """The save fails with a message, the checkpoint before stays, and the next save succeeds."""
    writer = CheckpointWriter(tmp_path, 1, asynchronous)
    writer.save(1, pieces_at(1, 512), {})
    assert [r.error for r in writer.wait()] == [None]
    with full_disk(100_000):
        writer.save(2, pieces_at(2, 512), {})
        [report] = writer.wait()
    assert report.path is None and report.error is not None
    assert str(tmp_path) in report.error and "rank-00000.safetensors" in report.error
    assert "this rank needs 393," in report.error and "are free" in report.error
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    writer.save(3, pieces_at(3, 512), {})
    [report] = writer.wait()
    assert report.error is None and report.removed == (tmp_path / "step-00000001",)
    assert list(committed_steps(tmp_path)) == [3]


def test_full_disk_when_the_manifest_is_written(tmp_path: Path) -> None:
    """The tensors fit, the manifest does not."""
    save(tmp_path, 1, pieces_at(1), {}, keep=1)
    writer = CheckpointWriter(tmp_path, 1, False)
    with full_disk(8_000):
        writer.save(2, pieces_at(2), {"config": "x" * 10_000})
    [report] = writer.poll()
    assert report.error is not None and "File too large" in report.error
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_save_raises_for_those_who_want_a_path(tmp_path: Path) -> None:
    with full_disk(1000), pytest.raises(CheckpointError, match="step 2 was not saved"):
        save(tmp_path, 2, pieces_at(2), {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file in the way")
    writer = CheckpointWriter(tmp_path / "checkpoints", 1, True)
    writer.save(1, pieces_at(1), {})
    [report] = writer.poll()
    assert report.error is not None and str(tmp_path / "checkpoints") in report.error


def _one_rank_fails(directory: str, failing: int, how: str, asynchronous: bool) -> list[SaveReport]:
    rank, group = dist.get_rank(), dist.group.WORLD
    stuck = threading.Event()

    def on_point(name: str) -> None:
        if rank == failing and name == "shard written":
            if how == "raises":
                raise RuntimeError("out of luck")
            stuck.wait(2.0)

    box = Box((rank * 64, 0), (64, 64))
    pieces = [Piece("w", (256, 64), box, torch.full(box.size, 1.0))]
    healthy = CheckpointWriter(Path(directory), 1, asynchronous, group)
    healthy.save(1, pieces, {})
    reports = healthy.wait()
    writer = CheckpointWriter(Path(directory), 1, asynchronous, group, on_point=on_point,
                              timeout_seconds=0.5 if how == "hangs" else 60)
    writer.save(2, pieces, {})
    reports += writer.wait()
    healthy.save(3, pieces, {})
    return reports + healthy.wait()


@pytest.mark.parametrize("asynchronous", (False, True), ids=("sync", "async"))
@pytest.mark.parametrize(("failing", "how"), ((0, "raises"), (2, "raises"), (2, "hangs")))
def test_one_rank_fails_all_withdraw(tmp_path: Path, failing: int, how: str, asynchronous: bool) -> None:
    for rank, (first, failed, last) in enumerate(
            run_distributed(_one_rank_fails, 4, str(tmp_path), failing, how, asynchronous)):
        assert (first.error, last.error) == (None, None)
        assert failed.path is None and failed.error is not None
        if rank == failing and how == "raises":
            assert "out of luck" in failed.error
        elif rank == 0:
            assert ("rank 2: " in failed.error and "out of luck" in failed.error) if how == "raises" else (
                "(rank 2) did not finish within" in failed.error)
        else:
            assert "withdrawn" in failed.error
    assert list(committed_steps(tmp_path)) == [3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000003"]


def _full_disk_on_one(directory: str) -> list[str | None]:
    rank, group = dist.get_rank(), dist.group.WORLD
    box = Box((rank * 64, 0), (64, 64))
    pieces = [Piece("w", (256, 64), box, torch.full(box.size, float(rank)))]
    writer = CheckpointWriter(Path(directory), 1, True, group)
    writer.save(1, pieces, {})
    errors = [report.error for report in writer.wait()]
    with full_disk(4_000 if rank == 3 else 1 << 40):
        writer.save(2, pieces, {})
        errors += [report.error for report in writer.wait()]
    return errors


def test_full_disk_on_one_rank(tmp_path: Path) -> None:
    results = run_distributed(_full_disk_on_one, 4, str(tmp_path))
    assert all(first is None for first, _ in results)
    assert "rank 3: " in results[0][1] and "needs 16," in results[0][1] and "rank-00003.safetensors" in results[0][1]
    assert "File too large" in results[3][1]
    reader, _ = find_latest(tmp_path)
    assert reader is not None and reader.step == 1


def _different_steps(directory: str) -> None:
    writer = CheckpointWriter(Path(directory), 1, False, dist.group.WORLD)
    with pytest.raises(ValueError, match="another step"):
        writer.save(dist.get_rank(), pieces_at(1), {})


def _boxes_change(directory: str) -> list[int]:
    """The division of labour is settled anew when one rank's boxes change."""
    rank, group = dist.get_rank(), dist.group.WORLD
    writer = CheckpointWriter(Path(directory), None, False, group)
    files = []
    for step, cut in enumerate((4, 4, 6)):
        box = Box((0,), (cut,)) if rank == 0 else Box((cut,), (8 - cut,))
        shared = Piece("shared", (3,), Box.whole((3,)), torch.ones(3))
        writer.save(step, [Piece("w", (8,), box, torch.arange(8.0)[box.slices]), shared], {})
        assert [report.error for report in writer.poll()] == [None]
        reader = CheckpointReader(Path(directory) / f"step-{step:08d}")
        assert torch.equal(reader.read("w"), torch.arange(8.0))
        files.append(len(reader.boxes("shared")))
    return files


def test_agreement_between_ranks(tmp_path: Path) -> None:
    run_distributed(_different_steps, 2, str(tmp_path / "a"))
    assert run_distributed(_boxes_change, 2, str(tmp_path / "b")) == [[1, 1, 1]] * 2


def test_incomplete_state_is_refused(tmp_path: Path) -> None:
    half = Piece("w", (8, 4), Box((0, 0), (4, 4)), torch.zeros(4, 4))
    writer = CheckpointWriter(tmp_path, 1, False)
    writer.save(1, [half], {})
    [report] = writer.poll()
    assert report.error is not None and "hold 16 of its 32 elements" in report.error
    assert list(tmp_path.iterdir()) == []


def test_keep(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 2, False)
    for step in (10, 20, 30):
        writer.save(step, pieces_at(step), {})
    assert [r.removed for r in writer.wait()] == [(), (), (tmp_path / "step-00000010",)]
    assert list(committed_steps(tmp_path)) == [20, 30]
    writer.save(25, pieces_at(25), {})                      # an older step again: nothing later is touched
    assert list(committed_steps(tmp_path)) == [20, 25, 30]
    with pytest.raises(CheckpointError, match="at least 1"):
        CheckpointWriter(tmp_path, 0, False)


def test_milestones_stay(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, 2, False, milestones=20)
    for step in range(5, 51, 5):
        writer.save(step, pieces_at(step), {})
    writer.wait()
    assert list(committed_steps(tmp_path)) == [20, 40, 45, 50]


def test_an_older_checkpoint_that_cannot_be_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The save counts; the person is told."""
    rename = Path.rename

    def refuse(self: Path, target: Path) -> Path:
        if "deleted" in target.name:
            raise PermissionError(1, "Operation not permitted", str(self))
        return rename(self, target)

    save(tmp_path, 1, pieces_at(1), {}, keep=1)
    monkeypatch.setattr(Path, "rename", refuse)
    writer = CheckpointWriter(tmp_path, 1, False)
    writer.save(2, pieces_at(2), {})
    [report] = writer.poll()
    assert report.path == tmp_path / "step-00000002" and report.error is None and report.removed == ()
    assert report.warning is not None and "step-00000001" in report.warning


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    for values in (1, 2):
        path = save(tmp_path, 5, pieces_at(values), {}, keep=None)
    assert torch.equal(CheckpointReader(path).read("w0"), pieces_at(2)[0].tensor)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


def test_async_writes_what_was_there_when_it_was_called(tmp_path: Path) -> None:
    """Byte for byte the files of a synchronous save, though training goes on changing the tensors."""
    def slow(name: str) -> None:
        if name == "shard created":
            time.sleep(0.05)

    weights = torch.randn(300, 700)
    pieces = [Piece("w", (300, 700), Box.whole((300, 700)), weights),
              Piece("t", (700, 300), Box.whole((700, 300)), weights.T),
              Piece("b", (5,), Box.whole((5,)), torch.randn(5).bfloat16())]
    background = CheckpointWriter(tmp_path / "async", None, True, on_point=slow)
    for step in range(3):
        metadata = {"consumed_samples": step}
        save(tmp_path / "sync", step, pieces, metadata, keep=None)
        background.save(step, pieces, metadata)
        weights.add_(1.0)                                   # long before the file is written
        metadata["consumed_samples"] = -1
        [report] = background.wait()
        assert report.error is None
        for name in ("rank-00000.safetensors", "manifest.json"):
            there = f"step-{step:08d}/{name}"
            assert (tmp_path / "async" / there).read_bytes() == (tmp_path / "sync" / there).read_bytes()


def test_one_save_in_flight(tmp_path: Path) -> None:
    """A second save waits for the first and says for how long; every report is given once."""
    def slow(name: str) -> None:
        if name == "shard synced":
            time.sleep(0.2)

    writer = CheckpointWriter(tmp_path, None, True, on_point=slow)
    writer.save(1, pieces_at(1), {})
    assert writer.poll() == []
    writer.save(2, pieces_at(2), {})
    [first] = writer.poll()
    [second] = writer.wait()
    assert (first.step, second.step) == (1, 2)
    assert first.waited_seconds < 0.1 < second.waited_seconds <= second.stalled_seconds < second.seconds
    assert writer.poll() == writer.wait() == []


def test_everything_is_synced_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power cut can lose anything that was not fsynced: every file and directory, in order."""
    events: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def record_fsync(descriptor: int) -> None:
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    def record_rename(self: Path, target: Path) -> Path:
        events.append(f"{self.name} → {target.name}")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(Path, "rename", record_rename)
    save(tmp_path / "new" / "c", 1, pieces_at(1), {}, keep=1)
    names = [re.sub(r"\.step-00000001\.writing-\w+", "WRITING", event) for event in events if "done" not in event]
    assert names == [tmp_path.name, "new", "rank-00000.safetensors", "manifest.json", "WRITING",
                     "WRITING → step-00000001", "c"]


def test_the_first_rank_opens_no_file_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What 2,048 ranks have written stands in the names of their markers, a listing of which takes milliseconds."""
    attempt = Save(tmp_path / "step-00000001", "0", 1, 0, 2048, None, 10.0, lambda _: None)
    begin(attempt)
    for rank in range(2048):
        what = f"{rank + 1}-{rank:064x}" if rank % 2 else "nothing"
        (attempt.writing / f"rank-{rank:05d}.{what}.done").touch()
    monkeypatch.setattr("io.open", None)
    start = time.process_time()
    assert _await_parts(attempt) == [StoredFile(f"rank-{rank:05d}.safetensors", rank + 1, f"{rank:064x}")
                                     for rank in range(1, 2048, 2)]
    assert time.process_time() - start < 1 and not list(attempt.writing.iterdir())


def test_files_belong_to_their_readers(tmp_path: Path) -> None:
    """Ordinary permissions (the umask's), so that colleagues can read them."""
    path = save(tmp_path, 1, pieces_at(1), {}, keep=1)
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE((path / "manifest.json").stat().st_mode) == 0o666 & ~mask


@given(st.lists(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 3)), max_size=10), min_size=1, max_size=6))
def test_each_piece_is_written_once(holdings: list[list[tuple[int, int]]]) -> None:
    """Pieces are (name, size); a name has one size; empty ones are skipped, and a rank may list one twice."""
    sizes = {name: size for rank in holdings for name, size in rank}
    everyone = [[Piece(f"w{name}", (sizes[name],), Box.whole((sizes[name],)), torch.zeros(sizes[name]))
                 for name, _ in rank] for rank in holdings]
    division = divide(ledger_of_ranks(everyone))
    written = [pieces[index].key for rank, pieces in enumerate(everyone) for index in division.of(rank)]
    assert sorted(written) == sorted(f"w{name}" for name, size in sizes.items() if size)


def test_replicas_are_spread_evenly() -> None:
    """Without ZeRO all data-parallel ranks hold the same: each writes about its share."""
    pieces = [Piece(f"w{name}", (100 + name % 7,), Box.whole((100 + name % 7,)), torch.zeros(100 + name % 7))
              for name in range(66)]
    division = divide(ledger_of_ranks([pieces] * 4))
    loads = [sum(pieces[i].tensor.numel() for i in division.of(rank)) for rank in range(4)]
    assert max(loads) - min(loads) <= 106
