"""Implementations measured beside their references, and kernels compiled for a GPU that is not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.bench.kernels import error, run
from engine.errors import RequestError
from engine.kernels.table import TABLE


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


def test_every_available_implementation_is_measured(tmp_path: Path) -> None:
    """Errors of the dtype's size, also where an implementation changes its inputs."""
    file = tmp_path / "kernels.json"
    assert run(["--model", "tiny", "--tokens", "16", "--repeats", "1", "--dtype", "fp32", "--json", str(file)]) == 0
    results = json.loads(file.read_text())
    assert [result["title"].partition(":")[0] for result in results] == [operation.name for operation in TABLE]
    for operation, result in zip(TABLE, results, strict=True):
        assert result["cases"][0]["name"] == operation.reference.name
        assert (result["operation"], result["dtype"], result["reached"]["product"]) == (operation.name, "fp32", 1024)
        for case in result["cases"]:
            assert 0 <= float(case["error"]) < 2e-6, (operation.name, case)


def test_the_worst_tensor_counts() -> None:
    good, bad = torch.ones(4, dtype=torch.float64), torch.full((4,), 1.5, dtype=torch.float64)
    assert error([good, bad], [good, good]) == 0.5


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "llama3.2-2b"], "llama3.2-1b"), (["--tokens", "0"], "at least 1")])
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        run(arguments)
