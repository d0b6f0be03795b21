"""Which parameter is cut along which dimension: one table, applied to a model that knows nothing of it.

Patterns are module paths of `engine.model.transformer`, layer numbers as `*`.  A `column` layer's output features and a
`row` layer's input features are divided; `vocab` divides rows of the embedding.  What is not in the table is held by
every tensor rank; with sequence parallelism such a parameter (a norm) sees only part of the tokens on each rank, and
its gradient is a partial sum.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Literal, NamedTuple

from torch import Tensor, nn

from engine.distributed.collectives import all_gather
from engine.kernels.cross_entropy import cross_entropy
from engine.model.layers import Embedding, Linear
from engine.model.spec import ParamSpec, new_parameter, spec_of
from engine.model.transformer import Transformer
from engine.parallel.tensor.layers import ParallelLinear, TensorContext, VocabEmbedding


class Rule(NamedTuple):
    """How a module is cut: the kind of layer it becomes, and the dimension of its weight that is divided."""

    kind: Literal["vocab", "column", "row"]
    dim: int


TENSOR_CUT: dict[str, Rule] = {
    "embedding": Rule("vocab", 0),
    "layers.*.self_attention.linear_qkv": Rule("column", 0),      # [kv_groups, q_per_group + 2, head_dim, hidden]
    "layers.*.self_attention.linear_proj": Rule("row", 1),        # [hidden, heads · head_dim]
    "layers.*.mlp.linear_fc1": Rule("column", 1),                 # [2, ffn, hidden]
    "layers.*.mlp.linear_fc2": Rule("row", 1),                    # [hidden, ffn]
    "output_layer": Rule("column", 0),                            # [vocab, hidden]
}


def cut_tensor(chunk: Transformer, context: TensorContext) -> None:
    """Replaces the layers of `chunk` (on the meta device, uncut) by their slices on this rank."""
    cut: dict[nn.Parameter, nn.Parameter] = {}      # a tied weight is met twice and cut once

    def local(parameter: nn.Parameter, dim: int | None) -> nn.Parameter:
        if parameter not in cut:
            cut[parameter] = new_parameter(_local_spec(spec_of(parameter), dim, context), parameter.device)
        return cut[parameter]

    for path, module in list(chunk.named_modules()):
        rule = TENSOR_CUT.get(re.sub(r"\.\d+\.", ".*.", path))
        parent, _, name = path.rpartition(".")
        if rule is None:
            for key, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, key, local(parameter, None))
        elif isinstance(module, Embedding):
            setattr(chunk.get_submodule(parent), name, VocabEmbedding(local(module.weight, rule.dim), context))
        elif isinstance(module, Linear) and rule.kind != "vocab":
            bias = None if module.bias is None else local(module.bias, rule.dim)
            layer = ParallelLinear(local(module.weight, rule.dim), bias, rule.kind, context)
            setattr(chunk.get_submodule(parent), name, layer)


def _local_spec(spec: ParamSpec, dim: int | None, context: TensorContext) -> ParamSpec:
    if dim is not None:
        return spec.with_cut(dim, context.axis.size, context.axis.index)
    return replace(spec, partial_sum=context.sequence and context.axis.size > 1)


def vocab_parallel_loss(logits: Tensor, labels: Tensor, weight_spec: ParamSpec, context: TensorContext) -> Tensor:
    """Cross-entropy per token, fp32 and shaped like `labels`, from this rank's columns of the logits."""

    def gather(parts: Tensor) -> Tensor:
        return all_gather(parts.unsqueeze(0), context.axis)

    box = weight_spec.box
    return cross_entropy(logits, labels, first=box.offset[0], num_valid=box.size[0],
                         gather=gather if context.axis.size > 1 else None)
