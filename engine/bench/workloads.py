"""For every operation of the table, the work that one microbatch of a model gives it.

A workload says how to make the inputs for so many tokens, how to run an implementation forward and backward on them,
and what that must cost at least: the bytes of everything that goes in and comes out, each moved once, or the
floating-point operations where products are what takes the time.  Beside the device's measured speed of copying or
multiplying, the time then says how much is left to gain.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from engine.config.model import ModelConfig
from engine.kernels.fp8 import E4M3, amax_of, narrow, scales_of

Inputs = Sequence[Tensor]
Draw = Callable[..., Tensor]                    # normal numbers of a shape: a GPU multiplies zeros faster
Work = Callable[[], Sequence[Tensor]]           # done once per call; everything that comes out


@dataclass(frozen=True)
class Workload:
    """What an operation has to do for so many tokens, which are one sequence.

    Attributes:
        inputs: so many tokens' numbers, drawn by the given function.
        prepared: an implementation's work on inputs, forward and, where it is differentiated, backward.  It may change
            them: doing it again takes as long, and gives other numbers.
        elements: numbers that go in and come out, both directions together; 0: products are what takes the time.
        flops: of the products.
    """

    inputs: Callable[[Draw, int], Inputs]
    prepared: Callable[[Any, Inputs], Work]
    elements: Callable[[int], float] = lambda tokens: 0.0
    flops: Callable[[int], float] = lambda tokens: 0.0


def workloads(model: ModelConfig) -> Mapping[str, Workload]:
    """By the operation's name, in the model's dimensions."""
    hidden, ffn, vocabulary = model.hidden_size, model.ffn_hidden_size, model.vocab_size
    groups, width, heads = model.num_kv_heads, model.head_dim, model.num_heads
    per_group = heads // groups

    def attention_flops(tokens: int) -> float:
        """Two products forward and five backward (Dao et al. 2022), half of each behind the causal mask."""
        return 7 * heads * width * tokens * tokens

    def product_flops(tokens: int) -> float:
        """The widest linear layer's."""
        return 2 * tokens * hidden * 2 * ffn

    return MappingProxyType({
        "attention": Workload(
            lambda draw, t: [draw(t, 1, groups, per_group, width), *(draw(t, 1, groups, width) for _ in range(2))],
            _differentiated(), flops=attention_flops),
        "attention_block": Workload(
            lambda draw, t: [draw(1, heads, t, width), *(draw(1, groups, t, width) for _ in range(2))],
            _block, flops=attention_flops),
        "rms_norm": Workload(lambda draw, t: [draw(t, 1, hidden), draw(t, 1, hidden), draw(hidden)],
                             _differentiated(1e-5), elements=lambda t: 8 * t * hidden),
        "layer_norm": Workload(lambda draw, t: [draw(t, 1, hidden), draw(hidden), draw(hidden)],
                               _differentiated(1e-5), elements=lambda t: 5 * t * hidden),
        "rope": Workload(lambda draw, t: [draw(t, 1, groups, per_group + 2, width), draw(t, 1, 1, 1, width // 2)],
                         _rope, elements=lambda t: 4 * t * groups * (per_group + 2) * width),
        "swiglu": Workload(lambda draw, t: [draw(t, 1, 2, ffn)], _differentiated(), elements=lambda t: 8 * t * ffn),
        "relu2": Workload(lambda draw, t: [draw(t, 1, ffn)], _differentiated(), elements=lambda t: 5 * t * ffn),
        "cross_entropy": Workload(lambda draw, t: [draw(t, 1, vocabulary)], _of_logits,
                                  elements=lambda t: 3 * t * vocabulary),
        "log_probs": Workload(lambda draw, t: [draw(t, 1, vocabulary)], _of_logits,
                              elements=lambda t: 3 * t * vocabulary),
        "linear": Workload(lambda draw, t: [draw(t, 1, hidden), draw(2 * ffn, hidden)], _linear, flops=product_flops),
        "weight_gradient": Workload(lambda draw, t: [draw(t, 2 * ffn), draw(t, hidden)], _weight_gradient,
                                    flops=product_flops),
        "fp8_product": Workload(lambda draw, t: [draw(t, hidden), draw(2 * ffn, hidden)], _fp8_product,
                                flops=product_flops),
        "adamw": Workload(lambda draw, t: [draw(t * hidden), draw(t * hidden)], _adamw,
                          elements=lambda t: 7 * t * hidden),
    })


def _differentiated(*extra: object) -> Callable[[Any, Inputs], Work]:
    """For functions of differentiable tensors, and of numbers after them."""
    return lambda function, inputs: lambda: _both_ways(lambda *leaves: function(*leaves, *extra), inputs)


def _both_ways(function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Inputs) -> list[Tensor]:
    """Outputs and the inputs' gradients; upstream gradients are the outputs themselves."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [out.detach() for out in outputs]
    return [*upstream, *torch.autograd.grad(outputs, leaves, upstream)]


def _block(block: Any, inputs: Inputs) -> Work:
    q, k, v = inputs

    def work() -> list[Tensor]:
        out, lse = block.forward(q, k, v, causal=True)
        return [out, lse, *block.backward(q, q, k, v, out, lse, causal=True)]

    return work


def _rope(function: Any, inputs: Inputs) -> Work:
    cos, sin = inputs[1].cos(), inputs[1].sin()
    return lambda: _both_ways(lambda qkv: function(qkv, cos, sin), inputs[:1])


def _of_logits(function: Any, inputs: Inputs) -> Work:
    """Implementations may write the gradient where the logits are, which a leaf does not allow, and its view does."""
    (logits,) = inputs
    targets = torch.arange(len(logits), device=logits.device).remainder(logits.shape[-1]).view(logits.shape[:-1])
    return lambda: _both_ways(lambda leaf: function(leaf.view_as(leaf), targets), inputs)


def _linear(function: Any, inputs: Inputs) -> Work:
    return lambda: [function(*inputs)]


def _weight_gradient(function: Any, inputs: Inputs) -> Work:
    grad, x = inputs
    sums = torch.zeros(grad.shape[1], x.shape[1], dtype=_wide(x).dtype, device=x.device)

    def work() -> list[Tensor]:
        function(sums, grad.T, x, accumulate=True)
        return [sums]

    return work


def _fp8_product(function: Any, inputs: Inputs) -> Work:
    """Tensorwise; the casts are not counted."""
    a, b = (narrow(x, scales_of(amax_of(x, (None, None)), E4M3), (None, None), E4M3) for x in inputs)
    return lambda: [function(a, b, inputs[0].dtype)]


def _adamw(function: Any, inputs: Inputs) -> Work:
    """In the dtype of optimizer states, whatever the model computes in."""
    param, grad = (_wide(x) for x in inputs)
    first, second, step = torch.zeros_like(param), torch.zeros_like(param), torch.zeros_like(param[0])
    one, zero = torch.ones_like(step), torch.zeros_like(step)

    def work() -> list[Tensor]:
        function([param], [grad], [first], [second], [step], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
                 grad_divisor=one, found_inf=zero)
        return [param, first, second]

    return work


def _wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where that came in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
