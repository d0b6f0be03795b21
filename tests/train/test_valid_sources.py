"""The loss of each held-out source, in metrics and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.config import Config
from tests.kit.runs import metrics, run_config, train, write_corpus


def config_of(folder: Path, name: str, valid: list[str], **sections: Any) -> Config:
    sources = [{"path": write_corpus(folder / path, seed=len(path))} for path in valid]
    probe = run_config(folder, name, steps=3, eval={"every": 3, "batches": len(valid)}, **sections)
    return probe.with_changes(data={"valid": sources})


def test_each_source_has_its_own_loss_and_together_they_are_the_whole(tmp_path: Path) -> None:
    both = config_of(tmp_path, "both", ["web", "books"])
    train(both)
    row = metrics(both)[-1]
    assert row["valid_loss"] == pytest.approx((row["valid_loss/web"] + row["valid_loss/books"]) / 2, rel=1e-6)
    for name in ("web", "books"):                                               # alone, as many samples
        alone = config_of(tmp_path, name + "-run", [name])
        train(alone)
        assert metrics(alone)[-1]["valid_loss"] == pytest.approx(row[f"valid_loss/{name}"], rel=1e-6)
        assert not any(key.startswith("valid_loss/") for key in metrics(alone)[-1])
    cut = config_of(tmp_path, "cut", ["web", "books"], parallel={"data": 2})
    train(cut)
    for key in ("valid_loss", "valid_loss/web", "valid_loss/books"):
        assert metrics(cut)[-1][key] == pytest.approx(row[key], rel=1e-5)
    (Path(both.run.dir) / "config.yaml").write_text(both.dump())
    assert cli.run(["report", both.run.dir]) == 0
    assert ">books<" in (Path(both.run.dir) / "report.html").read_text()
