"""Matrix products; on some CPUs in fp32, oneDNN's instead of the BLAS library's.

For fp32 on x86 torch calls MKL, which runs 256-bit code on processors that Intel did not make, even where they have
AVX-512.  oneDNN, which comes with torch and computes its bf16 products, runs 512-bit code on them: twice as fast on an
AMD EPYC.  It is reached through the operator that torch's own compiler emits for linear layers, and adds up in fp32
like MKL.  Everywhere else, or where that operator is missing, products are torch's.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# Below this many multiplications, setting oneDNN up costs more than it saves.
SMALLEST_PRODUCT = 128**3


@cache
def has_onednn() -> bool:
    """Whether oneDNN has the faster product here: AVX-512, and not Intel's."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkldnn.is_available():
        return False
    cpuinfo = Path("/proc/cpuinfo")
    other_maker = cpuinfo.is_file() and "GenuineIntel" not in cpuinfo.read_text(encoding="utf-8")
    return other_maker and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _use_onednn(x: Tensor, weight: Tensor) -> bool:
    return (x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu"
            and x.numel() * weight.shape[0] >= SMALLEST_PRODUCT and has_onednn())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x·Wᵀ + b: [..., k], [n, k], [n] → [..., n].  No autograd: callers have a backward pass of their own."""
    if _use_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a·b: [..., k], [k, n] → [..., n].  No autograd."""
    return linear(a, b.T)


def matmul_into(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = a·b, or out += a·b, for matrices; `out` [m, n] may have another dtype than `a` [m, k] and `b` [k, n]."""
    if _use_onednn(a, b.T):      # it copies a first factor that is not contiguous: let that be the smaller one
        product = matmul(a, b) if a.shape[0] <= b.shape[1] else matmul(b.T, a.T).T
    elif out.dtype == a.dtype:
        out.addmm_(a, b, beta=1 if accumulate else 0)
        return
    else:
        product = a @ b
    out.add_(product) if accumulate else out.copy_(product)
