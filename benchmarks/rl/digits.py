"""From demonstrations that are half wrong to a policy that is right: SFT, a reward model, PPO and GRPO on digits.

A prompt is three digits, and right is to write them in order.  Of the demonstrations some are in the opposite order;
the reward model learns from pairs which order is meant; PPO then learns from what it says, GRPO from the answers.

    --variant half        half of the demonstrations are wrong, β = 0.3
    --variant reversed    70 % of them are
    --variant cheap       half, β = 0.05 and a reward model that has seen few pairs: its reward rises, accuracy need not
    --variant grpo        half; the reward is an exact match, and there is no reward model

Accuracy is that of the texts of the step, at temperature 1.

    python benchmarks/rl/digits.py --variant half --seeds 3
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine import cli
from engine.config import Config, resolve_layout
from engine.distributed.mesh import Job
from engine.rl.function_scorer import open_scorers
from engine.rl.prompts import Prompts
from engine.rl.rollouts import Rollouts
from engine.rl.start import start

COUNT, DIGITS = 3, "012345"
MODEL = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 4, "ffn_hidden_size": 128,
         "vocab_size": 257, "max_seq_len": 32}
VARIANTS = {"half": (0.5, 0.3, 2000), "reversed": (0.7, 0.3, 2000), "cheap": (0.5, 0.05, 24), "grpo": (0.5, 0.0, 0)}


def write_data(folder: Path, seed: int, wrong: float, pairs: int) -> None:
    """Demonstrations, pairs and prompts."""
    draw = random.Random(seed)

    def digits() -> str:
        return "".join(draw.choice(DIGITS) for _ in range(COUNT))

    def lines(name: str, records: list[dict[str, str]]) -> None:
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))

    demonstrations = []
    for _ in range(4000):
        prompt = digits()
        demonstrations.append({"prompt": prompt, "completion": in_order(prompt, draw.random() < wrong)})
    lines("sft.jsonl", demonstrations)
    found = [digits() for _ in range(pairs or 1)]
    found = [prompt for prompt in found if len(set(prompt)) > 1] or ["01"]
    lines("pairs.jsonl", [{"prompt": prompt, "chosen": in_order(prompt, False), "rejected": spoilt(prompt, draw)}
                          for prompt in found])
    prompts = [digits() for _ in range(2000)]
    lines("prompts.jsonl", [{"prompt": prompt, "answer": in_order(prompt, False)} for prompt in prompts])


def in_order(text: str, falling: bool) -> str:
    return "".join(sorted(text, reverse=falling))


def spoilt(text: str, draw: random.Random) -> str:
    """The opposite order, another one, a digit too few or too many, or any digits."""
    what = draw.random()
    if what < 0.4:
        return in_order(text, True)
    if what < 0.7:
        ordered = in_order(text, False)
        place = draw.randrange(COUNT)
        return draw.choice((ordered[:place] + ordered[place + 1:], ordered + draw.choice(DIGITS),
                            ordered[:place] + draw.choice(DIGITS.replace(ordered[place], "")) + ordered[place + 1:]))
    other = list(text) if what < 0.85 else [draw.choice(DIGITS) for _ in range(COUNT)]
    while "".join(other) == in_order(text, False):
        draw.shuffle(other)
    return "".join(other)


def base(folder: Path, name: str, objective: str, **sections: Any) -> dict[str, Any]:
    """What all runs have in common."""
    return {"run": {"dir": str(folder / name), "objective": objective, "seed": 1, "device": "cpu"},
            "model": dict(MODEL), "precision": {"compute": "fp32"}, "eval": {"every": 0},
            "checkpoint": {"every": 0, "keep_best": False},
            "reliability": {"watchdog": None}, "log": {"every": 100},
            "data": {"tokenizer": "bytes", "template": "plain", "seq_len": 16, "pack": False},
            "optim": {"lr": 2e-3, "warmup_steps": 20, "weight_decay": 0.0}, "parallel": {"data": 1}} | sections


def train(folder: Path, name: str, config: dict[str, Any], source: str) -> None:
    """One run of `octant train`."""
    config["data"] = config["data"] | {"train": [{"path": str(folder / source)}]}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))
    if cli.run(["train", str(file)]):
        raise SystemExit(f"{name} failed")


def learn(folder: Path, objective: str, beta: float, seed: int, steps: int) -> list[dict[str, float]]:
    """PPO or GRPO; what every step's texts were like."""
    exact = objective == "grpo"
    reward: dict[str, Any] = {"function": "exact_match"} if exact else {"load": str(folder / "rm")}
    values = base(folder, "rl", objective, steps=steps, batch={"micro": 64}, log={"every": 1},
                  optim={"lr": 5e-4, "decay": "constant", "weight_decay": 0.0},
                  rollout={"prompts": 32 if exact else 128, "max_new_tokens": COUNT + 2, "batch": 256},
                  ppo={"epochs": 2, "minibatch": 64, "kl_coef": beta, "missing_eos_penalty": 1.0, "gae_lambda": 0.95},
                  grpo={"epochs": 1, "minibatch": 128, "group": 8, "clip_coef_high": 0.28},
                  roles={"actor": {"load": str(folder / "sft")}, "reward": reward,
                         "critic": {"optim": {"lr": 2e-3}} | ({} if exact else {"load": str(folder / "rm")})})
    values["run"]["seed"] = seed
    values["data"] = values["data"] | {"train": [{"path": str(folder / "prompts.jsonl")}]}
    config, job = resolve_layout(Config.model_validate(values), 1), Job("cpu")
    prompts, seen = Prompts.open(config), []

    def look(rollouts: Rollouts) -> None:
        right = [text == rollouts.prompt_of(row).record["answer"] for row, text in enumerate(rollouts.texts)]
        seen.append({"accuracy": float(np.mean(right)), "score": float(rollouts.scores.mean())})

    learner = start(config, job, prompts, open_scorers(config, None), prompts.tokenizer.vocab_size, prompts.end_ids,
                    lambda: False, told=look)
    try:
        learner.run()
    finally:
        learner.close()
    return seen


def run(variant: str, seed: int, steps: int) -> list[dict[str, float]]:
    """Everything from data on."""
    wrong, beta, pairs = VARIANTS[variant]
    folder = Path(tempfile.mkdtemp())
    try:
        write_data(folder, seed, wrong, pairs)
        train(folder, "sft", base(folder, "sft", "sft", steps=400, batch={"micro": 128}), "sft.jsonl")
        if pairs:
            score = base(folder, "rm", "reward", steps=150 if pairs > 100 else 40,
                         batch={"micro": 64 if pairs > 100 else 16}, reward={"center": 0.01},
                         checkpoint={"every": 0, "load": str(folder / "sft")})
            score["model"] |= {"head": "score"}
            score["optim"] = score["optim"] | {"lr": 1e-3}
            train(folder, "rm", score, "pairs.jsonl")
        return learn(folder, "ppo" if pairs else "grpo", beta, seed, steps)
    finally:
        shutil.rmtree(folder)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variant", choices=VARIANTS, default="half")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = [(seed, run(given.variant, seed, given.steps)) for seed in range(1, given.seeds + 1)]
    print("| variant | seed | accuracy at first | after 20 | 40 | at the end | score at first | at the end |")
    print("|---" * 8 + "|")
    for seed, seen in rows:
        accuracy = [f"{np.mean([step['accuracy'] for step in seen[first:first + 3]]):.2f}"
                    for first in (0, 20, 40, len(seen) - 3)]
        scores = f"{seen[0]['score']:.2f} | {seen[-1]['score']:.2f}"
        print(f"| {given.variant} | {seed} | {' | '.join(accuracy)} | {scores} |")


if __name__ == "__main__":
    main()
