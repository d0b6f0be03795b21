"""Comparing speeds honestly: cases take turns, and medians are compared.

A machine drifts: clocks change with temperature, caches fill, somebody else starts a job.  Measuring all of A and then
all of B puts the drift into the difference.  Here the cases take turns, A B A B …, after some rounds that are not
counted, so drift meets both alike, and medians ignore the round in which something else happened.

    result = alternating(Case("transformers", theirs, work=tokens), Case("octant", ours, work=tokens), unit="tokens")
    print(result.text())                    # also: result.markdown(), result.to_dict()

The first case is the baseline.  The ratio of another case compares medians of the time per unit of work: above 1 the
case is faster.  The range beside it is the smallest and the largest ratio within one round; a claim that the range
contradicts is noise.  Every output carries the machine, the versions, the commit and the command, because a number
without them is hearsay.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch

from engine import __version__
from engine.errors import RequestError
from engine.report.charts import number
from engine.writing import refuse_other_files, write_errors, write_whole

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Case:
    """One contender.

    Attributes:
        name: what it is called in the tables.
        run: does the work once.  It returns None and is timed here, or the seconds it measured itself, as a job in
            other processes does.
        work: units done by one run, such as tokens.
    """

    name: str
    run: Callable[[], float | None]
    work: float = 1.0


@dataclass(frozen=True)
class Measurement:
    """What one case took, in seconds, in the order measured."""

    name: str
    seconds: tuple[float, ...]
    work: float = 1.0

    @property
    def median_seconds(self) -> float:
        return median(self.seconds)

    @property
    def rates(self) -> tuple[float, ...]:
        """Units of work per second, in each round."""
        return tuple(self.work / seconds for seconds in self.seconds)

    @property
    def rate(self) -> float:
        """Units of work per second, at the median time."""
        return self.work / self.median_seconds


@dataclass(frozen=True)
class Comparison:
    """Measurements of cases that took turns; the first is the baseline.

    Attributes:
        title: what was compared.
        measurements: one per case, with equally many seconds each.
        unit: what `work` counts; empty: no rate is printed.
        warmup: rounds before the first that counts.
        environment: machine, versions, commit, command.
        facts: what else is known of a case, by its name: columns of the table, the same for all cases.
        figures: what else is known of the comparison, for programs that read the JSON.
    """

    title: str
    measurements: tuple[Measurement, ...]
    unit: str = ""
    warmup: int = 0
    environment: dict[str, str] = field(default_factory=dict)
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def ratio(self, name: str) -> float:
        """How many times as fast as the baseline the case `name` is, at the medians."""
        return self._named(name).rate / self.measurements[0].rate

    def ratio_range(self, name: str) -> tuple[float, float]:
        """The smallest and the largest ratio within one round."""
        ratios = [own / base for own, base in zip(self._named(name).rates, self.measurements[0].rates, strict=True)]
        return min(ratios), max(ratios)

    def text(self, environment: bool = True) -> str:
        """A table for the terminal."""
        rows = self._rows()
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                           for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
        facts = [f"{name}: {value}" for name, value in self.environment.items()] if environment else []
        return "\n".join([self.title, *(f"  {line}" for line in lines), self._method(), *facts])

    def markdown(self, environment: bool = True) -> str:
        """A section for a file of `benchmarks/`."""
        head, *rows = (f"| {' | '.join(row)} |" for row in self._rows())
        rule = "|---|" + "---:|" * (head.count("|") - 2)
        facts = [f"- {name}: " + (f"`{value}`" if name == "command" else value)
                 for name, value in self.environment.items()]
        return "\n".join([f"## {self.title}", "", head, rule, *rows, "", self._method(), "",
                          *([*facts, ""] if environment else [])])

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        cases = [asdict(m) | {"median_seconds": m.median_seconds, "rate": m.rate, "ratio": self.ratio(m.name),
                              "ratio_range": self.ratio_range(m.name)} | dict(self.facts.get(m.name, {}))
                 for m in self.measurements]
        return {"title": self.title, "unit": self.unit, "warmup": self.warmup, "cases": cases,
                "environment": self.environment} | dict(self.figures)

    def _named(self, name: str) -> Measurement:
        return next(measurement for measurement in self.measurements if measurement.name == name)

    def _rows(self) -> list[list[str]]:
        columns = list(next(iter(self.facts.values()), ()))
        rows = [["case", "median s", "min s", "max s", *([f"{self.unit}/s"] if self.unit else []), "ratio", "range",
                 *columns]]
        for m in self.measurements:
            low, high = self.ratio_range(m.name)
            rate = [number(m.rate)] if self.unit else []
            rows.append([m.name, *(f"{s:.4g}" for s in (m.median_seconds, min(m.seconds), max(m.seconds))), *rate,
                         f"{self.ratio(m.name):.2f}×", "" if m is self.measurements[0] else f"{low:.2f}–{high:.2f}",
                         *(self.facts[m.name][column] for column in columns)])
        return rows

    def _method(self) -> str:
        return (f"{len(self.measurements[0].seconds)} rounds in which the cases take turns, after {self.warmup} to "
                f"warm up; medians. Ratio to {self.measurements[0].name}: above 1 is faster.")


def alternating(*cases: Case, repeats: int = 9, warmup: int = 2, title: str = "", unit: str = "",
                synchronize: Callable[[], None] | None = None, packages: Sequence[str] = (),
                clock: Callable[[], float] = time.perf_counter) -> Comparison:
    """Run the cases in turns, A B A B …, and time each.

    Args:
        cases: the baseline first; names differ.
        repeats: rounds that count.
        warmup: rounds before, which compile, allocate and fill caches.
        title: what is compared; the cases' names unless given.
        unit: what the cases' `work` counts, such as `tokens`.
        synchronize: waits for the device, before and after each run.
        packages: distributions whose versions belong to the result, besides torch's.
    """
    if not cases or repeats < 1 or len({case.name for case in cases}) < len(cases):
        raise ValueError(f"alternating() needs cases with different names and a repeat; got "
                         f"{[case.name for case in cases]}, repeats={repeats}")
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for turn in range(-warmup, repeats):
        for case in cases:
            taken = _timed(case, synchronize, clock)
            if turn >= 0:
                seconds[case.name].append(taken)
    measurements = tuple(Measurement(case.name, tuple(seconds[case.name]), case.work) for case in cases)
    return Comparison(title or " / ".join(seconds), measurements, unit, warmup, describe_environment(packages))


def _timed(case: Case, synchronize: Callable[[], None] | None, clock: Callable[[], float]) -> float:
    gc.collect()                                             # or the other case's garbage would be paid for here
    if synchronize is not None:
        synchronize()
    start = clock()
    own = case.run()
    if synchronize is not None:
        synchronize()
    return clock() - start if own is None else own


def add_options(parser: argparse.ArgumentParser, repeats: int = 9) -> None:
    """The options every benchmark has: `--repeats`, `--json FILE` and `--markdown FILE`."""
    parser.add_argument("--repeats", type=int, default=repeats, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--json", type=_results_file, metavar="FILE", help="write the results as JSON")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="append the results to a Markdown file")


def publish(results: Sequence[Comparison], args: argparse.Namespace) -> None:
    """Print the results of one process, and write them where the options of `add_options` say."""
    print("\n\n".join(result.text(environment=result is results[-1]) for result in results))
    if args.json is not None:
        content = json.dumps([result.to_dict() for result in results], indent=1, ensure_ascii=False)
        with write_errors(args.json):
            write_whole(args.json, content + "\n")
    if args.markdown is not None:
        with write_errors(args.markdown), args.markdown.open("a", encoding="utf-8") as file:
            file.write("\n".join(result.markdown(environment=result is results[-1]) for result in results) + "\n")


def _results_file(name: str) -> Path:
    """Refused before anything is measured where it holds something else than results."""
    try:
        refuse_other_files([Path(name)], _is_published)
    except RequestError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return Path(name)


def _is_published(data: bytes) -> bool:
    """Whether a file holds earlier results."""
    try:
        return all({"title", "cases", "environment"} <= set(result) for result in json.loads(data))
    except (ValueError, TypeError):
        return False


def describe_environment(packages: Sequence[str] = ()) -> dict[str, str]:
    """What a measurement depends on: machine, threads, versions, commit, command."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}",
                *(f"{package} {_version(package)}" for package in packages)]
    return {
        "machine": ", ".join([f"{cpu_name()} ({os.cpu_count()} cores, {torch.get_num_threads()} threads)",
                              *(f"{devices.count(name)} × {name}" for name in dict.fromkeys(devices))]),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": ", ".join(versions),
        "commit": _commit(),
        "command": _command(sys.argv),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    """As the system calls it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    """The commit measured, marked where tracked files differ from it; the version where there is no repository."""
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return commit + (" with local changes" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return f"octant {__version__}, not a git checkout"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def _command(argv: Sequence[str]) -> str:
    """The command line as another user would type it, without this machine's folders."""
    program = Path(argv[0])
    if program.name in ("octant", "__main__.py"):
        return shlex.join(["octant", *argv[1:]])
    resolved = program.resolve()
    inside = resolved.relative_to(REPOSITORY) if resolved.is_relative_to(REPOSITORY) else Path(program.name)
    return shlex.join(["python", str(inside), *argv[1:]])
