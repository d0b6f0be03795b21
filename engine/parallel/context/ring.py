"""Ring attention (Liu et al. 2023) over zig-zag pieces, causal, grouped-query, with document masks.

Every rank keeps its queries.  Keys and values go round the ring: in step s a rank works on those of rank i−s while the
next ones are already on their way.  The partial results are merged with their log-sum-exps in fp32
(`kernels/attention_block.py`).  Of the four (query piece, key piece) pairs of a step, causality needs:

    own keys        the causal triangle of both pieces together (their positions are in order)
    from j < i      all queries × the early keys
    from j > i      the late queries × all keys

which is the same amount of work in every step and on every rank.  Packed documents cut each of the four pairs into
rectangles and triangles, one for every document that reaches into both pieces: blocks like any other, and no masks.

Backward goes round once more, and the gradients of keys and values follow them one step behind, in fp32, until they are
home: they too travel while a block is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.distributed.collectives import RingShift, start_ring_shift
from engine.distributed.mesh import Axis
from engine.kernels.attention_block import AttentionBlock
from engine.kernels.documents import Documents


class Visit(NamedTuple):
    """What some queries of one rank have to do with some keys of another: a rectangle of the score matrix, or its lower
    triangle."""

    rows: slice
    queries: slice
    keys: slice
    causal: bool


def visits(rank: int, source: int, length: int, size: int, documents: Documents | None = None) -> Iterator[Visit]:
    """The non-empty parts of the scores of `rank`'s queries and `source`'s keys; `length`: tokens per rank."""
    half = length // 2
    if documents is not None:
        yield from _of_documents(pieces(rank, size, half), pieces(source, size, half), half, documents)
    elif source == rank:
        yield Visit(slice(None), slice(0, length), slice(0, length), True)
    elif source < rank:
        yield Visit(slice(None), slice(0, length), slice(0, half), False)
    else:
        yield Visit(slice(None), slice(half, length), slice(0, length), False)


def pieces(rank: int, size: int, half: int) -> tuple[int, int]:
    """Where in the whole sequence the two pieces of a rank begin."""
    return rank * half, (2 * size - 1 - rank) * half


def _of_documents(own: tuple[int, int], theirs: tuple[int, int], half: int, documents: Documents) -> Iterator[Visit]:
    """Every document's part of each of two pieces of queries and of keys."""
    for row, start, stop in documents:
        for i, query_piece in enumerate(own):
            for j, key_piece in enumerate(theirs):
                queries, keys = (slice(max(start - piece, 0) + k * half, min(stop - piece, half) + k * half)
                                 for k, piece in ((i, query_piece), (j, key_piece)))
                if key_piece <= query_piece and queries.start < queries.stop and keys.start < keys.stop:
                    yield Visit(slice(row, row + 1), queries, keys, key_piece == query_piece)


class _RingAttention(torch.autograd.Function):
    """q [B, H, S, D], kv [2, B, G, S, D] of this rank → output [B, H, S, D]."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, documents: Documents | None, axis: Axis,
                block: AttentionBlock) -> Tensor:
        length = q.shape[2]
        out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        lse = torch.full(q.shape[:3], float("-inf"), dtype=torch.float32, device=q.device)
        visiting = kv
        for step in range(axis.size):
            source = (axis.index - step) % axis.size
            arriving = start_ring_shift(visiting, axis) if step + 1 < axis.size else None
            for rows, queries, keys, causal in visits(axis.index, source, length, axis.size, documents):
                block_out, block_lse = block.forward(q[rows, :, queries], *visiting[:, rows, :, keys].unbind(0),
                                                     causal=causal)
                _merge(out[rows, :, queries], lse[rows, :, queries], block_out, block_lse)
            if arriving is not None:
                visiting = arriving.wait()
        result = out.to(q.dtype)
        ctx.save_for_backward(q, kv, result, lse)
        ctx.axis, ctx.block, ctx.documents = axis, block, documents
        return result

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, out, lse = ctx.saved_tensors
        axis: Axis = ctx.axis
        grad, length = grads[0].contiguous(), q.shape[2]
        grad_q = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
        visiting = kv
        travelling: RingShift | None = None
        for step in range(axis.size):
            source = (axis.index - step) % axis.size
            arriving = start_ring_shift(visiting, axis) if step + 1 < axis.size else None
            grad_kv = torch.zeros(kv.shape, dtype=torch.float32, device=kv.device)
            for rows, queries, keys, causal in visits(axis.index, source, length, axis.size, ctx.documents):
                pieces_of = ctx.block.backward(grad[rows, :, queries], q[rows, :, queries],
                                               *visiting[:, rows, :, keys].unbind(0), out[rows, :, queries],
                                               lse[rows, :, queries].contiguous(), causal=causal)
                grad_q[rows, :, queries] += pieces_of[0]
                grad_kv[0, rows, :, keys] += pieces_of[1]
                grad_kv[1, rows, :, keys] += pieces_of[2]
            if travelling is not None:
                grad_kv += travelling.wait()                         # what others found has come under the block
            travelling = start_ring_shift(grad_kv, axis, tag=1)      # after the last step this brings them home
            if arriving is not None:
                visiting = arriving.wait()
        if travelling is not None:
            grad_kv = travelling.wait()
        return grad_q.to(q.dtype), grad_kv.to(kv.dtype), None, None, None


def _merge(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> None:
    """Adds a block's result to what is known of the same queries, in place, fp32."""
    merged = torch.logaddexp(lse, block_lse)
    out.mul_((lse - merged).exp_().unsqueeze(-1)).addcmul_(block.float(), (block_lse - merged).exp_().unsqueeze(-1))
    lse.copy_(merged)


class RingAttention:
    """Takes the place of `kernels.attention.attention` in a layer whose sequence is spread over `axis`."""

    def __init__(self, axis: Axis, block: AttentionBlock) -> None:
        self.axis, self.block = axis, block

    def __call__(self, q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, mask: Tensor | None = None,
                 documents: Documents | None = None) -> Tensor:
        """As `attention`, on this rank's tokens, without masks; `documents` are those of the whole sequences."""
        assert mask is None
        q = q_SBGQD.flatten(2, 3).permute(1, 2, 0, 3)
        kv = torch.stack((k_SBGD, v_SBGD)).permute(0, 2, 3, 1, 4).contiguous()
        out: Tensor = _RingAttention.apply(q, kv, documents, self.axis, self.block)
        return out.permute(2, 0, 1, 3).flatten(2)
