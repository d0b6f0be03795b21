"""Whatever a run's folder holds, `octant report` draws it or says in a sentence which line is none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import strategies as st

from engine.report.page import write_report
from engine.report.runs import read_run
from tests.kit.fuzz import Reader, bent, damaged, fuzz, hostile
from tests.kit.run_folder import write_run


def read(folder: Path) -> None:
    run = read_run(folder)
    pages = write_report([run], folder / "report.html", folder / "report")
    text = pages[0].read_text(encoding="utf-8")
    assert "nan" not in text.partition("<h2>Facts")[0].partition("</style>")[2], "a chart with a place that is none"


def lines(records: object) -> bytes:
    rows = records if isinstance(records, list) else [records]
    return b"".join(json.dumps(row, default=str).encode("utf-8", "surrogatepass") + b"\n" for row in rows)


def test_damaged_metrics(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    records = write_run(tmp_path / "run")
    good = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    one = st.one_of(damaged(good), bent(list(records)).map(lines), bent(list(records[:3]), edits=2).map(lines),
                    hostile())
    fuzz(Reader("metrics.jsonl", read, tmp_path / "run"), st.fixed_dictionaries({"metrics.jsonl": one}), request)
