"""Whatever changes on disk is noticed, and the checkpoint before is used."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine.checkpoint.folder import corrupt_checkpoints
from engine.checkpoint.manifest import DamagedCheckpoint
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import find_latest, open_checkpoint
from engine.checkpoint.stream import write_checkpoint
from engine.errors import CheckpointError
from tests.kit.pieces import Layout, fetch, files_of, value

LAYOUT = Layout(tensor=2, data=2)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, in four files each."""
    folder = tmp_path_factory.mktemp("pristine")
    for step in (1, 2):
        write_checkpoint(folder / f"step-{step:08d}", step, {"step": step}, files_of(LAYOUT), fetch)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "checkpoints"))


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    position = random.randrange(len(data) * 8)
    data[position // 8] ^= 1 << position % 8
    path.write_bytes(data)


def zero_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = random.randrange(0, len(data), 4096)
    start = start if any(data[start:start + 4096]) else 0
    data[start:start + 4096] = bytes(len(data[start:start + 4096]))
    path.write_bytes(data)


def truncate(path: Path) -> None:
    os.truncate(path, random.randrange(path.stat().st_size))


def extend(path: Path) -> None:
    with open(path, "ab") as file:
        file.write(b"\0")


FILES = ("manifest.json", *(f"rank-{rank:05d}.safetensors" for rank in range(4)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", (flip_bit, zero_page, truncate, extend, Path.unlink), ids=lambda f: f.__name__)
def test_every_damage_to_every_file(folder: Path, damage: Callable[[Path], None], name: str) -> None:
    random.seed(f"{damage.__name__}{name}")
    damage(folder / "step-00000002" / name)
    reader, [skipped] = find_latest(folder)
    assert reader is not None and reader.step == 1
    assert skipped.step == 2 and name in str(skipped)
    assert corrupt_checkpoints(folder) == [folder / "step-00000002.corrupt"]
    assert torch.equal(reader.read("model.embedding.weight"), value("model.embedding.weight", (26, 12)))


def test_flipped_bits_everywhere(pristine: Path) -> None:
    """A few hundred places, header and all, one at a time."""
    dice = random.Random(0)
    for name in FILES:
        path = pristine / "step-00000002" / name
        original = path.read_bytes()
        for _ in range(60):
            position = dice.randrange(len(original) * 8)
            data = bytearray(original)
            data[position // 8] ^= 1 << position % 8
            path.write_bytes(data)
            with pytest.raises(CheckpointError, match=name):
                open_checkpoint(pristine / "step-00000002")
        path.write_bytes(original)
    assert open_checkpoint(pristine).step == 2


def test_an_older_one_is_never_taken_for_the_newest(folder: Path) -> None:
    """Who evaluates or converts a run gets its newest checkpoint, or hears where the one before is."""
    flip_bit(folder / "step-00000002" / "rank-00001.safetensors")
    with pytest.raises(CheckpointError, match=r"step-00000002: damaged: .*rank-00001.*: \S*step-00000001"):
        open_checkpoint(folder)
    find_latest(folder)                                                         # a training run sets it aside
    with pytest.raises(CheckpointError, match="set aside; step-00000001, the newest that is left") as caught:
        open_checkpoint(folder)
    assert caught.value.exit_code == 2
    assert open_checkpoint(folder / "step-00000001").step == 1
    (folder / "step-00000001").rename(folder / "step-00000003")                 # and goes on to a later step
    assert open_checkpoint(folder).step == 1


def test_an_exchanged_file_is_noticed(folder: Path) -> None:
    """A whole file of the same size, from another rank."""
    there = folder / "step-00000002"
    shutil.copy(there / "rank-00001.safetensors", there / "rank-00000.safetensors")
    with pytest.raises(CheckpointError, match="rank-00000"):
        open_checkpoint(there)


def test_none_valid_is_an_error_that_lasts(folder: Path) -> None:
    """Starting anew by itself would be the worst way to lose a run, now or at the next attempt."""
    for step in (1, 2):
        flip_bit(folder / f"step-{step:08d}" / "rank-00002.safetensors")
    for _ in range(2):
        with pytest.raises(CheckpointError, match="2 checkpoints and none is whole") as caught:
            find_latest(folder)
        assert caught.value.exit_code == 2
    (folder / "step-00000001").rename(folder / "step-00000001.corrupt")
    (folder / "step-00000002").rename(folder / "step-00000002.corrupt")
    with pytest.raises(CheckpointError, match="set aside before"):
        find_latest(folder)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    assert find_latest(tmp_path / "checkpoints") == (None, [])
    assert find_latest(tmp_path) == (None, [])


def test_setting_aside_twice(folder: Path) -> None:
    (folder / "step-00000002.corrupt").mkdir()
    flip_bit(folder / "step-00000002" / "rank-00000.safetensors")
    _, [skipped] = find_latest(folder)
    assert skipped.path.name == "step-00000002.corrupt-2"


def rewrite_manifest(checkpoint: Path, change: Callable[[dict], None]) -> None:
    """A manifest with another content and the right hash: what a bug or an attacker would write."""
    body = json.loads((checkpoint / "manifest.json").read_text())
    del body["sha256"]
    change(body)
    text = json.dumps(body, separators=(",", ":")).encode()[:-1]
    (checkpoint / "manifest.json").write_bytes(
        text + b',"sha256":"' + hashlib.sha256(text).hexdigest().encode() + b'"}\n')


@pytest.mark.parametrize("name", ("../step-00000001/rank-00000.safetensors", "/etc/passwd", "a/b.safetensors",
                                  "..", ".hidden.safetensors", "manifest.json", "x\0.safetensors"))
def test_paths_that_leave_the_directory_are_refused(folder: Path, name: str) -> None:
    rewrite_manifest(folder / "step-00000002", lambda body: body["files"][0].update(name=name))
    with pytest.raises(DamagedCheckpoint, match="not a plain name"):
        CheckpointReader(folder / "step-00000002")
    reader, _ = find_latest(folder)
    assert reader is not None and reader.step == 1


def _first_box(body: dict) -> list:
    return next(iter(body["tensors"].values()))["blocks"][0]


CONTRADICTIONS: dict[str, Callable[[dict], object]] = {
    "box outside": lambda body: _first_box(body)[0].__setitem__(0, 10_000),
    "negative offset": lambda body: _first_box(body)[0].__setitem__(0, -1),
    "no such file": lambda body: _first_box(body).__setitem__(2, 99),
    "run beyond its block": lambda body: _first_box(body).__setitem__(2, [[1, 10_000, 1, 0, 0]]),
    "run of too many": lambda body: _first_box(body).__setitem__(2, [[0, 0, 1 << 60, 0, 0]]),
    "run that goes on beyond the files": lambda body: _first_box(body).__setitem__(2, [[0, 1, 2, 0, 99]]),
    "run with a number too large": lambda body: _first_box(body).__setitem__(2, [[1 << 70, 1, 1, 0, 0]]),
    "run of text": lambda body: _first_box(body).__setitem__(2, [["a", 1, 1, 0, 0]]),
    "run too short": lambda body: _first_box(body).__setitem__(2, [[0, 1]]),
    "unknown type": lambda body: next(iter(body["tensors"].values())).update(dtype="PICKLE"),
    "step is text": lambda body: body.update(step="2"),
    "no files": lambda body: body.pop("files"),
    "same file twice": lambda body: body["files"].append(body["files"][0]),
    "another format": lambda body: body.update(format="zip"),
}


@pytest.mark.parametrize("change", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_manifests_that_make_no_sense(folder: Path, change: Callable[[dict], object]) -> None:
    rewrite_manifest(folder / "step-00000002", change)
    with pytest.raises(DamagedCheckpoint):
        CheckpointReader(folder / "step-00000002")


def test_a_box_stored_nowhere_is_noticed(folder: Path) -> None:
    rewrite_manifest(folder / "step-00000002", lambda body: body["tensors"]["model.embedding.weight"]["blocks"].pop())
    with pytest.raises(DamagedCheckpoint, match=r"embedding\.weight: the files together hold 156 of its 312"):
        CheckpointReader(folder / "step-00000002")


def test_blocks_that_overlap_do_not_hide_a_hole(folder: Path) -> None:
    """As many elements as the tensor has, some of them twice."""
    def overlap(body: dict) -> None:
        body["tensors"]["model.embedding.weight"]["blocks"] = [[[0, 0], [13, 12], 0], [[0, 0], [12, 12], 0],
                                                               [[0, 0], [1, 12], 0]]

    rewrite_manifest(folder / "step-00000002", overlap)
    with pytest.raises(CheckpointError, match="stored nowhere"):
        CheckpointReader(folder / "step-00000002").read("model.embedding.weight")


def test_a_newer_format_is_refused_but_not_called_corrupt(folder: Path) -> None:
    rewrite_manifest(folder / "step-00000002", lambda body: body.update(version=3))
    with pytest.raises(CheckpointError, match="format version 3, this Octant reads versions up to 2"):
        find_latest(folder)
    assert (folder / "step-00000002").exists()
