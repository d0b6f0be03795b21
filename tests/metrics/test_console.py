"""The console line: what it says, and that the time left is right from the start."""

from __future__ import annotations

import io
from typing import Any

import pytest

from engine.metrics.console import Console, duration, step_line

RECORD = {"step": 120, "loss": 3.21449, "grad_norm": 1.0234, "lr": 3e-4, "tokens_per_second": 12345.6, "mfu": 0.4853}


class Clock:
    """Time that passes when told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_line_of_a_step() -> None:
    assert step_line(RECORD, 1000, 250.0) == (
        "step  120/1000 │ loss 3.2145 │ grad norm 1.02 │ lr 3.00e-04 │ 12.3k tokens/s │ MFU 48.5 % (causal) │ "
        "ETA 0:04:10")


def test_what_is_unknown_is_said_to_be() -> None:
    line = step_line(RECORD | {"mfu": None, "loss": None}, 1000, None)
    assert "MFU n/a (causal)" in line and "loss n/a" in line and line.endswith("ETA –")


@pytest.mark.parametrize(("first_step", "flagged"),
                         [(0, [False, True, False, True]), (100, [False, False, False, True])])
def test_updates_skipped_since_the_last_line_are_visible(first_step: int, flagged: list[bool]) -> None:
    stream = io.StringIO()
    console = Console(1000, stream, first_step=first_step)
    for step, skipped in enumerate([0, 1, 1, 3] if first_step == 0 else [1, 1, 1, 3], first_step + 1):
        console.step(RECORD | {"step": step, "skipped": skipped})
    lines = stream.getvalue().splitlines()
    assert ["SKIPPED" in line for line in lines] == flagged
    assert "SKIPPED 2" in lines[3]


@pytest.mark.parametrize(("tokens_per_second", "text"), [
    (812.4, " 812 tokens/s"), (9999.0, " 9999 tokens/s"), (778_240.0, " 778k tokens/s"), (1.5e6, " 1.5M tokens/s"),
])
def test_tokens_per_second(tokens_per_second: float, text: str) -> None:
    assert text in step_line(RECORD | {"tokens_per_second": tokens_per_second}, 1000, None)


def test_durations() -> None:
    assert (duration(59.6), duration(3 * 86400 + 7200)) == ("0:01:00", "3 days, 2:00:00")


@pytest.mark.parametrize("first_step", [0, 900])
def test_time_left_ignores_the_warm_up_and_the_steps_before_a_resume(first_step: int) -> None:
    clock, total = Clock(), 1000
    console = Console(total, io.StringIO(), is_terminal=False, first_step=first_step, clock=clock)
    clock.now += 60.0                                        # the first step compiles for a minute
    console.step(RECORD | {"step": first_step + 1})
    assert console.seconds_left() is None
    for step in range(first_step + 2, first_step + 5):
        clock.now += 2.0
        console.step(RECORD | {"step": step})
        assert console.seconds_left() == pytest.approx(2.0 * (total - step))


def test_time_left_follows_sparse_lines_and_a_change_of_speed() -> None:
    clock = Clock()
    console = Console(100_000, io.StringIO(), is_terminal=False, clock=clock)
    step = 0
    for seconds in [1.0] * 50 + [3.0] * 150:                 # ten steps a line, then three times slower
        step, clock.now = step + 10, clock.now + 10 * seconds
        console.step(RECORD | {"step": step})
    assert console.seconds_left() == pytest.approx(3.0 * (100_000 - step))


def print_all(console: Console) -> None:
    console.step(RECORD)
    console.evaluation(120, 3.0)
    console.checkpoint(120, "runs/x/checkpoints/step-00000120", 0.25)
    console.warning("validation data ran out")
    console.note("resumed from step 100")


def test_plain_lines_in_a_file() -> None:
    stream = io.StringIO()
    with Console(1000, stream) as console:
        print_all(console)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    assert "validation loss 3.0000 │ perplexity 20.09" in lines[1]
    assert "saved runs/x/checkpoints/step-00000120" in lines[2] and "0.25 s" in lines[2]
    assert lines[3] == "warning: validation data ran out"
    assert "\x1b" not in stream.getvalue()


def test_terminal_has_a_live_bar_and_the_same_lines() -> None:
    stream = io.StringIO()
    with Console(1000, stream, is_terminal=True, first_step=100) as console:
        print_all(console)
    text = stream.getvalue()
    assert "\x1b[" in text and "100/1000" in text
    assert "loss 3.2145" in text and "warning: validation data ran out" in text


def test_stream_without_unicode_does_not_stop_the_run() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    print_all(Console(1000, stream, is_terminal=False))
    assert b"loss 3.2145" in raw.getvalue()


def test_every_step_is_printed_however_fast() -> None:
    stream = io.StringIO()
    console = Console(500, stream, is_terminal=False)
    for step in range(1, 501):
        console.step(RECORD | {"step": step})
    assert len(stream.getvalue().splitlines()) == 500


def test_diverged_validation_loss_does_not_stop_the_run() -> None:
    stream = io.StringIO()
    console = Console(10, stream, is_terminal=False)
    values: list[Any] = [1e6, float("nan"), float("inf")]
    for value in values:
        console.evaluation(1, value)
    assert [line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines()] == ["inf", "nan", "inf"]
