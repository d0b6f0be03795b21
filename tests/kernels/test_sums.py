"""Sums of squares of tens of millions of numbers, whatever they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.sums import sum_of_squares

MANY = 41_943_040


def values(kind: str, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    if kind == "equal":
        return torch.full((size,), 1e-3 / 3)
    x = torch.randn(size, generator=generator) * 1e-3
    if kind == "one large":
        x[size // 3] = 1.0
    return x


@pytest.mark.parametrize("kind", ["normal", "equal", "one large"])
@pytest.mark.parametrize("size", [MANY, MANY + 777])
def test_many_numbers(kind: str, size: int, device: torch.device) -> None:
    x = values(kind, size).to(device)
    want = x.double().square().sum().item()
    assert sum_of_squares(x).item() == pytest.approx(want, rel=1e-6)
    if device.type == "cpu":
        flat = torch.linalg.vector_norm(x).item() ** 2
        assert flat != pytest.approx(want, rel=1e-4), "a running sum would do"


@pytest.mark.parametrize("size", [0, 1, 63, 1024, 1025, 5000])
def test_any_length(size: int, device: torch.device) -> None:
    x = values("normal", size).to(device)
    assert sum_of_squares(x).item() == pytest.approx(x.double().square().sum().item(), rel=1e-6)


def test_what_is_not_finite_stays_so() -> None:
    x = torch.ones(5000)
    x[17] = torch.inf
    assert sum_of_squares(x).item() == torch.inf
    x[18] = torch.nan
    assert sum_of_squares(x).isnan()
