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

# Keys of our model section that only some families have, beside the kind of feed-forward layer, and their defaults.
FEATURES = ("qk_norm", "qkv_bias", "attention_bias", "mlp_bias", "norm", "residual", "position", "position_offset",
            "rope_share", "embedding_scale", "window", "full_every", "norm_place", "embedding_norm",
            "query_pre_attn_scalar", "attention_softcap", "logit_softcap", "rope_local_theta")
DEFAULTS = {key: ModelConfig.model_fields[key].default for key in FEATURES}


@dataclass(frozen=True)
class Family:
    """A class of `transformers`.

    Attributes:
        defaults: what it takes for keys that `config.json` leaves out.
        written: keys that only this class has, as they are written.
        required: keys that only this class has, with the value that Octant computes; another one is refused.
        equal: keys that only this class has, and another each that has the same value where they are given.
        window: which of the layers look back through `sliding_window` only: all, none, as `layer_types` says (which is
            refused), or by that all but every so-manyth.
        full_every: the same number where nothing says it, for the last kind.
        numbers: those of `FEATURES` that are numbers of its `config.json`, or null there, and their keys.
        mlps: our kind of feed-forward layer, by `hidden_act`; where two have the same kind, the first is written.
        always: those of `FEATURES` that its models have, without a key, and what they are.
        derived: the same, where they follow from the sizes of the model (a `model` section of ours).
        flags: those of `FEATURES` that are keys of its `config.json`, under the same names.
        partial_rotary: `partial_rotary_factor` may be less than one.
        keys: what it calls settings that most classes call otherwise, by that name; null: it has no such setting.
        aliases: other names that some of its files have for keys, by these.
        computes: whether the class takes the sizes of a model.
        names: tensors that it calls otherwise than `checkpoints_tools.names` does, by our names.
        transposed: those whose matrices have inputs × outputs.
    """

    name: str
    model_type: str
    defaults: Json
    written: Json = field(default_factory=dict)
    required: Json = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    window: Literal["all", "none", "layer_types", "pattern"] = "none"
    full_every: int = 0
    numbers: Mapping[str, str] = field(default_factory=dict)
    mlps: Mapping[str, str] = field(default_factory=lambda: {"silu": "swiglu", "swish": "swiglu"})
    always: Json = field(default_factory=dict)
    derived: Callable[[Json], Json] = lambda sizes: {}
    flags: tuple[str, ...] = ()
    partial_rotary: bool = False
    keys: Mapping[str, str | None] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    computes: Callable[[ModelConfig], bool] = lambda config: True
    names: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    transposed: frozenset[str] = frozenset()

    def has_all_of(self, config: ModelConfig) -> bool:
        """Whether a model of this family computes just what `config` does."""
        stated = DEFAULTS | self.always | self.derived(config.model_dump())
        free = {*self.flags, *self.numbers, *(["rope_share"] if self.partial_rotary else []),
                *({"all": ["window"], "pattern": ["window", "full_every"]}.get(self.window, []))}
        features = all(getattr(config, key) == stated[key] for key in FEATURES if key not in free)
        return features and config.mlp in self.mlps.values() and config.attention == "grouped-query" and \
            self.computes(config)

    def hidden_act(self, config: ModelConfig) -> str:
        """What Hugging Face calls the activation."""
        return next(theirs for theirs, ours in self.mlps.items() if ours == config.mlp)

    def in_its_words(self, settings: Json) -> Json:
        """Settings under the names that its `config.json` has for them."""
        named = {self.keys.get(key, key): value for key, value in settings.items()}
        return {key: value for key, value in named.items() if key is not None}


def divides(config: ModelConfig) -> bool:
    """Heads share the hidden size out, as classes without a `head_dim` have it."""
    return config.head_dim * config.num_heads == config.hidden_size


def plain_heads(config: ModelConfig) -> bool:
    """The same, and every head has keys and values of its own; of these classes only the language models are known."""
    return divides(config) and config.num_kv_heads == config.num_heads and config.head == "language_model"


def tensors(prefix: str, ends: dict[str, str], layer: dict[str, str | tuple[str, ...]],
            parts: tuple[str, ...] = ("weight", "bias")) -> dict[str, tuple[str, ...]]:
    """The table `Family.names` of a class that calls everything otherwise: of layers by their part of the name."""
    named: dict[str, tuple[str, ...]] = {f"{ours}.{part}": (f"{theirs}.{part}",)
                                         for ours, theirs in ends.items() for part in parts}
    for ours, theirs in layer.items():
        several = (theirs,) if isinstance(theirs, str) else theirs
        for part in parts:
            named[f"layers.{{i}}.{ours}.{part}"] = tuple(f"{prefix}.{{i}}.{each}.{part}" for each in several)
    return named


SAME: Json = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "hidden_act": "silu",
              "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "rope_theta": 10000.0}
QWEN: Json = {**SAME, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32,
              "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
              "max_window_layers": 28}
BIASES = ("attention_bias", "mlp_bias")
BIASED: Json = {"norm": "layernorm", "attention_bias": True, "mlp_bias": True}
HEADLESS: dict[str, str | None] = {"num_key_value_heads": None, "head_dim": None}       # classes of plain heads
QKV = "self_attention.linear_qkv"
GEMMA2: Json = {**SAME, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 256000,
                "hidden_act": "gelu_pytorch_tanh", "max_position_embeddings": 8192, "tie_word_embeddings": True,
                "query_pre_attn_scalar": 256, "sliding_window": 4096, "final_logit_softcapping": 30.0,
                "attn_logit_softcapping": 50.0}
GEMMA_NUMBERS = {"query_pre_attn_scalar": "query_pre_attn_scalar", "attention_softcap": "attn_logit_softcapping",
                 "logit_softcap": "final_logit_softcapping"}
SANDWICH: Json = {"norm": "rmsnorm-1p", "norm_place": "both"}
FOUR_NORMS = {"layers.{i}.pre_mlp_layernorm.weight": ("model.layers.{i}.pre_feedforward_layernorm.weight",)}
FAMILIES = {family.name: family for family in (
    Family("LlamaForCausalLM", "llama",
           {**SAME, "vocab_size": 32000, "intermediate_size": 11008, "max_position_embeddings": 2048},
           flags=BIASES, computes=lambda config: config.hidden_size % config.num_heads == 0),
    Family("MistralForCausalLM", "mistral",
           {**SAME, "vocab_size": 32000, "intermediate_size": 14336, "num_key_value_heads": 8,
            "max_position_embeddings": 131072, "sliding_window": 4096},
           window="all"),
    Family("Qwen2ForCausalLM", "qwen2", QWEN, {"use_sliding_window": False}, window="layer_types",
           always={"qkv_bias": True}),
    Family("Qwen3ForCausalLM", "qwen3", {**QWEN, "head_dim": 128}, {"use_sliding_window": False}, window="layer_types",
           always={"qk_norm": True}, flags=("attention_bias",)),
    Family("ArceeForCausalLM", "arcee",
           {**SAME, "hidden_size": 2560, "hidden_act": "relu2", "rms_norm_eps": 1e-5, "vocab_size": 32000,
            "intermediate_size": 18432, "max_position_embeddings": 4096},
           mlps={"relu2": "relu2", "gelu": "gelu"}, flags=BIASES,
           computes=lambda config: config.hidden_size % config.num_heads == 0),
    Family("Phi3ForCausalLM", "phi3",
           {**SAME, "hidden_size": 3072, "intermediate_size": 8192, "vocab_size": 32064, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096},
           {"resid_pdrop": 0.0, "embd_pdrop": 0.0}, window="all", partial_rotary=True,
           keys={"head_dim": None}, computes=divides,
           names={f"layers.{{i}}.{QKV}.weight": ("model.layers.{i}.self_attn.qkv_proj.weight",) * 3,
                  "layers.{i}.mlp.linear_fc1.weight": ("model.layers.{i}.mlp.gate_up_proj.weight",) * 2}),
    Family("GemmaForCausalLM", "gemma",
           {**SAME, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28, "num_attention_heads": 16,
            "num_key_value_heads": 16, "head_dim": 256, "vocab_size": 256000, "hidden_act": "gelu_pytorch_tanh",
            "max_position_embeddings": 8192, "tie_word_embeddings": True},
           required={"use_bidirectional_attention": None}, mlps={"gelu_pytorch_tanh": "geglu", "gelu": "geglu"},
           always={"norm": "rmsnorm-1p"}, flags=("attention_bias",),
           derived=lambda sizes: {"embedding_scale": sizes["hidden_size"] ** 0.5}),
    Family("Gemma2ForCausalLM", "gemma2", GEMMA2,
           required={"use_bidirectional_attention": None}, window="pattern", full_every=2,
           numbers=GEMMA_NUMBERS, mlps={"gelu_pytorch_tanh": "geglu"}, always=SANDWICH, flags=("attention_bias",),
           derived=lambda sizes: {"embedding_scale": sizes["hidden_size"] ** 0.5},
           keys={"hidden_act": "hidden_activation"}, computes=lambda config: config.query_pre_attn_scalar is not None,
           names=FOUR_NORMS),
    Family("Gemma3ForCausalLM", "gemma3_text",
           {**GEMMA2, "vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6,
            "rope_local_base_freq": 10000.0, "attn_logit_softcapping": None, "final_logit_softcapping": None},
           required={"use_bidirectional_attention": False}, window="pattern", full_every=6,
           numbers=GEMMA_NUMBERS | {"rope_local_theta": "rope_local_base_freq"}, mlps={"gelu_pytorch_tanh": "geglu"},
           always=SANDWICH | {"qk_norm": True}, flags=("attention_bias",),
           derived=lambda sizes: {"embedding_scale": sizes["hidden_size"] ** 0.5},
           keys={"hidden_act": "hidden_activation"}, computes=lambda config: config.query_pre_attn_scalar is not None,
           names=FOUR_NORMS),
    Family("Olmo2ForCausalLM", "olmo2",
           {**SAME, "vocab_size": 50304, "intermediate_size": 11008, "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5},
           always={"norm_place": "post", "qk_norm": "projection"}, flags=("attention_bias",), keys={"head_dim": None},
           computes=divides),
    Family("Starcoder2ForCausalLM", "starcoder2",
           {**SAME, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30, "num_attention_heads": 24,
            "num_key_value_heads": 2, "vocab_size": 49152, "hidden_act": "gelu_pytorch_tanh", "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "use_bias": True, "tie_word_embeddings": True},
           {"residual_dropout": 0.0, "embedding_dropout": 0.0}, {"use_bias": True},
           window="all", mlps={"gelu_pytorch_tanh": "gelu-tanh", "gelu": "gelu"}, always=BIASED,
           keys={"rms_norm_eps": "norm_epsilon"},
           names=tensors("model.layers", {}, {"mlp.linear_fc1": "mlp.c_fc", "mlp.linear_fc2": "mlp.c_proj"})),
    Family("GPTNeoXForCausalLM", "gpt_neox",
           {**SAME, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44, "num_attention_heads": 64,
            "vocab_size": 50432, "hidden_act": "gelu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
            "partial_rotary_factor": 0.25, "use_parallel_residual": True, "attention_bias": True},
           {"hidden_dropout": 0.0, "classifier_dropout": 0.0}, {"use_parallel_residual": True, "attention_bias": True},
           mlps={"gelu": "gelu", "gelu_new": "gelu-tanh", "gelu_fast": "gelu-tanh", "relu": "relu"},
           always=BIASED | {"residual": "parallel"}, partial_rotary=True, computes=plain_heads,
           keys=HEADLESS | {"rms_norm_eps": "layer_norm_eps", "rope_theta": "rotary_emb_base",
                            "partial_rotary_factor": "rotary_pct"},
           names=tensors("gpt_neox.layers", {"embedding": "gpt_neox.embed_in", "output_layer": "embed_out",
                                             "final_layernorm": "gpt_neox.final_layer_norm"},
                         {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm",
                          QKV: "attention.query_key_value", "self_attention.linear_proj": "attention.dense",
                          "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h"})),
    Family("GPT2LMHeadModel", "gpt2",
           {**SAME, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "vocab_size": 50257,
            "hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "max_position_embeddings": 1024,
            "tie_word_embeddings": True, "scale_attn_weights": True},
           {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
           {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
           mlps={"gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh", "gelu": "gelu", "relu": "relu"},
           always=BIASED | {"position": "learned"}, computes=plain_heads,
           keys=HEADLESS | {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head",
                            "intermediate_size": "n_inner", "max_position_embeddings": "n_positions",
                            "hidden_act": "activation_function", "rms_norm_eps": "layer_norm_epsilon",
                            "rope_theta": None, "rope_scaling": None, "attention_dropout": None},
           names=tensors("transformer.h", {"embedding": "transformer.wte", "position_embedding": "transformer.wpe",
                                           "final_layernorm": "transformer.ln_f", "output_layer": "lm_head"},
                         {"input_layernorm": "ln_1", "pre_mlp_layernorm": "ln_2", QKV: ("attn.c_attn",) * 3,
                          "self_attention.linear_proj": "attn.c_proj", "mlp.linear_fc1": "mlp.c_fc",
                          "mlp.linear_fc2": "mlp.c_proj"}),
           transposed=frozenset(f"layers.{{i}}.{layer}.weight" for layer in (
               QKV, "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"))),
    Family("BloomForCausalLM", "bloom",
           {**SAME, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 250880,
            "hidden_act": "gelu_new", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
            "tie_word_embeddings": True},
           {"hidden_dropout": 0.0, "attention_dropout": 0.0},
           {"apply_residual_connection_post_layernorm": False, "slow_but_exact": False},
           mlps={"gelu_new": "gelu-tanh"}, always=BIASED | {"position": "alibi", "embedding_norm": True},
           computes=lambda config: plain_heads(config) and config.ffn_hidden_size == 4 * config.hidden_size,
           keys=HEADLESS | {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head", "intermediate_size": None,
                            "max_position_embeddings": "seq_length", "hidden_act": None, "rope_theta": None,
                            "rope_scaling": None, "rms_norm_eps": "layer_norm_epsilon"},
           aliases={"n_embed": "hidden_size", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
           names=tensors("transformer.h", {"embedding": "transformer.word_embeddings", "output_layer": "lm_head",
                                           "embedding_layernorm": "transformer.word_embeddings_layernorm",
                                           "final_layernorm": "transformer.ln_f"},
                         {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm",
                          QKV: "self_attention.query_key_value", "self_attention.linear_proj": "self_attention.dense",
                          "mlp.linear_fc1": "mlp.dense_h_to_4h", "mlp.linear_fc2": "mlp.dense_4h_to_h"})),
    Family("OPTForCausalLM", "opt",
           {**SAME, "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
            "vocab_size": 50272, "hidden_act": "relu", "rms_norm_eps": 1e-5, "max_position_embeddings": 2048,
            "tie_word_embeddings": True, "do_layer_norm_before": True, "enable_bias": True,
            "layer_norm_elementwise_affine": True},
           {"dropout": 0.0},
           {"do_layer_norm_before": True, "enable_bias": True, "layer_norm_elementwise_affine": True,
            "_remove_final_layer_norm": False}, equal={"word_embed_proj_dim": "hidden_size"},
           mlps={"relu": "relu", "gelu": "gelu"}, always=BIASED | {"position": "learned", "position_offset": 2},
           computes=lambda config: plain_heads(config) and config.norm_eps == 1e-5,
           keys=HEADLESS | {"intermediate_size": "ffn_dim", "hidden_act": "activation_function", "rms_norm_eps": None,
                            "rope_theta": None, "rope_scaling": None},
           names=tensors("model.decoder.layers", {"embedding": "model.decoder.embed_tokens",
                                                  "position_embedding": "model.decoder.embed_positions",
                                                  "final_layernorm": "model.decoder.final_layer_norm"},
                         {"input_layernorm": "self_attn_layer_norm", "pre_mlp_layernorm": "final_layer_norm",
                          QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                          "self_attention.linear_proj": "self_attn.out_proj", "mlp.linear_fc1": "fc1",
                          "mlp.linear_fc2": "fc2"})),
)}


def family_of(config: ModelConfig) -> Family:
    """The family as which a model is written.

    Raises:
        CheckpointError: no class of `transformers` that Octant knows computes it.
    """
    for family in FAMILIES.values():
        if family.has_all_of(config):
            return family
    features = [f"{key}: {str(getattr(config, key)).lower()}" for key in FEATURES
                if getattr(config, key) != DEFAULTS[key]]
    sizes = f"hidden_size {config.hidden_size}, num_heads {config.num_heads}"
    raise CheckpointError(f"no class of transformers computes this model (attention: {config.attention}, mlp: "
                          f"{config.mlp}, {', '.join([*features, sizes])}); Octant writes "
                          f"{', '.join(FAMILIES)}")
