"""`octant goodput`: what failures cost a job of a given size, and how often it is best to save."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from engine.errors import RequestError
from engine.plan.goodput import LLAMA_3, Failures, Times, best_interval, shares, young

MINUTES = (1, 2, 5, 10, 20, 30, 60, 120)


def run(args: argparse.Namespace) -> int:
    """Print the best interval, what the time goes into, and a table of other intervals.

    Raises:
        RequestError: a number is out of its range.
    """
    failures = Failures(args.failures, args.days, args.on)
    _require_numbers(args)
    times = Times(failures.mean_seconds(args.gpus), args.restart_seconds, args.save_seconds, args.write_seconds)
    best = max(best_interval(times), args.write_seconds, args.step_seconds or 0.0)
    intervals = {"best": best, **{f"{minutes} min": 60.0 * minutes for minutes in MINUTES
                                  if 60.0 * minutes >= args.write_seconds}}
    if args.json:
        print(json.dumps({"times": asdict(times), "best_interval_seconds": best, "young_seconds": young(times),
                          "goodput": shares(times, best).training, "shares": asdict(shares(times, best)),
                          "intervals": {name: shares(times, each).training for name, each in intervals.items()}},
                         indent=1))
        return 0
    source = " (Llama 3, arXiv:2407.21783, section 3.3.4)" if failures == LLAMA_3 else ""
    print(f"failures        {args.failures:g} in {args.days:g} days on {args.on:,} GPUs{source}: on {args.gpus:,} "
          f"one in {_long(times.failure)}")
    print(f"restart         {_long(times.restart)} from a failure to training")
    print(f"save            training waits {_long(times.save)}; it counts {_long(times.write)} later")
    steps = "" if args.step_seconds is None else f", {max(1, round(best / args.step_seconds)):,} steps"
    print(f"save every      {_long(best)}{steps} (Young's first order: {_long(young(times))})\n")
    print("interval   training   saving   restarting   done again")
    for name, interval in intervals.items():
        each = shares(times, interval)
        print(f"{name:<10} {each.training:>8.2%} {each.saving:>8.2%} {each.restarting:>12.2%} {each.lost:>12.2%}")
    return 0


def _require_numbers(args: argparse.Namespace) -> None:
    for name in ("failures", "days", "on", "gpus", "save_seconds", "step_seconds"):
        value = getattr(args, name)
        if value is not None and not 0 < value < float("inf"):
            raise RequestError(f"--{name.replace('_', '-')} {value:g}: a number above 0")
    for name in ("restart_seconds", "write_seconds"):
        if not 0 <= getattr(args, name) < float("inf"):
            raise RequestError(f"--{name.replace('_', '-')} {getattr(args, name):g}: a number from 0 on")


def _long(seconds: float) -> str:
    """`0.25 s`, `41 s`, `12.3 min`, `3.1 h`, `9.4 days`."""
    for most, unit, size in ((1.0, "s", 0.0), (100.0, "s", 1.0), (5_400.0, "min", 60.0), (172_800.0, "h", 3_600.0)):
        if seconds < most:
            return f"{seconds:.2g} s" if size == 0.0 else f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86_400:.3g} days"
