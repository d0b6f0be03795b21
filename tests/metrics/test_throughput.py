"""Speed arithmetic and the step timer."""

from __future__ import annotations

import pytest

from engine.metrics.throughput import StepTimer, throughput


def test_tokens_flops_and_utilisation() -> None:
    speed = throughput(tokens=6000, seconds=2.0, flops_per_token=4e9, num_devices=3, peak=8.0)
    assert speed.record() == {"tokens_per_second": 3000.0, "tflops_per_device": 4.0, "mfu": 0.5}


def test_unknown_peak_gives_no_utilisation() -> None:
    assert throughput(1, 1.0, 1.0, 1, None).mfu is None


def test_timer_counts_the_step_and_not_what_lies_between() -> None:
    now = iter([10.0, 12.5, 100.0, 101.0])
    timer = StepTimer(clock=lambda: next(now))
    timer.start()
    assert timer.stop() == 2.5
    timer.start()
    assert timer.stop() == 1.0


def test_timer_waits_for_the_device_before_it_reads_the_clock() -> None:
    events: list[str] = []

    def clock() -> float:
        events.append("clock")
        return 0.0

    timer = StepTimer(synchronize=lambda: events.append("wait"), clock=clock)
    timer.start()
    timer.stop()
    assert events == ["wait", "clock", "wait", "clock"]


def test_timer_stopped_without_start_is_an_error() -> None:
    timer = StepTimer()
    timer.start()
    timer.stop()
    with pytest.raises(RuntimeError):
        timer.stop()
