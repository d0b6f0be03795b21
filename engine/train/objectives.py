"""The objectives by the name that `run.objective` gives them."""

from __future__ import annotations

from collections.abc import Callable

from engine.align.preference import DPO, ORPO
from engine.align.reward import RewardModel
from engine.align.sft import supervised
from engine.config import Config
from engine.errors import ConfigError
from engine.model.objective import NEXT_TOKEN, Objective

OBJECTIVES: dict[str, Callable[[Config], Objective]] = {
    "pretrain": lambda config: NEXT_TOKEN,
    "sft": lambda config: supervised(config.sft.ptx_weight),
    "reward": lambda config: RewardModel(2 if config.reward.loss == "pairwise" else config.reward.answers,
                                         config.reward.center),
    "dpo": lambda config: DPO(config.dpo),
    "orpo": lambda config: ORPO(config.orpo.lambda_),
}


def objective_of(config: Config) -> Objective:
    """What a run trains.

    Raises:
        ConfigError: no objective has that name, or it needs a model with another head.
    """
    name = config.run.objective
    if name not in OBJECTIVES:
        raise ConfigError(f"run.objective is {name}, which this version cannot train; it has {', '.join(OBJECTIVES)}")
    objective = OBJECTIVES[name](config)
    if objective.head != config.model.head:
        raise ConfigError(f"run.objective {name} trains a model with model.head: {objective.head}; it is "
                          f"{config.model.head}")
    return objective
