"""Test programs that run in a process of their own, because of what they do to torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CANNOT_RUN = 77                          # the exit code of one that needs something that is not there


def output_of(*words: str, lacking: str | None = None) -> str:
    """What `python WORDS…` prints, which must succeed.

    The test is skipped, with the program's last line for the reason, where this torch has not the parts that fake
    tensors are made of: they are private, and `octant rehearse` refuses in the same words.

    Args:
        lacking: words by which a program that does not end with `CANNOT_RUN` says so.
    """
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode == CANNOT_RUN or (lacking is not None and lacking in done.stderr):
        pytest.skip(done.stderr.splitlines()[-1])
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
