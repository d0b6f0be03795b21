"""The sections of what is trained besides pretraining, and with how few parameters."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, WithJsonSchema

from engine.config.fields import Fraction, Positive, Section, Size, nearest

ALL_LINEAR, HEAD = "all-linear", "lm_head"
# The projections of a layer by the names that Hugging Face's models and PEFT have for them.
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TARGETS = (ALL_LINEAR, *PROJECTIONS, HEAD)


def _targets(value: object) -> object:
    """A name or a list of names, each once."""
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ValueError(f"must be {ALL_LINEAR} or a list of {', '.join(TARGETS[1:])}; it is {value!r:.60}")
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"there is no linear layer {name!r:.40}; {nearest(str(name), TARGETS)}")
    return tuple(dict.fromkeys(names))


Targets = Annotated[tuple[str, ...], BeforeValidator(_targets), WithJsonSchema(
    {"anyOf": [{"enum": [*TARGETS]}, {"type": "array", "items": {"enum": [*TARGETS]}, "minItems": 1}]})]


class AdapterConfig(Section):
    """LoRA: the weights stay as they are, and some get (alpha / rank)·B·A added, which is all that is trained."""

    rank: Size = 16
    alpha: Positive = Field(default_factory=lambda values: 2.0 * values.get("rank", 16))
    dropout: Fraction = 0.0                                  # of what goes into A
    targets: Targets = (ALL_LINEAR,)                         # all-linear: of the layers, without the head

    def adapts(self, projection: str) -> bool:
        """Whether the projection of this name has an adapter."""
        return projection in self.targets or (ALL_LINEAR in self.targets and projection != HEAD)

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / self.rank
