"""Dropout whose mask follows from what an element is, not from who computes it.

A random stream per device would drop other elements in every layout, and others again when a layer is recomputed.  Here
an element's number is a hash of where it is:

    of the token    run's seed, number of the sample, row of it, position       drawn where batches are made, a field of
                                                                                the batch that is cut as tokens are
    of the layer    its name
    of the feature  its index in the whole layer

so nothing is kept of the mask: the backward pass, or a recomputed layer, finds the same one.  The hash is MurmurHash3's
finaliser (Appleby 2011) on 64 bits, in integer operations that every device has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.distributed.random import seed_for
from engine.model.context import Batch
from engine.model.fields import NOISE
from engine.model.transformer import Block, Transformer

# Odd numbers whose multiples are spread over 64 bits, as signed ones: the finaliser's two, and the golden ratio's.
FIRST, SECOND, GOLDEN = -49064778989728563, -4265267296055464877, -7046029254386353131
BITS = 31                                            # of a hash that are compared with the share that is dropped


def token_keys(seed: int, sample: int, row: int, length: int) -> npt.NDArray[np.int64]:
    """A number for each token of a row of a sample, int64 [length]."""
    start = np.uint64(seed_for(seed, "dropout", sample, row))
    with np.errstate(over="ignore"):
        return (start + np.arange(length, dtype=np.uint64) * np.uint64(GOLDEN & (2**64 - 1))).view(np.int64)


class Noise:
    """The numbers of the tokens that a chunk is working on; None: nothing is dropped, as in evaluations."""

    def __init__(self) -> None:
        self.keys_SB: Tensor | None = None

    def during(self, chunk: Transformer) -> None:
        """Knows the tokens whenever a layer of `chunk` runs, also when it is recomputed later."""
        for module in chunk.layers.values():
            if isinstance(module, Block):
                module.forward = partial(self._heard, module.forward)  # type: ignore[method-assign]
        chunk.hidden_states = partial(self._heard, chunk.hidden_states)  # type: ignore[method-assign]

    def _heard(self, forward: Callable[..., Tensor], *args: Any) -> Tensor:
        """The batch comes last."""
        batch: Batch = args[-1]
        self.keys_SB = batch.extra.get(NOISE)
        return forward(*args)


def layer_key(name: str) -> int:
    """A number for a layer."""
    return seed_for(0, "dropout", name)


def drop(x: Tensor, keys_SB: Tensor, layer: int, share: float, first: int = 0) -> Tensor:
    """x [S, B, n] without a share of its elements, the others made larger by as much.

    Args:
        keys_SB: of x's tokens.
        layer: of the layer, `layer_key`.
        first: index of x's first feature in the whole layer.
    """
    dropped: Tensor = _Drop.apply(x, keys_SB, layer, share, first)
    return dropped


class _Drop(torch.autograd.Function):
    """The mask is made twice rather than kept."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, keys_SB: Tensor, layer: int, share: float, first: int) -> Tensor:
        ctx.save_for_backward(keys_SB)
        ctx.rest = layer, share, first
        return x * _mask(x, keys_SB, layer, share, first)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        [keys_SB] = ctx.saved_tensors
        return grads[0] * _mask(grads[0], keys_SB, *ctx.rest), None, None, None, None


def _mask(x: Tensor, keys_SB: Tensor, layer: int, share: float, first: int) -> Tensor:
    """0 or 1/(1 − share) for each element of x, in its dtype."""
    features = torch.arange(first + 1, first + x.shape[-1] + 1, device=x.device) * FIRST
    hashed = _mixed(_mixed(keys_SB + layer).unsqueeze(-1) + features)
    kept = (hashed & ((1 << BITS) - 1)) >= int(share * (1 << BITS))
    return kept.to(x.dtype).div_(1 - share)


def _mixed(x: Tensor) -> Tensor:
    """All bits of the result depend on all bits of x; a shift to the right brings in no sign."""
    lowest = (1 << 31) - 1
    x = (x ^ ((x >> 33) & lowest)) * FIRST
    x = (x ^ ((x >> 33) & lowest)) * SECOND
    return x ^ ((x >> 33) & lowest)
