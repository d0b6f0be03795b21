"""Where the next start of a run goes on: checkpoints that are kept, loaded, damaged, of others; anew and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from engine.checkpoint.resume import open_checkpoint
from engine.checkpoint.write import save
from engine.config import load_config
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece
from tests.kit.runs import (
    assert_equal_tensors,
    contents,
    metrics,
    octant_train,
    run_config,
    saved_steps,
    tensors,
    trained,
)


@pytest.mark.parametrize(("keep", "left"), [(1, [7]), (2, [6, 7]), (0, [2, 4, 6, 7])])
def test_keep(tmp_path: Path, keep: int, left: list[int]) -> None:
    config = run_config(tmp_path, "run", steps=7, checkpoint={"keep": keep})
    octant_train(config)
    assert saved_steps(config) == left


def test_saved_at_the_end_only(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=3, checkpoint={"every": 0})
    octant_train(config)
    assert saved_steps(config) == [3]


@pytest.mark.parametrize("as_folder", [False, True], ids=["checkpoint", "run's folder"])
def test_load_takes_the_weights_and_begins_at_step_0(tmp_path: Path, as_folder: bool,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    first = run_config(tmp_path, "first", steps=2)
    octant_train(first)
    path = Path(first.run.dir) if as_folder else Path(first.run.dir) / "checkpoints" / "step-00000002"
    config = run_config(tmp_path, "second", steps=2, checkpoint={"load": str(path)},
                        optim={"lr": 1e-12, "min_lr": 0, "weight_decay": 0})
    assert octant_train(config) == 0
    assert f"weights from {path}" in capsys.readouterr().out
    weights, before = (tensors(c, 2, "model.") for c in (config, first))
    assert all(torch.allclose(weights[key], before[key], atol=1e-9) for key in before)
    assert [row["step"] for row in metrics(config)] == [1, 2]
    assert metrics(config)[0]["consumed_samples"] == 4
    capsys.readouterr()
    assert octant_train(config, "steps=3") == 0, "the same command goes on with the run, not with `load`"
    assert "(step 2, 8 samples consumed)" in capsys.readouterr().out


def test_a_checkpoint_of_weights_cannot_be_resumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = run_config(tmp_path, "first", steps=2)
    octant_train(first)
    reader = open_checkpoint(Path(first.run.dir))
    pieces = [Piece(key, tuple(value.shape), Box.whole(tuple(value.shape)), value)
              for key, value in tensors(first, 2, "model.").items()]
    path = save(tmp_path / "weights", 0, pieces, {"config": reader.metadata["config"]}, keep=None)
    assert octant_train(run_config(tmp_path, "load", checkpoint={"load": str(path)})) == 0
    capsys.readouterr()
    assert octant_train(run_config(tmp_path, "resume", checkpoint={"resume": str(path)})) == 2
    assert capsys.readouterr().err == f"octant train: {path} holds weights only: start a run from it with " \
                                      "checkpoint.load\n"


def test_a_damaged_checkpoint_is_set_aside_and_said_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run")
    octant_train(config)
    before, want = trained(config), tensors(config, 5)
    [file] = (Path(config.run.dir) / "checkpoints" / "step-00000005").glob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    capsys.readouterr()
    assert octant_train(config) == 0
    printed = capsys.readouterr().out
    assert "checkpoint of step 5 skipped, now step-00000005.corrupt: rank-00000.safetensors: the content has changed " \
        "since it was written" in printed
    assert "(step 4, 16 samples consumed)" in printed
    assert trained(config) == before
    assert_equal_tensors(tensors(config, 5), want)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run", steps=2)
    octant_train(config)
    before = contents(Path(config.run.dir))
    for overrides in (["model.num_layers=2", "model.rope_theta=5000"],
                      ["model.num_layers=2", f"checkpoint.load={config.run.dir}", f"run.dir={tmp_path}/other"]):
        capsys.readouterr()
        assert octant_train(config, *overrides) == 2
        error = capsys.readouterr().err
        assert "step-00000002 is of another model" in error
        assert "model.num_layers: 4 in the checkpoint, 2 now" in error
        assert ("model.rope_theta: 10000.0 in the checkpoint, 5000.0 now" in error) == (len(overrides) == 2)
    assert contents(Path(config.run.dir)) == before


def test_another_length_of_sequences_is_another_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run", steps=2)
    octant_train(config)
    before = contents(Path(config.run.dir))
    capsys.readouterr()
    assert octant_train(config, "data.seq_len=32", "steps=3") == 2
    error = capsys.readouterr().err
    assert "was trained with data.seq_len 16, now it is 32" in error and error.count("\n") == 1
    assert contents(Path(config.run.dir)) == before
    step = Path(config.run.dir) / "checkpoints" / "step-00000002"
    assert octant_train(config, "data.seq_len=32", f"checkpoint.load={step}", f"run.dir={tmp_path}/longer") == 0


def test_beginning_anew_loses_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run", steps=4)
    octant_train(config)
    folder, first = Path(config.run.dir), contents(Path(config.run.dir))
    assert octant_train(config, "checkpoint.resume=never", "run.seed=8") == 0
    assert f"what {folder} held of an earlier run is in {folder / 'earlier-1'} now" in capsys.readouterr().out
    assert contents(folder / "earlier-1") == first
    assert [row["step"] for row in metrics(config)] == [1, 2, 3, 4]
    assert metrics(config)[0]["loss"] != json.loads(first["metrics.jsonl"].splitlines()[0])["loss"]
    assert load_config(folder / "config.yaml").run.seed == 8
    second = {name: data for name, data in contents(folder).items() if not name.startswith("earlier-")}
    assert octant_train(config, "checkpoint.resume=never") == 0
    assert contents(folder / "earlier-1") == first and contents(folder / "earlier-2") == second


def test_beginning_anew_in_an_empty_folder_is_no_matter(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=2, checkpoint={"resume": "never"})
    assert octant_train(config) == 0
    assert not list(Path(config.run.dir).glob("earlier-*"))


def test_going_back_to_an_older_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The abandoned steps stay at hand, and cannot be resumed from by mistake."""
    config = run_config(tmp_path, "run", steps=6)
    octant_train(config)
    folder, before, weights = Path(config.run.dir), trained(config), tensors(config, 6)
    old = folder / "checkpoints" / "step-00000002"
    assert octant_train(config, f"checkpoint.resume={old}", "steps=3") == 0
    assert f"resumed from {old} (step 2, 8 samples consumed)" in capsys.readouterr().out
    assert saved_steps(config) == [2, 3]
    assert [row["step"] for row in metrics(config)] == [1, 2, 3]
    earlier = run_config(tmp_path, "run/earlier-1")
    assert saved_steps(earlier) == [4, 6] and trained(earlier) == before
    assert_equal_tensors(tensors(earlier, 6), weights)


def test_resuming_the_run_of_another_folder(tmp_path: Path) -> None:
    first, whole = run_config(tmp_path, "first", steps=6), run_config(tmp_path, "whole", steps=6)
    octant_train(whole)
    octant_train(first, "steps=3")
    before = contents(Path(first.run.dir))
    config = run_config(tmp_path, "second", steps=2)
    octant_train(config)
    own = contents(Path(config.run.dir))
    assert octant_train(config, f"checkpoint.resume={first.run.dir}", "steps=6") == 0
    assert contents(Path(first.run.dir)) == before
    assert contents(Path(config.run.dir) / "earlier-1") == own
    assert saved_steps(config) == [4, 6]
    assert [row["step"] for row in metrics(config)] == [4, 5, 6]
    assert metrics(config)[0]["consumed_samples"] == 16
