"""Which tensor is which: one table, read in both directions.

The three layouts hold the same numbers; they differ in how many tensors they make of them:

    ours            one tensor per layer, q, k, v fused per key-value group: [G, Q + 2, D, h]; gate, up fused: [2, f, h]
    Hugging Face    one tensor per layer and projection: q [G·Q·D, h], k and v [G·D, h], gate and up [f, h]
    megatron-core   one tensor for all layers, stacked on a leading axis: [L, G·(Q + 2)·D, h] and [L, 2·f, h]

(G key-value groups of Q query heads and one k and v head each, D head dimension, h hidden, f feed-forward, L layers.)
So every foreign tensor, or layer of it, is a box of one of ours with its leading dimensions run together: a `Part`.
Rotary embedding turns the two halves of a head in all three, so no row changes its place within a head.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

import torch

from checkpoints_tools.families import FAMILIES, Family
from engine.config import ModelConfig
from engine.distributed.boxes import Box
from engine.model.parameters import spec_of
from engine.model.projections import Fused
from engine.model.transformer import Transformer

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """One kind of parameter under its three names; `{i}` is the layer.  What megatron-core's has none for is empty.

    Where Hugging Face has several names, ours is cut along `dim` as `engine.model.projections.Fused` says.  A name that
    a family gives several times is one tensor, which holds these one behind the other.
    """

    ours: str
    hf: tuple[str, ...]
    megatron: str
    dim: int = 0


TABLE = (
    Row("embedding.weight", ("model.embed_tokens.weight",), "embedding.word_embeddings.weight"),
    Row("position_embedding.weight", ("model.embed_positions.weight",), ""),
    Row("embedding_layernorm.weight", ("model.embed_layernorm.weight",), ""),
    Row("embedding_layernorm.bias", ("model.embed_layernorm.bias",), ""),
    Row("layers.{i}.input_layernorm.weight", ("model.layers.{i}.input_layernorm.weight",),
        "decoder.layers.self_attention.linear_qkv.layer_norm_weight"),
    Row("layers.{i}.input_layernorm.bias", ("model.layers.{i}.input_layernorm.bias",),
        ""),
    Row("layers.{i}.self_attention.linear_qkv.weight",
        ("model.layers.{i}.self_attn.q_proj.weight", "model.layers.{i}.self_attn.k_proj.weight",
         "model.layers.{i}.self_attn.v_proj.weight"),
        "decoder.layers.self_attention.linear_qkv.weight", dim=1),
    Row("layers.{i}.self_attention.linear_qkv.bias",
        ("model.layers.{i}.self_attn.q_proj.bias", "model.layers.{i}.self_attn.k_proj.bias",
         "model.layers.{i}.self_attn.v_proj.bias"),
        "decoder.layers.self_attention.linear_qkv.bias", dim=1),
    Row("layers.{i}.self_attention.q_layernorm.weight", ("model.layers.{i}.self_attn.q_norm.weight",),
        "decoder.layers.self_attention.q_layernorm.weight"),
    Row("layers.{i}.self_attention.k_layernorm.weight", ("model.layers.{i}.self_attn.k_norm.weight",),
        "decoder.layers.self_attention.k_layernorm.weight"),
    Row("layers.{i}.self_attention.linear_proj.weight", ("model.layers.{i}.self_attn.o_proj.weight",),
        "decoder.layers.self_attention.linear_proj.weight"),
    Row("layers.{i}.self_attention.linear_proj.bias", ("model.layers.{i}.self_attn.o_proj.bias",),
        "decoder.layers.self_attention.linear_proj.bias"),
    Row("layers.{i}.post_attention_layernorm.weight", ("model.layers.{i}.post_attention_layernorm.weight",), ""),
    Row("layers.{i}.post_attention_layernorm.bias", ("model.layers.{i}.post_attention_layernorm.bias",), ""),
    Row("layers.{i}.post_mlp_layernorm.weight", ("model.layers.{i}.post_feedforward_layernorm.weight",), ""),
    Row("layers.{i}.post_mlp_layernorm.bias", ("model.layers.{i}.post_feedforward_layernorm.bias",), ""),
    Row("layers.{i}.pre_mlp_layernorm.weight", ("model.layers.{i}.post_attention_layernorm.weight",),
        "decoder.layers.mlp.linear_fc1.layer_norm_weight"),
    Row("layers.{i}.pre_mlp_layernorm.bias", ("model.layers.{i}.post_attention_layernorm.bias",),
        ""),
    Row("layers.{i}.mlp.linear_fc1.weight",
        ("model.layers.{i}.mlp.gate_proj.weight", "model.layers.{i}.mlp.up_proj.weight"),
        "decoder.layers.mlp.linear_fc1.weight"),
    Row("layers.{i}.mlp.linear_fc1.bias",
        ("model.layers.{i}.mlp.gate_proj.bias", "model.layers.{i}.mlp.up_proj.bias"),
        "decoder.layers.mlp.linear_fc1.bias"),
    Row("layers.{i}.mlp.linear_fc2.weight", ("model.layers.{i}.mlp.down_proj.weight",),
        "decoder.layers.mlp.linear_fc2.weight"),
    Row("layers.{i}.mlp.linear_fc2.bias", ("model.layers.{i}.mlp.down_proj.bias",),
        "decoder.layers.mlp.linear_fc2.bias"),
    Row("final_layernorm.weight", ("model.norm.weight",), "decoder.final_layernorm.weight"),
    Row("final_layernorm.bias", ("model.norm.bias",), ""),
    Row("output_layer.weight", ("lm_head.weight",), "output_layer.weight"),
    Row("score.weight", ("score.weight",), ""),
)
ROWS = {row.ours: row for row in TABLE}
LLAMA = FAMILIES["LlamaForCausalLM"]     # whose names are the table's
PREFIX = "model."                       # of parameters in our checkpoints


@dataclass(frozen=True)
class Part:
    """The block `box` of our parameter `ours` is the foreign tensor `name`, or layer `layer` of it, or some rows of it.

    Attributes:
        shape: of the block in the foreign tensor, without the axis of layers.
        first: the first of its rows, where the tensor holds several blocks one behind the other.
        transposed: the tensor has inputs × outputs; the block, once it is turned, does not.
    """

    ours: str
    box: Box
    name: str
    shape: Shape
    layer: int | None = None
    first: int = 0
    transposed: bool = False

    @property
    def num_elements(self) -> int:
        return self.box.num_elements


def parameter_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Global name and shape of every parameter of the model, in the order of the layers."""
    with torch.device("meta"):
        model = Transformer(config)
    specs = [spec_of(parameter) for parameter in model.parameters()]
    return {spec.name: spec.shape for spec in specs}


def hf_parts(config: ModelConfig, family: Family = LLAMA) -> dict[str, list[Part]]:
    """Per parameter of ours, the Hugging Face tensors, or blocks of them, that are cut out of it."""
    parts: dict[str, list[Part]] = {}
    for ours, shape, row, layer in _rows(config):
        fused, whole = Fused(family.names.get(row.ours, row.hf), row.dim), Box.whole(shape)
        found = parts[ours] = []
        rows: Counter[str] = Counter()
        for name, start, length in fused.rows(shape[row.dim]):
            box, name = whole.narrow(row.dim, start, length), name.format(i=layer)
            block = _run_together(ours, box.size)
            found.append(Part(ours, box, name, block, first=rows[name],
                              transposed=row.ours in family.transposed))
            rows[name] += block[0]
    return parts


def hf_shapes(parts: Collection[Part]) -> dict[str, Shape]:
    """The Hugging Face tensors that these blocks are all of."""
    rows: dict[str, Shape] = {}
    for part in parts:
        rows[part.name] = (part.first + part.shape[0], *part.shape[1:])
    transposed = {part.name for part in parts if part.transposed}
    return {name: shape[::-1] if name in transposed else shape for name, shape in rows.items()}


def megatron_parts(config: ModelConfig) -> dict[str, Part]:
    """Per parameter of ours, the megatron-core tensor, or layer of a stacked one, that it is."""
    return {ours: Part(ours, Box.whole(shape), row.megatron, _run_together(ours, shape), layer)
            for ours, shape, row, layer in _rows(config)}


def _rows(config: ModelConfig) -> Iterator[tuple[str, Shape, Row, int | None]]:
    for ours, shape in parameter_shapes(config).items():
        layer = re.match(r"layers\.(\d+)\.", ours)
        if layer is None:
            yield ours, shape, ROWS[ours], None
        else:
            yield ours, shape, ROWS["layers.{i}." + ours[layer.end():]], int(layer[1])


def _run_together(ours: str, size: Shape) -> Shape:
    """A matrix keeps its last dimension, which is the input; a bias or the weight of a norm has none."""
    return (prod(size),) if ours.endswith((".bias", "norm.weight")) else (prod(size[:-1]), size[-1])
