"""What the schema already names and this version does not do yet: one row each, deleted when the feature lands."""

from __future__ import annotations

from collections.abc import Callable

from engine.config.rl import RL_OBJECTIVES
from engine.config.schema import Config

# (true where the configuration asks for it, what it asks for, what to do instead)
UNSUPPORTED: tuple[tuple[Callable[[Config], bool], str, str], ...] = (
    (lambda c: c.precision.fp8 == "te", "FP8 by Transformer Engine", "set precision.fp8 to tensorwise"),
    (lambda c: c.precision.fp8 != "off" and c.run.objective in RL_OBJECTIVES, "FP8 in a run that makes its own texts",
     "set precision.fp8 to off"),
)


def unsupported(config: Config) -> list[str]:
    """A message for every feature that `config` asks for and this version lacks."""
    return [f"{what} is not available in this version: {remedy}" for asks, what, remedy in UNSUPPORTED if asks(config)]
