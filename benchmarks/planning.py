"""The planner beside what others measured: step times and memory of published runs, and what it says of them.

    python benchmarks/planning.py [--rows benchmarks/planning/rows.csv] [--each] [--markdown F]

Prints one line for each set of runs: how many, the mean and the worst relative error, and whether constants of
`engine/plan/devices.py` were fitted to it.  `--each` prints every run as well.  Rows of your own have the same columns;
`practice` is a name of `engine/plan/practice.py`, `step_seconds` and `memory_gib` may be empty.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from engine.config import Config
from engine.plan import practice
from engine.plan.devices import device
from engine.plan.stages import all_stages
from engine.plan.state import stage_state
from engine.plan.step import step_time

ROWS = Path(__file__).with_name("planning") / "rows.csv"
PRACTICES = {each.name: each for each in vars(practice).values() if isinstance(each, practice.Practice)}
# What the constants were fitted to: of these sets the share of the rows in brackets.
FITTED = {"vTrain, one node": "one row in seven", "vTrain, several nodes": "30 rows", "Korthikanti 2022": "all",
          "Narayanan 2021": "all", "NVIDIA H100, BF16": "all", "NVIDIA H100, FP8": "all", "SimuMax B200": "time"}
STATE_BYTES = 18                           # of a parameter: bf16, fp32 gradient, master, two moments
# GiB that cuBLAS and Transformer Engine hold all the time; cuBLAS takes 32 MiB from Hopper on, and 8 before.
WORKSPACES = {"a100-80g": 0.075, "h100-sxm": 0.10, "b200": 0.10}


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
                  "tie_embeddings": row["mlp"] == "gelu", "mlp_bias": row["bias"] == "1",
                  "attention_bias": row["bias"] == "1"},
        "parallel": {"tensor": number["tensor"], "pipeline": number["pipeline"], "context": number["context"],
                     "data": number["data"], "sequence": bool(number["sequence"]), "zero": number["zero"],
                     "recompute": row["recompute"], "virtual_stages": chunks,
                     "schedule": "interleaved" if chunks > 1 else "1f1b"},
        "precision": {"fp8": "te" if row["precision"] == "fp8" else "off"},
        "data": {"seq_len": number["seq"]}, "batch": {"micro": number["micro"], "global": number["global_batch"]},
        "steps": 1000})


def compared(rows: Path) -> Iterator[Compared]:
    """Every figure of the file beside its prediction."""
    with rows.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            config, group = config_of(row), row["set"]
            parallel = config.parallel
            name = (f"{row['source']}: {row['layers']} × {row['hidden']}, t{parallel.tensor} p{parallel.pipeline} "
                    f"c{parallel.context} d{parallel.data} m{config.batch.micro}")
            if row["step_seconds"]:
                seconds = step_time(config, device(row["device"]), PRACTICES[row["practice"]]).seconds
                yield Compared(f"time: {group}", name, float(row["step_seconds"]), seconds)
            if row["steady_gib"]:              # of the last stage, which is what Megatron-LM's tests record
                last = stage_state(config, parallel.pipeline - 1, even=True).bytes.total
                positions = number_of_positions(row) * STATE_BYTES * (parallel.pipeline == 1)
                steady = (last + positions) / 2**30 + WORKSPACES[row["device"]]
                yield Compared(f"between steps: {group}", name, float(row["steady_gib"]), steady)
            if row["memory_gib"]:
                even = PRACTICES[row["practice"]].deals_evenly
                gib = max(stage.total for stage in all_stages(config, even=even)) / 2**30
                yield Compared(f"memory: {group}", name, float(row["memory_gib"]), gib)


def number_of_positions(row: Mapping[str, str]) -> int:
    """Elements of the learned positions, which Megatron-LM's GPT has and Octant does not."""
    return int(row["seq"]) * int(row["hidden"])


def table(results: Mapping[str, list[Compared]]) -> str:
    """The sets, as Markdown."""
    lines = ["| set | runs | mean error | worst | fitted |", "|---|---|---|---|---|"]
    for group, each in results.items():
        errors = [abs(one.error) for one in each]
        kind, _, name = group.partition(": ")
        fitted = FITTED.get(name, "no") if kind == "time" else "workspaces" if kind == "between steps" else "no"
        lines.append(f"| {group} | {len(each)} | {mean(errors):.1%} | {max(errors):.1%} | {fitted} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--each", action="store_true", help="print every run")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    results: dict[str, list[Compared]] = defaultdict(list)
    for one in compared(args.rows):
        results[one.group].append(one)
        if args.each:
            print(f"{one.error:+7.1%}  {one.measured:10.3f}  {one.predicted:10.3f}  {one.group}: {one.name}")
    print(table(results))
    if args.markdown is not None:
        args.markdown.write_text(table(results) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
