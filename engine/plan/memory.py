"""Does a job fit?  Asked by each rank before anything is built, because the kernel's answer is to kill without a word.

What is there all the time, weights, gradients, fp32 masters and moments, is exact and is read off what the rank will
build (`engine.plan.explain`).  Of activations, what no rank can do without is added (`least_activation_bytes`).  So a
job that passes may still be too large, and one that does not pass cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from engine.config import Config
from engine.distributed.host_memory import Room, host_memory
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.plan.estimate import gib, least_activation_bytes
from engine.plan.explain import StateBytes, explain


def require_room(config: Config, rank: int, ranks_on_host: Sequence[int], device: torch.device) -> list[str]:
    """What `rank` should say of its memory before it starts.

    Args:
        ranks_on_host: all ranks on this rank's machine, itself included; on a CPU they share its memory.
        device: where this rank will compute.

    Raises:
        RequestError: the state and the least of activations are more than there is.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        room: Room | None = Room(free, f"free on {device}")
        ranks_on_host = [rank]
    else:
        room = host_memory()
    return compare(states(config, ranks_on_host), room, config)


def states(config: Config, ranks: Sequence[int]) -> list[StateBytes]:
    """What each of these ranks holds all the time; it differs between pipeline stages only, but for some padding."""
    topology, by_stage = Topology.of(config), dict[int, StateBytes]()
    stages = [topology.coordinates(rank)["pipeline"] for rank in ranks]
    for rank, stage in zip(ranks, stages, strict=True):
        if stage not in by_stage:
            by_stage[stage] = explain(config, rank).bytes
    return [by_stage[stage] for stage in stages]


def compare(needed: Sequence[StateBytes], room: Room | None, config: Config) -> list[str]:
    """Lines for people about what the ranks with these states need together and what there is.

    Raises:
        RequestError: it is too much.
    """
    total, step = sum(each.total for each in needed), len(needed) * least_activation_bytes(config)
    who = "this process" if len(needed) == 1 else f"the {len(needed)} processes on this machine"
    of_all = "" if len(needed) == 1 else f" of {len(needed)} processes"
    what = f"memory: {gib(total)} of weights, gradients and optimizer state{of_all}"
    if room is None:
        return [what]
    if total + step > room.available:
        parts = ", ".join(f"{name} {gib(sum(getattr(each, name) for each in needed))}"
                          for name in ("parameters", "gradients", "optimizer"))
        raise RequestError(
            f"this job does not fit: {who} would hold {gib(total)} all the time ({parts}) and at least {gib(step)} "
            f"more in a step (batch.micro {config.batch.micro} × data.seq_len {config.data.seq_len} tokens); "
            f"{gib(room.available)} are {room.where}. {_remedy(config, total > room.available)}")
    return [f"{what}; {gib(room.available)} {room.where}"]


def _remedy(config: Config, state_is_too_large: bool) -> str:
    if state_is_too_large:
        return ("Use more devices (parallel.tensor, parallel.pipeline), shard more of it over data ranks "
                f"(parallel.zero, now {config.parallel.zero}), or a smaller model")
    return ("Lower batch.micro or data.seq_len, or cut the sequence over more devices (parallel.context, "
            "parallel.tensor)")
