"""`octant rehearse CONFIG.yaml`: a rank of a job of any size walked through here, before the job is queued."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence

from engine.config import Config, load_config, resolve_layout
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.hints import hint
from engine.plan.memory import gib
from engine.plan.rehearsal import DEVICE, Rehearsed, device_for, positions, rehearse


def run(args: argparse.Namespace) -> int:
    """Rehearse one rank, or one of every stage and tensor position; 1 where something is wrong.

    Raises:
        RequestError: there is no such rank or device, or the rank does not fit it.
        ConfigError: the configuration is wrong, or impossible on so many processes.
    """
    config = _resolved(load_config(args.config, args.overrides), args.world)
    topology = Topology.of(config)
    if args.all_stages and args.rank is not None:
        raise RequestError("--rank names one rank, --all-stages takes one of each stage and tensor position: give one")
    ranks = positions(topology) if args.all_stages else [args.rank or 0]
    device = device_for(args.device)
    since, done = time.perf_counter(), []
    for rank in ranks:
        done.append(rehearse(config, rank, device))
        if not args.json:
            print(_line(done[-1], topology), flush=True)
    if args.json:
        print(json.dumps([each.record() for each in done] if args.all_stages else done[0].record(), indent=1))
    else:
        print(_together(done, device.type, time.perf_counter() - since))
        print(hint("train", args.config, *args.overrides))
    return 1 if any(each.faults for each in done) else 0


def _resolved(config: Config, world: int | None) -> Config:
    parallel = config.parallel
    if world is None:
        data = parallel.data if isinstance(parallel.data, int) else 1
        return resolve_layout(config, data * parallel.model_parallel_size)
    copies = parallel.model_copy(update={"data": "auto"})
    return resolve_layout(config.model_copy(update={"parallel": copies}), world)


def _line(it: Rehearsed, topology: Topology) -> str:
    where = ", ".join(f"{axis} {index}" for axis, index in it.coordinates.items()
                      if getattr(topology, axis) > 1) or "alone"
    if it.faults:
        return f"rank {it.rank} ({where}): " + "; ".join(it.faults)
    took = "" if it.step_seconds is None else f", {it.step_seconds:.3g} s a step of {it.microbatches} microbatches"
    memory = f"at most {gib(it.peak_bytes)} of tensors" if it.peak_bytes else "done"
    return f"rank {it.rank} ({where}): {memory}{took}"


def _together(done: Sequence[Rehearsed], device: str, seconds: float) -> str:
    """What it comes to, and what it was."""
    wrong = sum(bool(each.faults) for each in done)
    what = f"{len(done)} rank{'s' * (len(done) > 1)} of the job rehearsed in {seconds:.0f} s on {device}"
    if wrong:
        return f"{what}: {wrong} with something wrong"
    if device == DEVICE:
        return f"{what}: nothing that the host waits for in a step, no tensor on another device than it belongs on"
    return f"{what}, without waiting for other ranks"

