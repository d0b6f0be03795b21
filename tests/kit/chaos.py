"""A small run that something happens to all the time, and what becomes of it.  `python -m tests.kit.chaos --minutes 10`

Two or more processes train a tiny model under `launch/train.sh`.  A seeded die settles what happens, where and in which
phase: killed, crashed, frozen, hanging, an exception, a flipped bit, a lost network, a full disk, a damaged checkpoint,
a NaN, a leap of the clock.  One strikes about every `--every` seconds; the steps at which they do follow from how long
a step takes here, measured first.  The oracle is a run of as many steps that nobody disturbs (but for the same NaNs):
final weights and every number of `metrics.jsonl` must be equal to the last bit.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from engine.config import Config
from engine.metrics.events import Event, read_events
from engine.metrics.goodput import CAUSES, IN_STEPS, PREFIX, text
from tests.kit.runs import assert_equal_tensors, launch, metrics, run_config, tensors, trained

DEADLY = ("kill", "segfault", "exit", "raise", "network_drop", "stop", "hang")
PHASES = ("load", "forward_backward", "reduce", "update", "publish", "read", "save")
SAVE_EVERY_SECONDS = 1.0
WATCHDOG_SECONDS = 4.0


def faults(steps: int, every: int, save_every: int, ranks: int, seed: int) -> list[dict[str, Any]]:
    """One for each `every` steps, at a random place."""
    dice, found = random.Random(seed), []
    kinds: list[str] = []
    for at in range(every, steps - every // 2, every):
        if not kinds:                                        # all in turn, each turn in another order
            kinds = [*DEADLY, "bit_flip", "disk_full", "stalled_writer", "damage", "nan", "clock_jump", "slow"]
            dice.shuffle(kinds)
        kind, phase = kinds.pop(), dice.choice(PHASES)
        step = at + dice.randrange(every // 3 + 1)
        if phase == "save":
            step = step // save_every * save_every + save_every
        fault = {"kind": kind, "rank": dice.randrange(ranks), "step": step, "phase": phase, "seconds": 2.0}
        if kind in ("nan", "bit_flip"):
            fault["phase"] = "load"
        if kind == "nan":
            fault["every_time"] = True
        if kind == "clock_jump":
            fault["seconds"] = dice.choice((-1e5, 1e5))
        found.append(fault)
        if kind == "damage":                                 # is noticed by the next start only
            found.append(fault | {"kind": "kill", "phase": "forward_backward", "step": step + 1})
    return found


def configured(folder: Path, name: str, steps: int, save_every: int, ranks: int,
               inject: list[dict[str, Any]]) -> Config:
    return run_config(
        folder, name, steps=steps, parallel={"data": ranks, "zero": 0}, batch={"micro": 1, "global": 4 * ranks},
        data={"seq_len": 32, "train": [{"path": str(folder / "train"), "epochs": None}]}, eval={"every": 0},
        checkpoint={"every": save_every, "keep": 3, "async": True}, log={"every": 5},
        reliability={"inject": inject, "max_restarts_without_progress": 5,
                     "watchdog": {"min_seconds": WATCHDOG_SECONDS, "start_seconds": 120, "save_seconds": 20}})


def finish(config: Config, output: Path) -> float:
    """Runs it to its end; seconds."""
    began = time.monotonic()
    with output.open("w") as file:
        job = launch(config)
        assert job.stdout is not None
        for line in job.stdout:
            file.write(line)
    if job.wait() != 0:
        raise AssertionError(f"ended with {job.returncode}:\n{output.read_text()[-4000:]}")
    return time.monotonic() - began


def between(events: list[Event], first: str, then: str) -> list[float]:
    """Seconds from each event of the one kind to the next of the other."""
    found, since = [], None
    for event in events:
        if event.kind == first:
            since = since or event.time
        elif event.kind == then and since is not None:
            found.append((event.time - since).total_seconds())
            since = None
    return found


def quantile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))] if values else 0.0


def step_seconds(folder: Path, ranks: int) -> float:
    """How long a step takes here, now, with what belongs to it."""
    config = configured(folder, "measured", 40, 1000, ranks, [])
    finish(config, folder / "measured.out")
    rows = metrics(config)
    return float((rows[-1]["time"] - rows[1]["time"]) / (rows[-1]["step"] - rows[1]["step"]))


def report(config: Config, seconds: float) -> dict[str, Any]:
    """What became of the run."""
    events = read_events(Path(config.run.dir))
    injected = [event for event in events if event.kind == "injected"]
    account = {cause: events[-1].detail["goodput"][PREFIX + cause] for cause in CAUSES}
    restarting = account["restart"] + account["start"]
    productive = sum(account[cause] for cause in IN_STEPS)
    ends = between(events, "failed", "start")
    apart = (injected[-1].time - injected[0].time).total_seconds() / max(1, len(injected) - 1)
    return {
        "seconds": round(seconds), "steps": config.steps, "faults": dict(Counter(e.detail["fault"] for e in injected)),
        "seconds_between_faults": round(apart, 1),
        "attempts": sum(event.kind == "start" for event in events), "goodput": text(account),
        "productive_of_the_time_not_restarting": round(productive / (sum(account.values()) - restarting), 4),
        "restart_seconds": {"p50": round(quantile(ends, 0.5), 1), "p95": round(quantile(ends, 0.95), 1),
                            "of": "the end of an attempt to the next one's first step", "number": len(ends)},
        "load_average": os.getloadavg()[1], "cores": os.cpu_count()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--every", type=float, default=30.0, help="seconds between faults")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="chaos-") as name:
        folder = Path(name)
        seconds = step_seconds(folder, args.ranks)
        away = args.every / 6                                # a guess: so much of each interval goes into a restart
        every, save_every = (max(2, round(each / seconds)) for each in (args.every - away, SAVE_EVERY_SECONDS))
        steps = max(3, round(60 * args.minutes / args.every)) * every
        planned = faults(steps, every, save_every, args.ranks, args.seed)
        print(f"{seconds:.3f} s a step: {steps} steps, {len(planned)} faults, seed {args.seed}", flush=True)
        config = configured(folder, "chaos", steps, save_every, args.ranks, planned)
        found = report(config, finish(config, folder / "chaos.out"))
        print(json.dumps(found, indent=1), flush=True)
        lasting = [fault for fault in planned if fault.get("every_time")]
        whole = configured(folder, "whole", steps, 10 * steps, args.ranks, lasting)
        finish(whole, folder / "whole.out")
        assert_equal_tensors(tensors(config, steps), tensors(whole, steps))
        assert trained(config) == trained(whole)
    print("finished; weights and metrics are those of a run that nobody disturbed, to the last bit")


if __name__ == "__main__":
    main()
