"""A make-believe accelerator: every operation on it has shapes, types and a device, and neither memory nor values.

torch has a device for backends of others.  Registered under a name of its own, and used with fake tensors, it takes
part in autograd like a GPU; and two faults that otherwise only a GPU shows are errors on it: an operation that mixes
devices, and a value that the host reads back (`.item()`, `.tolist()`, `bool(…)`), for which it would wait.  Copying a
number to a device waits as well, so `torch.tensor(x, device=…)` is refused.

A few things of the engine need values, and get them from elsewhere while `pretending`: samples are read and collated
for real and then forgotten, what a rank asks its peers on the host is answered by itself, and the one number that the
host hears a step late is zero.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch

from engine.distributed.agree import maximum
from engine.distributed.mesh import Job, Mesh, single_mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.model.context import Batch
from engine.train import batches
from engine.train.batches import HostBatch, HostStep, Loader
from engine.train.tally import LateRead

DEVICE = "pretend"


def install() -> None:
    """Registers the device with torch, for as long as the process lives.

    Raises:
        RequestError: this torch has not what it is made of.
    """
    registration = _part("torch.utils.backend_registration")
    _part("torch._subclasses.fake_tensor")
    if hasattr(torch, DEVICE):
        return

    class Module(registration._DummyBackendModule):                    # type: ignore[name-defined]
        """What torch asks of a device's module."""

        def get_amp_supported_dtype(self) -> list[torch.dtype]:
            return [torch.bfloat16]

        def is_autocast_enabled(self) -> bool:
            return False

        def get_autocast_dtype(self) -> torch.dtype:
            return torch.bfloat16

        def current_device(self) -> int:
            return 0

    registration._setup_privateuseone_for_python_backend(DEVICE, backend_module=Module())


def _part(name: str) -> Any:
    """A module of torch that it does not promise to have."""
    try:
        return import_module(name)
    except ImportError as error:
        raise RequestError(f"torch {torch.__version__} has not what fake tensors on a device of their own are made of: "
                           f"{error}") from None


@contextmanager
def pretending() -> Iterator[Any]:
    """What is made inside has no values, but for what is read from files; yields the mode."""
    fake = _part("torch._subclasses.fake_tensor")
    with fake.FakeTensorMode(allow_non_fake_inputs=True) as mode, ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", message=".*data pointer of FakeTensor.*")   # it is compared, never followed
        for owner, name, new in _replacements(mode, fake.unset_fake_temporarily):
            stack.enter_context(replaced(owner, name, new))
        yield mode


@contextmanager
def replaced(owner: Any, name: str, new: Any) -> Iterator[None]:
    """Inside, an attribute of a module or a class is another."""
    before = getattr(owner, name)
    setattr(owner, name, new)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _replacements(mode: Any, on_the_host: Any) -> Iterator[tuple[Any, str, Any]]:
    """What has values while everything else has none: (owner, name, instead)."""
    part, read = HostBatch.part, Loader._read

    def forgetful(batch: HostBatch, mesh: Mesh) -> Batch:
        """A copy of real values to the device would really be made, so they are forgotten before."""
        own = batch.batch.map(lambda _, x: mode.from_tensor(x))
        if own.documents is not None:
            own = replace(own, documents=replace(own.documents, cu_seqlens=mode.from_tensor(own.documents.cu_seqlens)))
        return part(HostBatch(own), mesh)

    def with_values(loader: Loader, first: int) -> HostStep:
        with on_the_host():
            return read(loader, first)

    def alone(values: list[int], group: object) -> list[int]:
        with on_the_host():
            return maximum(values, None)

    def late(read: LateRead, numbers: torch.Tensor) -> list[float]:
        return [0.0] * len(numbers)

    yield HostBatch, "part", forgetful
    yield Loader, "_read", with_values
    yield batches, "maximum", alone
    yield LateRead, "exchange", late
    yield torch.utils, "swap_tensors", _swap
    yield torch.nn.functional, "scaled_dot_product_attention", _attention
    for name in ("tensor", "as_tensor"):
        yield torch, name, _without_copies(getattr(torch, name))


def _swap(a: torch.Tensor, b: torch.Tensor) -> None:
    """`torch.utils.swap_tensors`, which refuses tensors that a mode knows of."""
    a.__class__, b.__class__ = b.__class__, a.__class__
    a.__dict__, b.__dict__ = b.__dict__, a.__dict__
    torch._C._swap_tensor_impl(a, b)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """What a fused kernel takes and keeps; torch's own for a device that it does not know writes scores out."""
    result: torch.Tensor = _Fused.apply(q, k, v)
    return result


class _Fused(torch.autograd.Function):
    """q [B, H, S, D] → [B, H, S, D]; kept are its inputs, its output and a number for each row."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q, k, v, _, _ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class CopiedNumber(RuntimeError):
    """A number was copied to the device, for which the host waits."""


def _without_copies(make: Any) -> Any:
    def refusing(data: Any, **options: Any) -> torch.Tensor:
        if str(options.get("device", "cpu")).startswith(DEVICE) and not isinstance(data, torch.Tensor):
            raise CopiedNumber(f"{data!r} is copied to the device, and the host waits for it: use torch.full")
        result: torch.Tensor = make(data, **options)
        if result.dim() and getattr(result, "constant", None) is not None:
            vars(result)["constant"] = None     # of one element: its copy to the device would really be made
        return result

    return refusing


@contextmanager
def one_rank(topology: Topology, rank: int, device: torch.device | str) -> Iterator[Mesh]:
    """The mesh of one rank whose peers are not there: its collectives do nothing, and what it receives is arbitrary.

    Raises:
        RequestError: this torch has no such collectives.
    """
    dist, kind = torch.distributed, torch.device(device).type
    if topology.world_size == 1:
        yield single_mesh(device)
        return
    store = _part("torch.testing._internal.distributed.fake_pg").FakeStore()
    backend = "fake" if kind == "cpu" else f"cpu:fake,{kind}:fake"
    dist.init_process_group(backend, store=store, rank=rank, world_size=topology.world_size)
    try:
        yield _Alone(device).mesh(topology)
    finally:
        dist.destroy_process_group()


class _Alone(Job):
    """Every group speaks what the default group does."""

    def _backend(self, name: str) -> str | None:
        return None


class Allocations:
    """What tensors without memory would take: every storage on the device, from its first use to its end.

    Attributes:
        held, peak: bytes now, and at most.
    """

    def __init__(self) -> None:
        self.held = self.peak = 0
        self._storages: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}

    @contextmanager
    def counting(self) -> Iterator[Allocations]:
        """Inside, what operations make is counted."""
        see, resize = self.see, torch.UntypedStorage.resize_

        class Mode(_part("torch.utils._python_dispatch").TorchDispatchMode):           # type: ignore[misc]
            """Looks at the result of every operation."""

            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                result = func(*args, **(kwargs or {}))
                for each in result if isinstance(result, tuple | list) else (result,):
                    if isinstance(each, torch.Tensor) and each.device.type == DEVICE:
                        see(each.untyped_storage())
                return result

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            if storage._cdata in self._storages:
                self._forget(storage._cdata)
                see(storage)
            return result

        with replaced(torch.UntypedStorage, "resize_", resized), Mode():
            yield self

    def see(self, storage: torch.UntypedStorage) -> None:
        """Counts it, unless it is counted."""
        key, size = storage._cdata, storage.nbytes()
        if key not in self._storages:
            self._storages[key] = size, weakref.ref(storage, lambda _: self._forget(key))
            self.held += size
            self.peak = max(self.peak, self.held)

    def _forget(self, key: int) -> None:
        size, _ = self._storages.pop(key)
        self.held -= size
