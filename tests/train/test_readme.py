"""The README's commands parse and run, and every file it names is there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from engine.cli import build_parser

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```console\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.removeprefix("$ ") for block in BLOCKS for line in block.splitlines() if line]
COMMANDS = [shlex.split(line, comments=True) for line in LINES]

# What makes a command small enough for a test, or leaves it to another: words of it -> words to put in their place.
SMALLER = {
    "32000": ["340"],
    "configs/tiny.yaml": [str(ROOT / "configs" / "tiny.yaml"), "data.tokenizer=tok.model", "model.vocab_size=340",
                          "data.train=[{path: data/web}]", "data.valid=[]", "steps=2", "batch.global=4"],
}


def octant_commands() -> list[list[str]]:
    return [command[1:] for command in COMMANDS if command[:1] == ["octant"]]


def test_there_are_commands() -> None:
    assert len(octant_commands()) >= 5
    assert ["make", "demo"] in COMMANDS and ["make", "test"] in COMMANDS


@pytest.mark.parametrize("command", octant_commands(), ids=" ".join)
def test_command_parses(command: list[str]) -> None:
    build_parser().parse_args([word for word in command if word not in ("…", "...")])


def test_make_targets_and_scripts_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in COMMANDS:
        if command[0] == "make":
            assert re.search(rf"^{command[1]}:", makefile, re.MULTILINE), command
        elif command[0] == "sbatch":
            assert (ROOT / command[1]).is_file(), command


def test_every_file_named_is_there() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    folders = "engine|tests|docs|kernels|launch|configs|benchmarks|checkpoints_tools"
    paths = re.findall(rf"`((?:{folders})/[\w./-]+)`", README)
    missing = [path for path in (*links, *paths) if "://" not in path and not (ROOT / path).exists()]
    assert not missing


def test_the_commands_run_one_after_the_other(tmp_path: Path) -> None:
    words = "the run of a model over all that it reads and all that it has read before"
    lines = (json.dumps({"text": f"{words} {i} {words[i % 40:]} {i * i}"}) for i in range(400))
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))
    for command in octant_commands():
        if command[0] in ("demo", "bench"):
            continue
        smaller = [part for word in command for part in SMALLER.get(word, [word])]
        done = subprocess.run([sys.executable, "-m", "engine", *smaller], cwd=tmp_path, capture_output=True, text=True,
                              env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False)
        assert done.returncode == 0, f"octant {shlex.join(smaller)}\n{done.stdout}{done.stderr}"
    assert (tmp_path / "out" / "config.json").is_file()
