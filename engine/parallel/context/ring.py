"""Ring attention (Liu et al. 2023) over zig-zag pieces, causal, grouped-query, with document masks.

Every rank keeps its queries.  Keys and values go round the ring: in step s a rank works on those of rank i−s while the
next ones are already on their way.  The partial results are merged with their log-sum-exps in fp32
(`kernels/attention_block.py`).  Of the four (query piece, key piece) pairs of a step, causality needs:

    own keys        the causal triangle of both pieces together (their positions are in order)
    from j < i      all queries × the early keys
    from j > i      the late queries × all keys

which is the same amount of work in every step and on every rank.  Backward goes round once more, and the gradients of
keys and values follow them one step behind, in fp32, until they are home: they too travel while a block is computed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.distributed.collectives import RingShift, start_ring_shift
from engine.distributed.mesh import Axis
from engine.kernels.attention_block import AttentionBlock
from engine.parallel.context.zigzag import positions_of


class Visit(NamedTuple):
    """What the queries of one rank have to do with the keys of another."""

    queries: slice
    keys: slice
    causal: bool


def visit(rank: int, source: int, length: int) -> Visit:
    """The non-empty part of the score matrix of `rank`'s queries and `source`'s keys; `length`: tokens per rank."""
    half = length // 2
    if source == rank:
        return Visit(slice(0, length), slice(0, length), True)
    return Visit(slice(0, length), slice(0, half), False) if source < rank else \
        Visit(slice(half, length), slice(0, length), False)


class _RingAttention(torch.autograd.Function):
    """q [B, H, S, D], kv [2, B, G, S, D] of this rank → output [B, H, S, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, mask: Tensor | None, axis: Axis, block: AttentionBlock) -> Tensor:
        length = q.shape[2]
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
        visiting = kv
        for step in range(axis.size):
            source = (axis.index - step) % axis.size
            arriving = start_ring_shift(visiting, axis) if step + 1 < axis.size else None
            part = visit(axis.index, source, length)
            piece = block.forward(q[:, :, part.queries], *visiting[:, :, :, part.keys].unbind(0),
                                  **_masking(mask, part, source, axis, length))
            _merge(out[:, :, part.queries], lse[:, :, part.queries], *piece)
            if arriving is not None:
                visiting = arriving.wait()
        result = out.to(q.dtype)
        ctx.save_for_backward(q, kv, result, lse, mask)
        ctx.axis, ctx.block = axis, block
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse, mask = ctx.saved_tensors
        axis: Axis = ctx.axis
        grad, length = grads[0].contiguous(), q.shape[2]
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        visiting, grad_kv = kv, torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
        travelling: RingShift | None = None
        for step in range(axis.size):
            source = (axis.index - step) % axis.size
            arriving = start_ring_shift(visiting, axis) if step + 1 < axis.size else None
            part = visit(axis.index, source, length)
            rows = part.queries
            pieces = ctx.block.backward(grad[:, :, rows], q[:, :, rows], *visiting[:, :, :, part.keys].unbind(0),
                                        out[:, :, rows], lse[:, :, rows].contiguous(),
                                        **_masking(mask, part, source, axis, length))
            grad_q[:, :, rows] += pieces[0]
            if travelling is not None:
                grad_kv = travelling.wait()
            grad_kv[0, :, :, part.keys] += pieces[1]
            grad_kv[1, :, :, part.keys] += pieces[2]
            travelling = start_ring_shift(grad_kv, axis, tag=1)      # after the last step this brings them home
            if arriving is not None:
                visiting = arriving.wait()
        if travelling is not None:
            grad_kv = travelling.wait()
        return grad_q.to(q.dtype), grad_kv.to(kv.dtype), None, None, None


def _masking(mask: Tensor | None, part: Visit, source: int, axis: Axis, length: int) -> dict[str, Any]:
    """How the block is masked: causal, not at all, or by its part of the document mask [B, 1, S, C·S]."""
    if mask is None:
        return {"causal": part.causal}
    keys = positions_of(source, axis.size, axis.size * length, mask.device)[part.keys]
    return {"causal": False, "mask": mask[:, :, part.queries].index_select(3, keys)}


def _merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> None:
    """Adds a block's result to what is known of the same queries, in place, fp32."""
    merged = torch.logaddexp(lse, block_lse)
    out.mul_((lse - merged).exp_().unsqueeze(-1)).addcmul_(block.float(), (block_lse - merged).exp_().unsqueeze(-1))
    lse.copy_(merged)


class RingAttention:
    """Takes the place of `kernels.attention.attention` in a layer whose sequence is spread over `axis`."""

    def __init__(self, axis: Axis, block: AttentionBlock) -> None:
        self.axis, self.block = axis, block

    def __call__(self, q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, mask: Tensor | None = None) -> Tensor:
        """As `attention`, on this rank's tokens; `mask` is [B or 1, 1, S, C·S], its keys in their true order."""
        q = q_SBGQD.flatten(2, 3).permute(1, 2, 0, 3)
        kv = torch.stack((k_SBGD, v_SBGD)).permute(0, 2, 3, 1, 4).contiguous()
        out: Tensor = _RingAttention.apply(q, kv, mask, self.axis, self.block)
        return out.permute(2, 0, 1, 3).flatten(2)
