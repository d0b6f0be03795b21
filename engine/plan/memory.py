"""Does a job fit?  Asked before anything is built, because the kernel's answer is to kill without a word.

What each process will hold at the worst moment of a step is worked out from the configuration alone
(`engine.plan.stages`), without torch, and compared with what there is.  A job that would need more is refused with the
numbers and the cheapest change of the configuration that makes it fit; the prediction is allowed to be `SLACK` too high
before anybody is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from engine.config import Config, resolve_layout
from engine.distributed.host_memory import Room
from engine.distributed.topology import Topology
from engine.errors import ConfigError, RequestError
from engine.plan.stages import StageMemory, all_stages

SLACK = 0.03                               # docs/planning.md: predictions are within it of what an allocator counts


def require_room(config: Config, ranks: Sequence[int], room: Room | None, *, on_gpu: bool) -> list[str]:
    """Lines for people about what the processes that share a memory will need of it.

    Args:
        ranks: these processes; on a GPU one.

    Raises:
        RequestError: it is more than there is.
    """
    stages = stages_of(config, ranks, on_gpu)
    total, of_all = sum(each.total for each in stages), "" if len(stages) == 1 else f" of {len(stages)} processes"
    if room is not None and total * (1 - SLACK) > room.available:
        who = "this process" if len(stages) == 1 else f"the {len(stages)} processes on this machine"
        raise RequestError(f"this job does not fit: {who} would hold {gib(total)} ({_parts(stages)}), and "
                           f"{gib(room.available)} are {room.where}. The largest part is {largest(stages)}. "
                           + _remedy(config, ranks, room.available, on_gpu))
    state, step = _state_and_step(stages)
    there = "" if room is None else f", and {gib(room.available)} {room.where}"
    return [f"memory: at most {gib(total)}{of_all}{there}",
            f"  state {gib(state)}, activations and workspace {gib(step)}"]


def stages_of(config: Config, ranks: Sequence[int], on_gpu: bool) -> list[StageMemory]:
    """What each of these ranks needs; it differs between pipeline stages only, but for some padding."""
    topology, stages = Topology.of(config), all_stages(config, on_gpu=on_gpu)
    return [stages[topology.coordinates(rank)["pipeline"]] for rank in ranks]


def largest(stages: Sequence[StageMemory]) -> str:
    """The largest term of the fullest stage, for people."""
    name, size = max(stages, key=lambda stage: stage.total).largest
    return f"{name} ({gib(size)} of a process)"


def _state_and_step(stages: Sequence[StageMemory]) -> tuple[float, float]:
    """Bytes that are there all the time, and those that come and go within a step."""
    return (sum(each.state.total for each in stages), sum(each.activations + each.workspace for each in stages))


def _parts(stages: Sequence[StageMemory]) -> str:
    state, step = _state_and_step(stages)
    return f"{gib(state)} of weights, gradients and optimizer state and {gib(step)} of activations and workspace"


def _remedy(config: Config, ranks: Sequence[int], available: float, on_gpu: bool) -> str:
    """The first change that makes it fit, of those that keep the number of processes; they are in order of cost."""
    for words, changed in changes(config):
        need = sum(each.total for each in stages_of(changed, ranks, on_gpu))
        if need <= available:
            return f"Set {words}: {gib(need)}"
    return ("No change of the layout on as many processes is enough: use more devices (parallel.tensor, "
            "parallel.pipeline), a smaller model, or train adapters (adapter.rank)")


def changes(config: Config) -> Iterator[tuple[str, Config]]:
    """What saves memory, cheapest first: each change, then each together with those before it."""
    parallel, batch = config.parallel, config.batch
    steps: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("parallel.recompute=selective", lambda: {"parallel": {"recompute": "selective"}}),
        (f"parallel.zero={max(parallel.zero, 1)}", lambda: {"parallel": {"zero": max(parallel.zero, 1)}}),
        ("batch.micro=1", lambda: {"batch": {"micro": 1}}),
        ("parallel.recompute=full", lambda: {"parallel": {"recompute": "full", "recompute_layers": None}}),
        ("parallel.zero=2", lambda: {"parallel": {"zero": max(parallel.zero, 2)}}),
        ("parallel.zero=3", lambda: {"parallel": {"zero": 3}}),
    ]
    if parallel.recompute != "none":
        steps.pop(0)
    useless = {f"parallel.zero={parallel.zero}", f"batch.micro={batch.micro}"}
    if parallel.data_size * parallel.context == 1:
        steps = [step for step in steps if "zero" not in step[0]]
    together: dict[str, str] = {}
    changed = config
    for words, change in steps:
        if words in useless:
            continue
        try:
            alone = resolve_layout(config.with_changes(**change()), parallel.world_size)
            changed = resolve_layout(changed.with_changes(**change()), parallel.world_size)
        except ConfigError:
            continue
        together[words.partition("=")[0]] = words
        yield words, alone
        if len(together) > 1:
            yield " ".join(together.values()), changed


def gib(num_bytes: float) -> str:
    """`5.1 GiB`, `310 MiB`."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
