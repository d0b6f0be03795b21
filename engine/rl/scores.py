"""From what reward functions and models say of a text to the score that is learned from, in this order:

    1. sum        the sources' numbers, each times its weight
    2. penalties  of a text that came to no end, and of one that nearly reached the limit
    3. scale      divided by the running standard deviation
    4. clip       to ±`reward_clip`

A number that is not finite counts 0, and is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from engine.config import GRPOConfig, OverlongConfig, PPOConfig
from engine.rl.coefficients import RunningMoments

Numbers = npt.NDArray[np.float64]


def weighted_sum(parts: Sequence[Numbers], weights: Sequence[float]) -> tuple[Numbers, int]:
    """Every text's sum, and how many numbers were not finite."""
    table = np.stack([np.asarray(part, np.float64) for part in parts])
    bad = ~np.isfinite(table)
    return (np.where(bad, 0.0, table) * np.asarray(weights, np.float64)[:, None]).sum(0), int(bad.sum())


def overlong_penalty(lengths: Sequence[int], most: int, config: OverlongConfig) -> Numbers:
    """0 up to most − buffer tokens, then falling in a straight line to −penalty at `most` (Yu et al. 2025, eq. 13)."""
    over = np.asarray(lengths, np.float64) - (most - config.buffer)
    return -config.penalty * np.clip(over / config.buffer, 0.0, 1.0)


def shaped(scores: Numbers, ended: Sequence[bool], lengths: Sequence[int], most: int,
           config: PPOConfig | GRPOConfig, seen: RunningMoments) -> tuple[Numbers, RunningMoments]:
    """The scores that are learned from, and the running moments with those of before their scaling."""
    out = np.array(scores, np.float64)
    if config.missing_eos_penalty is not None:
        out -= config.missing_eos_penalty * ~np.asarray(ended, bool)
    if config.overlong is not None:
        out += overlong_penalty(lengths, most, config.overlong)
    if config.reward_norm:
        seen = seen.with_more(out.tolist())
        out /= seen.std
    if config.reward_clip is not None:
        out = out.clip(-config.reward_clip, config.reward_clip)
    return out, seen
