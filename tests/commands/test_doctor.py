"""The doctor's text names versions and reasons, and survives whatever an optional package does on import."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from engine.commands.doctor import ACCELERATORS, CORE, EXTRAS, doctor_report, memory_bytes, probe


def test_everything_is_reported() -> None:
    report = doctor_report()
    for name in (*CORE, *(extra.distribution for extra in EXTRAS), *(a.name for a in ACCELERATORS)):
        assert f"\n{name:<20} " in report
    assert torch.__version__ in report


def test_nothing_private_is_in_it() -> None:
    assert str(Path.home()) not in doctor_report()


@pytest.mark.parametrize(("text", "expected"), [
    ("def wanted() -> None: ...", "works"),
    ("other = 1", "installed without wanted"),
    ("raise RuntimeError('no wheel\\nsecond line')", "installed, but fails on import (RuntimeError: no wheel)"),
    ("raise OSError", "installed, but fails on import (OSError: )"),
])
def test_probe(text: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"octant_probe_{abs(hash(text))}"
    (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert probe(name, "wanted") == expected


def test_probe_of_what_is_not_there() -> None:
    assert probe("octant_no_such_package.sub", "x") == "not installed"


def test_memory_is_plausible() -> None:
    assert 1 << 28 < memory_bytes() < 1 << 50
