"""A run's folder as training leaves it, with made-up numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from engine.config import load_config


def write_run(run_dir: Path, num_steps: int = 40, overrides: tuple[str, ...] = (),
              every: int = 1) -> list[dict[str, Any]]:
    """Write `config.yaml` and `metrics.jsonl`; returns the records."""
    run_dir.mkdir(parents=True)
    source = run_dir / "source.yaml"
    source.write_text("model: {preset: tiny}\nsteps: 100\nbatch: {micro: 1, global: 8}\ndata: {seq_len: 64}\n"
                      "parallel: {tensor: 2, pipeline: 2, data: 2}\n")
    (run_dir / "config.yaml").write_text(load_config(source, overrides).dump())
    source.unlink()
    records = [_record(step) for step in range(every, num_steps + 1, every)]
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def _record(step: int) -> dict[str, Any]:
    seconds = 9.0 if step == 1 else 0.5
    record = {"step": step, "loss": 2 + 6 * math.exp(-step / 10), "grad_norm": 1 + 200 / step, "lr": 1e-4,
              "tokens": step * 512, "consumed_samples": step * 8, "step_seconds": seconds,
              "tokens_per_second": 512 / seconds, "tflops_per_device": 0.25, "mfu": None, "memory_bytes": 3 * 2**30,
              "skipped": int(step >= 7)}
    return record | ({"valid_loss": 2.5} if step % 20 == 0 else {})
