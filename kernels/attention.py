"""Causal grouped-query attention through torch's scaled-dot-product kernels (flash, cuDNN or memory-efficient).

Shapes: S queries, T keys, B batch, G key-value groups, Q query heads per group, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.operation import Implementation, Operation, Place, anywhere, installed


def attention_reference(q_SBGQD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, mask: Tensor | None = None) -> Tensor:
    """The definition, with the scores written out; `mask` as in `attention`, None for causal (S = T)."""
    q, k, v = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q_SBGQD, k_TBGD, v_TBGD))
    scores = torch.einsum("sbgqd,tbgd->bgqst", q, k) * q.shape[-1] ** -0.5
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()[None, None]
    scores = scores.masked_fill(~mask.unsqueeze(1), float("-inf"))
    out = torch.einsum("bgqst,tbgd->sbgqd", scores.softmax(-1), v)
    return out.flatten(2).to(q_SBGQD.dtype)


def attention(q_SBGQD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention output [S, B, G·Q·D].

    Args:
        mask: bool [B or 1, 1, S, T], True where a query may see a key; None for the plain causal mask (S = T).
    """
    q = q_SBGQD.flatten(2, 3).permute(1, 2, 0, 3)
    k, v = k_TBGD.permute(1, 2, 0, 3), v_TBGD.permute(1, 2, 0, 3)
    grouped = q_SBGQD.shape[3] > 1
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.permute(2, 0, 1, 3).flatten(2)


def _flash_attn(place: Place) -> Callable[..., Tensor]:
    """The flash-attn package's kernel; it takes no masks, so packed documents and cached keys go to torch's."""
    place.require(device="cuda", dtypes=(torch.bfloat16, torch.float16))
    flash = installed("flash_attn", "flash_attn_func")

    def flash_attention(q_SBGQD: Tensor, k_TBGD: Tensor, v_TBGD: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            return attention(q_SBGQD, k_TBGD, v_TBGD, mask)
        q, k, v = (x.transpose(0, 1) for x in (q_SBGQD.flatten(2, 3), k_TBGD, v_TBGD))      # batch first
        out: Tensor = flash(q, k, v, causal=True, deterministic=place.deterministic)
        return out.transpose(0, 1).flatten(2)

    return flash_attention


ATTENTION = Operation("attention", "causal or masked grouped-query attention", (
    Implementation("sdpa", anywhere(attention)),
    Implementation("flash-attn", _flash_attn),
    Implementation("reference", anywhere(attention_reference))))
