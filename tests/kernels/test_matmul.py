"""Matrix products, whichever library computes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.matmul import LINEAR, WEIGHT_GRADIENT, with_bf16_arithmetic
from engine.kernels.operation import Operation
from tests.kit.compare import found, random, relative_error

# m, k, n: below and above the size from which oneDNN is used, and not multiples of anything
SIZES = [(3, 5, 7), (1, 640, 3300), (150, 130, 170), (257, 129, 65)]


def every(operation: Operation) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("name", [entry.name for entry in operation.implementations])


def close(got: Tensor, want: Tensor) -> None:
    """fp32 all the way: a product in tf32 or bf16 would miss this by orders of magnitude."""
    assert got.shape == want.shape and relative_error(got.cpu(), want) < 3e-6


@every(LINEAR)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
def test_products(m: int, k: int, n: int, name: str, device: torch.device) -> None:
    linear = found(LINEAR, name, device, torch.float32)
    a, b, bias = random(m, k, seed=1), random(k, n, seed=2), random(n, seed=3)
    x, y = a.float().to(device), b.float().to(device)
    for transposed in (y.T, y.T.contiguous()):
        close(linear(x, transposed), a @ b)
        close(linear(x.T.contiguous().T, transposed), a @ b)
        close(linear(x, transposed, bias.float().to(device)), a @ b + bias)
        close(linear(x.view(m, 1, k), transposed), (a @ b).unsqueeze(1))


def added(name: str, device: torch.device, dtype: torch.dtype) -> Callable[..., None]:
    return found(WEIGHT_GRADIENT, name, device, dtype)


@every(WEIGHT_GRADIENT)
@pytest.mark.parametrize(("m", "k", "n"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_products_into_an_accumulator(m: int, k: int, n: int, dtype: torch.dtype, name: str,
                                      device: torch.device) -> None:
    """Products of bf16 matrices too keep all of fp32 on their way into it."""
    add = added(name, device, dtype)
    a, b, first = random(k, m, seed=4, dtype=dtype), random(k, n, seed=5, dtype=dtype), random(m, n, seed=6)
    out = torch.full((m, n), float("nan"), device=device)      # what is in a fresh accumulator does not matter
    add(out, a.to(device).T, b.to(device), accumulate=False)
    close(out, a.double().T @ b.double())
    out.copy_(first)
    add(out, a.to(device).T, b.to(device), accumulate=True)
    close(out, first + a.double().T @ b.double())


@every(WEIGHT_GRADIENT)
def test_many_microbatches_add_up_like_one(name: str, device: torch.device) -> None:
    """A sum over 64 microbatches in bf16 is as good as one over all their tokens."""
    add = added(name, device, torch.bfloat16)
    grad, x = random(64 * 40, 150, seed=7, dtype=torch.bfloat16), random(64 * 40, 130, seed=8, dtype=torch.bfloat16)
    out = torch.zeros(150, 130, device=device)
    for some_grad, some_x in zip(grad.split(40), x.split(40), strict=True):
        add(out, some_grad.to(device).T, some_x.to(device), accumulate=True)
    want = grad.double().T @ x.double()
    assert (out.cpu() - want).norm() < 1e-6 * want.norm()
    pairs = zip(grad.split(40), x.split(40), strict=True)
    rounded = sum((some_grad.T @ some_x).double() for some_grad, some_x in pairs)
    assert (rounded - want).norm() > 1e-3 * want.norm(), "products rounded to bf16 would not pass"


def test_arithmetic_in_bf16_rounds_nothing_that_was_bf16_before() -> None:
    """Whether or not this processor has the instructions; and the setting is back behind it, whatever happens."""
    settings = torch.backends.mkldnn.matmul
    before, add = settings.fp32_precision, with_bf16_arithmetic(settings)
    a, b = random(1024, 136, seed=4, dtype=torch.bfloat16), random(1024, 176, seed=5, dtype=torch.bfloat16)
    out = torch.full((136, 176), float("nan"))
    add(out, a.T, b, accumulate=False)
    close(out, a.double().T @ b.double())
    add(out, a.T, b, accumulate=True)
    close(out, 2 * (a.double().T @ b.double()))
    with pytest.raises(RuntimeError):
        add(out, a, b, accumulate=True)
    assert settings.fp32_precision == before


@every(LINEAR)
def test_what_was_chosen_is_what_computes(name: str) -> None:
    linear = found(LINEAR, name, torch.device("cpu"), torch.float32)
    large, small = torch.ones(150, 150), torch.ones(20, 20)
    for x, onednn in ((large, name == "onednn"), (small, False)):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            linear(x, x)
        assert ("mkldnn::_linear_pointwise" in {event.key for event in profile.key_averages()}) == onednn


@every(LINEAR)
def test_what_comes_out_may_be_added_to(name: str) -> None:
    """Behind a function with a backward pass of its own, as adapters do it."""
    product = found(LINEAR, name, torch.device("cpu"), torch.float32)

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
            ctx.save_for_backward(weight)
            return product(x, weight)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
            return grads[0] @ ctx.saved_tensors[0], None

    x, weight = torch.randn(64, 3, 128, requires_grad=True), torch.randn(192, 128)
    y = Product.apply(x, weight).add_(1.0)
    torch.testing.assert_close(y, x @ weight.T + 1.0)
