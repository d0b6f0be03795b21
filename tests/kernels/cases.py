"""For every operation of the table: inputs, and how an implementation is run on them, forward and backward.

A case's `run` takes an implementation's function and floating-point inputs of any dtype, on any device, and returns all
that can be compared: outputs and gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.documents import Documents
from engine.kernels.fp8 import E4M3, E5M2, amax_of, narrow, scales_of
from tests.kit.compare import forward_backward, random

LENGTH, BATCH, DIM = 40, 2, 16


@dataclass(frozen=True)
class Case:
    """`run(function, inputs)` → tensors to compare; `inputs` are fp64 on the CPU."""

    name: str
    inputs: Sequence[Tensor]
    run: Callable[[Any, Sequence[Tensor]], list[Tensor]]


def differentiated(*extra: Any, **named: Any) -> Callable[[Any, Sequence[Tensor]], list[Tensor]]:
    """For functions of differentiable tensors, which come first, and others."""
    def run(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        rest = [x.to(inputs[0].device) if isinstance(x, Tensor) else x for x in extra]
        return forward_backward(lambda *leaves: function(*leaves, *rest, **named), inputs, inputs[0].dtype)

    return run


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where that came in: what accumulators and optimizer states are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def some_mask(queries: int, keys: int) -> Tensor:
    mask = torch.rand(BATCH, 1, queries, keys, generator=torch.Generator().manual_seed(4)) < 0.5
    mask[..., 0] = True
    return mask


def attention_cases() -> list[Case]:
    def inputs(queries: int, keys: int, groups: int, heads: int) -> list[Tensor]:
        return [random(queries, BATCH, groups, heads, DIM, seed=1), random(keys, BATCH, groups, DIM, seed=2),
                random(keys, BATCH, groups, DIM, seed=3)]

    def with_documents(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        documents = Documents.of(torch.tensor([[0] * 7 + [1] * 33, [0] * 20 + [1] + [2] * 19])).to(inputs[0].device)
        return differentiated(documents=documents)(function, inputs)

    return [Case("causal", inputs(LENGTH, LENGTH, 2, 2), differentiated()),
            Case("causal, one group per head", inputs(LENGTH, LENGTH, 4, 1), differentiated()),
            Case("masked", inputs(LENGTH, LENGTH, 2, 2), differentiated(some_mask(LENGTH, LENGTH))),
            Case("one query over a cache", inputs(1, LENGTH, 2, 2), differentiated(some_mask(1, LENGTH))),
            Case("documents", inputs(LENGTH, LENGTH, 2, 2), with_documents)]


def attention_block_cases() -> list[Case]:
    def run(causal: bool) -> Callable[[Any, Sequence[Tensor]], list[Tensor]]:
        def both(block: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
            q, k, v, grad = inputs
            out, lse = block.forward(q, k, v, causal=causal)
            final = torch.logaddexp(lse, torch.zeros_like(lse))      # these queries see other keys too
            scaled = (wide(out) * (lse - final).exp().unsqueeze(-1)).to(out.dtype)
            return [out, scaled, *block.backward(grad, q, k, v, scaled, final, causal=causal)]
        return both

    inputs = [random(BATCH, heads, LENGTH, DIM, seed=seed) for seed, heads in enumerate((4, 2, 2, 4))]
    return [Case("causal", inputs, run(True)), Case("all", inputs, run(False))]


def rms_norm_inputs(*shape: int) -> tuple[Tensor, Tensor, Tensor]:
    return 3 * random(*shape, seed=1), 2 * random(*shape, seed=18), 1 + 0.5 * random(shape[-1], seed=2)


def rms_norm_cases(shapes: Sequence[tuple[int, ...]] = ((LENGTH, BATCH, 96), (7, 33), (LENGTH, BATCH, 4, DIM)),
                   eps: float = 1e-5) -> list[Case]:
    """With something to add, and alone: both go on along the residual stream and are normalised."""
    def alone(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        return forward_backward(lambda x, w: function(x, None, w, eps), inputs, inputs[0].dtype)

    return [case for shape in shapes for case in (
        Case(str(shape), rms_norm_inputs(*shape), differentiated(eps)),
        Case(f"{shape}, nothing to add", rms_norm_inputs(*shape)[::2], alone))]


def rope_cases() -> list[Case]:
    def run(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        qkv, angles = inputs[0], inputs[1].double()
        cos, sin = angles.cos().to(qkv.dtype), angles.sin().to(qkv.dtype)
        return differentiated(cos, sin)(function, [qkv])

    # few enough bits that every dtype turns by the same angles
    angles = random(LENGTH, BATCH, 1, 1, DIM // 2, seed=5).to(torch.bfloat16).double()
    return [Case(f"{groups} groups of {heads}", (random(LENGTH, BATCH, groups, heads + 2, DIM, seed=6), angles), run)
            for groups, heads in ((2, 4), (3, 1))]


def swiglu_cases() -> list[Case]:
    return [Case(str(shape), (4 * random(*shape, seed=7),), differentiated()) for shape in ((LENGTH, BATCH, 2, 56),)]


def relu2_cases() -> list[Case]:
    return [Case(str(shape), (4 * random(*shape, seed=17),), differentiated()) for shape in ((LENGTH, BATCH, 56),)]


def layer_norm_cases() -> list[Case]:
    return [Case(str(shape), (2 + 3 * random(*shape, seed=18), random(shape[-1], seed=19), random(shape[-1], seed=20)),
                 differentiated(1e-5)) for shape in ((LENGTH, BATCH, 56),)]


VOCABULARY, CUT = 37, (20, 17)


def vocabulary_cases(**named: Any) -> list[Case]:
    """For what is computed of logits and targets, whole and with the vocabulary cut over two ranks.

    Implementations may write their gradient over the logits, so each is given its own.
    """
    logits = 4 * random(LENGTH, BATCH, VOCABULARY, seed=8)
    targets = torch.arange(LENGTH * BATCH).remainder(VOCABULARY).view(LENGTH, BATCH)

    def over_ranks(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The exchange is played by running the forward pass twice."""
        columns = max(CUT) + 3
        parts = [F.pad(part, (0, columns - part.shape[-1])) for part in inputs[0].split(CUT, dim=-1)]
        where = targets.to(inputs[0].device)
        posted: list[Tensor] = []

        def rank(index: int, gather: Any) -> Callable[[Tensor], Any]:
            cut = {"first": sum(CUT[:index]), "num_valid": CUT[index], "gather": gather}
            return lambda part: function(part * 1, where, **cut, **named)

        def post(mine: Tensor) -> Tensor:
            posted.append(mine.detach())
            return mine.unsqueeze(0)

        for index, part in enumerate(parts):
            rank(index, post)(part)
        return [x for index, part in enumerate(parts)
                for x in forward_backward(rank(index, lambda mine: torch.stack(posted)), [part], part.dtype)]

    def whole(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        return differentiated(targets, **named)(lambda x, *rest, **cut: function(x * 1, *rest, **cut), inputs)

    return [Case("whole", (logits,), whole), Case("over two ranks", (logits,), over_ranks)]


def linear_cases() -> list[Case]:
    def run(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        x, weight, bias = inputs
        return [function(x, weight), function(x, weight, bias), function(x, weight.T.contiguous().T)]

    def case(tokens: int, k: int, n: int) -> Case:
        inputs = (random(tokens, 1, k, seed=9), random(n, k, seed=10), random(n, seed=11))
        return Case(f"{tokens} × {k} × {n}", inputs, run)

    return [case(5, 24, 16), case(150, 136, 176)]


def weight_gradient_cases() -> list[Case]:
    def run(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        grad, x, start = inputs
        fresh, sums = torch.full_like(wide(start), float("nan")), wide(start).clone()
        function(fresh, grad.T, x, accumulate=False)
        function(sums, grad.T, x, accumulate=True)
        return [fresh, sums]

    def case(tokens: int, k: int, n: int) -> Case:
        inputs = (random(tokens, n, seed=12), random(tokens, k, seed=13), random(n, k, seed=14))
        return Case(f"{tokens} × {k} × {n}", inputs, run)

    return [case(5, 24, 16), case(150, 136, 176), case(150, 176, 136)]


def fp8_product_cases() -> list[Case]:
    def run(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        whole = (None, None)
        a, b = (narrow(x, scales_of(amax_of(x, whole), dtype), whole, dtype)
                for x, dtype in zip(inputs, (E5M2, E4M3), strict=True))
        return [function(a, b, inputs[0].dtype)]

    return [Case(f"48 × {k} × 32", (random(48, k, seed=15), random(32, k, seed=16)), run) for k in (16, 136, 21)]


def adamw_cases() -> list[Case]:
    def run(function: Any, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Two updates, one that is skipped, and another."""
        params = [wide(x).clone() for x in inputs[:2]]
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        steps = [torch.zeros((), dtype=p.dtype, device=p.device) for p in params]
        for step, skipped in enumerate((0.0, 0.0, 1.0, 0.0), start=1):
            bad = float("nan") if skipped else 1.0
            function(params, [p.roll(step) * bad for p in map(wide, inputs[2:])], *moments, steps, lr=1e-2,
                     betas=(0.9, 0.95), eps=1e-4, weight_decay=0.1, grad_divisor=torch.full_like(steps[0], 3.0),
                     found_inf=torch.full_like(steps[0], skipped))
        return [*params, *moments[0], *moments[1], *steps]

    return [Case("four steps", [random(size, seed=15 + i) for i, size in enumerate((64, 200, 64, 200))], run)]


CASES: dict[str, Callable[[], list[Case]]] = {
    "attention": attention_cases, "attention_block": attention_block_cases, "rms_norm": rms_norm_cases,
    "rope": rope_cases, "swiglu": swiglu_cases, "relu2": relu2_cases,
    "layer_norm": layer_norm_cases, "cross_entropy": vocabulary_cases,
    "log_probs": partial(vocabulary_cases, temperature=0.8), "linear": linear_cases,
    "weight_gradient": weight_gradient_cases, "fp8_product": fp8_product_cases, "adamw": adamw_cases}
