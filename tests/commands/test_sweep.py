"""`octant sweep`: a run per mixture, each the run that `octant train` makes; what is done is not done again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from engine import cli
from engine.errors import ConfigError
from engine.plan.mixtures import read_sweep
from tests.kit.layouts import TINY
from tests.kit.runs import write_corpus


def write(path: Path, values: object) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_mixtures_are_tried_once_and_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    web, books = (write_corpus(tmp_path / name, seed=index) for index, name in enumerate(("web", "books")))
    base = write(tmp_path / "small.yaml", {
        **{key: TINY[key] for key in ("model", "precision", "optim") if key in TINY},
        "run": {"device": "cpu"}, "steps": 2, "batch": {"global": 2},
        "data": {"seq_len": 16, "valid": [{"path": web}, {"path": books}]},
        "eval": {"every": 2, "batches": 2}, "checkpoint": {"every": 0}})
    sweep = {"base": str(base), "dir": str(tmp_path / "mixtures"), "sources": {"web": web, "books": books},
             "mixtures": {"even": {"web": 1, "books": 1}, "web-only": {"web": 2}}}
    file = write(tmp_path / "mixtures.yaml", sweep)
    assert cli.run(["sweep", str(file)]) == 0
    out = capsys.readouterr().out
    assert "50.0%" in out and "100.0%" in out and "loss on books" in out
    assert out.strip().splitlines()[-1].startswith("next: octant report")
    metrics = {name: (tmp_path / "mixtures" / name / "metrics.jsonl").read_text() for name in ("even", "web-only")}
    assert cli.run(["sweep", str(file), "--json"]) == 0
    told = {one["mixture"]: one for one in json.loads(capsys.readouterr().out)}
    for name, text in metrics.items():
        assert (tmp_path / "mixtures" / name / "metrics.jsonl").read_text() == text, "a finished run is left alone"
        row = json.loads(text.splitlines()[-1])
        assert told[name]["losses"] == {"web": row["valid_loss/web"], "books": row["valid_loss/books"]}
        assert told[name]["loss"] == row["valid_loss"]
    alone = yaml.safe_load((tmp_path / "mixtures" / "web-only.yaml").read_text())
    alone["run"]["dir"] = str(tmp_path / "alone")
    assert cli.run(["train", str(write(tmp_path / "alone.yaml", alone))]) == 0
    by_hand = json.loads((tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()[-1])
    assert by_hand["valid_loss"] == told["web-only"]["loss"]
    assert "Held-out loss" in (tmp_path / "mixtures" / "mixtures.svg").read_text()
    write(file, sweep | {"mixtures": {"even": {"web": 1, "books": 3}}})
    capsys.readouterr()
    assert cli.run(["sweep", str(file)]) == 2 and "was trained with another data" in capsys.readouterr().err


def test_what_a_file_may_say(tmp_path: Path) -> None:
    good = {"base": "x.yaml", "dir": "d", "sources": {"a": "a", "b": "b"}, "random": {"count": 3, "seed": 4}}
    drawn = read_sweep(write(tmp_path / "m.yaml", good)).all()
    assert drawn == read_sweep(tmp_path / "m.yaml").all() and list(drawn) == ["random-0", "random-1", "random-2"]
    assert all(sum(shares.values()) == pytest.approx(1) for shares in drawn.values())
    for change, why in (({"mixtures": {"m": {"c": 1}}}, "names c, and sources are a, b"),
                        ({"random": None}, "no mixtures"), ({"mixtures": {"m": {"a": 0}}}, "no source with a weight"),
                        ({"mixtures": {"../m": {"a": 1}}}, "should match pattern"),
                        ({"mixture": {}}, "mixture: Extra inputs"), ({"mixtures": {"m": {"a": -1}}}, "greater than")):
        with pytest.raises(ConfigError, match=why):
            read_sweep(write(tmp_path / "m.yaml", good | change))
    with pytest.raises(ConfigError, match="cannot read"):
        read_sweep(tmp_path / "none.yaml")
