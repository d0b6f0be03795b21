"""A make-believe accelerator: every operation on it has shapes, types and a device, and no values.

Run as a program, in a process of its own because it registers a device with torch for good:

    python -m tests.kit.accelerator '[{"parallel": {"pipeline": 2}, "last": true}, …]'       # changes to a small run

For each it trains two steps that are not logged, on the first or last rank of the layout (the collectives are torch's
fake ones), and prints one JSON line: null, or what went wrong.  Two faults that otherwise only a GPU shows are errors
here: an operation that mixes devices, and a value that the host reads back (`.item()`, `.tolist()`, `bool(…)`), which
would make it wait for the device.  Copying a number to the device waits as well: so `torch.tensor(x, device=…)` is
refused.  `read: true` has the loop read a value back, to see that it is noticed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils import backend_registration

from engine.config import Config
from engine.distributed.mesh import Mesh, single_mesh
from engine.distributed.topology import Topology
from engine.metrics.phases import Moment
from engine.model.context import Batch
from engine.train.batches import HostBatch, HostStep, Loader
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from engine.train.tally import LateRead
from tests.kit.fake import fake_rank
from tests.kit.runs import run_config

DEVICE = "pretend"
FIRST, LAST = 5, 6                         # steps, none of which is logged
READ = Loader._read


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]

    def is_autocast_enabled(self) -> bool:
        return False

    def get_autocast_dtype(self) -> torch.dtype:
        return torch.bfloat16

    def current_device(self) -> int:
        return 0


class Enough(Exception):
    """The steps have been done."""


def install() -> None:
    """Registers the device, and makes torch do on it what it would do on a GPU."""
    backend_registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=_Module())
    torch.utils.swap_tensors = _swap
    for name in ("tensor", "as_tensor"):
        setattr(torch, name, _without_copies(getattr(torch, name)))
    LateRead.exchange = _late                                                          # type: ignore[method-assign]


def _swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """`torch.utils.swap_tensors`, which refuses tensors that a FakeTensorMode knows of."""
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def _without_copies(make: Any) -> Any:
    def refusing(data: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device", "cpu")).startswith(DEVICE) and not isinstance(data, torch.Tensor):
            raise RuntimeError(f"{data!r} is copied to the device, and the host waits for it: use torch.full")
        result: torch.Tensor = make(data, **options)
        return result

    return refusing


def _late(self: LateRead, numbers: torch.Tensor) -> list[float]:
    """The one thing that the host reads after every step, and need not wait for."""
    assert numbers.device.type == DEVICE
    return [0.0] * len(numbers)


def _without_values(mode: FakeTensorMode) -> Callable[[HostBatch, Mesh], Batch]:
    """`HostBatch.part` of a batch whose values have been forgotten: a copy of real ones would really be made."""
    part = HostBatch.part

    def forgetful(batch: HostBatch, mesh: Mesh) -> Batch:
        ids = batch.document_ids_BS
        return part(HostBatch(batch.batch.map(lambda _, x: mode.from_tensor(x)),
                              None if ids is None else mode.from_tensor(ids)), mesh)

    return forgetful


def _with_values(loader: Loader, first: int) -> HostStep:
    """`Loader._read`: what happens on the host is real."""
    with unset_fake_temporarily():
        return READ(loader, first)


@contextmanager
def one_rank(config: Config, rank: int) -> Iterator[Mesh]:
    """The mesh of one rank whose peers are not there: what it receives has no values anyway."""
    world_size = config.parallel.world_size
    if world_size == 1:
        yield single_mesh(DEVICE)
        return
    with fake_rank(rank, world_size, DEVICE, f"cpu:fake,{DEVICE}:fake") as job:
        yield job.mesh(Topology.of(config))


def train_steadily(config: Config, rank: int, read: bool) -> None:
    """Some steps that are not logged."""
    def stop(moment: Moment) -> None:
        if moment.step > LAST:
            raise Enough
        if read and moment.phase == "update":
            trainer.state.optimizer.num_steps()

    with one_rank(config, rank) as mesh, FakeTensorMode(allow_non_fake_inputs=True) as mode, \
            patch.object(HostBatch, "part", _without_values(mode)), patch.object(Loader, "_read", _with_values):
        trainer = Trainer.start(config, mesh, Corpora.open(config), lambda: False)
        trainer.state.step = FIRST - 1
        trainer.phases.listeners.append(stop)
        try:
            trainer.run()
        except Enough:
            assert trainer.state.step == LAST
        finally:
            trainer.close()


def _short(text: str) -> str:
    """Of a traceback the lines of this repository, and what it ends with."""
    lines = text.splitlines()
    own = [line.strip() for line in lines if line.lstrip().startswith("File") and "site-packages" not in line]
    last = next(line for line in reversed(lines) if line[:1].isalpha() and "registered at" not in line)
    return "\n".join([*own, last[:500]])


def main() -> None:
    """One line for each case."""
    install()
    with tempfile.TemporaryDirectory() as folder:
        for number, case in enumerate(json.loads(sys.argv[1])):
            last, read = case.pop("last", False), case.pop("read", False)
            config = run_config(Path(folder), f"run-{number}", steps=40, **{
                "log": {"every": 30}, "checkpoint": {"every": 0, "resume": "never"}, "eval": {"every": 0}, **case})
            try:
                train_steadily(config, config.parallel.world_size - 1 if last else 0, read)
                print(json.dumps(None), flush=True)
            except Exception:
                print(json.dumps(_short(traceback.format_exc())), flush=True)


if __name__ == "__main__":
    main()
