"""What a device would be told to do: kernels launched, bytes that they read and write.

Counted as torch dispatches it, so it works on any device, also on `meta` or a make-believe one.  An operation that
computes is one launch; views and new, uninitialised memory are none.  Its bytes are those of all tensors that go in and
come out, each once: what it must move if nothing stays in a cache.  Kernels written in Triton are counted where they
would be launched.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.kernels.triton.ahead import MODULES

NO_KERNEL = ("aten::empty", "aten::new_empty", "aten::detach", "aten::alias", "aten::lift", "aten::promote_types",
             "aten::_unsafe_view", "aten::record_stream", "aten::resize_", "aten::set_", "prim::", "profiler::",
             "c10d::", "_c10d_functional::")
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
ATTENTION = "flash_attention"


@dataclass
class Launches(TorchDispatchMode):
    """Counts while it is entered.

    Attributes:
        kernels: by operation.
        moved: bytes, by operation.
    """

    kernels: Counter[str] = field(default_factory=Counter)
    moved: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (),
                           kwargs: Mapping[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if not name.startswith(NO_KERNEL) and not is_view(func):
            self.note(name, (args, kwargs, result))
        return result

    def note(self, name: str, tensors: object) -> None:
        """A launch of `name`, with all tensors that it reads and writes."""
        once = {id(tensor): tensor for tensor in tensors_in(tensors)}
        self.kernels[name] += 1
        self.moved[name] += sum(tensor.numel() * tensor.itemsize for tensor in once.values())

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    @property
    def elementwise_bytes(self) -> int:
        """All but what products and attention move."""
        return sum(size for name, size in self.moved.items()
                   if not name.startswith(PRODUCTS) and ATTENTION not in name)

    def minus(self, other: Launches) -> Launches:
        """What this one has counted and the other has not."""
        return Launches(self.kernels - other.kernels, self.moved - other.moved)


@contextmanager
def triton_counted(counts: Launches) -> Iterator[None]:
    """Inside, kernels in Triton are not run but counted."""
    def launched(kernel: Any, grid: tuple[int, ...], *arguments: Tensor | float, **constants: Any) -> None:
        counts.note(f"triton::{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}", arguments)

    with ExitStack() as stack:
        for module in MODULES:
            stack.enter_context(patch.object(import_module(f"engine.kernels.triton.{module}"), "launch", launched))
        yield


def is_view(func: Any) -> bool:
    """Whether what it returns shares its input's memory and is not written to."""
    returned = [each.alias_info for each in func._schema.returns]
    return any(info is not None and not info.is_write for info in returned)


def tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors_in(each)
