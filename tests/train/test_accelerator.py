"""A steady step on a make-believe accelerator: no tensor on the wrong device, and nothing that the host waits for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.indexed import IndexedWriter
from tests.kit.runs import LAYOUTS, ROOT


def complaints(cases: list[dict[str, Any]]) -> list[str | None]:
    done = subprocess.run([sys.executable, "-m", "tests.kit.accelerator", json.dumps(cases)], cwd=ROOT,
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line == "null" or line.startswith('"')]


def test_a_steady_step_waits_for_nothing(tmp_path: Path) -> None:
    """The first and the last rank of every kind of layout, with and without documents; and a step that does wait."""
    with IndexedWriter(tmp_path / "documents", np.uint16) as writer:
        for length in range(2, 60):
            writer.add_document(np.arange(length))
    masked = {"data": {"document_mask": True, "train": [{"path": str(tmp_path / "documents")}], "valid": []}}
    names = ("single", "interleaved", "zero 2", "zero 3", "context", "tensor × pipeline", "tensor × zero 1",
             "zb-v × zero 2")
    layouts: list[dict[str, Any]] = [
        *(LAYOUTS[name] for name in names), {"recompute": "full"}, {"recompute": "selective"},
        {"data": 4, "zero_shard": 2}, {"data": 2, "reproducible": True}, {"pipeline": 2, "schedule": "zb-h1"}]
    cases = [{"parallel": parallel, "last": last} for parallel in layouts
             for last in ((False, True) if "pipeline" in parallel else (False,))]
    cases += [{"parallel": parallel, **masked} for parallel in ({"data": 2}, {"context": 2})]
    cases += [{"precision": {"compute": "bf16"}}, {"read": True}]
    *found, read = complaints(cases)
    wrong = [f"{case}: {complaint}" for case, complaint in zip(cases, found, strict=False) if complaint]
    assert not wrong and len(found) == len(cases) - 1, "\n".join(wrong)
    assert read is not None and "DataDependentOutputException" in read and "num_steps" in read
