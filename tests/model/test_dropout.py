"""Dropout by hashes: as random as it should be, and the same wherever it is computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.model.dropout import drop, layer_key, token_keys


def keys(rows: int = 4, length: int = 64) -> Tensor:
    return torch.stack([torch.from_numpy(token_keys(1, row, 0, length)) for row in range(rows)], dim=1)


def dropped(share: float, name: str = "layers.0", first: int = 0, features: int = 96) -> Tensor:
    return drop(torch.ones(64, 4, features, dtype=torch.float64), keys(), layer_key(name), share, first)


@pytest.mark.parametrize("share", [0.05, 0.3, 0.9])
def test_a_share_is_dropped_and_the_mean_stays(share: float) -> None:
    x = dropped(share)
    assert set(x.unique().tolist()) <= {0.0, 1 / (1 - share)}
    spread = (share * (1 - share) / x.numel()) ** 0.5
    assert (x == 0).double().mean() == pytest.approx(share, abs=5 * spread)
    for dim in range(3):                                              # no token, row or feature is favoured
        others = [d for d in range(3) if d != dim]
        of_each = (x == 0).double().mean(others)
        assert (of_each - share).abs().max() < 6 * (share * (1 - share) * x.shape[dim] / x.numel()) ** 0.5


def test_masks_of_neighbours_have_nothing_in_common() -> None:
    """Correlations between tokens, rows, features and layers are those of independent numbers."""
    x = (dropped(0.5) == 0).double() - 0.5
    other = (dropped(0.5, "layers.1") == 0).double() - 0.5
    pairs = {"tokens": (x[1:], x[:-1]), "rows": (x[:, 1:], x[:, :-1]), "features": (x[..., 1:], x[..., :-1]),
             "layers": (x, other)}
    for name, (one, two) in pairs.items():
        assert abs((one * two).mean().item() * 4) < 5 / one.numel() ** 0.5, name


def test_a_part_of_the_tokens_or_features_has_its_part_of_the_mask() -> None:
    whole = dropped(0.4)
    assert torch.equal(dropped(0.4, first=32, features=64), whole[..., 32:])
    part = drop(torch.ones(16, 4, 96, dtype=torch.float64), keys()[16:32], layer_key("layers.0"), 0.4)
    assert torch.equal(part, whole[16:32])


def test_the_gradient_has_the_same_mask() -> None:
    x = torch.randn(8, 2, 16, requires_grad=True)
    y = drop(x, keys(2, 8), 5, 0.5)
    y.sum().backward()
    assert x.grad is not None and torch.equal(x.grad * x.detach(), y.detach())
