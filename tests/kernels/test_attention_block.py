"""Attention in blocks of keys: each block beside its reference, and blocks merged beside ordinary attention."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from engine.kernels.attention import attention_reference
from engine.kernels.attention_block import AttentionBlock, block_backward_reference, block_forward_reference
from engine.kernels.operation import Place
from engine.kernels.table import choose
from tests.kit.compare import TOLERANCE, random, relative_error

BATCH, LENGTH, DIM = 2, 12, 8
HEADS = [(4, 4), (6, 2)]              # query heads, key-value groups


def chosen(dtype: torch.dtype) -> AttentionBlock:
    """As a run on the CPU has it."""
    block = choose(Place(torch.device("cpu"), dtype)).attention_block
    assert block.forward is not block_forward_reference
    return block


def inputs(heads: int, groups: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the gradient of the output, [B, heads, S, D]."""
    return [random(BATCH, count, LENGTH, DIM, seed=seed).to(dtype)
            for seed, count in enumerate((heads, groups, groups, heads))]


def check(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    finite = want.isfinite()
    assert torch.equal(got.isfinite(), finite)
    assert relative_error(got[finite], want[finite]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "groups"), HEADS)
@pytest.mark.parametrize("causal", [False, True])
def test_a_block_equals_its_reference(causal: bool, heads: int, groups: int, dtype: torch.dtype) -> None:
    q, k, v, grad = inputs(heads, groups, dtype)
    block = chosen(dtype)
    out, lse = block.forward(q, k, v, causal=causal)
    want_out, want_lse = block_forward_reference(q, k, v, causal=causal)
    assert out.dtype == dtype and lse.dtype == torch.float32
    check(out, want_out, dtype)
    check(lse, want_lse, dtype)
    # the final output and log-sum-exp of these queries include other keys
    final_lse = torch.logaddexp(want_lse, torch.zeros(()))
    final_out = want_out * (want_lse - final_lse).exp().unsqueeze(-1).to(dtype)
    got = block.backward(grad, q, k, v, final_out, final_lse, causal=causal)
    want = block_backward_reference(grad, q, k, v, final_out, final_lse, causal=causal)
    for mine, theirs in zip(got, want, strict=True):
        check(mine, theirs, dtype)


@pytest.mark.parametrize(("heads", "groups"), HEADS)
def test_merged_blocks_are_attention(heads: int, groups: int) -> None:
    """The second half of the queries, over both halves of the keys."""
    q, k, v, grad = inputs(heads, groups, torch.float32)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    sequence_first = [x.permute(2, 0, 1, 3) for x in leaves]
    whole = attention_reference(sequence_first[0].unflatten(2, (groups, -1)), *sequence_first[1:])
    whole = whole.unflatten(-1, (heads, DIM)).permute(1, 2, 0, 3)[:, :, LENGTH // 2 :]
    want = torch.autograd.grad(whole, leaves, grad[:, :, LENGTH // 2 :].double())

    query, upstream = q[:, :, LENGTH // 2 :], grad[:, :, LENGTH // 2 :]
    halves = [(k[:, :, part], v[:, :, part], causal)
              for part, causal in ((slice(0, LENGTH // 2), False), (slice(LENGTH // 2, None), True))]
    block = chosen(torch.float32)
    parts = [block.forward(query, key, value, causal=causal) for key, value, causal in halves]
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    out = sum(part * (own - lse).exp().unsqueeze(-1) for part, own in parts)
    check(out, whole.detach(), torch.float32)
    grads = [block.backward(upstream, query, key, value, out, lse, causal=causal) for key, value, causal in halves]
    check(grads[0][0] + grads[1][0], want[0][:, :, LENGTH // 2 :], torch.float32)
    for which in (1, 2):
        check(torch.cat((grads[0][which], grads[1][which]), dim=2), want[which], torch.float32)
