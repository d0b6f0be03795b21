"""The planner beside what others measured: step times and memory of published runs, and what it says of them.

    python -m benchmarks.planning [--rows benchmarks/planning/rows.csv] [--each] [--markdown F]

Prints one line for each set of runs: how many, the mean and the worst relative error, the mean over every third run,
and what of the set the constants of `engine/plan/devices.py` and `planning_memory.py` were fitted to.  `--each` prints
every run as well.  Rows of your own have the same columns, or are a file that `planning_sources.py` knows; `practice`
is a name of `engine/plan/practice.py`, `options` are words of `planning_memory.Options`; `step_seconds`, `memory_gib`
and `steady_gib` may be empty.

`planning/calculated.csv` has, in three columns more, what others did not measure but calculated: the first stage's
activations, what its layers hold between steps, its parameters.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from benchmarks.planning_memory import (
    Options,
    activation_bytes,
    layer_state_bytes,
    parameter_bytes,
    peak_bytes,
    steady_bytes,
)
from benchmarks.planning_sources import Row, rows_of
from engine.config import Config
from engine.plan import practice
from engine.plan.devices import device
from engine.plan.step import step_time

ROWS = Path(__file__).with_name("planning") / "rows.csv"
CALCULATED = ROWS.with_name("calculated.csv")
PRACTICES = {each.name: each for each in vars(practice).values() if isinstance(each, practice.Practice)}
# What was fitted to which sets; where it says two thirds, every third run was held back from it.
FITTED = {"time: vTrain, one node": "two thirds", "time: vTrain, several nodes": "30 rows",
          "time: Korthikanti 2022": "all", "time: Narayanan 2021": "all", "time: NVIDIA H100, BF16": "all",
          "time: NVIDIA H100, FP8": "all", "time: SimuMax B200": "all",
          "between steps: Megatron-LM golden files": "messages", "memory: nanotron H100": "gathered inputs"}


@dataclass(frozen=True)
class Compared:
    """A run: what was measured, and what is predicted."""

    group: str
    name: str
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def config_of(row: Mapping[str, str]) -> Config:
    """A row's job."""
    number = {key: int(value) for key, value in row.items() if value.isdigit()}
    chunks = number["chunks"]
    return Config.model_validate({
        "model": {"num_layers": number["layers"], "hidden_size": number["hidden"], "num_heads": number["heads"],
                  "num_kv_heads": number["kv_heads"], "ffn_hidden_size": number["ffn"], "mlp": row["mlp"],
                  "vocab_size": number["vocab"], "max_seq_len": number["seq"],
                  "tie_embeddings": row["mlp"] == "gelu" or Options.of(row).tied, "mlp_bias": row["bias"] == "1",
                  "attention_bias": row["bias"] == "1"},
        "parallel": {"tensor": number["tensor"], "pipeline": number["pipeline"], "context": number["context"],
                     "data": number["data"], "sequence": bool(number["sequence"]), "zero": number["zero"],
                     "recompute": row["recompute"], "virtual_stages": chunks,
                     "schedule": "interleaved" if chunks > 1 else "1f1b"},
        "precision": {"fp8": "te" if row["precision"] == "fp8" else "off"},
        "data": {"seq_len": number["seq"]}, "batch": {"micro": number["micro"], "global": number["global_batch"]},
        "steps": 1000})


def compared(rows: Iterable[Row]) -> Iterator[Compared]:
    """Every figure of the rows beside its prediction."""
    for row in rows:
        config, group = config_of(row), row["set"]
        parallel = config.parallel
        name = (f"{row['source']}: {row['layers']} × {row['hidden']}, t{parallel.tensor} p{parallel.pipeline} "
                f"c{parallel.context} d{parallel.data} m{config.batch.micro}")
        if row["step_seconds"]:
            seconds = step_time(config, device(row["device"]), PRACTICES[row["practice"]]).seconds
            yield Compared(f"time: {group}", name, float(row["step_seconds"]), seconds)
        options, stages = Options.of(row), range(parallel.pipeline)
        if row["steady_gib"]:                  # Megatron-LM's tests record the last rank's
            stages = stages[-1:]
            steady = steady_bytes(config, row["device"], options, stages[0]) / 2**30
            yield Compared(f"between steps: {group}", name, float(row["steady_gib"]), steady)
        if row["memory_gib"]:
            gib = max(peak_bytes(config, row["device"], options, stage) for stage in stages) / 2**30
            yield Compared(f"memory: {group}", name, float(row["memory_gib"]), gib)
        for what, calculated in {"activations": activation_bytes(config, options, 0),
                                 "layers": layer_state_bytes(config, 0),
                                 "parameters": parameter_bytes(config, 0)}.items() if "activations_gib" in row else ():
            if stated := row[f"{what}_gib"]:
                yield Compared(f"calculated {what}: {group}", name, float(stated), calculated / 2**30)


def grouped(results: Iterable[Compared]) -> dict[str, list[Compared]]:
    """By set."""
    groups: dict[str, list[Compared]] = defaultdict(list)
    for one in results:
        groups[one.group].append(one)
    return groups


def held(of_a_set: list[Compared]) -> list[Compared]:
    """The third that nothing is fitted to."""
    return of_a_set[2::3]


def table(results: Mapping[str, list[Compared]]) -> str:
    """The sets, as Markdown."""
    lines = ["| set | runs | mean error | worst | mean of the third | fitted |", "|---|---|---|---|---|---|"]
    for group, each in results.items():
        errors, apart = ([abs(one.error) for one in some] for some in (each, held(each) or each))
        lines.append(f"| {group} | {len(each)} | {mean(errors):.1%} | {max(errors):.1%} | {mean(apart):.1%} | "
                     f"{FITTED.get(group, 'no')} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, nargs="+", default=[ROWS, CALCULATED])
    parser.add_argument("--each", action="store_true", help="print every run")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results = grouped(compared(row for path in args.rows for row in rows_of(path)))
    for one in (one for each in results.values() for one in each) if args.each else ():
        print(f"{one.error:+7.1%}  {one.measured:10.3f}  {one.predicted:10.3f}  {one.group}: {one.name}")
    print(table(results))
    if args.markdown is not None:
        args.markdown.write_text(table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
