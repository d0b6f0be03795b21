"""Rotary angles, with Llama 3's scaling for long contexts.

Dimension pair j turns by θ_j = base^(−2j/D) per position.  Llama 3.1 stretches the slow ones (Grattafiori et al. 2024,
and the `llama3` rule of its published configuration): with wavelength λ = 2π/θ and the original context length C,

    λ < C/high      θ unchanged
    λ > C/low       θ / factor
    between         linear blend of the two, weight (C/λ − low) / (high − low)
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import ModelConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | str) -> Tensor:
    """θ_j for every pair, fp32 [R/2], of the R dimensions of a head that turn."""
    exponents = torch.arange(0, config.rotary_dim, 2, dtype=torch.int64, device=device).float() / config.rotary_dim
    theta = 1.0 / (config.rope_theta**exponents)
    scaling = config.rope_scaling
    if scaling is None:
        return theta
    wavelength = 2 * math.pi / theta
    turns = scaling.original_max_seq_len / wavelength
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - blend) * theta / scaling.factor + blend * theta
    slowed = torch.where(turns < scaling.low_freq_factor, theta / scaling.factor, blended)
    return torch.where(turns > scaling.high_freq_factor, theta, slowed)


def rotary_angles(config: ModelConfig, positions_SB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every token's angles, each [S, B or 1, 1, 1, R/2], computed in fp32."""
    theta = inverse_frequencies(config, positions_SB.device)
    angles = positions_SB.float()[:, :, None, None, None] * theta
    return angles.cos().to(dtype), angles.sin().to(dtype)
