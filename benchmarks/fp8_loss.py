"""What FP8 does to a loss: a small model trained with each recipe and in bf16, and in other layouts.

    python benchmarks/fp8_loss.py [--steps 300] [--folder F] [--only NAME …] [--markdown F]

A model of a million parameters reads the example corpus (`octant data example`) as bytes, on the CPU, where products
of FP8 matrices are emulated: the numbers are those of FP8, the speed is not.  All layers are in FP8, also the first and
last, which a real run keeps in bf16.  Every run sees the same samples in the same order and begins with the same
weights.  The loss is that of the last twentieth of the steps, in which each sample counts once, and the held-out one at
the end; both are compared with bf16's on one process.  What is there from an earlier call with the same folder is not
run again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from engine.bench.harness import describe_environment

RECIPES = ("tensorwise", "rowwise", "blockwise", "mxfp8")
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {}, "tensor 2": {"tensor": 2}, "ZeRO 3 over 2": {"data": 2, "zero": 3}}
RUNS = {"bf16": ("off", "one process"),
        **{f"{recipe}, {layout}": (recipe, layout) for layout in LAYOUTS for recipe in RECIPES
           if recipe != "mxfp8" or layout == "one process"}}
WITHIN = 0.01                                   # of bf16's loss


def config(folder: Path, name: str, steps: int) -> dict[str, Any]:
    fp8, layout = RUNS[name]
    source = [{"path": str(folder / "corpus")}]
    return {"run": {"dir": str(folder / name.replace(", ", "-").replace(" ", "_")), "device": "cpu"},
            "model": {"num_layers": 2, "hidden_size": 256, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 512,
                      "max_seq_len": 64},
            "parallel": LAYOUTS[layout], "precision": {"compute": "bf16", "fp8": fp8, "fp8_skip": []},
            "data": {"tokenizer": "bytes", "seq_len": 64, "train": source, "valid": source},
            "batch": {"micro": 4, "global": 8}, "steps": steps, "optim": {"lr": 2e-3, "warmup_steps": steps // 10},
            "checkpoint": {"every": 0}, "eval": {"every": steps, "batches": 8}}


def octant(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "engine", *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def losses(folder: Path, name: str, steps: int) -> tuple[float, float]:
    """Of the last twentieth, and held out; trained now, unless it was before."""
    values = config(folder, name, steps)
    log = Path(values["run"]["dir"]) / "metrics.jsonl"
    if not log.exists() or len(log.read_text().splitlines()) < steps:
        path = folder / f"{log.parent.name}.yaml"
        path.write_text(yaml.safe_dump(values))
        print(name, file=sys.stderr, flush=True)
        octant("train", path)
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    last = rows[-(steps // 20):]
    return sum(row["loss"] for row in last) / len(last), rows[-1]["valid_loss"]


def table(found: dict[str, tuple[float, float]]) -> Iterator[str]:
    yield "| products | loss | beside bf16 | held out | beside bf16 |"
    yield "|---|--:|--:|--:|--:|"
    loss, held_out = found["bf16"]
    for name, (own, own_held_out) in found.items():
        beside, beside_held_out = own / loss - 1, own_held_out / held_out - 1
        yield f"| {name} | {own:.4f} | {beside:+.2%} | {own_held_out:.4f} | {beside_held_out:+.2%} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--folder", type=Path, help="for corpus and runs; default: a temporary one")
    parser.add_argument("--only", nargs="+", choices=RUNS, default=list(RUNS), metavar="NAME", help="besides bf16")
    parser.add_argument("--markdown", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "corpus.idx").exists():
            octant("data", "example", folder / "corpus.jsonl")
            octant("prepare", folder / "corpus.jsonl", "--tokenizer", "bytes", "--output", folder / "corpus")
        found = {name: losses(folder, name, args.steps) for name in RUNS if name == "bf16" or name in args.only}
    lines = [f"# What FP8 does to a loss, {args.steps} steps", "",
             "Made by `benchmarks/fp8_loss.py`; its docstring says what is measured.", "", *table(found), "",
             *(f"- {name}: {value}" for name, value in describe_environment().items())]
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")
    far = [name for name, own in found.items() if abs(own[0] / found["bf16"][0] - 1) > WITHIN]
    if far:
        print(f"further than {WITHIN:.0%} from bf16: {', '.join(far)}", file=sys.stderr)
    return 1 if far else 0


if __name__ == "__main__":
    sys.exit(main())
