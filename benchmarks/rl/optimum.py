"""Does PPO find the best policy there is?  For a reward of 0 or 1 that one is known.

    p*  = p₀·e^{1/β} / (p₀·e^{1/β} + 1 − p₀)                      how often it succeeds
    KL* = p*·ln(p*/p₀) + (1 − p*)·ln((1 − p*)/(1 − p₀))           how far it is from the reference

with β the price of divergence and p₀ how often the reference succeeds (the optimum of E[r] − β·KL is π₀·e^{r/β} / Z).
A text succeeds if its first token is one of four of 14; what follows does not matter, so that the best policy leaves it
alone.  Both numbers are means over the last steps.

    python benchmarks/rl/optimum.py [--seeds 3] [--steps 200] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.config import Config, resolve_layout
from engine.distributed.mesh import Job
from engine.rl.rollouts import Prompt, Rollouts
from engine.rl.scores import Numbers
from engine.rl.start import start

NUM_IDS, GOOD, LAST = 14, 4, 60
BETAS = (0.3, 0.5, 1.0)


@dataclass(frozen=True)
class TwoDigits:
    """See `engine.rl.rollouts.PromptSource`."""

    def prompt(self, number: int) -> Prompt:
        return Prompt(number, (4 + number % 8, 12), str(number % 8), {})

    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))

    def fingerprint(self) -> dict[str, Any]:
        return {"sources": ["two digits"]}


@dataclass(frozen=True)
class FirstIsGood:
    """See `engine.rl.rollouts.Scorer`."""

    name: str = "first is good"
    weight: float = 1.0
    complaints: tuple[str, ...] = ()

    def __call__(self, rollouts: Rollouts) -> Numbers:
        return np.array([float(response.tokens[0] < GOOD) for response in rollouts.responses])

    def close(self) -> None:
        """Nothing was started."""


def config_of(beta: float, seed: int, steps: int, directory: Path, **ppo: Any) -> Config:
    """One layer, 256 texts a step."""
    config = Config.model_validate({
        "run": {"objective": "ppo", "seed": seed, "dir": str(directory), "device": "cpu"}, "steps": steps,
        "model": {"num_layers": 1, "hidden_size": 32, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 32,
                  "vocab_size": NUM_IDS, "max_seq_len": 8},
        "precision": {"compute": "fp32"}, "data": {"seq_len": 6}, "batch": {"micro": 128}, "parallel": {"data": 1},
        "optim": {"lr": 1e-2, "decay": "cosine", "min_lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.99]},
        "checkpoint": {"every": 0, "async": False}, "reliability": {"watchdog": None}, "eval": {"every": 0},
        "rollout": {"prompts": 256, "max_new_tokens": 3, "batch": 256},
        "ppo": {"epochs": 2, "minibatch": 128, "kl_coef": beta, "gae_lambda": 1.0, "value_clip": None} | ppo,
        "roles": {"reward": {"function": "first_is_good"}}})
    return resolve_layout(config, 1)


def best(p0: float, beta: float) -> tuple[float, float]:
    """p* and KL*."""
    odds = p0 * math.exp(1 / beta)
    p = odds / (odds + 1 - p0)
    return p, p * math.log(p / p0) + (1 - p) * math.log((1 - p) / (1 - p0))


def run(beta: float, seed: int, steps: int, last: int = LAST, **ppo: Any) -> dict[str, float]:
    """One run beside the optimum."""
    with tempfile.TemporaryDirectory() as folder:
        config = config_of(beta, seed, steps, Path(folder), **ppo)
        learner = start(config, Job("cpu"), TwoDigits(), [FirstIsGood()], NUM_IDS, {11}, lambda: False)
        learner.tools.journal.console = None                             # nothing to look at
        p0, steps_seen = reference_rate(learner), []
        try:
            while learner.state.step < steps:
                with learner.phases.step(learner.state.step + 1):
                    learner._step()
                steps_seen.append((learner.row["critic/score/mean"], learner.row["objective/kl"]))
        finally:
            learner.close()
    seen, (p, kl) = np.array(steps_seen[-last:]), best(p0, beta)
    return {"beta": beta, "seed": seed, "p0": p0, "p": float(seen[:, 0].mean()), "p*": p,
            "kl": float(seen[:, 1].mean()), "kl*": kl}


def reference_rate(learner: Any) -> float:
    """How often the reference succeeds, by 8,192 texts: at the start the actor is the reference."""
    learner.maker.take_over()
    texts = [learner.texts.make(-step, 256 * step).rollouts for step in range(1, 33)]
    return float(np.mean([each.scores.mean() for each in texts]))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [run(beta, seed, given.steps) for beta in BETAS for seed in range(1, given.seeds + 1)]
    print("| β | seed | p₀ | p | p* | KL | KL* | largest error |\n|---|---|---|---|---|---|---|---|")
    for row in rows:
        error = max(abs(row["p"] - row["p*"]), abs(row["kl"] - row["kl*"]))
        print("| {beta} | {seed} | {p0:.3f} | {p:.3f} | {p*:.3f} | {kl:.3f} | {kl*:.3f} |".format(**row)
              + f" {error:.3f} |")
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
