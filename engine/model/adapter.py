"""Low-rank adapters (LoRA: Hu et al. 2021): y = W·x + (alpha / rank)·B·(A·x), W left as it is.

A is [rank, in] and random, B is [out, rank] and starts as zeros, so the model begins as what it was.  An adapter
belongs to a *projection* as Hugging Face's models and PEFT have it.  Where a layer's weight is several of them in one,
queries, keys and values of each group say, the layer has one `Adapter` with the A's of its targets in one matrix
[projections, rank, in], so that x is read once, and a B for each, in the shape of its rows of the weight:

    linear_qkv    [G, Q + 2, D, h]    q_proj, k_proj, v_proj   along dimension 1: Q rows, 1, 1
    linear_fc1    [2, f, h]           gate_proj, up_proj       along dimension 0

Parameters are made with rules, like all others.  A column-parallel layer has its A between the regions, where every
rank has all of x's features, and its B cut like the weight; a row-parallel one has its A cut like the weight and its B
between them.  So what ranks exchange is `rank` numbers per token and projection, never `in` or `out`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import AdapterConfig
from engine.model.dropout import Noise, drop, layer_key
from engine.model.layers import Linear
from engine.model.parameters import new_parameter, spec_of
from engine.model.projections import FUSED, Fused, adapter_specs, require_targets
from engine.model.spec import ParamSpec
from engine.model.transformer import Transformer

SCORE = "score.weight"


@dataclass(frozen=True)
class Projection:
    """An adapted one: which indices of the layer's weight it is, and the parameter that holds its B."""

    name: str
    start: int
    length: int

    @property
    def attribute(self) -> str:
        return f"b_{self.name}"


class Adapter(nn.Module):
    """The adapters of one layer's projections; uncut.  `engine.parallel.tensor.adapter` computes a slice of it.

    Attributes:
        weight: the layer's.
        active: it adds anything; without, the layer is what it was.
        noise: which tokens it works on, where some of its input is to be dropped.
    """

    noise: Noise | None = None

    def __init__(self, weight: ParamSpec, fused: Fused, projections: tuple[Projection, ...],
                 config: AdapterConfig) -> None:
        """For the layer whose weight has this spec (uncut)."""
        super().__init__()
        self.dim, self.size, self.weight = fused.dim, weight.shape[fused.dim], weight
        self.projections, self.config, self.active = projections, config, True
        self.key = layer_key(weight.name)
        a, *bs = adapter_specs(weight, fused, [(each.name, each.length) for each in projections], config.rank)
        self.a = new_parameter(a)
        for projection, spec in zip(projections, bs, strict=True):
            setattr(self, projection.attribute, new_parameter(spec))

    def b(self, projection: Projection) -> nn.Parameter:
        """The B of a projection."""
        parameter: nn.Parameter = getattr(self, projection.attribute)
        return parameter

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """[..., prod(out)] and [..., in] → y, with what the adapters make of x added in place."""
        if not self.active:
            return y
        each = (self.inner(self.dropped(x)) * self.config.scale).split(self.config.rank, dim=-1)
        parts = [self.outer(projection, its) for projection, its in zip(self.projections, each, strict=True)]
        if len(parts) == 1 and self.projections[0].length == self.size:
            return y.add_(parts[0])
        added: Tensor = _AddRows.apply(y, self, *parts)
        return added

    def rows(self, y: Tensor) -> list[Tensor]:
        """Views of [..., prod(out)], one for each projection: [..., *its part of out]."""
        shape = list(spec_of(self.b(self.projections[0])).local_shape[:-1])
        shape[self.dim] = self.size                     # where there are several, this is not the dimension that is cut
        whole = y.unflatten(-1, shape)
        return [whole.narrow(self.dim - len(shape), each.start, each.length) for each in self.projections]

    def dropped(self, x: Tensor) -> Tensor:
        """x without some of its elements, if the batch says that it is to be so."""
        keys_SB = None if self.noise is None else self.noise.keys_SB
        if keys_SB is None:
            return x
        return drop(x, self.of_tokens(keys_SB), self.key, self.config.dropout, self.first_feature(x))

    def of_tokens(self, keys_SB: Tensor) -> Tensor:
        """Those of the tokens of x."""
        return keys_SB

    def first_feature(self, x: Tensor) -> int:
        """Index of x's first feature in the whole layer."""
        return 0

    def inner(self, x: Tensor) -> Tensor:
        """A·x: [..., in] → [..., projections · rank]."""
        return F.linear(x, self.a.flatten(0, 1))

    def outer(self, projection: Projection, inner: Tensor) -> Tensor:
        """B·(A·x): [..., rank] → [..., rows of the projection]."""
        return F.linear(inner, self.b(projection).flatten(0, -2))


class _AddRows(torch.autograd.Function):
    """Adds to some of the rows of y; torch's own views would copy the whole gradient for each of them."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, adapter: Adapter, *parts: Tensor) -> Tensor:
        ctx.adapter, ctx.shapes = adapter, [part.shape for part in parts]
        for rows, part in zip(adapter.rows(y), parts, strict=True):
            rows.add_(part.view(rows.shape))
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        parts = (rows.reshape(shape) for rows, shape in zip(ctx.adapter.rows(grads[0]), ctx.shapes, strict=True))
        return grads[0], None, *parts


def attach_adapters(chunk: Transformer, config: AdapterConfig) -> None:
    """Gives the targets in `chunk` (uncut) their adapters; nothing else is trained any more, but for a score head.

    Raises:
        ConfigError: the model does not have one of them.
    """
    require_targets(chunk.config, config)
    noise = Noise() if config.dropout else None
    for parameter in chunk.parameters():
        spec = spec_of(parameter)
        if spec.name != SCORE:
            parameter.requires_grad_(False).spec = replace(spec, trainable=False)  # type: ignore[attr-defined]
    for path, module in list(chunk.named_modules()):
        fused = FUSED.get(path.rpartition(".")[2])
        if fused is None or not isinstance(module, Linear):
            continue
        spec = spec_of(module.weight)
        targets = tuple(Projection(*row) for row in fused.rows(spec.shape[fused.dim]) if config.adapts(row[0]))
        if targets:
            module.adapter = Adapter(spec, fused, targets, config)
            module.adapter.noise = noise
    if noise is not None:
        noise.during(chunk)
