"""The objective of a run, by its row in `engine.config.objectives`."""

from __future__ import annotations

from pkgutil import resolve_name

from engine.config import Config
from engine.config.objectives import OBJECTIVES
from engine.errors import ConfigError
from engine.model.objective import Objective


def objective_of(config: Config) -> Objective:
    """What a run trains; no other objective is imported.

    Raises:
        ConfigError: it needs a model with another head.
    """
    name = config.run.objective
    objective: Objective = resolve_name(OBJECTIVES[name].made_by)(config)
    if objective.head != config.model.head:
        raise ConfigError(f"run.objective {name} trains a model with model.head: {objective.head}; it is "
                          f"{config.model.head}")
    return objective
