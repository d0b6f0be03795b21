"""Kernels in Triton without a GPU: their arithmetic in Triton's interpreter, in fp32.

The interpreter rounds to bf16 by cutting off, so bf16 is compared on a GPU only (`test_table.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.kernels.operation import Operation, Place, Unavailable
from engine.kernels.table import TABLE
from tests.kernels.cases import CASES, Case, differentiated, rms_norm_cases
from tests.kernels.test_table import FP32, assert_as_good
from tests.kit.compare import random

pytest.importorskip("triton", reason="Triton is not installed")

# With a GPU Triton compiles in this process instead of interpreting: the same cases run there, in test_table.py.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="test_table.py runs them on the GPU itself")

OPERATIONS = {operation.name: operation for operation in TABLE
              if any(entry.name == "triton" for entry in operation.implementations)}
GPU = Place(torch.device("cuda"), torch.float32)


def in_interpreter(operation: Operation) -> Any:
    """What a GPU would be given; `TRITON_INTERPRET` is set by the suite's conftest."""
    return next(entry for entry in operation.implementations if entry.name == "triton").find(GPU)


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_cases_of_the_table(name: str) -> None:
    for case in CASES[name]():
        assert_as_good(OPERATIONS[name], in_interpreter(OPERATIONS[name]), case, FP32)


def odd_cases() -> Iterator[tuple[str, Case]]:
    """Sizes that no block divides, single rows, strides."""
    for case in rms_norm_cases(((1, 1), (3, 5), (601, 7), (2, 1030)), 0.1):
        yield "rms_norm", case
    for shape in ((1, 2, 1), (3, 1, 2, 1027)):
        yield "swiglu", Case(str(shape), (random(*shape, seed=3),), differentiated())
    for heads, dim, batch in ((3, 6, 1), (5, 24, 3)):
        def turned(function: Any, inputs: Any) -> list[Tensor]:
            qkv, angles = inputs
            cos, sin = angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)
            return differentiated(cos, sin)(lambda x, *turn: transposed(function(x, *turn)), [qkv])

        angles = random(4, 1, 1, 1, dim // 2, seed=5)
        yield "rope", Case(f"{heads} × {dim}", (random(4, batch, 2, heads + 2, dim, seed=6), angles), turned)


def transposed(parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """As attention wants them; their gradients come with other strides."""
    return tuple(part.transpose(0, 1).contiguous() for part in parts)


@pytest.mark.parametrize(("name", "case"), list(odd_cases()), ids=lambda value: getattr(value, "name", value))
def test_odd_shapes(name: str, case: Case) -> None:
    assert_as_good(OPERATIONS[name], in_interpreter(OPERATIONS[name]), case, FP32)


@pytest.mark.parametrize("name", ["cross_entropy", "log_probs"])
def test_a_vocabulary_of_many_blocks_with_padding_and_huge_logits(name: str) -> None:
    columns, valid = 9001, 8999
    logits = 30 * random(24, columns, seed=7)
    logits[1, 17] = 5000.0                                  # a probability of one, an entropy of zero
    targets = torch.tensor([5, 17, 8998]).repeat(8)

    def run(function: Any, inputs: Any) -> list[Tensor]:
        return differentiated(targets)(lambda x, t: function(x * 1, t, num_valid=valid), inputs)

    case = Case("wide", (logits,), run)
    assert_as_good(OPERATIONS[name], in_interpreter(OPERATIONS[name]), case, FP32)


def test_a_rank_whose_columns_are_all_padding() -> None:
    run = in_interpreter(OPERATIONS["log_probs"])
    others = torch.tensor([[1.5, 2.0], [0.5, 1.0], [0.25, 0.125]])
    logits = torch.ones(2, 4, requires_grad=True)
    log_prob, entropy = run(logits * 1, torch.tensor([3, 4]), first=9, num_valid=0,
                            gather=lambda mine: torch.stack((mine, others)))
    (log_prob + entropy).sum().backward()
    assert torch.equal(log_prob, others[1] - others[0]) and torch.allclose(entropy, others[2])
    assert logits.grad is not None and logits.grad.eq(0).all()


def test_logits_that_have_become_their_gradient_are_not_used_again() -> None:
    leaf = torch.randn(2, 8, requires_grad=True)
    logits = leaf * 1
    loss = in_interpreter(OPERATIONS["cross_entropy"])(logits, torch.tensor([1, 2]))[0].sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_what_is_not_for_this_machine_says_why() -> None:
    for operation in OPERATIONS.values():
        entry = operation.implementations[0]
        assert entry.name == "triton"
        with pytest.raises(Unavailable, match="for cuda only"):
            entry.find(FP32)
