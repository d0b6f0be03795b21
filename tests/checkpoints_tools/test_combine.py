"""Averages and merges, compared with plain torch on whole models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints_tools.names import PREFIX, parameter_shapes
from engine import cli
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import spread, write_checkpoint
from engine.checkpoint.write import save
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece
from tests.kit.checkpoints import model
from tests.kit.runs import run_config, train_here

CONFIG = model(num_kv_heads=2, tie_embeddings=True)


def weights_of(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {PREFIX + name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(CONFIG).items()}


def write(path: Path, weights: dict[str, Tensor], tokenizer: str = "a", **changes: Any) -> str:
    """A checkpoint in three files, so that tensors lie in pieces."""
    config = CONFIG.model_copy(update=changes).model_dump(mode="json")
    entries = [Entry(key, tensor.shape, Box.whole(tensor.shape), tensor.dtype) for key, tensor in weights.items()]
    metadata = {"config": {"model": config, "data": {"tokenizer": None}}, "data": {"tokenizer": tokenizer}}
    write_checkpoint(path, 7, metadata, spread(entries, 3), lambda entry: weights[entry.key][entry.box.slices])
    return str(path)


def read(path: Path) -> dict[str, Tensor]:
    reader = CheckpointReader(path)
    return {key: reader.read(key) for key in reader.keys()}


def expected_slerp(a: Tensor, b: Tensor, t: float) -> Tensor:
    u, v = a.double().flatten(), b.double().flatten()
    angle = torch.arccos(torch.dot(u / u.norm(), v / v.norm()))
    return ((torch.sin((1 - t) * angle) * u + torch.sin(t * angle) * v) / torch.sin(angle)).view(a.shape).float()


def expected_ties(base: Tensor, models: list[Tensor], density: float) -> Tensor:
    """Value by value, as the paper says it."""
    start = base.double().flatten().tolist()
    changes = []
    for tensor in models:
        change = (tensor.double() - base.double()).flatten().tolist()
        order = sorted(range(len(change)), key=lambda i: -abs(change[i]))[:int(density * len(change))]
        changes.append({i: change[i] for i in order})
    out = []
    for i, value in enumerate(start):
        own = [change[i] for change in changes if i in change]
        kept = [x for x in own if (x > 0) == (sum(own) > 0)]
        out.append(value + (sum(kept) / len(kept) if kept else 0.0))
    return torch.tensor(out, dtype=torch.float64).view(base.shape).float()


def test_the_average_of_the_last_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = [weights_of(seed) for seed in range(4)]
    metadata = {"config": {"model": CONFIG.model_dump(mode="json")}, "state": {"step": 0, "consumed_samples": 8,
                                                                               "optimizer_step": 0}}
    for step, weights in enumerate(models):
        metadata["state"]["step"] = step
        save(tmp_path / "run" / "checkpoints", step, [Piece(key, tuple(w.shape), Box.whole(tuple(w.shape)), w)
                                                      for key, w in weights.items()], metadata, keep=None)
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert cli.run(["convert", "average", run, str(out), "--last", "3"]) == 0
    assert "steps 1, 2, 3" in capsys.readouterr().out
    for key, values in read(out).items():
        assert torch.equal(values, torch.stack([m[key].double() for m in models[1:]]).mean(0).float()), key
    assert "state" not in CheckpointReader(out).metadata
    assert cli.run(["convert", "average", run, str(tmp_path / "no"), "--last", "5"]) == 2
    assert "has 4 checkpoints" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize("method", ["linear", "slerp", "ties"])
def test_a_merge(method: str, tmp_path: Path) -> None:
    a, b, base = (weights_of(seed) for seed in (1, 2, 3))
    paths = [write(tmp_path / name, weights) for name, weights in (("a", a), ("b", b), ("base", base))]
    out = tmp_path / "out"
    extra = ["--base", paths[2], "--density", "0.3"] if method == "ties" else ["--share", "0.3"]
    assert cli.run(["convert", "merge", paths[0], paths[1], str(out), "--method", method, *extra]) == 0
    merged = read(out)
    assert merged.keys() == a.keys()
    for key in a:
        want = {"linear": lambda k: (0.7 * a[k].double() + 0.3 * b[k].double()).float(),
                "slerp": lambda k: expected_slerp(a[k], b[k], 0.3),
                "ties": lambda k: expected_ties(base[k], [a[k], b[k]], 0.3)}[method](key)
        torch.testing.assert_close(merged[key], want, rtol=1e-6, atol=1e-7)
    assert CheckpointReader(out).metadata["combined"]["method"] == method


def test_slerp_of_a_model_with_itself_is_that_model(tmp_path: Path) -> None:
    weights = weights_of(1)
    path = write(tmp_path / "a", weights)
    assert cli.run(["convert", "merge", path, path, str(tmp_path / "out"), "--method", "slerp"]) == 0
    assert all(torch.equal(values, weights[key]) for key, values in read(tmp_path / "out").items())


def test_what_does_not_go_together_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weights = weights_of(1)
    a = write(tmp_path / "a", weights)
    theta, other = write(tmp_path / "b", weights, rope_theta=5e5), write(tmp_path / "c", weights, tokenizer="b")
    cases = [([a, theta], "not of one shape: rope_theta 10000.0 and 500000.0"), ([a, other], "other tokenizers"),
             ([a, a, "--method", "ties"], "--base says which"), ([a, a, "--base", a], "linear has no base"),
             ([a, a, "--share", "1.5"], "--share 1.5 is not between 0 and 1"),
             ([a, a, "--method", "ties", "--base", theta], "not of one shape")]
    for arguments, message in cases:
        assert cli.run(["convert", "merge", *arguments[:2], str(tmp_path / "out"), *arguments[2:]]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_run_of_milestones_is_averaged_and_trained_on(tmp_path: Path) -> None:
    first = run_config(tmp_path, "run", steps=7, checkpoint={"every": 2, "keep": 1, "keep_every": 3})
    train_here(first)
    kept = sorted(path.name for path in (Path(first.run.dir) / "checkpoints").iterdir())
    assert kept == ["step-00000003", "step-00000006", "step-00000007"]
    out = tmp_path / "average"
    assert cli.run(["convert", "average", first.run.dir, str(out), "--last", "2"]) == 0
    second = run_config(tmp_path, "second", steps=1, checkpoint={"load": str(out)}, optim={"lr": 1e-30, "min_lr": 0.0})
    train_here(second)
    started = read(Path(second.run.dir) / "checkpoints" / "step-00000001")
    assert all(torch.equal(values, started[key]) for key, values in read(out).items())
    assert json.loads((out / "manifest.json").read_text())["metadata"]["combined"]["method"] == "average"
