"""Rotary angles, and ways to stretch them over a longer context than the model was trained with.

Dimension pair j of D turns by θ_j = base^(−2j/D) per position.  For a context that is `factor` times as long:

    linear    every θ_j / factor (Chen et al. 2023)
    ntk       base · factor^(D/(D−2)): the fastest pair as it was, the slowest one linear (bloc97 2023)
    dynamic   ntk whose factor is 1 + factor·(L/C − 1) for a sequence of L tokens, longer than the original context C;
              up to C nothing changes (bloc97, emozilla 2023)
    yarn      by turns r_j = C·θ_j/2π in the original context C (Peng et al. 2023, section 3.2): above `beta_fast` as it
              was, below `beta_slow` linear, a ramp over j between; and queries and keys longer by
              `attention_factor` = 0.1·ln(factor) + 1, which lowers the entropy of attention
    llama3    the same idea with a ramp over r_j (Grattafiori et al. 2024 and its published configuration): above
              `high_freq_factor` as it was, below `low_freq_factor` linear

What L is, `engine.model.context.Batch` says: one number for a whole batch, or one for each of its tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.config import ModelConfig, RopeScalingConfig

OTHER_BASE = ("ntk", "dynamic")      # kinds that are plain RoPE of another base


def inverse_frequencies(config: ModelConfig, device: torch.device | str, seq_len: int | Tensor = 0) -> Tensor:
    """θ_j for every pair, fp32 [R/2], of the R dimensions of a head that turn.

    Args:
        seq_len: tokens of the sequence, which only `dynamic` goes by; of many, […, 1], they have θ each, […, R/2].
    """
    scaling, dim = config.rope_scaling, config.rotary_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.int64, device=device).float() / dim
    theta = 1.0 / (stretched_base(config, seq_len) ** exponents)
    if scaling is None or scaling.type in OTHER_BASE:
        return theta
    if scaling.type == "linear":
        return theta / scaling.factor
    blend = _llama3_ramp(scaling, theta) if scaling.type == "llama3" else \
        _yarn_ramp(scaling, config.rope_theta, dim, device)
    return (1 - blend) * theta / scaling.factor + blend * theta


def stretched_base(config: ModelConfig, seq_len: int | Tensor = 0) -> float | Tensor:
    """What `ntk` makes of `rope_theta`, and `dynamic` for sequences of `seq_len` tokens; itself with other kinds."""
    scaling, dim = config.rope_scaling, config.rotary_dim
    if scaling is None or scaling.type not in OTHER_BASE or dim <= 2:        # a single pair turns by 1 in any base
        return config.rope_theta
    factor: float | Tensor = scaling.factor
    if original := scaling.original_max_seq_len:
        longest = seq_len.clamp(min=original) if isinstance(seq_len, Tensor) else max(seq_len, original)
        factor = 1 + factor * (longest / original - 1)
    return config.rope_theta * factor ** (dim / (dim - 2))


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
    """The angles of one model's tokens; keeps θ, which takes longer to compute than the angles of one token.

    Where lengths decide (`dynamic`), θ is computed each time.
    """

    def __init__(self, config: ModelConfig) -> None:
        self._config, self._factor = config, attention_factor(config)
        self._by_length = config.rope_scaling is not None and config.rope_scaling.type == "dynamic"
        self._theta: Tensor | None = None

    def __call__(self, positions_SB: Tensor, dtype: torch.dtype, seq_len: int | Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of every token's angles, each [S, B or 1, 1, 1, R/2], computed in fp32, times the factor.

        Args:
            seq_len: `Batch.whole_len`.
        """
        if self._theta is None or self._theta.device != positions_SB.device or self._by_length:
            lengths = seq_len.view(*seq_len.shape, 1, 1, 1) if isinstance(seq_len, Tensor) else seq_len
            self._theta = inverse_frequencies(self._config, positions_SB.device, lengths)
        angles = positions_SB.float().view(*positions_SB.shape, 1, 1, 1) * self._theta
        cos, sin = angles.cos(), angles.sin()
        if self._factor != 1:
            cos, sin = cos * self._factor, sin * self._factor
        return cos.to(dtype), sin.to(dtype)
