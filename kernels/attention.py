"""Causal grouped-query attention through torch's scaled-dot-product kernels (flash, cuDNN or memory-efficient).

Packed documents are attended to one by one, or all in one call of a kernel that takes their boundaries; a mask is for
queries over cached keys only.  Scores within a cap (Gemma 2's), and those that fall with the distance (ALiBi: Press et
al. 2022), are written out for some queries at a time, and again in the backward pass, where no kernel has such;
flash-attn has caps.

Shapes: S queries, T keys, B batch, G key-value groups, Q query heads per group, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from engine.kernels.documents import Documents
from engine.kernels.operation import Implementation, Operation, Place, Unavailable, anywhere, installed

QUERIES = 256                              # whose scores are there at once where they are written out


def attention_reference(q_SBGQD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, mask: Tensor | None = None,
                        documents: Documents | None = None, window: int | None = None,
                        softcap: float | None = None, slopes: Tensor | None = None) -> Tensor:
    """The definition, with the scores written out; arguments as of `attention`."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_SBGQD, k_TBGD, v_TBGD))
    scores = torch.einsum("sbgqd,tbgd->bgqst", q, k) * q.shape[-1] ** -0.5
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if slopes is not None:                 # a softmax knows differences only: the keys' positions do
        far = torch.arange(len(k), device=k.device, dtype=k.dtype)
        scores = scores + (slopes.to(k.dtype)[:, None] * far).view(1, *q.shape[2:4], 1, -1)
    if documents is not None:
        mask = documents.mask(scores.device)
    if mask is None:
        queries, keys = scores.shape[-2:]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=scores.device).tril(keys - queries)[None, None]
    if window is not None:
        mask = latest(mask, window)
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    out = torch.einsum("bgqst,tbgd->sbgqd", scores.softmax(-1), v)
    return out.flatten(2).to(q_SBGQD.dtype)


def latest(mask: Tensor, window: int) -> Tensor:
    """Of the keys that a query sees the last `window`."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) <= window)


def attention(q_SBGQD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, mask: Tensor | None = None,
              documents: Documents | None = None, window: int | None = None,
              softcap: float | None = None, slopes: Tensor | None = None) -> Tensor:
    """Attention output [S, B, G·Q·D].

    Args:
        mask: bool [B or 1, 1, S, T], True where a query may see a key; None: the plain causal mask (S = T), or all
            keys for the query that is behind them (S = 1).
        documents: queries see keys of their own document only, besides (S = T, no mask).
        window: of these keys, queries see the latest so many.
        softcap: scores s become cap·tanh(s / cap) (Gemma 2).
        slopes: [G·Q]; scores fall by so much per token of distance (ALiBi).
    """
    if documents is not None:
        return _one_by_one(q_SBGQD, k_TBGD, v_TBGD, documents, window, softcap, slopes)
    if softcap is not None or slopes is not None:
        return _written_out(q_SBGQD, k_TBGD, v_TBGD, mask, window, softcap, slopes)
    if window is not None and mask is not None:
        mask = latest(mask, window)
    elif window is not None and window < len(k_TBGD):
        if len(q_SBGQD) == 1:
            return attention(q_SBGQD, k_TBGD[-window:], v_TBGD[-window:])
        return _band(q_SBGQD, k_TBGD, v_TBGD, window)
    q = q_SBGQD.flatten(2, 3).permute(1, 2, 0, 3)
    k, v = k_TBGD.permute(1, 2, 0, 3), v_TBGD.permute(1, 2, 0, 3)
    grouped = q_SBGQD.shape[3] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1,
                                         enable_gqa=grouped)
    return out.permute(2, 0, 1, 3).flatten(2)


def _band(q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, window: int) -> Tensor:
    """`window` queries at a time, which see keys of theirs and of the `window` before: S·2·window scores, not S².

    Of the 2·window keys of queries that begin at the second half, query i sees i + 1 to i + window.
    """
    queries = q_SBGQD.split(window)
    done = [attention(queries[0], k_SBGD[:window], v_SBGD[:window])]
    band = torch.ones(window, 2 * window, dtype=torch.bool, device=q_SBGQD.device).triu(1).tril(window)
    for number, some in enumerate(queries[1:], 1):
        keys = slice((number - 1) * window, number * window + len(some))
        mask = band[: len(some), : window + len(some)][None, None]
        done.append(attention(some, k_SBGD[keys], v_SBGD[keys], mask))
    return torch.cat(done)


def _written_out(q_SBGQD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, mask: Tensor | None, window: int | None,
                 softcap: float | None, slopes: Tensor | None) -> Tensor:
    """`QUERIES` queries at a time: what is kept of them is their input and their output."""
    if mask is not None and window is not None:
        mask = latest(mask, window)
    done = []
    for start in range(0, len(q_SBGQD), QUERIES):
        queries = q_SBGQD[start : start + QUERIES]
        keys, seen = slice(None), mask
        if mask is not None:
            seen = mask[..., start : start + QUERIES, :]
        else:
            first = start + len(k_TBGD) - len(q_SBGQD)
            stop = first + len(queries)
            keys = slice(0 if window is None else max(0, first + 1 - window), stop)
            seen = torch.ones(len(queries), stop, dtype=torch.bool, device=queries.device).tril(first)
            seen = (seen if window is None else seen.triu(first + 1 - window))[None, None, :, keys]
        done.append(checkpoint(attention_reference, queries, k_TBGD[keys], v_TBGD[keys], seen, None, None, softcap,
                               slopes, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(done) if len(done) > 1 else done[0]


def _one_by_one(q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, documents: Documents, window: int | None,
                softcap: float | None, slopes: Tensor | None) -> Tensor:
    """Each document by itself."""
    rows = []
    for row, qkv in enumerate(zip(*(x.split(1, dim=1) for x in (q_SBGQD, k_SBGD, v_SBGD)), strict=True)):
        parts = zip(*(x.split(documents.lengths(row)) for x in qkv), strict=True)      # backward one concatenation
        rows.append(torch.cat([attention(q, k, v, window=window, softcap=softcap, slopes=slopes) for q, k, v in parts]))
    return torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]


def _in_one_call(q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, documents: Documents,
                 run: Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]) -> Tensor:
    """By a kernel for tokens of documents one behind the other, [B·S, heads, D]; `run`: of q, k, v, bounds, longest."""
    q, k, v = (x.transpose(0, 1).flatten(0, 1) for x in (q_SBGQD.flatten(2, 3), k_SBGD, v_SBGD))
    out = run(q, k, v, documents.cu_seqlens, documents.longest)
    return out.flatten(1).unflatten(0, (len(documents.bounds), -1)).transpose(0, 1)


def _before(window: int | None) -> tuple[int, int]:
    """How many keys a query sees before its own (-1: any number), and behind."""
    return (-1 if window is None else window - 1), 0


def _only(window: int | None, softcap: float | None) -> dict[str, Any]:
    """Window and cap for whoever takes causality by another name."""
    return {**({} if window is None else {"window_size": _before(window)}),
            **({} if softcap is None else {"softcap": softcap})}


def _varlen(place: Place) -> Callable[..., Tensor]:
    """Torch's attention, and for documents its kernel for sequences of different lengths."""
    place.require(device="cuda", dtypes=(torch.bfloat16, torch.float16))
    varlen = installed("torch.nn.attention.varlen", "varlen_attn")
    if missing := {"window_size", "enable_gqa"} - set(signature(varlen).parameters):
        raise Unavailable(f"torch {torch.__version__} has it without {min(missing)}")
    if place.deterministic:
        raise Unavailable("its gradients depend on the order of additions")

    def run(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int | None) -> Tensor:
        return varlen(q, k, v, bounds, bounds, longest, longest, window_size=_before(window), enable_gqa=True)

    def varlen_attention(q_SBGQD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, mask: Tensor | None = None,
                         documents: Documents | None = None, window: int | None = None,
                         softcap: float | None = None, slopes: Tensor | None = None) -> Tensor:
        if documents is None or softcap is not None or slopes is not None:
            return attention(q_SBGQD, k_TBGD, v_TBGD, mask, documents, window, softcap, slopes)
        return _in_one_call(q_SBGQD, k_TBGD, v_TBGD, documents, partial(run, window=window))

    return varlen_attention


def _flash_attn(place: Place) -> Callable[..., Tensor]:
    """The flash-attn package's kernel; it takes no masks, so cached keys go to torch's."""
    place.require(device="cuda", dtypes=(torch.bfloat16, torch.float16))
    flash, packed = installed("flash_attn", "flash_attn_func"), installed("flash_attn", "flash_attn_varlen_func")

    def run(q: Tensor, k: Tensor, v: Tensor, bounds: Tensor, longest: int, window: int | None,
            softcap: float | None) -> Tensor:
        return packed(q, k, v, bounds, bounds, longest, longest, causal=True, deterministic=place.deterministic,
                      **_only(window, softcap))

    def flash_attention(q_SBGQD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, mask: Tensor | None = None,
                        documents: Documents | None = None, window: int | None = None,
                        softcap: float | None = None, slopes: Tensor | None = None) -> Tensor:
        if slopes is not None or mask is not None:
            return attention(q_SBGQD, k_TBGD, v_TBGD, mask, documents, window, softcap, slopes)
        if documents is not None:
            return _in_one_call(q_SBGQD, k_TBGD, v_TBGD, documents, partial(run, window=window, softcap=softcap))
        q, k, v = (x.transpose(0, 1) for x in (q_SBGQD.flatten(2, 3), k_TBGD, v_TBGD))      # batch first
        out: Tensor = flash(q, k, v, causal=True, deterministic=place.deterministic,
                            **_only(window, softcap))
        return out.transpose(0, 1).flatten(2)

    return flash_attention


ATTENTION = Operation("attention", "causal or masked grouped-query attention", (
    Implementation("varlen", _varlen),
    Implementation("sdpa", anywhere(attention)),
    Implementation("flash-attn", _flash_attn),
    Implementation("reference", anywhere(attention_reference))))
