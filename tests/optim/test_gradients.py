"""The global gradient norm of as many elements as real models have, cut like real layouts cut them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.distributed.mesh import single_mesh
from engine.optim.gradients import sum_over_world
from engine.parallel.data.flat import ALIGNMENT

SIZE = 655_360 * ALIGNMENT                        # 42 million


def bucket(gradient: Tensor, *, counted: bool = True, is_first_copy: bool = True) -> Any:
    return SimpleNamespace(grad_shard=gradient, kind=SimpleNamespace(counted=counted), is_first_copy=is_first_copy,
                           level=0, num_used=gradient.numel(), counted_gradient=lambda: gradient)


@pytest.mark.parametrize("reproducible", [False, True])
def test_the_norm_is_right_in_any_layout(reproducible: bool) -> None:
    gradient = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)) * 1e-3
    gradient[: SIZE // 2] += 2e-3                 # no layout may depend on all parts being alike
    want = gradient.double().square().sum().sqrt().item()
    for cuts in ([1], [0.5, 0.5], [0.01, 0.29, 0.7], [1 / 40] * 40):
        sizes = [int(share * SIZE) // ALIGNMENT * ALIGNMENT for share in cuts]
        sizes[-1] = SIZE - sum(sizes[:-1])
        buckets = [bucket(part) for part in gradient.split(sizes)]
        norm = sum_over_world(None, buckets, single_mesh(), reproducible=reproducible).grad_norm.item()
        assert norm == pytest.approx(want, rel=1e-6), f"in parts of {cuts}"


def test_replicas_do_not_count() -> None:
    gradient = torch.full((ALIGNMENT,), 2.0)
    buckets = [bucket(gradient), bucket(gradient, counted=False), bucket(gradient, is_first_copy=False)]
    assert sum_over_world(None, buckets, single_mesh()).grad_norm.item() == 16.0
    assert sum_over_world(None, [], single_mesh()).grad_norm.item() == 0.0
