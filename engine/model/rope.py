"""Rotary angles, and ways to stretch them over a longer context than the model was trained with.

Dimension pair j of D turns by θ_j = base^(−2j/D) per position.  For a context that is `factor` times as long:

    linear    every θ_j / factor (Chen et al. 2023)
    ntk       base · factor^(D/(D−2)): the fastest pair as it was, the slowest one linear (bloc97 2023)
    yarn      by turns r_j = C·θ_j/2π in the original context C (Peng et al. 2023, section 3.2): above `beta_fast` as it
              was, below `beta_slow` linear, a ramp over j between; and queries and keys longer by
              `attention_factor` = 0.1·ln(factor) + 1, which lowers the entropy of attention
    llama3    the same idea with a ramp over r_j (Grattafiori et al. 2024 and its published configuration): above
              `high_freq_factor` as it was, below `low_freq_factor` linear
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeScalingConfig


def inverse_frequencies(config: ModelConfig, device: torch.device | str) -> Tensor:
    """θ_j for every pair, fp32 [R/2], of the R dimensions of a head that turn."""
    scaling, dim = config.rope_scaling, config.rotary_dim
    base = config.rope_theta
    if scaling is not None and scaling.type == "ntk":
        base = stretched_base(config)
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    theta = 1.0 / (base**exponents)
    if scaling is None or scaling.type == "ntk":
        return theta
    if scaling.type == "linear":
        return theta / scaling.factor
    blend = _yarn_ramp(scaling, base, dim, device) if scaling.type == "yarn" else _llama3_ramp(scaling, theta)
    return (1 - blend) * theta / scaling.factor + blend * theta


def stretched_base(config: ModelConfig) -> float:
    """The base that `ntk` makes of `rope_theta`."""
    assert config.rope_scaling is not None
    dim = config.rotary_dim
    return config.rope_theta * config.rope_scaling.factor ** (dim / (dim - 2)) if dim > 2 else config.rope_theta


def _llama3_ramp(scaling: RopeScalingConfig, theta: Tensor) -> Tensor:
    """How much of each frequency stays as it was."""
    assert scaling.original_max_seq_len and scaling.low_freq_factor and scaling.high_freq_factor
    turns = scaling.original_max_seq_len / (2 * math.pi / theta)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    return ((turns - scaling.low_freq_factor) / span).clamp(0, 1)


def _yarn_ramp(scaling: RopeScalingConfig, base: float, dim: int, device: torch.device | str) -> Tensor:
    """How much of each frequency stays as it was; the ends of the ramp are whole pairs, as published models have it."""
    def pair_that_turns(times: float) -> float:
        assert scaling.original_max_seq_len
        return dim * math.log(scaling.original_max_seq_len / (times * 2 * math.pi)) / (2 * math.log(base))

    first = max(math.floor(pair_that_turns(scaling.beta_fast or 32)), 0)
    last = min(math.ceil(pair_that_turns(scaling.beta_slow or 1)), dim - 1)
    pairs = torch.arange(dim // 2, dtype=torch.float32, device=device)
    return 1 - ((pairs - first) / max(last - first, 0.001)).clamp(0, 1)


def attention_factor(config: ModelConfig) -> float:
    """What queries and keys are multiplied with."""
    scaling = config.rope_scaling
    if scaling is None or scaling.type != "yarn":
        return 1.0
    return scaling.attention_factor or (0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0)


class RotaryAngles:
    """The angles of one model's tokens; keeps θ, which takes longer to compute than the angles of one token."""

    def __init__(self, config: ModelConfig) -> None:
        self._config, self._factor = config, attention_factor(config)
        self._theta: Tensor | None = None

    def __call__(self, positions_SB: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of every token's angles, each [S, B or 1, 1, 1, R/2], computed in fp32, times the factor."""
        if self._theta is None or self._theta.device != positions_SB.device:
            self._theta = inverse_frequencies(self._config, positions_SB.device)
        angles = positions_SB.float().view(*positions_SB.shape, 1, 1, 1) * self._theta
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1:
            cos, sin = cos * self._factor, sin * self._factor
        return cos.to(dtype), sin.to(dtype)
