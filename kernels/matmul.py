"""Matrix products: `linear`, which is forward pass and input gradient, and products added to an fp32 accumulator.

*oneDNN.*  For fp32 on x86 torch calls MKL, which runs 256-bit code on processors that Intel did not make, even where
they have AVX-512.  oneDNN, which comes with torch and computes its bf16 products, runs 512-bit code on them: twice as
fast on an AMD EPYC.  It is reached through the operator that torch's own compiler emits for linear layers, and adds up
in fp32 like MKL.

*Weight gradients* are sums over tokens, and go on being summed over microbatches and ranks.  A product in bf16 would
round each microbatch's sum to 8 bits before it is added; products of two bf16 numbers are exact in fp32, so all ways
here keep everything: tensor cores that write fp32 (CUDA), or operands widened before the product (CPU).  Where a
processor has tiles for bf16 (AMX), oneDNN may be told to multiply fp32 matrices with them: it then rounds to bf16 what
was bf16 before, adds up in fp32, and is not slowed down by the widening.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operation import Find, Implementation, Operation, Place, Unavailable, anywhere, torch_operator

# Below this many multiplications, setting oneDNN up costs more than it saves.
SMALLEST_PRODUCT = 128**3


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b: [..., k], [n, k], [n] → [..., n].  No autograd: callers have a backward pass of their own."""
    return F.linear(x, weight, bias)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a·b, or out += a·b, for matrices [m, n], [m, k], [k, n], in the arithmetic of `out`.

    `out` is at least as wide as `a` and `b`: fp32 for bf16 operands.  Without `accumulate` it may hold anything.
    """
    out.addmm_(a.to(out.dtype), b.to(out.dtype), beta=1 if accumulate else 0)


def _cpuinfo() -> str:
    """What the kernel says of the processor; nothing, where it doesn't."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _onednn(place: Place) -> Any:
    """oneDNN's linear operator, where it is the faster one: AVX-512, and not Intel's."""
    place.require(device="cpu")
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        raise Unavailable("no AVX-512, or torch without oneDNN")
    cpuinfo = _cpuinfo()
    if not cpuinfo or "GenuineIntel" in cpuinfo:
        raise Unavailable("MKL is not slower on this processor")
    return torch_operator("mkldnn", "_linear_pointwise")


def _onednn_linear(place: Place) -> Any:
    place.require(dtypes=(torch.float32,))
    product, shaped = _onednn(place), torch_operator("aten", "_unsafe_view")

    def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.numel() * weight.shape[0] < SMALLEST_PRODUCT:
            return F.linear(x, weight, bias)
        # Of more than two dimensions it returns a view, to which autograd lets nobody add in place, as adapters do.
        return shaped(product(x.flatten(0, -2), weight, bias, "none", [], ""), (*x.shape[:-1], weight.shape[0]))

    return onednn_linear


def _onednn_add_product(place: Place) -> Any:
    place.require(dtypes=(torch.float32, torch.bfloat16))
    multiply = _onednn(place)

    def onednn_add_product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
        if a.numel() * b.shape[1] < SMALLEST_PRODUCT:
            return add_product(out, a, b, accumulate=accumulate)
        a, b = a.float(), b.float()
        # it copies a first factor that is not contiguous: let that be the smaller one
        product = multiply(a, b.T, None, "none", [], "") if a.shape[0] <= b.shape[1] else \
            multiply(b.T, a, None, "none", [], "").T
        out.add_(product) if accumulate else out.copy_(product)

    return onednn_add_product


def with_bf16_arithmetic(settings: Any) -> Callable[..., None]:
    """Products of widened matrices, `settings.fp32_precision` set for them alone."""
    def add_bf16_product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
        before, settings.fp32_precision = settings.fp32_precision, "bf16"
        try:
            product = torch.mm(a.float(), b.float())
        finally:
            settings.fp32_precision = before
        out.add_(product) if accumulate else out.copy_(product)

    return add_bf16_product


def _onednn_amx(place: Place) -> Any:
    place.require(device="cpu", dtypes=(torch.bfloat16,))
    if "amx_bf16" not in _cpuinfo():
        raise Unavailable("this processor has no AMX")
    settings = getattr(torch.backends.mkldnn, "matmul", None)
    if not torch.backends.mkldnn.is_available() or not hasattr(settings, "fp32_precision"):
        raise Unavailable(f"torch {torch.__version__} cannot choose oneDNN's arithmetic")
    return with_bf16_arithmetic(settings)


def add_product_in_fp32(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """One pass: the accumulator is read and written by the product itself."""
    torch.addmm(out, a, b, out_dtype=torch.float32, beta=1 if accumulate else 0, out=out)


def _mm_fp32(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """The product is written in fp32, and added in a second pass."""
    if accumulate:
        out.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        torch.mm(a, b, out_dtype=torch.float32, out=out)


def _tried(function: Any) -> Find:
    """For products of bf16 matrices on a GPU that some builds of torch cannot write in fp32: found by trying."""
    def find(place: Place) -> Any:
        place.require(device="cuda", dtypes=(torch.bfloat16, torch.float16))
        a = torch.full((16, 16), 1 + 2**-7, dtype=place.dtype, device=place.device)
        out = torch.full((16, 16), 0.5, device=place.device)
        try:
            function(out, a, a, accumulate=False)
            function(out, a, a, accumulate=True)
        except (RuntimeError, TypeError) as error:
            raise Unavailable(f"torch {torch.__version__}: " + str(error).partition("\n")[0]) from None
        if not torch.equal(out, torch.full_like(out, 32 * (1 + 2**-7) ** 2)):      # 17 bits: it was rounded to bf16
            raise Unavailable(f"torch {torch.__version__} rounds it")
        return function

    return find


LINEAR = Operation("linear", "products of the forward pass and of input gradients", (
    Implementation("onednn", _onednn_linear),
    Implementation("torch", anywhere(linear))))

WEIGHT_GRADIENT = Operation("weight_gradient", "products added to fp32 accumulators", (
    Implementation("onednn-amx", _onednn_amx),
    Implementation("onednn", _onednn_add_product),
    Implementation("addmm-fp32", _tried(add_product_in_fp32)),
    Implementation("mm-fp32", _tried(_mm_fp32)),
    Implementation("torch", anywhere(add_product))))
