"""The README's commands parse, its make targets do what it says, and every file it names is there.

That the `octant` commands also run is `tests/commands/test_demo.py`'s: it takes them from here.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from engine.cli import build_parser

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.removeprefix("$ ") for block in BLOCKS for line in block.splitlines() if line]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]


def octant_commands() -> list[list[str]]:
    """Their arguments, in the README's order."""
    return [command[1:] for command in COMMANDS if command[:1] == ["octant"]]


def test_there_are_commands() -> None:
    assert len(octant_commands()) >= 5
    assert ["make", "demo"] in COMMANDS and ["make", "test"] in COMMANDS


@pytest.mark.parametrize("command", octant_commands(), ids=" ".join)
def test_command_parses(command: list[str]) -> None:
    build_parser().parse_args(command)


@pytest.mark.parametrize(("target", "runs"), [("demo", "octant demo"), ("test", "python -m pytest")])
def test_make_installs_and_runs(target: str, runs: str, tmp_path: Path) -> None:
    """Dry, as in a fresh clone: a virtual environment, the installation into it, then the command."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "--dry-run", target, f"VENV={tmp_path / 'fresh'}"], cwd=ROOT, capture_output=True,
                          text=True, env=outside, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert f"{tmp_path}/fresh/bin/{runs}" in lines[-1]
    [environment] = [i for i, line in enumerate(lines) if "-m venv" in line]
    [installation] = [i for i, line in enumerate(lines) if "pip" in line and "--editable" in line]
    assert environment < installation < len(lines) - 1


def test_make_targets_and_scripts_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in COMMANDS:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command
        elif command[0] == "sbatch":
            assert (ROOT / command[1]).is_file(), command


def test_the_translation_has_the_same_commands() -> None:
    text = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
    lines = "\n".join(re.findall(r"^```console\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).splitlines()
    assert [shlex.split(line, comments=True) for line in lines if line] == COMMANDS


@pytest.mark.parametrize("page", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"])
def test_every_file_named_is_there(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text)
    folders = "engine|corpus_tools|tests|docs|kernels|launch|configs|benchmarks|checkpoints_tools"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+)`", text)
    missing = [path for path in (*links, *paths) if "://" not in path and not (ROOT / path).exists()]
    assert not missing
