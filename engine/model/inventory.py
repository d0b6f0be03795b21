"""All parameters of a model, as specs: what `engine.model.transformer` makes tensors of, and what is counted.

Layers are alike, so one of them and both ends are the whole model.  Specs come by the name that a parameter has in its
module; the spec's own name is the global one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from engine.config import ModelConfig
from engine.model.kinds import attention_of, init_std, mlp_of, norm_of
from engine.model.spec import BETWEEN, VOCABULARY, ParamSpec

Specs = Mapping[str, ParamSpec]


def layer_specs(config: ModelConfig, index: int) -> Specs:
    """The parameters of layer `index`: two halves, each with the norm in front of it, behind it, or both."""
    return {spec.name: replace(spec, name=f"layers.{index}.{spec.name}") for spec in _layer(config)}


def _layer(config: ModelConfig) -> Iterator[ParamSpec]:
    for before, half, kind, behind in (
            ("input_layernorm", "self_attention", attention_of(config), "post_attention_layernorm"),
            ("pre_mlp_layernorm", "mlp", mlp_of(config), "post_mlp_layernorm")):
        if config.norm_place != "post":
            yield from norm_of(config).parameters(before, config.hidden_size)
        for spec in kind.parameters(config):
            yield replace(spec, name=f"{half}.{spec.name}")
        if config.norm_place != "pre":
            yield from norm_of(config).parameters(behind, config.hidden_size)


def below(specs: Specs, module: str) -> Specs:
    """Those of a module inside, by their names in it."""
    return {name.removeprefix(f"{module}."): spec for name, spec in specs.items() if name.startswith(f"{module}.")}


def end_specs(config: ModelConfig) -> Specs:
    """The parameters in front of the first layer and behind the last; a tied output layer has the embedding's name."""
    table, std = (config.vocab_size, config.hidden_size), init_std(config)
    embedding = ParamSpec("embedding.weight", table, VOCABULARY, init_std=std, tied=config.tie_embeddings)
    final_norm = norm_of(config).parameters("final_layernorm", config.hidden_size)
    ends = {"embedding.weight": embedding, **{spec.name: spec for spec in final_norm}}
    if config.embedding_norm:
        ends |= {spec.name: spec for spec in norm_of(config).parameters("embedding_layernorm", config.hidden_size)}
    if config.position == "learned":
        rows = config.max_seq_len + config.position_offset
        ends["position_embedding.weight"] = ParamSpec("position_embedding.weight", (rows, config.hidden_size), BETWEEN,
                                                      init_std=std)
    if config.head == "score":
        scale = (config.hidden_size + 1) ** -0.5
        return ends | {"score.weight": ParamSpec("score.weight", (1, config.hidden_size), BETWEEN, init_std=scale)}
    own = ParamSpec("output_layer.weight", table, VOCABULARY, init_std=std)
    return ends | {"output_layer.weight": replace(embedding, tied_copy=True) if config.tie_embeddings else own}
