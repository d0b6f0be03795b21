"""Half a layer, attention or feed-forward: what a kind of it computes.

    x = x + half(norm(x))

Its numbers, the parameters it is made of first, stand in `engine.model.kinds`; here is what is asked of its class:

    forward               the mathematics, uncut
    entrance, cheap       what recomputation may forget
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

from torch import Tensor, nn

from engine.config import ModelConfig
from engine.kernels.table import Operations
from engine.model.context import Batch
from engine.model.inventory import Specs

Angles = tuple[Tensor, Tensor]


class Half(nn.Module, ABC):
    """A half; subclasses make its parameters of their specs.

    Attributes:
        entrance: the layer that takes the norm's output, which may be forgotten behind it.
        cheap: pairs of a layer whose output costs little to compute again, and the layer that takes it.
    """

    entrance: ClassVar[str]
    cheap: ClassVar[tuple[tuple[str, str], ...]] = ()

    @abstractmethod
    def __init__(self, config: ModelConfig, index: int, specs: Specs, operations: Operations) -> None:
        """Half of layer `index`, with the parameters that its kind says it has."""
        super().__init__()

    @abstractmethod
    def forward(self, x_SBH: Tensor, angles: Angles, batch: Batch) -> Tensor:
        """[S, B, H] → [S, B, H]; with sequence parallelism both are this rank's part of the sequence."""


class Attention(Half):
    """A half in which tokens see each other.

    Attributes:
        core_attention: queries [S, B, G, Q, D], keys and values [T, B, G, D], mask, documents → [S, B, G·Q·D]; with
            `window` each query sees so many keys.  Context parallelism puts one in its place that reaches beyond this
            rank's tokens, and knows no window.
    """

    core_attention: Callable[..., Tensor]
