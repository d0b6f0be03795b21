"""Reward functions: what can be checked needs no model.

    f(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]

`exact_match` compares with the record's `answer`, `gsm8k` the last number of the response with that behind `####` in
it; any other is named as `module:function`.  The first rank calls it, and all hear what it said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.config import Config
from engine.distributed.agree import share_json
from engine.distributed.mesh import Axis
from engine.errors import RequestError
from engine.rl.rollouts import Rollouts
from engine.rl.scores import Numbers

Function = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """1 where the response is the record's answer, blanks around it aside."""
    return [float(response.strip() == str(record["answer"]).strip())
            for response, record in zip(responses, records, strict=True)]


def gsm8k(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """1 where the last number of the response is that behind #### in the record's answer."""
    return [float(bool(said := _last_number(response)) and said == _last_number(str(record["answer"])))
            for response, record in zip(responses, records, strict=True)]


def _last_number(text: str) -> str:
    found = _NUMBER.findall(text.rpartition("####")[2])
    return found[-1].replace(",", "").removesuffix(".0") if found else ""


KNOWN: Mapping[str, Function] = MappingProxyType({"exact_match": exact_match, "gsm8k": gsm8k})


def function_of(name: str) -> Function:
    """The reward function of a name.

    Raises:
        RequestError: there is none.
    """
    try:
        function: Function = KNOWN[name] if name in KNOWN else resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise RequestError(f"roles.reward: there is no function {name!r} ({error}): use {', '.join(KNOWN)}, or "
                           "module:function of a module that can be imported") from None
    return function


@dataclass(frozen=True)
class FunctionScorer:
    """See `engine.rl.rollouts.Scorer`."""

    name: str
    weight: float
    function: Function
    world: Axis

    def __call__(self, rollouts: Rollouts) -> Numbers:
        rows = range(rollouts.num_rows)
        said: Any = {}
        if self.world.index == 0:
            try:
                said = [float(number) for number in self.function(
                    [rollouts.prompt_of(row).text for row in rows], list(rollouts.texts),
                    [dict(rollouts.prompt_of(row).record) for row in rows])]
            except Exception as error:  # whatever somebody's function does, all ranks must hear of it
                said = {"error": f"{type(error).__name__}: {error}"}
        said = share_json(said, self.world.group)
        if isinstance(said, dict):
            raise RequestError(f"the reward function {self.name} failed: {said['error']}")
        return np.array(said, np.float64)

    def close(self) -> None:
        """Nothing was started."""


def open_scorers(config: Config, functions: Mapping[str, Function], world: Axis) -> list[FunctionScorer]:
    """Those of the run."""
    return [FunctionScorer(source.function, source.weight, functions[source.function], world)
            for source in config.roles.reward if source.function is not None]
