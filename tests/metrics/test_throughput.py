"""Speed arithmetic."""

from __future__ import annotations

from engine.metrics.throughput import throughput


def test_tokens_flops_and_utilisation() -> None:
    speed = throughput(tokens=6000, seconds=2.0, flops_per_token=4e9, num_devices=3, peak=8.0)
    assert speed.record() == {"tokens_per_second": 3000.0, "tflops_per_device": 4.0, "mfu": 0.5}


def test_unknown_peak_gives_no_utilisation() -> None:
    assert throughput(1, 1.0, 1.0, 1, None).mfu is None
