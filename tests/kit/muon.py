"""Muon by its definition, on the matrices that Hugging Face's models have: by singular values, in fp64.

Newton and Schulz's steps take every singular value s of X to a·s + b·s³ + c·s⁵ and leave the vectors alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config


class Muon(torch.optim.Optimizer):
    """Of parameters by name."""

    def __init__(self, named: Mapping[str, nn.Parameter], config: Config) -> None:
        super().__init__([{"params": [*named.values()], "lr": 0.0}], {})
        self.names, self.config = [*named], config
        self.averages = [torch.zeros_like(p) for p in named.values()]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        [group] = self.param_groups
        momentum = 0.95 if self.config.optim.momentum is None else self.config.optim.momentum
        for name, p, average in zip(self.names, group["params"], self.averages, strict=True):
            average.mul_(momentum).add_(p.grad, alpha=1 - momentum)
            update = momentum * average + (1 - momentum) * p.grad
            p.mul_(1 - group["lr"] * self.config.optim.weight_decay)
            for part, of in zip(matrices(name, p, self.config), matrices(name, update, self.config), strict=True):
                part.sub_(group["lr"] * 0.2 * max(of.flatten(0, -2).shape) ** 0.5 * orthogonal(of))


def matrices(name: str, parameter: Tensor, config: Config) -> list[Tensor]:
    """Views of q, k and v, of gate and up, or of the one that it is."""
    if "linear_qkv" in name:
        return list(parameter.split((config.model.num_heads // config.model.num_kv_heads, 1, 1), dim=1))
    return list(parameter.split(1)) if "linear_fc1" in name else [parameter]


def orthogonal(parts: Tensor) -> Tensor:
    """Of a matrix whose rows may have several dimensions."""
    u, s, v = torch.linalg.svd(parts.flatten(0, -2).double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s @ v).view(parts.shape).to(parts.dtype)
