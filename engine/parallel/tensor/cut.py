"""Cutting a model that knows nothing of it: each parameter by its own rule (`engine.model.spec`).

A linear layer whose weight is divided becomes a column- or row-parallel one, an embedding a vocabulary-parallel one,
and a layer's adapter one of the same kind.
Every other module stays what it is, with this rank's part of its parameters.
"""

from __future__ import annotations

from torch import nn

from engine.model.adapter import Adapter
from engine.model.layers import Embedding, Linear, PositionEmbedding, ProjectionNorm
from engine.model.parameters import new_parameter, spec_of
from engine.model.transformer import Transformer
from engine.parallel.tensor.adapter import ParallelAdapter
from engine.parallel.tensor.layers import (
    ParallelLinear,
    ParallelProjectionNorm,
    PartPositionEmbedding,
    TensorContext,
    VocabEmbedding,
)


def cut_tensor(chunk: Transformer, context: TensorContext) -> None:
    """Replaces the layers of `chunk` (on the meta device, uncut) by their slices on this rank.

    Raises:
        TypeError: a parameter has no spec, and so no rule.
        ValueError: a dimension does not divide.
    """
    cut: dict[nn.Parameter, nn.Parameter] = {}      # a tied weight is met twice and cut once

    def local(parameter: nn.Parameter) -> nn.Parameter:
        if parameter not in cut:
            spec = spec_of(parameter).on_tensor_rank(context.axis.size, context.axis.index, context.sequence)
            cut[parameter] = new_parameter(spec, parameter.device)
        return cut[parameter]

    for path, module in list(chunk.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, key, local(parameter))
        replacement = _parallel(module, context)
        if replacement is not None:
            parent, _, name = path.rpartition(".")
            setattr(chunk.get_submodule(parent), name, replacement)


def _parallel(module: nn.Module, context: TensorContext) -> nn.Module | None:
    """The layer that computes together with its peers what `module` computes alone; None: `module` itself does."""
    if isinstance(module, Embedding):
        return VocabEmbedding(module.weight, context)
    if isinstance(module, PositionEmbedding):
        return PartPositionEmbedding(module, context)
    if isinstance(module, Linear) and (rule := spec_of(module.weight).rule).dim is not None:
        layer = ParallelLinear(module.weight, module.bias, "row" if rule.kind == "row" else "column", context)
        layer.adapter = module.adapter                          # cut in its turn: a module comes before its parts
        return layer
    if isinstance(module, ProjectionNorm):
        return ParallelProjectionNorm(module, context)
    if isinstance(module, Adapter):
        return ParallelAdapter(module, context)
    return None
