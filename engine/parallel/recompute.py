"""Recomputation: forget activations in the forward pass, compute them again in the backward pass.

full         A layer keeps its input only and runs its forward pass again before its backward pass (Chen et al. 2016):
             about a third more computation, almost no memory.
selective    What is cheap to compute and large to keep (Korthikanti et al. 2022, section 5; attention's own share of it
             is done by the fused attention kernel already): the outputs of both norms and what the halves call cheap,
             such as the output of SwiGLU.  Of a layer's roughly 16·S·B·H activations at F = 8/3·H that is 4.7, for
             a few elementwise passes.

The selective kind works on single outputs.  The norm's output is needed by the linear layer behind it, in the forward
pass and for the weight gradient.  After that layer has run, the output's storage is emptied; when the gradient of the
layer's output arrives, the storage is filled again, in place, so what autograd saved is valid by the time it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from engine.model.transformer import Block

Recompute = Literal["none", "selective", "full"]


def apply_recompute(blocks: Iterable[Block], kind: Recompute) -> None:
    """Makes these layers recompute."""
    for block in blocks:
        if kind == "full":
            block.forward = partial(_checkpointed, block.forward)  # type: ignore[method-assign]
        elif kind == "selective":
            for norm, half in block.halves:
                if norm is not None:
                    _forget_output(norm, half.get_submodule(half.entrance))
                for producer, consumer in half.cheap:
                    _forget_output(half.get_submodule(producer), half.get_submodule(consumer))


def _checkpointed(forward: Callable[..., Tensor], *args: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*args)
    result: Tensor = checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)
    return result


def _forget_output(producer: nn.Module, consumer: nn.Module) -> None:
    """Empties the output of `producer` once `consumer` has used it, and fills it again before its backward pass.

    A norm has two: the sum that it normalises, which is kept, and what is forgotten.
    """
    latest: list[tuple[Tensor, Tensor]] = []

    def remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor | tuple[Tensor, Tensor]) -> None:
        if torch.is_grad_enabled():
            latest.append(output if isinstance(output, tuple) else (inputs[0], output))

    def forget(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if not latest:
            return
        source, forgotten = latest.pop()
        nbytes = forgotten.untyped_storage().size()

        def refill(_: Tensor) -> None:
            with torch.no_grad():
                forgotten.untyped_storage().resize_(nbytes)
                again = producer.forward(source)
                forgotten.data.copy_(again[1] if isinstance(again, tuple) else again)

        if output.requires_grad:
            output.register_hook(refill)
        forgotten.untyped_storage().resize_(0)

    producer.register_forward_hook(remember)
    consumer.register_forward_hook(forget)
