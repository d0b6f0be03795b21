"""Kernels compiled ahead of time: for a GPU that is not there."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from engine.bench.kernels import run
from engine.errors import RequestError


def test_all_compile_for_hopper_without_spills() -> None:
    """In a process in which Triton compiles, while the suite's interprets."""
    pytest.importorskip("triton", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "engine", "bench", "kernels", "--compile", "sm_90"],
                          env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if " sm_90 " in line]
    assert len(rows) >= 15 and all(line.split("sm_90")[1].split()[1] == "0" for line in rows)
    assert {line.split(".")[0] for line in rows} == {"rms_norm", "rope", "swiglu", "vocabulary", "adamw"}


def test_what_cannot_be_compiled_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RequestError, match="sm_75 is none of"):
        run(["--compile", "sm_90,sm_75"])
    monkeypatch.setattr("engine.bench.kernels.find_spec", lambda name: None)
    with pytest.raises(RequestError, match="needs Triton"):
        run(["--compile", "sm_90"])
