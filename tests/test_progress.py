"""How far a command has come: lines in a file, a bar on a terminal, both within 80 columns."""

from __future__ import annotations

import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from engine.progress import BYTES, Progress, duration, quiet
from tests.kit.clock import Clock

ROOT = Path(__file__).resolve().parents[1]


def test_durations() -> None:
    texts = [duration(seconds) for seconds in (59.6, 35_999, 36_000, 3 * 86400, 5 * 86400 + 7200, 123 * 86400)]
    assert texts == ["0:01:00", "9:59:59", "10h 00m", "72h 00m", "5d 02h", "123d"]


def lines(total: int, unit: str, reports: list[tuple[float, int]], worked: int | None = None, note: str = "",
          what: str = "writing") -> list[str]:
    """What is printed where there is no terminal, at `(seconds since the last, done)`."""
    stream, clock = io.StringIO(), Clock()
    with Progress(what, total, unit, stream=stream, clock=clock) as progress:
        for seconds, done in reports:
            clock.now += seconds
            progress.reach(done, worked, lambda: note)
    return stream.getvalue().splitlines()


def test_a_line_every_ten_seconds() -> None:
    printed = lines(4 * 10**9, BYTES, [(1, 10**9), (5, 10**9 + 1), (5, 2 * 10**9), (9.9, 3 * 10**9), (0.1, 3 * 10**9)])
    assert printed == ["writing  50 %  2.0 of 4.0 GB  100.0 MB/s  0:00:20 left",
                       "writing  75 %  3.0 of 4.0 GB  100.0 MB/s  0:00:10 left"]


def test_what_was_there_before_is_no_speed() -> None:
    """A pass that goes on at 90 % of its input; and text unpacked to three times the bytes read."""
    assert lines(1000, BYTES, [(20, 900), (10, 910)], worked=30) == [
        "writing  90 %  0.9 of 1.0 kB", "writing  91 %  0.9 of 1.0 kB  3 B/s  0:01:30 left"]


def test_other_units_and_unknown_totals() -> None:
    assert lines(4000, "windows", [(0, 0), (20, 1000)], note="loss 3.2145") == [
        "writing  25 %  1,000 of 4,000 windows  50/s  loss 3.2145  0:01:00 left"]
    assert lines(0, BYTES, [(0, 0), (20, 5 * 10**6)]) == ["writing  5.0 MB  250.0 kB/s"]


@pytest.mark.parametrize(("is_terminal", "asked"), [(False, [10.5, 20.5]), (True, [0.5, 1.5, 10.5, 20.5])])
def test_a_note_is_asked_for_where_it_is_shown(is_terminal: bool, asked: list[float]) -> None:
    """It may cost a wait for the device."""
    clock, times = Clock(), list[float]()
    start = clock.now

    def note() -> str:
        times.append(clock.now - start)
        return "loss 1"

    for shown in (False, True):
        with Progress("evaluating", 9, "windows", shown, io.StringIO(), is_terminal, clock) as progress:
            for done, seconds in enumerate((0.5, 1, 0.5, 8.5, 0.1, 9.9)):
                clock.now += seconds
                progress.reach(done, note=note)
        assert times == (asked if shown else [])
        start = clock.now


@pytest.mark.parametrize(("total", "unit", "note"), [
    (999 * 10**12, BYTES, ""), (10**7, "windows", "loss 12.3456"), (10**12, "steps", "")])
def test_lines_fit_into_80_columns(total: int, unit: str, note: str) -> None:
    for reports in ([(0, 0), (20.0, total)], [(0, 0), (20.0, total // 100_000)]):
        (line,) = lines(total, unit, reports, note=note, what="evaluating")
        assert len(line) <= 80, line


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    stream, clock = io.StringIO(), Clock()
    with Progress("writing", 100, stream=stream, is_terminal=True, clock=clock) as progress:
        progress.advance(20)
        clock.now += 1
        progress.advance(30)
        progress.print("said meanwhile")
    assert "\x1b[" in stream.getvalue() and "said meanwhile" in stream.getvalue()
    assert "50 of 100 B  30 B/s  0:00:02 left" in stream.getvalue()


def test_threads_report_together_and_a_quiet_one_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    stream, clock = io.StringIO(), Clock()
    with Progress("reading", 8000, "files", stream=stream, clock=clock) as progress, ThreadPoolExecutor(8) as pool:
        list(pool.map(progress.advance, [1] * 7999))
        clock.now += 20
        progress.advance(1)
    assert stream.getvalue().startswith("reading 100 %  8,000 of 8,000 files")
    with quiet("reading", 10) as progress:
        progress.advance(10)
    assert capfd.readouterr() == ("", "")


def test_it_is_the_only_one() -> None:
    """Whoever shows progress uses it."""
    folders = ("engine", "checkpoints_tools", "corpus_tools")
    found = [path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py")
             if "rich.progress" in path.read_text(encoding="utf-8")]
    assert found == [Path("engine/progress.py")]


def test_piped_output_is_not_drawn_into_the_bar() -> None:
    code = ("from engine.progress import Progress\nwith Progress('reading', 9, is_terminal=True) as progress:\n"
            "    progress.advance(3)\n    print('{\"whole\": true}')")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == '{"whole": true}\n' and "reading" in done.stderr
