"""The kinds of halves of a layer, in numbers: what each holds and costs.

    x = x + half(norm(x))

A kind is an object here, named by its row in `engine.config.kinds`, and a class with the mathematics, which the object
names (`engine.model.half`).  All that is asked about a kind before anything is computed stands here and needs no torch:

    parameters    their names, shapes and rules (`engine.model.spec`), of which the class makes its tensors: counts of
                  parameters, initialisation, tensor parallelism, ZeRO, checkpoints
    products      operations that no weight takes part in: FLOPs, the dealing of layers to stages
    kept          what the backward pass needs: memory
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Literal

from engine.config import ModelConfig
from engine.config.kinds import ATTENTIONS, MLPS, NORMS
from engine.model.spec import BETWEEN, INSIDE, ParamSpec, Rule


def init_std(config: ModelConfig) -> float:
    """Standard deviation that matrices start with; `small` is Nguyen & Salazar's (2019, section 2.2)."""
    return (2 / (5 * config.hidden_size)) ** 0.5 if config.init_std == "small" else config.init_std


def residual_init_std(config: ModelConfig) -> float:
    """That of layers that write into the residual stream, by `model.init_output`.

    With `depth` they start smaller by 1/√(2·layers) (Radford et al. 2019, section 2.3), with `wang` as GPT-J's and
    GPT-NeoX-20B's do (Black et al. 2022, section 2.1).
    """
    return {"depth": init_std(config) / (2 * config.num_layers) ** 0.5, "plain": init_std(config),
            "wang": 2 / (config.num_layers * config.hidden_size ** 0.5)}[config.init_output]


def linear(name: str, out_shape: tuple[int, ...], in_features: int, rule: Rule, *, init_std: float,
           bias: bool = False) -> Iterator[ParamSpec]:
    """The parameters of a linear layer; `rule` is its weight's.

    The bias of a layer whose output is divided is divided alike; any other is added to the whole sum, outside.
    """
    yield ParamSpec(f"{name}.weight", (*out_shape, in_features), rule, init_std=init_std)
    if bias:
        bias_rule = BETWEEN if rule.kind == "row" else rule
        yield ParamSpec(f"{name}.bias", out_shape, bias_rule, init="zeros", decay=False)


@dataclass(frozen=True)
class Norm:
    """A kind of norm; `computes` is where its class is, as `module:class`.

    Attributes:
        bias: it has one.
        init: what its weight begins with.
        statistics: fp32 numbers per token that it keeps for its backward pass, beside its input.
    """

    computes: str
    bias: bool = False
    init: Literal["ones", "zeros"] = "ones"
    statistics: int = 1

    def parameters(self, name: str, size: int, rule: Rule = BETWEEN) -> Iterator[ParamSpec]:
        """Those of the norm `name` over `size` elements."""
        yield ParamSpec(f"{name}.weight", (size,), rule, init=self.init, decay=False)
        if self.bias:
            yield ParamSpec(f"{name}.bias", (size,), rule, init="zeros", decay=False)


@dataclass(frozen=True)
class Kept:
    """Elements per token that a half keeps for its backward pass, inside its region: tensor ranks divide them.

    What stands outside is its input, the norm's output.

    Attributes:
        elements: in the compute dtype.
        cheap: those of them that selective recomputation forgets.
        statistics: fp32 numbers.
    """

    elements: int
    cheap: int = 0
    statistics: int = 0


@dataclass(frozen=True)
class Kind(ABC):
    """A kind of half; `computes` is where its class is, as `module:class`."""

    computes: str

    @abstractmethod
    def parameters(self, config: ModelConfig) -> Iterator[ParamSpec]:
        """All parameters, named as in the class."""

    @abstractmethod
    def kept(self, config: ModelConfig) -> Kept:
        """What the backward pass needs of each token."""

    def products(self, config: ModelConfig, seq_len: int) -> int:
        """Multiply-accumulates per token among activations, a causal score matrix counted half."""
        return 0


class GroupedQuery(Kind):
    """See `engine.model.attention`."""

    def parameters(self, config: ModelConfig) -> Iterator[ParamSpec]:
        groups, heads, dim = config.num_kv_heads, config.num_heads, config.head_dim
        yield from linear("linear_qkv", (groups, heads // groups + 2, dim), config.hidden_size, Rule("column", 0, 2),
                          init_std=init_std(config), bias=config.qkv_bias or config.attention_bias)
        if config.qk_norm == "projection":
            for name, rows, copied in (("q_layernorm", heads // groups, 0), ("k_layernorm", 1, 1)):
                yield ParamSpec(f"{name}.weight", (groups, rows, dim), Rule("column", 0, copied), init="ones",
                                decay=False)
        elif config.qk_norm:
            for name in ("q_layernorm", "k_layernorm"):
                yield from norm_of(config).parameters(name, dim, INSIDE)
        yield from linear("linear_proj", (config.hidden_size,), heads * dim, Rule("row", 1),
                          init_std=residual_init_std(config), bias=config.attention_bias)

    def products(self, config: ModelConfig, seq_len: int) -> int:
        """Scores and weighted values over the keys that queries see on average, half of the `seq_len` without a window.

        Of layers with a window and layers without it is the mean.
        """
        window = min(config.window or seq_len, seq_len)
        seen_twice = 2 * window - window * window / seq_len
        full = config.num_layers // config.full_every / config.num_layers if config.full_every else 0.0
        return round(config.num_heads * config.head_dim * (full * seq_len + (1 - full) * seen_twice))

    def kept(self, config: ModelConfig) -> Kept:
        """Queries, keys, values, the output, its log-sum-exps; with norms of queries and keys, what they normalise."""
        heads, groups, dim = config.num_heads, config.num_kv_heads, config.head_dim
        projection = (heads + 2 * groups) * dim
        elements = projection + heads * dim
        if not config.qk_norm:
            return Kept(elements, statistics=heads)
        return Kept(elements + projection, statistics=heads + norm_of(config).statistics * (heads + groups))


@dataclass(frozen=True)
class FeedForward(Kind):
    """See `engine.model.mlp`.

    Attributes:
        inputs: how many projections into the features there are.
    """

    inputs: int

    def parameters(self, config: ModelConfig) -> Iterator[ParamSpec]:
        yield from linear("linear_fc1", (self.inputs, config.ffn_hidden_size), config.hidden_size, Rule("column", 1),
                          init_std=init_std(config), bias=config.mlp_bias)
        yield from linear("linear_fc2", (config.hidden_size,), config.ffn_hidden_size, Rule("row", 1),
                          init_std=residual_init_std(config), bias=config.mlp_bias)

    def kept(self, config: ModelConfig) -> Kept:
        """The activation's input and its output, of which the latter is cheap."""
        return Kept((self.inputs + 1) * config.ffn_hidden_size, cheap=config.ffn_hidden_size)


GROUPED_QUERY = GroupedQuery("engine.model.attention:GroupedQueryAttention")
SWIGLU = FeedForward("engine.model.mlp:SwiGLU", inputs=2)
GELU = FeedForward("engine.model.mlp:GELU", inputs=1)
RELU2 = FeedForward("engine.model.mlp:SquaredReLU", inputs=1)
GELU_TANH = FeedForward("engine.model.mlp:GELUTanh", inputs=1)
RELU = FeedForward("engine.model.mlp:ReLU", inputs=1)
GEGLU = FeedForward("engine.model.mlp:GEGLU", inputs=2)
RMS_NORM = Norm("engine.model.layers:RMSNorm")
RMS_NORM_1P = Norm("engine.model.layers:ShiftedRMSNorm", init="zeros")
LAYER_NORM = Norm("engine.model.layers:LayerNorm", bias=True, statistics=2)


def attention_of(config: ModelConfig) -> Kind:
    """The kind of attention that a model has."""
    kind: Kind = resolve_name(ATTENTIONS[config.attention])
    return kind


def mlp_of(config: ModelConfig) -> Kind:
    """The kind of feed-forward layer that a model has."""
    kind: Kind = resolve_name(MLPS[config.mlp])
    return kind


def norm_of(config: ModelConfig) -> Norm:
    """The kind of norm that a model has."""
    kind: Norm = resolve_name(NORMS[config.norm])
    return kind
