"""Matrix products, whichever library computes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels import matmul as kernel
from tests.kit.compare import random, relative_error

LIBRARIES = pytest.mark.parametrize("library", [
    "torch", pytest.param("onednn", marks=pytest.mark.skipif(
        not kernel.has_onednn(), reason="MKL is not slower on this processor"))])
# m, k, n: below and above the size from which oneDNN is used, and not multiples of anything
SIZES = [(3, 5, 7), (1, 640, 3300), (150, 130, 170), (257, 129, 65)]


@pytest.fixture(autouse=True)
def chosen(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the library that the test asks for."""
    monkeypatch.setattr(kernel, "has_onednn", lambda: library == "onednn")


def close(got: Tensor, want: Tensor) -> None:
    """fp32 all the way: a product in tf32 or bf16 would miss this by orders of magnitude."""
    assert got.shape == want.shape and relative_error(got, want) < 3e-6


@LIBRARIES
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_products(m: int, k: int, n: int, library: str) -> None:
    a, b, bias = random(m, k, seed=1), random(k, n, seed=2), random(n, seed=3)
    x, y = a.float(), b.float()
    close(kernel.matmul(x, y), a @ b)
    close(kernel.matmul(x.T.contiguous().T, y), a @ b)
    close(kernel.matmul(x, y.T.contiguous().T), a @ b)
    close(kernel.linear(x, y.T.contiguous(), bias.float()), a @ b + bias)
    close(kernel.linear(x.view(m, 1, k), y.T), (a @ b).unsqueeze(1))


@LIBRARIES
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float64], ids=str)
def test_products_into_an_accumulator(m: int, k: int, n: int, out_dtype: torch.dtype, library: str) -> None:
    a, b, first = random(k, m, seed=4), random(k, n, seed=5), random(m, n, seed=6)
    out = torch.full((m, n), float("nan"), dtype=out_dtype)      # what is in a fresh accumulator does not matter
    kernel.matmul_into(out, a.float().T, b.float(), accumulate=False)
    close(out, a.T @ b)
    out.copy_(first)
    kernel.matmul_into(out, a.float().T, b.float(), accumulate=True)
    close(out, first + a.T @ b)


@LIBRARIES
def test_bf16_products_go_into_fp32_accumulators(library: str) -> None:
    a, b = random(130, 140, seed=7, dtype=torch.bfloat16), random(140, 150, seed=8, dtype=torch.bfloat16)
    out = torch.ones(130, 150)
    kernel.matmul_into(out, a, b, accumulate=True)
    assert relative_error(out, 1 + a.double() @ b.double()) < 1e-2
    assert kernel.matmul(a, b).dtype == torch.bfloat16


@LIBRARIES
def test_the_library_asked_for_is_the_one_that_computes(library: str) -> None:
    large, small, half = torch.ones(150, 150), torch.ones(20, 20), torch.ones(150, 150, dtype=torch.bfloat16)
    for x, onednn in ((large, library == "onednn"), (small, False), (half, False)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            kernel.matmul(x, x)
        assert ("mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}) == onednn
