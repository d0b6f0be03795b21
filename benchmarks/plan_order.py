"""Whether a calibrated plan orders layouts as they are: 12 layouts of a small model, predicted and measured.

    torchrun --nproc-per-node 4 benchmarks/plan_order.py --rounds 9 --markdown results.md

On four processes of this machine.  The network is measured, and steps of other models (data parallel, of other widths
and lengths) calibrate the computation; nothing of the layouts that are compared is known to the plan.  Then these take
turns, a step each, so that whatever else the machine does meets all of them, and the median step of each counts.
Prints both orders and Spearman's rank correlation, of the plan before and after calibration.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

from engine.bench.harness import describe_environment
from engine.bench.mfu import Measured
from engine.bench.mfu_rows import Rows, row_of
from engine.bench.network import measure as measure_network
from engine.bench.stalls import Stalls
from engine.config import Config, resolve_layout
from engine.distributed.agree import gather_json
from engine.distributed.environment import available_cores, launch_environment
from engine.distributed.mesh import Job
from engine.distributed.process import joined
from engine.distributed.topology import Topology
from engine.plan.calibrate import calibrated
from engine.plan.devices import device
from engine.plan.search import words
from engine.plan.step import step_time
from engine.train.loop import Trainer
from engine.train.made_up import made_up_trainer, steps_only, take_step

LAYOUTS: tuple[dict[str, Any], ...] = (
    {"data": 4}, {"data": 4, "zero": 3}, {"data": 4, "recompute": "full"}, {"data": 2, "tensor": 2}, {"tensor": 4},
    {"tensor": 4, "recompute": "full"}, {"pipeline": 4}, {"pipeline": 2, "data": 2}, {"pipeline": 2, "tensor": 2},
    {"pipeline": 4, "recompute": "full"}, {"data": 4, "zero": 2, "recompute": "selective"},
    {"tensor": 2, "data": 2, "recompute": "full"})
OTHERS = ((128, 128, 2), (384, 64, 1), (128, 512, 1), (512, 128, 1), (64, 128, 4))         # width, length, micro
PROCESSES = 4


def config_of(hidden: int, length: int, micro: int, **parallel: Any) -> Config:
    """A job of four layers."""
    return resolve_layout(Config.model_validate({
        "model": {"num_layers": 4, "hidden_size": hidden, "num_heads": max(hidden // 32, 4),
                  "ffn_hidden_size": hidden * 8 // 3 // 32 * 32, "vocab_size": 2048, "max_seq_len": length},
        "parallel": parallel, "precision": {"compute": "fp32"}, "data": {"seq_len": length}, "steps": 1000,
        "batch": {"micro": micro, "global": 16 * micro}}), PROCESSES)


def trainers(configs: Sequence[Config], job: Job, stack: ExitStack) -> list[Trainer]:
    """One of each, all at once."""
    made = []
    for config in configs:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        made.append(made_up_trainer(steps_only(config, 100), job.mesh(Topology.of(config)), folder))
        stack.callback(made[-1].close)
    return made


def in_turns(running: Sequence[Trainer], rounds: int, job: Job) -> list[list[float]]:
    """Seconds of each one's steps, on the slowest rank; the first round does not count."""
    own: list[list[float]] = [[] for _ in running]
    for number in range(rounds + 1):
        for trainer, seconds in zip(running, own, strict=True):
            take_step(trainer)
            taken = trainer.phases.taken()
            seconds += taken.each if number else ()
    told = gather_json(own, job.world.group)
    return [[max(step) for step in zip(*(rank[i] for rank in told), strict=True)] for i in range(len(running))]


def calibration(job: Job, rounds: int, folder: Path) -> list[Path]:
    """Files of the network and of steps of other models, as `octant bench` writes them."""
    network = measure_network(job, PROCESSES, "here", (4096, 65536, 2**20), rounds)
    configs = [config_of(*size, data=PROCESSES) for size in OTHERS]
    causes: list[list[dict[str, float]]] = [[] for _ in configs]
    with ExitStack() as stack:
        running = trainers(configs, job, stack)
        stalls = [Stalls(trainer.mesh, trainer.phases) for trainer in running]
        for number in range(rounds + 1):
            for trainer, watch, seen in zip(running, stalls, causes, strict=True):
                with watch.watching():
                    take_step(trainer)
                split = watch.split()
                seen += [split] if number else []
    told = gather_json(causes, job.world.group)
    files = [folder / "network.json", folder / "mfu.json"]
    if job.rank == 0:
        files[0].write_text(json.dumps(network.record()))
        rows = Rows(files[1])
        for i, config in enumerate(configs):
            split = {cause: median(step[cause] for rank in told for step in rank[i]) for cause in told[0][i][0]}
            rows.add(row_of(config, "cpu", 1, None, Measured((sum(split.values()),), split, 0), None,
                            PROCESSES / available_cores()))
    return files


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Correlation of ranks, none of which are equal."""
    ranks = [[sorted(each).index(value) for value in each] for each in (a, b)]
    count = len(a)
    return 1 - 6 * sum((x - y) ** 2 for x, y in zip(*ranks, strict=True)) / (count * (count**2 - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="turns that count (default: %(default)s)")
    parser.add_argument("--size", type=int, nargs=3, default=(256, 128, 1), metavar=("HIDDEN", "LENGTH", "MICRO"))
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--keep", type=Path, help="a folder for the calibration's files and the times")
    args = parser.parse_args()
    launched = launch_environment()
    with joined(launched, "cpu") as job, tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        folder = args.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        files = calibration(job, args.rounds, folder)
        configs = [config_of(*args.size, **layout) for layout in LAYOUTS]
        times = in_turns(trainers(configs, job, stack), args.rounds, job)
        if job.rank == 0:
            (folder / "times.json").write_text(json.dumps(times))
            tell(configs, times, files, args.markdown)


def tell(configs: Sequence[Config], times: Sequence[Sequence[float]], files: Sequence[Path],
         markdown: Path | None) -> None:
    """The table and the correlation."""
    table, measured = device("cpu"), [median(each) for each in times]
    ours = calibrated(table, files)
    before, after = ([step_time(config, on).seconds for config in configs] for on in (table, ours.device))
    lines = ["| layout | measured | calibrated plan | plan before |", "|---|---:|---:|---:|"]
    for _, i in sorted((seconds, i) for i, seconds in enumerate(measured)):
        lines.append(f"| {words(configs[i])} | {measured[i]:.3f} s | {after[i]:.3f} s | {before[i]:.3f} s |")
    lines += ["", f"Rank correlation with what was measured: {spearman(measured, after):.2f} calibrated, "
                  f"{spearman(measured, before):.2f} before. The calibrated figures miss their own runs by "
                  f"{ours.error or 0:.0%}.", "", *(f"- {k}: {v}" for k, v in describe_environment().items())]
    print("\n".join(lines))
    if markdown is not None:
        markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
