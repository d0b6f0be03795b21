"""The script for a machine with a GPU, with a stand-in interpreter: parts, results, failures."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from engine.commands.bench import BENCHMARKS
from engine.errors import RequestError

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!/bin/sh
echo "$*" >> "$LOG"
case "$*" in *doctor*) echo trouble; exit 3;; esac
"""


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def test_a_part_that_fails_stops_no_other_and_all_commands_exist(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    executable(tmp_path / "bin" / "nvidia-smi", "#!/bin/sh\necho a GPU\n")
    python, log, out = executable(tmp_path / "python", STAND_IN), tmp_path / "log", tmp_path / "out"
    environment = os.environ | {"PYTHON": str(python), "LOG": str(log), "PATH": f"{tmp_path}/bin:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "benchmarks/gpu.sh", str(out)], cwd=ROOT, env=environment, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 1 and "1 parts failed" in done.stdout, done.stderr
    commands = log.read_text().splitlines()
    assert (out / "machine.txt").read_text() == "a GPU\n" and (out / "doctor.txt").read_text() == "trouble\n"
    assert len((out / "summary.txt").read_text().splitlines()) == len(commands) + 1
    measured = [command.split()[3:] for command in commands if command.startswith("-m engine bench ")]
    assert {name for name, *_ in measured} == set(BENCHMARKS)
    for name, *options in measured:
        with pytest.raises(RequestError, match="at least 1"):           # all else was understood
            BENCHMARKS[name]([*options, "--repeats", "0"])


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode and "usage: benchmarks/gpu.sh OUT" in done.stderr


def test_the_limits_add_up_to_eight_minutes() -> None:
    text = (ROOT / "benchmarks" / "gpu.sh").read_text()
    limits = [int(line.split()[2]) for line in text.splitlines() if line.startswith(("part ", "octant "))]
    assert len(limits) >= 8 and sum(limits) <= 480
