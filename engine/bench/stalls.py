"""Where the time of a step goes on one rank: what it computes, and what it stands still for.

A collective that runs under computations costs nothing, however long it takes.  So what counts is how long a rank
stands still where it needs a result, and which axis of the mesh it waits for.  The watch stands between the engine and
`torch.distributed`: whatever is started there is waited for through it.  On a CPU the clock is read before and after a
wait; on a GPU, where a wait holds up the stream of work and not the host, events are put into that stream.

    compute            forward and backward passes, recomputation included
    tensor_comm        waiting for the tensor and the context axis
    pipeline_bubble    waiting for another stage: for its work, or its message, which look the same from here
    data_comm          waiting for gradients to be summed up and weights to be gathered
    optimizer          norm, update, copies of the new weights
    other              reading samples, and what is in no phase

Marks at every wait cost a little, so a step that is watched is not one that is timed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch.distributed as dist

from engine.distributed import collectives
from engine.distributed.mesh import Mesh
from engine.metrics.phases import Mark, Phases, seconds
from engine.plan.pretend import replaced

CAUSES = ("compute", "tensor_comm", "pipeline_bubble", "data_comm", "optimizer", "other")
AXES = {"world": "other", "ends": "pipeline_bubble", "pipeline": "pipeline_bubble", "replicate": "data_comm",
        "shard": "data_comm", "gradient": "data_comm", "context": "tensor_comm", "tensor": "tensor_comm"}
PASSES, UPDATE = "forward_backward", ("reduce", "update", "publish")
STARTED = ((collectives, "_all_gather_single"), (collectives, "_reduce_scatter_single"), (dist, "all_reduce"),
           (dist, "broadcast"), (dist, "all_to_all_single"), (dist, "batch_isend_irecv"), (dist, "isend"),
           (dist, "irecv"))


class _Watched:
    """The handle of something that was started; the time in which it is waited for is noted."""

    def __init__(self, work: Any, waiting: Callable[[], Any]) -> None:
        self._work, self._waiting = work, waiting

    def wait(self, *arguments: Any) -> Any:
        with self._waiting():
            return self._work.wait(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class Stalls:
    """What a rank waits for while `watching`, by phase and cause."""

    def __init__(self, mesh: Mesh, phases: Phases) -> None:
        self._phases = phases
        # Axes of the same ranks share a group, and then all but one are of size one, or mean the same.
        self._causes = {axis.group: cause for name, cause in AXES.items() if (axis := getattr(mesh, name)).size > 1}
        self._spans: list[tuple[str, str, Mark, Mark]] = []

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, waits are noted."""
        with ExitStack() as stack:
            for module, name in STARTED:
                stack.enter_context(replaced(module, name, partial(self._start, getattr(module, name))))
            yield

    def _start(self, start: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        group = options.get("group")
        if arguments and isinstance(arguments[0], list) and arguments[0] and hasattr(arguments[0][0], "group"):
            group = arguments[0][0].group                                          # of a batch of messages
        waiting = partial(self._waiting, self._causes.get(group, "other"))
        with waiting():                                      # what is not asynchronous has waited when it returns
            work = start(*arguments, **options)
        if isinstance(work, list):
            return [_Watched(each, waiting) for each in work]
        return None if work is None else _Watched(work, waiting)

    @contextmanager
    def _waiting(self, cause: str) -> Iterator[None]:
        begin = self._phases.mark()
        yield
        self._spans.append((self._phases.now.phase, cause, begin, self._phases.mark()))

    def split(self) -> dict[str, float]:
        """Seconds of a step by cause, of the steps taken while watching; their sum is that of a step.

        On a GPU it waits for what has been started.
        """
        taken, spans = self._phases.taken(), self._spans
        self._spans = []
        waited: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        for phase, cause, begin, end in spans:
            waited[phase][cause] += seconds(begin, end)
        out = dict.fromkeys(CAUSES, 0.0)
        for of_phase in (waited[phase] for phase in (PASSES, *UPDATE)):
            for cause, passed in of_phase.items():
                out[cause] += passed
        for name, phases in (("compute", (PASSES,)), ("optimizer", UPDATE)):
            out[name] += sum(taken.by_phase.get(phase, 0.0) - sum(waited[phase].values()) for phase in phases)
        out["other"] += taken.in_steps - sum(out.values())
        return {cause: passed / taken.steps for cause, passed in out.items()}
