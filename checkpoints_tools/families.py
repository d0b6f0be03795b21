"""Families of Hugging Face models: which classes of `transformers` compute what `engine.model` computes.

A family is a row of `FAMILIES`.  It says what its class always has, what its `config.json` may switch on, and what its
class takes for keys that are left out; reading, writing, the refusal of everything else and the names of the tensors
follow.  A model is written as the first family that has exactly its features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.config import ModelConfig
from engine.errors import CheckpointError

Json = dict[str, Any]

# Keys of our model section that only some families have, beside the kind of feed-forward layer.
FEATURES = ("qk_norm", "qkv_bias", "attention_bias", "mlp_bias")


@dataclass(frozen=True)
class Family:
    """A class of `transformers`.

    Attributes:
        defaults: what it takes for keys that `config.json` leaves out.
        written: keys that only this class has, as they are written.
        window: which of the layers look back through `sliding_window` only: all, none, or as `layer_types` says.
        mlps: our kind of feed-forward layer, by `hidden_act`; where two have the same kind, the first is written.
        always: those of `FEATURES` that its models have, without a key.
        flags: those of `FEATURES` that are keys of its `config.json`, under the same names.
        computes: whether the class takes the sizes of a model.
        names: tensors that it calls otherwise than `checkpoints_tools.names` does, by our names.
    """

    name: str
    model_type: str
    defaults: Json
    written: Json = field(default_factory=dict)
    window: Literal["all", "none", "layer_types"] = "none"
    mlps: Mapping[str, str] = field(default_factory=lambda: {"silu": "swiglu", "swish": "swiglu"})
    always: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    computes: Callable[[ModelConfig], bool] = lambda config: True
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def has_all_of(self, config: ModelConfig) -> bool:
        """Whether a model of this family computes just what `config` does."""
        features = all(getattr(config, key) == (key in self.always) for key in FEATURES if key not in self.flags)
        return features and config.mlp in self.mlps.values() and config.attention == "grouped-query" and \
            self.computes(config)

    def hidden_act(self, config: ModelConfig) -> str:
        """What Hugging Face calls the activation."""
        return next(theirs for theirs, ours in self.mlps.items() if ours == config.mlp)


SAME: Json = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
              "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
QWEN: Json = {**SAME, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
              "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
              "max_window_layers": 28}
BIASES = ("attention_bias", "mlp_bias")
FAMILIES = {family.name: family for family in (
    Family("LlamaForCausalLM", "llama",
           {**SAME, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
           flags=BIASES, computes=lambda config: config.hidden_size % config.num_heads == 0),
    Family("MistralForCausalLM", "mistral",
           {**SAME, "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "sliding_window": 4096},
           {"sliding_window": None}, window="all"),
    Family("Qwen2ForCausalLM", "qwen2", QWEN, {"use_sliding_window": False}, window="layer_types",
           always=("qkv_bias",)),
    Family("Qwen3ForCausalLM", "qwen3", {**QWEN, "head_dim": 128}, {"use_sliding_window": False}, window="layer_types",
           always=("qk_norm",), flags=("attention_bias",)),
    Family("ArceeForCausalLM", "arcee",
           {**SAME, "hidden_size": 2560, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "vocab_size": 32000,
            "intermediate_size": 18432, "max_position_embeddings": 4096},
           mlps={"relu2": "relu2", "gelu": "gelu"}, flags=BIASES,
           computes=lambda config: config.hidden_size % config.num_heads == 0),
)}


def family_of(config: ModelConfig) -> Family:
    """The family as which a model is written.

    Raises:
        CheckpointError: no class of `transformers` that Octant knows computes it.
    """
    for family in FAMILIES.values():
        if family.has_all_of(config):
            return family
    features = [f"{key}: {str(getattr(config, key)).lower()}" for key in FEATURES if getattr(config, key)]
    sizes = f"hidden_size {config.hidden_size}, num_heads {config.num_heads}"
    raise CheckpointError(f"no class of transformers computes this model (attention: {config.attention}, mlp: "
                          f"{config.mlp}, {', '.join([*features, sizes])}); Octant writes "
                          f"{', '.join(FAMILIES)}")
