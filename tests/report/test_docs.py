"""The Python in docs/metrics.md runs and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.kit.run_folder import write_run

ROOT = Path(__file__).resolve().parents[2]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[0])
def test_snippet(snippet: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                 capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "runs" / "x")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "docs/metrics.md", "exec"), {})
    printed = capsys.readouterr().out
    for expected in re.findall(r"print\(.*\) +# ([\d ]+)$", snippet, re.MULTILINE):
        assert expected in printed


def test_every_key_of_a_record_is_explained(tmp_path: Path) -> None:
    records = write_run(tmp_path / "run")
    table = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert [key for key in records[19] if f"| `{key}` |" not in table] == []
