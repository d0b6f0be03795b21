"""The configuration's section `model`: the shape of the transformer."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from engine.config.fields import Layers, NonNegative, Positive, Rate, Section, Share, Size
from engine.config.kinds import AttentionName, MLPName, NormName


class RopeScalingConfig(Section):
    """How RoPE is stretched over a longer context (`engine.model.rope`)."""

    type: Literal["llama3", "linear", "ntk", "dynamic", "yarn"] = "llama3"
    factor: Positive                                         # longer by so much
    original_max_seq_len: Size | None = None                 # llama3, yarn, dynamic: what it was trained with before
    low_freq_factor: Positive | None = None                  # llama3
    high_freq_factor: Positive | None = None                 # llama3
    beta_fast: Positive | None = None                        # yarn: null is 32
    beta_slow: Positive | None = None                        # yarn: null is 1
    attention_factor: Positive | None = None                 # yarn: null is 0.1·ln(factor) + 1

    @model_validator(mode="after")
    def _what_its_type_has(self) -> RopeScalingConfig:
        needed, optional = OF_ROPE_TYPES[self.type]
        given = {key for key in self.model_fields_set if getattr(self, key) is not None} - {"type", "factor"}
        if missing := [key for key in needed if key not in given]:
            raise ValueError(f"type: {self.type} needs {', '.join(missing)}")
        if foreign := sorted(given - {*needed, *optional}):
            raise ValueError(f"{foreign[0]} is not of type: {self.type}, which has "
                             f"{', '.join(('factor', *needed, *optional))}")
        if self.high_freq_factor and self.low_freq_factor and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(f"high_freq_factor({self.high_freq_factor:g}) is not above "
                             f"low_freq_factor({self.low_freq_factor:g})")
        return self


# Keys that a type of scaling must have, and may have.
OF_ROPE_TYPES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama3": (("original_max_seq_len", "low_freq_factor", "high_freq_factor"), ()),
    "linear": ((), ()), "ntk": ((), ()), "dynamic": (("original_max_seq_len",), ()),
    "yarn": (("original_max_seq_len",), ("beta_fast", "beta_slow", "attention_factor"))}


class ModelConfig(Section):
    """The transformer's shape.  `num_heads` need not times `head_dim` equal `hidden_size`."""

    num_layers: Layers
    hidden_size: Size
    num_heads: Size
    num_kv_heads: Size = Field(default_factory=lambda values: values["num_heads"])
    head_dim: Size = Field(default_factory=lambda values: values["hidden_size"] // values["num_heads"])
    ffn_hidden_size: Size
    vocab_size: Size                                         # the true one; padding for tensor parallelism is local
    max_seq_len: Size = 2048                                 # tokens
    position: Literal["rope", "learned", "alibi"] = "rope"   # learned: a table of max_seq_len rows, added at the start
    position_offset: NonNegative = 0                         # rows of the table before position 0 (OPT: 2)
    rope_theta: Positive = 10000.0
    rope_local_theta: Positive | None = None                 # of layers with a window, unscaled; null: as the others
    rope_share: Share = 1.0                                  # of each head that turns, its first dimensions
    rope_scaling: RopeScalingConfig | None = None
    norm: NormName = "rmsnorm"                               # a row of engine.config.kinds, like the two below
    norm_eps: Rate = 1e-5
    embedding_norm: bool = False                             # normalise what comes out of the embedding (BLOOM)
    norm_place: Literal["pre", "post", "both"] = "pre"       # of each half's norm: of its input, of its output
    embedding_scale: Positive = 1.0                          # what the embedding is multiplied with
    residual: Literal["sequential", "parallel"] = "sequential"       # parallel: both halves read the layer's input
    tie_embeddings: bool = False
    attention: AttentionName = "grouped-query"
    mlp: MLPName = "swiglu"
    window: Size | None = None                               # a token sees so many, itself and those before it
    full_every: NonNegative = 0                              # but in every so-manyth layer all before it; 0: in none
    qk_norm: bool | Literal["projection"] = False            # normalise queries and keys, head by head or all together
    query_pre_attn_scalar: Size | None = None            # scores are divided by its root; null: by head_dim's
    attention_softcap: Positive | None = None                # scores become cap·tanh(scores / cap); null: as they are
    logit_softcap: Positive | None = None                    # the same of logits
    qkv_bias: bool = False
    attention_bias: bool = False                             # on q, k, v and the projection behind attention
    mlp_bias: bool = False
    init_std: Rate | Literal["small"] = 0.02                 # of matrices at the start; small: √(2 / 5·hidden_size)
    init_output: Literal["depth", "plain", "wang"] = "depth"         # of those behind each half, see residual_init_std
    head: Literal["language_model", "score"] = "language_model"      # score: one number per token (reward, critic)

    @model_validator(mode="after")
    def _heads_divide(self) -> ModelConfig:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads({self.num_heads}) is not a multiple of num_kv_heads({self.num_kv_heads})")
        if self.rotary_dim % 2:
            share = f" × rope_share({self.rope_share:g})" if self.rope_share < 1 else ""
            raise ValueError(f"head_dim({self.head_dim}){share} is odd; RoPE rotates pairs")
        if self.attention_bias and self.qkv_bias:
            raise ValueError("attention_bias includes qkv_bias: set one of them")
        if self.head == "score" and self.tie_embeddings:
            raise ValueError("head: score has no output layer that tie_embeddings could tie: set it to false")
        if self.qk_norm and self.norm == "layernorm":
            raise ValueError("qk_norm divides by the root mean square: it goes with norm: rmsnorm or rmsnorm-1p")
        if self.qk_norm == "projection" and self.norm != "rmsnorm":
            raise ValueError(f"qk_norm: projection goes with norm: rmsnorm; norm is {self.norm}")
        if self.norm_place != "pre" and self.residual == "parallel":
            raise ValueError(f"norm_place: {self.norm_place} is of residual: sequential; parallel halves share a norm")
        if self.rope_local_theta and (self.window is None or self.position != "rope"):
            raise ValueError("rope_local_theta turns the heads of layers with a window: set window, and position: rope")
        if self.full_every and self.window is None:
            raise ValueError("full_every says which layers have no window, and there is no window: set it")
        if self.position_offset and self.position != "learned":
            raise ValueError("position_offset is of position: learned; RoPE has no table")
        return self

    def window_of(self, layer: int) -> int | None:
        """How many tokens a token of this layer sees; None: all before it."""
        return None if self.full_every and (layer + 1) % self.full_every == 0 else self.window

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE turns."""
        return int(self.head_dim * self.rope_share) if self.position == "rope" else 0
