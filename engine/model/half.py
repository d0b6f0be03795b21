"""Half a layer, attention or feed-forward: what a kind of it says about itself.

    x = x + half(norm(x))

A kind is one class and its row in `engine.config.kinds`.  Whoever must know something about it asks the class:

    its parameters        are made with their names, shapes and rules (`engine.model.spec`): initialisation, tensor
                          parallelism, ZeRO, checkpoints, counts of parameters
    forward               the mathematics, uncut
    entrance, cheap       what recomputation may forget
    products              operations that no weight takes part in: FLOPs, the dealing of layers to stages
    kept                  what the backward pass needs: memory
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import ClassVar

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.config.kinds import ATTENTIONS, MLPS
from engine.kernels.table import Operations
from engine.model.context import Batch

INIT_STD = 0.02
Angles = tuple[Tensor, Tensor]


def residual_init_std(config: ModelConfig) -> float:
    """Layers that write into the residual stream start smaller, by 1/√(2·layers) (Radford et al. 2019, section 2.3)."""
    return INIT_STD / (2 * config.num_layers) ** 0.5


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


class Half(nn.Module, ABC):
    """A kind of half; subclasses make their parameters.

    Attributes:
        entrance: the layer that takes the norm's output, which may be forgotten behind it.
        cheap: pairs of a layer whose output costs little to compute again, and the layer that takes it.
    """

    entrance: ClassVar[str]
    cheap: ClassVar[tuple[tuple[str, str], ...]] = ()

    @abstractmethod
    def __init__(self, config: ModelConfig, index: int, name: str, operations: Operations) -> None:
        """Half of layer `index`; `name` is how its parameters' names begin."""
        super().__init__()

    @abstractmethod
    def forward(self, x_SBH: Tensor, angles: Angles, batch: Batch) -> Tensor:
        """[S, B, H] → [S, B, H]; with sequence parallelism both are this rank's part of the sequence."""

    @classmethod
    def products(cls, config: ModelConfig, seq_len: int) -> int:
        """Multiply-accumulates per token among activations, a causal score matrix counted half."""
        return 0

    @classmethod
    @abstractmethod
    def kept(cls, config: ModelConfig) -> Kept:
        """What the backward pass needs of each token."""


class Attention(Half):
    """A half in which tokens see each other.

    Attributes:
        core_attention: queries [S, B, G, Q, D], keys and values [T, B, G, D], mask → [S, B, G·Q·D].  Context
            parallelism puts one in its place that reaches beyond this rank's tokens.
    """

    core_attention: Callable[..., Tensor]


def attention_of(config: ModelConfig) -> type[Attention]:
    """The kind of attention that a model has."""
    kind: type[Attention] = resolve_name(ATTENTIONS[config.attention])
    return kind


def mlp_of(config: ModelConfig) -> type[Half]:
    """The kind of feed-forward layer that a model has."""
    kind: type[Half] = resolve_name(MLPS[config.mlp])
    return kind
