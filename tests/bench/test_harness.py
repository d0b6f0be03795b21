"""The harness: who runs when, what counts, and what is said about it.  No test depends on how fast anything is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.bench.harness import (
    REPOSITORY,
    Case,
    Comparison,
    Measurement,
    _command,
    add_options,
    alternating,
    describe_environment,
    publish,
)


class Workshop:
    """Cases that only pass time, on a clock that stands otherwise."""

    def __init__(self) -> None:
        self.now = 0.0
        self.events: list[str] = []

    def clock(self) -> float:
        return self.now

    def case(self, name: str, *seconds: float, work: float = 1.0) -> Case:
        """Takes the given times, one after the other, and the last one from then on."""
        left = list(seconds)

        def run() -> None:
            self.events.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return Case(name, run, work)

    def compare(self, *cases: Case, repeats: int = 3, warmup: int = 2, unit: str = "",
                synchronize: Callable[[], None] | None = None) -> Comparison:
        return alternating(*cases, repeats=repeats, warmup=warmup, unit=unit, clock=self.clock,
                           synchronize=synchronize)


def test_cases_take_turns_and_the_warm_up_does_not_count() -> None:
    shop = Workshop()
    result = shop.compare(shop.case("a", 90, 90, 4, 5, 6), shop.case("b", 70, 70, 2, 2, 1))
    assert shop.events == ["a", "b"] * 5
    assert [m.seconds for m in result.measurements] == [(4, 5, 6), (2, 2, 1)]
    assert (result.ratio("a"), result.ratio("b")) == (1.0, 2.5)
    assert result.ratio_range("b") == (2.0, 6.0)


def test_one_disturbed_round_does_not_move_the_ratio() -> None:
    shop = Workshop()
    result = shop.compare(shop.case("a", 4), shop.case("b", 2, 2, 2, 2, 60, 2, 2), repeats=5)
    assert result.ratio("b") == 2.0
    assert result.ratio_range("b") == (4 / 60, 2.0)


def test_more_than_two_cases() -> None:
    shop = Workshop()
    result = shop.compare(shop.case("one", 8), shop.case("two", 4), shop.case("four", 16), repeats=2, warmup=0)
    assert shop.events == ["one", "two", "four"] * 2
    assert [result.ratio(name) for name in ("one", "two", "four")] == [1.0, 2.0, 0.5]


def test_time_measured_elsewhere_is_taken_over() -> None:
    shop = Workshop()
    result = shop.compare(shop.case("here", 4), Case("in other processes", lambda: 2.0))
    assert result.measurements[1].seconds == (2.0, 2.0, 2.0)


def test_ratio_is_per_unit_of_work() -> None:
    shop = Workshop()
    result = shop.compare(shop.case("one process", 4, work=100), shop.case("two processes", 5, work=200), unit="tokens")
    assert result.ratio("two processes") == pytest.approx(1.6)
    assert [m.rate for m in result.measurements] == [25, 40]


def test_device_is_waited_for_on_both_sides_of_a_run() -> None:
    shop = Workshop()
    shop.compare(shop.case("a", 1), shop.case("b", 1), repeats=1, warmup=0,
                 synchronize=lambda: shop.events.append("wait"))
    assert shop.events == ["wait", "a", "wait", "wait", "b", "wait"]


@pytest.mark.parametrize("arguments", [{"cases": []}, {"cases": ["a", "a"]}, {"cases": ["a", "b"], "repeats": 0}])
def test_what_cannot_be_compared_is_refused(arguments: dict[str, object]) -> None:
    shop = Workshop()
    cases = [shop.case(name, 1) for name in arguments.pop("cases")]          # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="different names and a repeat"):
        shop.compare(*cases, **arguments)                                    # type: ignore[arg-type]
    assert shop.events == []


RESULT = Comparison("Training step",
                    (Measurement("theirs", (2.0, 2.5, 3.0), 1000), Measurement("ours", (1.0, 2.0, 1.0), 1000)),
                    unit="tokens", warmup=1, environment={"machine": "a laptop", "command": "octant bench x"})


def test_text() -> None:
    title, head, theirs, ours, method, *facts = RESULT.text().splitlines()
    assert title == "Training step"
    assert head.split() == ["case", "median", "s", "min", "s", "max", "s", "tokens/s", "ratio", "range"]
    assert theirs.split() == ["theirs", "2.5", "2", "3", "400", "1.00×"]
    assert ours.split() == ["ours", "1", "1", "2", "1,000", "2.50×", "1.25–3.00"]
    assert "3 rounds" in method and "1 to warm up" in method
    assert facts == ["machine: a laptop", "command: octant bench x"]
    assert RESULT.text(environment=False).splitlines() == [title, head, theirs, ours, method]


def test_markdown() -> None:
    lines = RESULT.markdown().splitlines()
    assert lines[0] == "## Training step"
    assert lines[2:6] == ["| case | median s | min s | max s | tokens/s | ratio | range |",
                          "|---|---:|---:|---:|---:|---:|---:|",
                          "| theirs | 2.5 | 2 | 3 | 400 | 1.00× |  |",
                          "| ours | 1 | 1 | 2 | 1,000 | 2.50× | 1.25–3.00 |"]
    assert lines[-2:] == ["- machine: a laptop", "- command: `octant bench x`"]


def test_options_print_write_and_append(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    add_options(parser, repeats=5)
    arguments = ["--json", str(tmp_path / "r.json"), "--markdown", str(tmp_path / "r.md")]
    for _ in range(2):
        publish([RESULT, RESULT], parser.parse_args(arguments))
    assert parser.parse_args(arguments).repeats == 5
    first, second = json.loads((tmp_path / "r.json").read_text())
    assert first == second and first["cases"][1]["seconds"] == [1.0, 2.0, 1.0]
    assert (first["cases"][1]["ratio"], first["cases"][1]["ratio_range"]) == (2.5, [1.25, 3.0])
    assert first["environment"]["machine"] == "a laptop"
    assert (tmp_path / "r.md").read_text().count("## Training step") == 4
    assert "2.50×" in capsys.readouterr().out


def test_environment_names_machine_versions_and_commit() -> None:
    facts = describe_environment(["pytest", "no-such-package"])
    assert set(facts) == {"machine", "system", "versions", "commit", "command"} and all(facts.values())
    assert f"pytest {pytest.__version__}" in facts["versions"]
    assert "no-such-package not installed" in facts["versions"]


@pytest.mark.parametrize(("argv", "text"), [
    (["/somewhere/bin/octant", "bench", "matmul", "--size", "8"], "octant bench matmul --size 8"),
    ([str(REPOSITORY / "engine" / "__main__.py"), "bench", "matmul"], "octant bench matmul"),
    ([str(REPOSITORY / "benchmarks" / "train.py"), "--name", "a b"], "python benchmarks/train.py --name 'a b'"),
    (["/home/someone/own.py"], "python own.py"),
])
def test_command_is_shown_without_this_machines_folders(argv: list[str], text: str) -> None:
    assert _command(argv) == text
