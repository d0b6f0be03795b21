"""From logits to the next token.

    1. penalty r         logits of ids that the text has already: divided by r where positive, else multiplied
                         (Keskar et al. 2019, section 4.1)
    2. temperature τ     logits / τ; τ = 0 stands for its limit, the likeliest token
    3. top-k             keep the k largest
    4. top-p             of these, keep the likeliest until their probability reaches p (Holtzman et al. 2020)
    5. draw              the largest of log p_i − log e_i, with e_i exponentially distributed noise

The last is a draw from p (Gumbel 1954).  The noise is named, not drawn in turn: a hash of (seed, step, prompt, sample,
position, id).  So a text does not depend on the layout, on the rank that draws, or on which texts shared its batch.

*Why this draw.*  The products of a matrix with 1 row and with 16, or cut over ranks, differ in their last bits, so
logits of the same text do.  Noise of its own for every id makes that matter only where the two best candidates are that
close, about as rarely as the rounding is small.  One number for all ids, looked up in the cumulative probability, would
move with the sum of all ids before, and change a token V times as often.

Filters are in the order and with the ties of `transformers`, so the distributions are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.distributed.random import seed_for
from engine.generate.request import Sampling

# splitmix64 (Steele et al. 2014): a step between numbers, then shifts and products that mix all bits.
_STEP, _MIX = 0x9E3779B97F4A7C15, ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class Name(NamedTuple):
    """What the noise of a text is named after, besides the run's seed."""

    step: int
    prompt: int
    sample: int

    def at(self, seed: int, position: int) -> int:
        """The noise of the token at `position` of the text (0 is the prompt's first): 64 bits, signed."""
        return _signed(seed_for(seed, "sample", *self, position))


def _signed(bits: int) -> int:
    return bits - (1 << 64) if bits >> 63 else bits


def exponential(keys_B: Tensor, num_ids: int) -> Tensor:
    """Exponentially distributed noise of every id, fp64 [B, num_ids]: a function of (key, id)."""
    ids = torch.arange(1, num_ids + 1, dtype=torch.int64, device=keys_B.device)
    bits = keys_B.unsqueeze(1) + ids.mul_(_signed(_STEP))
    for shift, factor in _MIX:
        bits.bitwise_xor_(_shifted(bits, shift)).mul_(_signed(factor))
    bits = _shifted(bits.bitwise_xor_(_shifted(bits, 31)), 11)
    return bits.double().add_(0.5).mul_(2.0**-53).log_().neg_()              # of a uniform number in (0, 1)


def _shifted(bits: Tensor, by: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (bits >> by).bitwise_and_((1 << (64 - by)) - 1)


def penalise(logits_BV: Tensor, seen: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Step 1; `seen`: the ids that each row's text has, at least one each."""
    longest = max(map(len, seen))
    rows = [[*ids, *[ids[0]] * (longest - len(ids))] for ids in seen]
    ids_BN = put(torch.tensor(rows), logits_BV.device)
    found = logits_BV.gather(1, ids_BN)
    return logits_BV.scatter(1, ids_BN, torch.where(found < 0, found * penalty, found / penalty))


def filtered(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Steps 2 to 4 for logits in fp32: those of ids that are left over, −∞ elsewhere; τ must not be 0."""
    logits = logits_BV - logits_BV.amax(-1, keepdim=True)                                  # no overflow, however cold
    if sampling.temperature != 1:
        logits.div_(sampling.temperature)
    if 0 < sampling.top_k < logits.shape[1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        likelier = share.cumsum(-1) - share                  # probability of the tokens before
        drop = (likelier >= sampling.top_p).scatter(1, order, likelier >= sampling.top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def put(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the host does not wait for what the device has to do before."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def choose(logits_BV: Tensor, sampling: Sampling, keys: Sequence[int]) -> Tensor:
    """The next token of every row and its log-probability, fp64 [2, B]: ids are exact in it up to 2⁵³.

    The log-probability is that at this temperature, before top-k and top-p, in fp32; for τ = 0 that at 1.

    Args:
        logits_BV: over the true vocabulary, without padding.
        keys: the noise of each row's token (`Name.at`); of none for τ = 0.
    """
    logits = logits_BV.float()
    if sampling.temperature == 0:
        chosen = logits.argmax(-1, keepdim=True)
    else:
        noise = exponential(put(torch.tensor(keys, dtype=torch.int64), logits.device), logits.shape[1])
        chosen = torch.sub(filtered(logits, sampling), noise.log_(), out=noise).argmax(-1, keepdim=True)
        logits = logits / sampling.temperature if sampling.temperature != 1 else logits
    log_probs = logits.log_softmax(-1).gather(1, chosen)
    return torch.cat((chosen.double().T, log_probs.double().T))
