"""What one rank does in a step, in order: actions, matrix products (a block of ring attention counts as one), and
every collective's start and wait.

The recorder stands between the engine and `torch.distributed`, so what it sees is what is sent, whoever asked for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import engine.parallel.pipeline.executor as executor
import engine.parallel.pipeline.p2p as p2p
from engine.config import Config
from engine.distributed import collectives
from engine.distributed.mesh import Mesh
from engine.distributed.topology import Topology
from engine.kernels.attention_block import AttentionBlock
from engine.optim.adamw import AdamW
from engine.optim.gradients import sum_over_world
from engine.parallel.context.ring import RingAttention
from engine.parallel.parallelize import ParallelModel, parallelize
from engine.precision.gemms import PlainGemms
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import microbatches
from tests.kit.reference import global_batch

AXES = ("tensor", "pipeline", "context", "shard", "replicate", "gradient", "ends", "world")


@dataclass(frozen=True)
class Event:
    """`what` is an action, a matrix product, or start or wait of a collective; these also have a number and an axis."""

    what: str
    name: str
    number: int = -1
    axis: str = ""
    nbytes: int = 0


@dataclass
class Recording:
    """Events of one rank, and how many of its buckets and units there are."""

    events: list[Event] = field(default_factory=list)
    num_buckets: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def collectives(self) -> Counter[str]:
        """Collectives by kind and axis, such as `all_gather tensor`."""
        return Counter(f"{e.name} {e.axis}" for e in self.events if e.what == "start")

    @property
    def nbytes(self) -> Counter[str]:
        """Bytes that this rank brings to each kind of collective."""
        out: Counter[str] = Counter()
        for e in self.events:
            if e.what == "start":
                out[f"{e.name} {e.axis}"] += e.nbytes
        return out

    @property
    def actions(self) -> list[str]:
        return [e.name for e in self.events if e.what == "action"]

    def flights(self, name: str, axis: str) -> Iterator[list[Event]]:
        """For each such collective, the events between its start and the first wait for it."""
        for at, event in enumerate(self.events):
            if (event.what, event.name, event.axis) == ("start", name, axis):
                landing = next(i for i, e in enumerate(self.events) if e.what == "wait" and e.number == event.number)
                yield self.events[at + 1 : landing]


class _Noted:
    """A handle that notes the first wait for it."""

    def __init__(self, handle: Any, note: Callable[[], None]) -> None:
        self._handle, self._note = handle, note

    def wait(self) -> None:
        if self._note is not None:
            self._note()
            self._note = None
        self._handle.wait()

    def is_completed(self) -> bool:
        return self._handle.is_completed()


@contextmanager
def recorded(mesh: Mesh, model: ParallelModel) -> Iterator[Recording]:
    """Notes what this process does inside; of axes with the same ranks the first in `AXES` is named."""
    out = Recording()

    def axis_of(group: Any) -> str:
        ranks = tuple(dist.get_process_group_ranks(group or dist.group.WORLD))
        return next(name for name in AXES if getattr(mesh, name).ranks == ranks)

    def note(what: str, name: str) -> Callable[..., Any]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def noting(*args: Any, **kwargs: Any) -> Any:
                out.events.append(Event(what, str(args[0]) if what == "action" else name))
                return original(*args, **kwargs)
            return noting
        return wrap

    def collective(name: str, sent: Callable[..., Tensor]) -> Callable[..., Any]:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def noting(*args: Any, **kwargs: Any) -> Any:
                x, number = sent(*args), len(out.events)
                group = args[0][0].group if name == "exchange" else kwargs.get("group")
                where = axis_of(group)
                out.events.append(Event("start", name, number, where, x.numel() * x.element_size()))
                done = lambda: out.events.append(Event("wait", name, number, where))      # noqa: E731
                result = original(*args, **kwargs)
                if result is None:
                    done()
                    return None
                if isinstance(result, list):      # several handles of one exchange: the first wait is noted
                    return [_Noted(result[0], done), *result[1:]]
                return _Noted(result, done)
            return noting
        return wrap

    with pytest.MonkeyPatch.context() as patch:
        def replace(owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
            patch.setattr(owner, name, wrap(getattr(owner, name)))

        replace(collectives, "_all_gather_single", collective("all_gather", lambda out, x: x))
        replace(collectives, "_reduce_scatter_single", collective("reduce_scatter", lambda out, x: x))
        replace(dist, "all_reduce", collective("all_reduce", lambda x: x))
        replace(dist, "all_to_all_single", collective("all_to_all", lambda out, x: x))
        replace(dist, "broadcast", collective("broadcast", lambda x, *_: x))
        replace(dist, "batch_isend_irecv", collective("exchange", lambda operations: operations[0].tensor))
        messages = SimpleNamespace(isend=collective("send", lambda x, *_: x)(dist.isend),
                                   irecv=collective("receive", lambda x, *_: x)(dist.irecv))
        patch.setattr(p2p, "dist", messages)
        replace(PlainGemms, "forward", note("product", "forward"))
        replace(PlainGemms, "input_gradient", note("product", "input gradient"))
        replace(PlainGemms, "weight_gradient", note("product", "weight gradient"))
        for block in (block for chunk in model.chunks.values() for block in chunk.layers.values()):
            if isinstance(ring := block.self_attention.core_attention, RingAttention):
                patch.setattr(ring, "block", AttentionBlock(note("product", "forward")(ring.block.forward),
                                                            note("product", "input gradient")(ring.block.backward)))
        replace(executor, "record_function", note("action", ""))
        yield out


def build(config: Config, bucket_elements: int) -> tuple[ParallelModel, AdamW, Mesh]:
    """In a worker: this rank's part of a fresh model."""
    mesh = mesh_for(Topology.of(config))
    model = parallelize(config, mesh, bucket_elements=bucket_elements)
    model.initialise(config.run.seed)
    return model, AdamW(model.buckets, config.optim, model.operations), mesh


def record_step(config: Config, bucket_elements: int) -> Recording:
    """Runs on one rank: a step from its first action to the published weights."""
    model, optimizer, mesh = build(config, bucket_elements)
    batches = microbatches(config, global_batch(config, 1), mesh)
    with recorded(mesh, model) as out:
        losses = model.forward_backward(batches, 1e-3)
        sum_over_world(losses, model.buckets, mesh)
        optimizer.step(1e-3, torch.ones(()), torch.zeros(()))
        model.publish()
    out.num_buckets = len(model.buckets)
    out.extra = {"program": [str(action) for action in model.program], "peak": model.executor.peak_in_flight,
                 "partial": sum(b.kind.partial_sum for b in model.buckets),
                 "recorded by autograd": [b.grad_buffer.requires_grad for b in model.buckets]}
    return out


def record_layout(config: Config, bucket_elements: int = 6000) -> list[Recording]:
    """A recorded step of every rank."""
    return run_distributed(record_step, config.parallel.world_size, config, bucket_elements)
