"""`octant config` and `octant presets`: what they print loads again as what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import cli
from engine.config import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_the_command_prints_the_resolved_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["config", str(ROOT / "configs" / "tiny.yaml"), "optim.lr=1e-4"]) == 0
    printed = capsys.readouterr().out
    (tmp_path / "again.yaml").write_text(printed)
    assert load_config(tmp_path / "again.yaml") == load_config(ROOT / "configs" / "tiny.yaml", ["optim.lr=1e-4"])
    assert cli.run(["config"]) == 2
    assert "one that comes with Octant (dpo-llama3-8b, grpo-" in capsys.readouterr().err


def test_presets_are_listed_and_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["presets"]) == 0
    assert "llama-65b       65,285,660,672      80   8,192" in capsys.readouterr().out
    assert cli.run(["presets", "llama3.2-1b"]) == 0
    (tmp_path / "model.yaml").write_text(capsys.readouterr().out + "steps: 1\n")
    (tmp_path / "preset.yaml").write_text("model: {preset: llama3.2-1b}\nsteps: 1\n")
    assert load_config(tmp_path / "model.yaml") == load_config(tmp_path / "preset.yaml")
    assert cli.run(["presets", "llama3-1b"]) == 2
    assert "did you mean `llama3.2-1b`?" in capsys.readouterr().err
