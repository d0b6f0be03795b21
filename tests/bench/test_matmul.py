"""`octant bench`, from the command line to the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import cli
from engine.bench import matmul


def test_bench_matmul_measures_and_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "matmul", "--size", "8", "16", "--repeats", "3", "--json", str(tmp_path / "r.json")]) == 0
    results = json.loads((tmp_path / "r.json").read_text())
    assert [result["title"].partition(" matrix")[0] for result in results] == ["8 × 8", "16 × 16"]
    for result, size in zip(results, (8, 16), strict=True):
        for case in result["cases"]:
            assert len(case["seconds"]) == 3
            assert case["work"] == matmul.PRODUCTS_PER_RUN * 2 * size**3 / 1e12
    assert "bf16 reaches" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("arguments", [["matmul", "--size", "0"], ["matmul", "--repeats", "0"]])
def test_impossible_numbers_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *arguments]) == 2
    assert "at least 1" in capsys.readouterr().err
