"""What a row of the operations table is: one mathematical operation, and the implementations that compute it.

An implementation is found, not imported: its `find` is called once, when a run starts, with the place where the run
will compute, and returns the function to call or raises `Unavailable` with the reason.  So a symbol that a build of
torch lacks, a package that is not installed or a processor without the instructions costs an entry in the doctor's
report and nothing else, and what was probed is exactly what will be called.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


class Unavailable(Exception):
    """An implementation cannot be used here; the message is the reason."""


@dataclass(frozen=True)
class Place:
    """Where a run computes.

    Attributes:
        device: of weights and activations.
        dtype: of weights and activations.
        deterministic: the same input must give the same bits every time.
        fp8: how FP8 matrices are scaled (`engine.kernels.fp8`); `off`: a run has none.
    """

    device: torch.device
    dtype: torch.dtype
    deterministic: bool = False
    fp8: str = "off"

    def require(self, *, device: str | None = None, dtypes: tuple[torch.dtype, ...] = ()) -> None:
        """Raises `Unavailable` on another type of device or in another dtype."""
        if device is not None and self.device.type != device:
            raise Unavailable(f"for {device} only")
        if dtypes and self.dtype not in dtypes:
            raise Unavailable(f"for {' and '.join(short_name(dtype) for dtype in dtypes)} only")


Find = Callable[[Place], Any]


@dataclass(frozen=True)
class Implementation:
    """One way to compute an operation: the name a configuration gives, and how the function is found."""

    name: str
    find: Find


class _NoContext:
    """Takes what a forward pass keeps, and forgets it."""

    def save_for_backward(self, *tensors: Any) -> None:
        pass

    def set_materialize_grads(self, value: bool) -> None:
        pass


def applied(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """`function.apply`, or where no gradients are wanted its forward pass alone: autograd's part takes longer than a
    small operation on a processor, and a text that is being written is made of small operations."""
    return function.apply(*inputs) if torch.is_grad_enabled() else function.forward(_NoContext(), *inputs)


def anywhere(function: Any) -> Find:
    """For an implementation that runs on every device and in every dtype."""
    return lambda place: function


@dataclass(frozen=True)
class Operation:
    """An operation and its implementations in order of preference; the last one is the reference, and runs anywhere.

    Attributes:
        name: the key in the configuration's `kernels`, and the attribute of `table.Operations`.
        purpose: what it computes, in a few words.
    """

    name: str
    purpose: str
    implementations: tuple[Implementation, ...]

    @property
    def reference(self) -> Implementation:
        return self.implementations[-1]


def short_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` → `bf16`, as configurations call it."""
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64"}[dtype]


def torch_operator(namespace: str, name: str) -> Any:
    """An operator of torch that is no part of its public interface.

    Raises:
        Unavailable: this build of torch lacks it.
    """
    try:
        return getattr(getattr(torch.ops, namespace), name)
    except AttributeError:
        raise Unavailable(f"torch {torch.__version__} has no {namespace}::{name}") from None


def installed(module: str, symbol: str) -> Any:
    """`symbol` of an optional package; nothing else escapes, whatever the package does on import.

    Raises:
        Unavailable: the package is not there, is another one of that name, or fails on import.
    """
    try:
        if find_spec(module.partition(".")[0]) is None:
            raise Unavailable("not installed")
        return getattr(import_module(module), symbol)
    except Unavailable:
        raise
    except AttributeError:
        raise Unavailable(f"installed without {symbol}") from None
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        raise Unavailable(f"installed, but fails on import ({type(error).__name__}: {first_line})") from None


def in_triton(module: str, function: str) -> Find:
    """Finds `function` of `engine.kernels.triton.<module>`, whose `try_out` has run.

    A GPU may be too old, and a machine may have Triton and no compiler for what it writes.
    """
    def find(place: Place) -> Any:
        place.require(device="cuda", dtypes=(torch.bfloat16, torch.float16, torch.float32))
        installed("triton", "jit")
        found = import_module(f"engine.kernels.triton.{module}")
        try:
            if torch.cuda.is_available():
                found.try_out(place)
                torch.cuda.synchronize(place.device)
        except Exception as error:
            raise Unavailable(f"fails ({type(error).__name__}: " + str(error).partition("\n")[0] + ")") from None
        return getattr(found, function)

    return find
