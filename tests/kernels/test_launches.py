"""How many kernels a step launches, and what they move: counted on a make-believe accelerator, for Llama-3.2-1B."""

from __future__ import annotations

import json

import torch

from tests.kit.launches import Launches
from tests.kit.programs import output_of

MOST = {"forward": 30, "backward": 45}           # launches of a layer
SHARE = 0.45                                     # of the bytes that the same step moves without kernels of a GPU
BEFORE_GB = 162                                  # what it moved before there were any (logits, norms, SwiGLU, sums)


def test_operations_views_and_memory() -> None:
    a, b = torch.ones(4, 8), torch.ones(8, 2)
    with Launches() as launches:
        product = a.T.T @ b                                  # two views, one product
        torch.empty(1000)                                    # memory, no kernel
        product.add_(product)                                # the same tensor three times: moved once
        product.sum()
    assert launches.kernels == {"aten::mm": 1, "aten::add_": 1, "aten::sum": 1} and launches.num_kernels == 3
    assert launches.elementwise_bytes == 4 * (8 + (8 + 1))
    assert launches.moved["aten::mm"] == 4 * (32 + 16 + 8)


def test_a_layer_launches_few_kernels_and_moves_few_bytes() -> None:
    found = json.loads(output_of("-W", "ignore", "-m", "tests.kit.counted_step"))
    for name, both in found.items():
        for direction, cost in both.items():
            print(f"{name:<9} {direction:<9} {cost['launches']:>3} launches a layer, {cost['whole_launches']:>5} all; "
                  f"{cost['nbytes'] / 1e9:5.2f} GB a layer, {cost['whole_bytes'] / 1e9:6.1f} GB all")
    fused, anywhere = (sum(cost["whole_bytes"] for cost in found[name].values()) for name in ("fused", "anywhere"))
    print(f"a microbatch: {fused / 1e9:.1f} GB, {fused / anywhere:.0%} of what the same step moves anywhere")
    for direction, cost in found["fused"].items():
        assert cost["launches"] <= MOST[direction], cost["by_operation"]
    assert fused <= SHARE * anywhere and fused <= SHARE * BEFORE_GB * 1e9
