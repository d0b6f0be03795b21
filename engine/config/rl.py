"""The sections of reinforcement learning: who is there and where, how texts are made, how they are learned from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator

from engine.config.fields import Count, Fraction, NonNegative, Number, Positive, Section, Size, Words, nearest
from engine.config.model import ModelConfig
from engine.config.parallel import ParallelConfig

Probability = Annotated[float, Field(gt=0, le=1)]
Discount = Annotated[float, Field(ge=0, le=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
_RANGE = re.compile(r"(\d{1,7}):(\d{1,7})")


def _ranks(value: object) -> object:
    """`all`, or `a:b` for the ranks a to b − 1."""
    match = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if value != "all" and (match is None or int(match[1]) >= int(match[2])):
        raise ValueError(f'must be all, or a range such as "4:8" (ranks 4 to 7); it is {value!r:.40}')
    return value


Ranks = Annotated[str, BeforeValidator(_ranks), WithJsonSchema({"type": "string", "pattern": r"^(all|\d+:\d+)$"})]


class Place(Section):
    """Where a model lives.

    Attributes:
        ranks: all, or "a:b"; null: the actor's.
        parallel: its layout there; null: the actor's.
    """

    ranks: Ranks | None = None
    parallel: ParallelConfig | None = None

    def range_of(self, otherwise: range) -> range:
        """Its ranks in a job; `otherwise` where it names none.  All of the job's are left to `otherwise` too."""
        match = _RANGE.fullmatch(self.ranks or "")
        return otherwise if match is None else range(int(match[1]), int(match[2]))


class RoleConfig(Place):
    """One of the models.

    Attributes:
        load: checkpoint or run that its weights come from; null: the actor's, as the actor begins.
        model: null: the actor's, with the head that the role needs.
        offload: it lies in host memory while it has nothing to do.
    """

    load: Words | None = None
    model: ModelConfig | None = None
    offload: bool = False


class ActorConfig(RoleConfig):
    """The policy; `generate` is the layout in which it makes texts (null: its own)."""

    generate: ParallelConfig | None = None


class CriticConfig(RoleConfig):
    """What foresees rewards; `optim` changes keys of the run's."""

    optim: dict[Words, Any] = Field(default_factory=dict)


class RewardSource(RoleConfig):
    """What says how good a text is: a reward model, or a function."""

    function: Words | None = None                            # exact_match, gsm8k, or module:function
    weight: Finite = 1.0
    workers: Size = 1                                        # processes that a function is called in
    timeout_seconds: Positive = 30.0                         # for the texts of one call

    @model_validator(mode="after")
    def _one_of_both(self) -> RewardSource:
        if (self.load is None) == (self.function is None):
            raise ValueError("names either a reward model (load) or a function")
        return self


def _several(value: object) -> object:
    return value if isinstance(value, list | tuple) else [value]


def _one_or_several(schema: dict[str, Any]) -> None:
    """A list in the schema of editors, or what is in it."""
    listed = {key: schema.pop(key) for key in ("type", "items")}
    schema["anyOf"] = [listed, listed["items"]]


class RolesConfig(Section):
    """The models of a run of reinforcement learning."""

    actor: ActorConfig = ActorConfig()
    critic: CriticConfig = CriticConfig()
    reference: RoleConfig = RoleConfig()
    reward: Annotated[tuple[RewardSource, ...], BeforeValidator(_several),
                      Field(json_schema_extra=_one_or_several)] = ()
    rollout: Place | None = None                             # texts are made on ranks of their own


class CorrectionConfig(Section):
    """Weights for texts that another arithmetic, or older weights, have made: π_old / π_generated.

    Attributes:
        kind: tis: weights above `high` are cut to it; mask: what lies outside [low, high] does not count at all.
        level: of each token, or one of a whole text (their product).
    """

    kind: Literal["off", "tis", "mask"] = "off"
    level: Literal["token", "sequence"] = "token"
    low: Number = 0.5
    high: Positive = 2.0

    @model_validator(mode="after")
    def _some_room(self) -> CorrectionConfig:
        if self.low >= self.high:
            raise ValueError(f"low({self.low}) is not below high({self.high})")
        return self


class RolloutConfig(Section):
    """How texts are made."""

    prompts: Size = 128                                      # a step
    samples: Size = 1                                        # of each; grpo and rloo: their `group`
    max_new_tokens: Size = 512
    temperature: Positive = 1.0
    top_k: NonNegative = 0
    top_p: Probability = 1.0
    batch: Size = 64                                         # texts that a copy of the model works on at a time
    async_steps: Annotated[int, Field(ge=0, le=1)] = 0       # 1: texts of the next step are made during this one
    delta: bool = False                                      # send only the weights that have changed
    mask_truncated: bool = False                             # texts that came to no end are not learned from
    correction: CorrectionConfig = CorrectionConfig()


class OverlongConfig(Section):
    """A penalty that grows over the last `buffer` tokens before the limit, up to `penalty`."""

    buffer: Size
    penalty: Positive = 1.0


class LearningConfig(Section):
    """What all ways of learning from one's own texts have in common."""

    epochs: Count = 4                                        # over the texts of a step
    minibatch: Size = 64                                     # texts an update
    clip_coef: Fraction = 0.2                                # ratios count between 1 − clip_coef …
    clip_coef_high: Positive | None = None                   # … and 1 + clip_coef_high; null: clip_coef
    dual_clip: Annotated[float, Field(gt=1)] | None = None   # a bad token costs at most so many times its advantage
    entropy_coef: Number = 0.0
    ptx_coef: Number = 0.0                                   # weight of pretraining data in the loss
    target_kl: Positive | None = None                        # no further update of a step above 1.5 times this
    missing_eos_penalty: Number | None = None                # subtracted from the score of a text without an end
    overlong: OverlongConfig | None = None
    reward_clip: Positive | None = None                      # scores count between −this and this
    reward_norm: bool = False                                # scores are divided by their running standard deviation
    loss: Literal["token", "sequence", "constant"] = "token"         # what the policy's loss is a mean over


class PPOConfig(LearningConfig):
    """Proximal policy optimization."""

    value_clip: Positive | None = 0.2
    gamma: Discount = 1.0
    gae_lambda: Discount = 0.95
    kl_coef: Number = 0.05
    kl_target: Positive | None = None                        # the coefficient is adapted to this; null: it is fixed
    kl_horizon: Count = 10_000                               # texts over which it would change by a factor
    kl_estimator: Literal["k1", "k2", "k3"] = "k1"           # in the reward
    critic_warmup_steps: NonNegative = 0                     # the critic alone learns
    whiten_advantages: bool = True


class GRPOConfig(LearningConfig):
    """Group relative policy optimization, and by the same path REINFORCE leave-one-out."""

    group: Size = 8                                          # texts of a prompt, that are compared
    scale_by_std: bool = True
    kl_coef: Number = 0.0
    kl_estimator: Literal["k2", "k3"] = "k3"                 # in the loss
    dynamic_sampling: NonNegative = 0                        # times that groups without signal are made anew

    @model_validator(mode="after")
    def _comparable(self) -> GRPOConfig:
        if self.group < 2:
            raise ValueError(f"group({self.group}): texts are compared with each other, so that it takes two")
        return self


CRITIC_OBJECTIVES, GROUP_OBJECTIVES = ("ppo",), ("grpo", "rloo")
RL_OBJECTIVES = (*CRITIC_OBJECTIVES, *GROUP_OBJECTIVES)


def texts_of_a_step(objective: object, rollout: object, grpo: object) -> int | None:
    """The texts of a step, where the sections, checked or not, say it; None: they do not, or it is not asked."""
    if objective not in RL_OBJECTIVES:
        return None
    grouped = objective in GROUP_OBJECTIVES
    prompts = _value(rollout, RolloutConfig, "prompts")
    each = _value(grpo, GRPOConfig, "group") if grouped else _value(rollout, RolloutConfig, "samples")
    return prompts * each if isinstance(prompts, int) and isinstance(each, int) else None


def _value(section: object, kind: type[Section], key: str) -> object:
    default = kind.model_fields[key].default
    return section.get(key, default) if isinstance(section, Mapping) else getattr(section, key, default)


def merged_optim(run: Mapping[str, Any], changes: Mapping[str, Any], known: Sequence[str]) -> dict[str, Any]:
    """A role's optimizer settings: the run's with some keys replaced; of another rate the floor follows anew.

    Raises:
        ValueError: there is no such key.
    """
    for key in changes:
        if key not in known:
            raise ValueError(f"there is no key optim.{key!s:.40}; {nearest(str(key), known)}")
    base = {key: value for key, value in run.items() if not ("lr" in changes and key == "min_lr")}
    return base | dict(changes)
