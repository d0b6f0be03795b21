"""No kill, at any moment, loses an acknowledged checkpoint or leaves a run that cannot resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.checkpoint.commit import POINTS
from engine.checkpoint.folder import committed_steps, tidy
from engine.checkpoint.resume import find_latest
from engine.checkpoint.write import save
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece
from tests.kit.kills import Run, random_kills

COMMITTED_FROM = POINTS.index("renamed")


@pytest.mark.parametrize("asynchronous", (False, True), ids=("sync", "async"))
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_each_point(tmp_path: Path, point: str, asynchronous: bool) -> None:
    """The third of five saves dies (step 3, then its repetition): before the rename step 2 remains, after it step 3."""
    for occurrence, safe_step in ((3, 2), (4, 3)):
        run = Run(tmp_path / str(occurrence))
        run.directory.mkdir()
        run.life(asynchronous=asynchronous, die_at=(point, occurrence), steps=4)
        assert run.kills == 1
        run.life(steps=1)
        expected = safe_step + (occurrence == 3 and POINTS.index(point) >= COMMITTED_FROM)
        assert run.resumed_at[-1] == expected
        assert [p.name for p in (run.directory / "checkpoints").iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("point", ("shard created", "shard synced", "rank done"))
def test_two_ranks_die_at_a_point(tmp_path: Path, point: str) -> None:
    run = Run(tmp_path)
    run.life(world_size=2, die_at=(point, 2), steps=4)
    run.life(world_size=2, steps=1)
    assert run.resumed_at == [0, 1] or run.resumed_at == [0, 2]


def test_random_kills(tmp_path: Path) -> None:
    run = random_kills(tmp_path, kills=40, seed=1)
    assert run.kills >= 35
    assert run.acknowledged > 10        # it did get on, between kills


def test_killed_while_replacing(tmp_path: Path) -> None:
    """Between the two renames of a replacement, the old checkpoint waits under another name and is put back."""
    pieces = [Piece("w", (4,), Box.whole((4,)), torch.arange(4.0))]
    path = save(tmp_path, 5, pieces, {}, keep=None)
    path.rename(tmp_path / ".step-00000005.replaced-0123456789ab")
    (tmp_path / ".step-00000005.writing-0123456789ab").mkdir()
    reader, _ = find_latest(tmp_path)
    assert reader is not None and reader.step == 5
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000005"]


def test_killed_while_deleting(tmp_path: Path) -> None:
    """A checkpoint being deleted is out of sight before its first file goes, and its rest is removed later."""
    pieces = [Piece("w", (4,), Box.whole((4,)), torch.arange(4.0))]
    save(tmp_path, 5, pieces, {}, keep=None).rename(tmp_path / ".step-00000005.deleted-0123456789ab")
    save(tmp_path, 6, pieces, {}, keep=None)
    assert list(committed_steps(tmp_path)) == [6]
    assert tidy(tmp_path) == []
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000006"]
