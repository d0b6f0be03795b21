"""The console line: what it says, and that the time left is right from the start."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from typing import Any

import pytest

from engine.metrics.console import Console, step_line
from tests.kit.clock import Clock

RECORD = {"step": 120, "loss": 3.21449, "grad_norm": 1.0234, "lr": 3e-4, "tokens_per_second": 12345.6, "mfu": 0.4853}


def test_line_of_a_step() -> None:
    assert step_line(RECORD, 1000, 250.0) == (
        "step  120  loss 3.2145  norm 1.023  lr 3.0e-4  12.3k tok/s  MFU 48.5%  0:04:10")


def test_what_is_unknown_is_said_to_be_or_left_out() -> None:
    line = step_line(RECORD | {"mfu": None, "loss": None}, 1000, None)
    assert "MFU" not in line and "loss    n/a" in line and line.endswith("12.3k tok/s")


LOSSES = [0.0123, 9.99996, 3.2145, 10.98765, 123.456, 1234.5, 2.5e7, float("nan"), float("inf"), None]
NORMS = [0.0, 2.4e-7, 0.00098, 0.0123, 0.9996, 9.9994, 9.9996, 56.78, 99.996, 678.91, 999.96, 12_345.6, 3e9,
         float("inf"), None]
SPEEDS = [0.4, 812.4, 9_999.4, 12_345.0, 99_960.0, 778_240.0, 999_700.0, 1.5e6, 25.04e6, 1.2e9, None]


def test_columns_stay_where_they_are_and_fit_into_80() -> None:
    """Whatever the numbers, with six digits of steps, an MFU and weeks to go."""
    record = RECORD | {"step": 300_000, "lr": 1.5e-4}
    lines = [step_line(record | change, 350_000, left) for change, left in [
        *(({"loss": loss}, 1e5) for loss in LOSSES), *(({"grad_norm": norm}, 2e3) for norm in NORMS),
        *(({"tokens_per_second": speed}, 3e6) for speed in SPEEDS),
        *(({"lr": lr}, 9e6) for lr in (0.0, 1e-9, 1.0, 2.3e-6)), *(({"mfu": mfu}, 36_000.0) for mfu in (0.02, 0.6))]]
    assert {len(line) for line in lines} == {80}
    for word in ("loss", "norm", "lr", "tok/s", "MFU"):
        assert len({line.index(word) for line in lines}) == 1, word


def test_what_never_changes_is_said_once() -> None:
    for mfu, said in ((None, "MFU n/a: the peak of this device and arithmetic is not known"),
                      (0.48, "MFU counts causal attention")):
        stream = io.StringIO()
        console = Console(1000, stream)
        for step in (1, 2, 3):
            console.step(RECORD | {"step": step, "mfu": mfu})
        lines = stream.getvalue().splitlines()
        assert len(lines) == 4 and lines[0] == said


def test_lines_of_a_cluster_carry_the_time_of_day() -> None:
    stream = io.StringIO()
    console = Console(1000, stream, stamped=True)
    console.step(RECORD)
    console.warning("slow")
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in stream.getvalue().splitlines())


@pytest.mark.parametrize(("first_step", "flagged"),
                         [(0, [False, True, False, True]), (100, [False, False, False, True])])
def test_updates_skipped_since_the_last_line_are_visible(first_step: int, flagged: list[bool]) -> None:
    stream = io.StringIO()
    console = Console(1000, stream, first_step=first_step)
    for step, skipped in enumerate([0, 1, 1, 3] if first_step == 0 else [1, 1, 1, 3], first_step + 1):
        console.step(RECORD | {"step": step, "skipped": skipped})
    lines = stream.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("step")]
    after = dict(pairwise([*lines, ""]))
    assert ["skipped" in after[line] for line in steps] == flagged
    assert lines[-1] == ("warning: skipped 2 steps, weights unchanged: the gradient was not finite or too large, or no "
                         "label counted")


@pytest.mark.parametrize(("tokens_per_second", "text"), [
    (812.4, "   812 tok/s"), (9999.0, "  9999 tok/s"), (778_240.0, "  778k tok/s"), (1.5e6, " 1.50M tok/s"),
])
def test_tokens_per_second(tokens_per_second: float, text: str) -> None:
    assert text in step_line(RECORD | {"tokens_per_second": tokens_per_second}, 1000, None)


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
    assert len(lines) == 6
    assert lines[2] == "step  120  valid loss 3.0000  perplexity 20.09"
    assert lines[3] == "step  120  saved (training waited 0.25 s) runs/x/checkpoints/step-00000120"
    assert lines[4] == "warning: validation data ran out"
    assert "\x1b" not in stream.getvalue()


def test_a_loss_of_comparisons_has_no_perplexity() -> None:
    stream = io.StringIO()
    with Console(1000, stream) as console:
        console.evaluation(120, 0.25, accuracy=0.975)
    assert stream.getvalue() == "step  120  valid loss 0.2500  accuracy 97.5%\n"


def test_terminal_has_a_live_bar_and_the_same_lines() -> None:
    stream = io.StringIO()
    with Console(1000, stream, is_terminal=True, first_step=100) as console:
        print_all(console)
    text = stream.getvalue()
    assert "\x1b[" in text and "120 of 1,000 steps" in text
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
    assert len(stream.getvalue().splitlines()) == 501


def test_diverged_validation_loss_does_not_stop_the_run() -> None:
    stream = io.StringIO()
    console = Console(10, stream, is_terminal=False)
    values: list[Any] = [1e6, float("nan"), float("inf")]
    for value in values:
        console.evaluation(1, value)
    assert [line.rsplit(" ", 1)[1] for line in stream.getvalue().splitlines()] == ["inf", "nan", "inf"]
