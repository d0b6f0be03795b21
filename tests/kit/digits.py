"""The smallest task that can be learned from scores: write the digits of the prompt in order.

    ids 0 … 9: digits      10: "and now sorted"      11: the end      12: nothing

A source of prompts is a function of their numbers, as a run's is, and the score of a text is the share of its places
that are right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.config import Config, resolve_layout
from engine.config.layout import world_size_of
from engine.distributed.mesh import Job
from engine.rl.loop import Learner
from engine.rl.rollouts import Prompt, Rollouts
from engine.rl.scores import Numbers
from engine.rl.start import start

SORTED, END, NUM_IDS = 10, 11, 13


@dataclass(frozen=True)
class Digits:
    """See `engine.rl.rollouts.PromptSource`."""

    count: int = 3
    seed: int = 5
    alphabet: int = 10

    def prompt(self, number: int) -> Prompt:
        draw = random.Random(self.seed * 1_000_003 + number)
        digits = [draw.randrange(self.alphabet) for _ in range(self.count - number % 2)]
        text = "".join(map(str, digits))
        return Prompt(number, (*digits, SORTED), text, {"prompt": text, "answer": "".join(sorted(text))})

    def decode(self, tokens: Sequence[int]) -> str:
        return "".join(str(token) if token < SORTED else "" for token in tokens)

    def fingerprint(self) -> dict[str, Any]:
        return {"sources": ["digits"], "count": self.count, "seed": self.seed}


@dataclass(frozen=True)
class Places:
    """The share of places that are right; the end is one."""

    name: str = "places"
    weight: float = 1.0
    complaints: tuple[str, ...] = ()

    def __call__(self, rollouts: Rollouts) -> Numbers:
        return np.array([_right(rollouts, row) for row in range(rollouts.num_rows)])

    def close(self) -> None:
        pass


def _right(rollouts: Rollouts, row: int) -> float:
    want = [*sorted(rollouts.prompt_of(row).tokens[:-1]), END]
    got = rollouts.responses[row].tokens
    return sum(a == b for a, b in zip(want, got, strict=False)) / max(len(want), len(got))


def exact(rollouts: Rollouts) -> float:
    """The share of texts that are right altogether."""
    return float(np.mean([_right(rollouts, row) == 1 for row in range(rollouts.num_rows)]))


TINY: Mapping[str, Any] = {
    "run": {"objective": "ppo", "seed": 3, "device": "cpu"},
    "model": {"num_layers": 2, "hidden_size": 16, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 32,
              "vocab_size": NUM_IDS, "max_seq_len": 16},
    "precision": {"compute": "fp32"}, "data": {"seq_len": 8}, "steps": 3, "batch": {"micro": 2},
    "optim": {"lr": 1e-2, "eps": 1e-2, "decay": "constant", "weight_decay": 0.0},
    "checkpoint": {"every": 0, "async": False}, "eval": {"every": 0}, "reliability": {"watchdog": None},
    "rollout": {"prompts": 8, "samples": 2, "max_new_tokens": 4},
    "ppo": {"epochs": 2, "minibatch": 8, "kl_coef": 0.1},
    "grpo": {"group": 2, "epochs": 2, "minibatch": 8},
    "roles": {"reward": {"function": "places"}},
}


def rl_config(directory: object, **sections: Any) -> Config:
    """`TINY` with keys of some sections changed, resolved for the processes that it asks for."""
    values = {key: dict(value) if isinstance(value, dict) else value for key, value in TINY.items()}
    for section, changes in sections.items():
        there = values.get(section)
        values[section] = there | changes if isinstance(there, dict) and isinstance(changes, dict) else changes
    values["run"] = values["run"] | {"dir": str(directory)}
    if "data" not in values.get("parallel", {}):
        values["parallel"] = values.get("parallel", {}) | {"data": 1}
    config = Config.model_validate(values)
    return resolve_layout(config, world_size_of(config))


def learner_of(config: Config, job: Job, stop_requested: Callable[[], bool] = lambda: False,
               told: Callable[[Rollouts], None] | None = None, source: Digits = Digits()) -> Learner:
    """A run of the task on this rank."""
    return start(config, job, source, [Places()], NUM_IDS, {END}, stop_requested, told=told)
