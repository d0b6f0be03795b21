"""From logits to the next token.

    1. temperature τ     logits / τ; τ = 0 stands for its limit, the likeliest token
    2. top-k             keep the k largest
    3. top-p             of these, keep the likeliest until their probability reaches p (Holtzman et al. 2020)
    4. draw              the first token, in order of ids, at which the cumulative probability exceeds u

u is the only random number.  It is named, not drawn in turn: a hash of (seed, index of the prompt, position of the
token).  So a text does not depend on the layout, on the rank that draws, or on which prompts shared its batch.
Filters are in the order and with the ties of `transformers`, so the distributions are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.distributed.random import seed_for
from engine.generate.request import Sampling


def uniform(seed: int, prompt: int | str, position: int) -> float:
    """The random number in [0, 1) for the token at `position` of the text that goes on from prompt number `prompt`."""
    return (seed_for(seed, "sample", prompt, position) >> 10) / 2**53


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """What is drawn from, fp32 [B, V]; `sampling.temperature` must not be 0."""
    logits = logits_BV.float()
    logits = (logits - logits.amax(-1, keepdim=True)) / sampling.temperature         # no overflow, however cold
    if 0 < sampling.top_k < logits.shape[1]:
        smallest = logits.topk(sampling.top_k).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, float("-inf"))
    if sampling.top_p < 1:
        ordered, order = logits.sort(descending=True)
        share = ordered.softmax(-1)
        likelier = share.cumsum(-1) - share                  # probability of the tokens before
        drop = (likelier >= sampling.top_p).scatter(1, order, likelier >= sampling.top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits.softmax(-1)


def put(x: Tensor, device: torch.device) -> Tensor:
    """A host tensor on the device; the host does not wait for what the device has to do before."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


def choose(logits_BV: Tensor, sampling: Sampling, prompts: Sequence[int | str], positions: Sequence[int]) -> Tensor:
    """The next token of every row, int64 [B].

    Args:
        logits_BV: over the true vocabulary, without padding.
        prompts: number or name of each row's prompt, which names its random numbers.
        positions: place of the new token in each row's text.
    """
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    cumulative = probabilities(logits_BV, sampling).double().cumsum(-1)
    draws = [uniform(sampling.seed, prompt, position) for prompt, position in zip(prompts, positions, strict=True)]
    u = put(torch.tensor(draws, dtype=torch.float64), logits_BV.device).unsqueeze(1)
    chosen = torch.searchsorted(cumulative, u * cumulative[:, -1:], right=True)
    return chosen.squeeze(1).clamp(max=logits_BV.shape[1] - 1)
