"""`octant checkpoint list|inspect|verify|reshard`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine import cli
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.write import save
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run with two checkpoints."""
    weights = torch.randn(64, 32)
    pieces = [Piece(f"{kind}.w", (64, 32), Box.whole((64, 32)), weights)
              for kind in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")]
    for step in (10, 20):
        save(tmp_path / "run" / "checkpoints", step, pieces, {"layout": {"tensor": 1}}, keep=None)
    return tmp_path / "run"


def damage(run_dir: Path) -> Path:
    path = run_dir / "checkpoints" / "step-00000020" / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    return path


def test_list(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step-00000005.corrupt").mkdir()
    (run_dir / "checkpoints" / "step-00000020" / "manifest.json").write_text("{")
    assert cli.run(["checkpoint", "list", str(run_dir)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "10" in lines[1] and "complete" in lines[1] and "cut short" in lines[2]
    assert "set aside" in lines[3] and lines[-1].startswith("next: octant checkpoint verify")
    assert cli.run(["checkpoint", "list", str(run_dir), "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["checkpoints"][0]["tokens_seen"] is None                           # no run's state in it
    assert [row["step"] for row in listed["checkpoints"]] == [10, None]


def test_list_says_how_far_a_run_had_come_in_its_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = {"config": {"data": {"seq_len": 2048}},
                "state": {"step": 10, "consumed_samples": 640, "optimizer_step": 10}}
    save(tmp_path / "checkpoints", 10, [Piece("w", (4,), Box.whole((4,)), torch.zeros(4))], metadata, keep=None)
    assert cli.run(["checkpoint", "list", str(tmp_path)]) == 0
    assert f"{640 * 2048:,}" in (out := capsys.readouterr().out) and " 640 " in out
    assert cli.run(["checkpoint", "list", str(tmp_path), "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["checkpoints"]
    assert (row["tokens_seen"], row["sample"]) == (1_310_720, 640)


def test_inspect(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["checkpoint", "inspect", str(run_dir), "--tensors"]) == 0
    text = capsys.readouterr().out
    assert "step 20" in text and "optimizer.exp_avg_sq" in text and '{"tensor": 1}' in text and "64×32" in text
    assert cli.run(["checkpoint", "inspect", str(run_dir), "--tensors", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["step"] == 20 and report["tensors"]["model.w"] == {"dtype": "F32", "shape": [64, 32], "boxes": 1}


def test_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["checkpoint", "verify", str(run_dir)]) == 0
    assert capsys.readouterr().out.count("every byte is as it was written") == 2
    damage(run_dir)
    assert cli.run(["checkpoint", "verify", str(run_dir)]) == 1
    assert "1 of 2 damaged" in capsys.readouterr().out
    assert cli.run(["checkpoint", "verify", str(run_dir / "checkpoints" / "step-00000010")]) == 0
    capsys.readouterr()
    assert cli.run(["checkpoint", "verify", str(run_dir / "checkpoints" / "step-00000020"), "--json"]) == 1
    [problems] = json.loads(capsys.readouterr().out)["problems"].values()
    assert problems == ["rank-00000.safetensors: the content has changed since it was written"]


def test_reshard(run_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["checkpoint", "reshard", str(run_dir), str(tmp_path / "out"), "--files", "4"]
    assert cli.run(command) == 0
    assert "4 files (from 1)" in capsys.readouterr().out
    before, after = CheckpointReader(run_dir / "checkpoints" / "step-00000020"), CheckpointReader(tmp_path / "out")
    assert all(torch.equal(before.read(key), after.read(key)) for key in before.keys())
    assert (after.step, after.metadata) == (before.step, before.metadata)
    assert cli.run(command) == 2
    assert "is there already" in capsys.readouterr().err
    damage(run_dir)
    assert cli.run([*command[:3], str(tmp_path / "other"), "--files", "2"]) == 2
    assert "content has changed" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_nothing_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for action in ("list", "inspect", "verify"):
        assert cli.run(["checkpoint", action, str(tmp_path)]) == 2
        assert "no checkpoint there" in capsys.readouterr().err
