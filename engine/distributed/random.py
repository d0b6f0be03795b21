"""Random streams are named, not numbered by rank.

A stream's seed is a hash of the run's seed and the stream's name.  Every rank that asks for `init/layers.3.mlp…` draws
the same numbers, whatever the layout, and no stream depends on how much another one was used before it.
"""

from __future__ import annotations

import hashlib

import torch


def seed_for(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the stream called `names` in a run seeded with `seed`."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator_for(seed: int, *names: str | int) -> torch.Generator:
    """A fresh generator, the CPU's, at the start of the stream called `names`."""
    return torch.Generator().manual_seed(seed_for(seed, *names))
