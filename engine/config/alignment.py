"""The sections of what is trained besides pretraining, and with how few parameters."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from engine.config.fields import Fraction, Number, Positive, Section, Size, nearest

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


class SFTConfig(Section):
    """Supervised fine-tuning."""

    ptx_weight: Number = 0.0                                 # of a label of pretraining data, beside 1 of an answer's


class RewardConfig(Section):
    """Reward models."""

    loss: Literal["pairwise", "kwise"] = "pairwise"          # kwise: all pairs of a prompt's ranked answers
    answers: Size = 4                                        # kwise: the most that a prompt has
    margin: bool = True                                      # the data's, where they have any; pairwise only
    center: Number = 0.0                                     # weight of (s_chosen + s_rejected)²


class DPOConfig(Section):
    """Direct preference optimization."""

    beta: Positive = 0.1
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0        # share of preferences that are mistaken
    sft_weight: Number = 0.0                                 # of the chosen answer's mean loss per token
    reference: Literal["cached", "live"] = "cached"          # live: the model without its adapter, in every step

    @model_validator(mode="after")
    def _smooths(self) -> DPOConfig:
        if self.label_smoothing and self.loss != "sigmoid":
            raise ValueError(f"label_smoothing({self.label_smoothing}) is of loss: sigmoid; {self.loss} has none")
        return self


class ORPOConfig(Section):
    """Odds ratio preference optimization."""

    lambda_: Number = Field(default=0.1, validation_alias="lambda", serialization_alias="lambda")
