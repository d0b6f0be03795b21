"""How far are the log-probabilities that texts are drawn with from those that are learned from?

Making texts feeds one token of many texts at a time, learning feeds whole texts; the sums are taken in another order,
and what each is rounded to depends on the dtype.  PPO divides by what the training layout says, `rollout.correction`
weighs by the difference.  The same short run for each dtype, of a model that learns: over all tokens of all steps, mean
and largest |log π_training − log π_generating|, and of the probabilities themselves, as `rollout_probs_diff_…` are.

    python -m benchmarks.rl.two_arithmetics [--steps 5] [--layers 4] [--hidden 128]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.rl.optimum import FirstIsGood, TwoDigits
from engine.config import Config, resolve_layout
from engine.distributed.mesh import Job
from engine.rl import objectives
from engine.rl.experience import Experience
from engine.rl.rollouts import Rollouts
from engine.rl.start import start

NUM_IDS, LAST, NEW_TOKENS = 1000, 999, 16


def config_of(dtype: str, args: argparse.Namespace, directory: Path) -> Config:
    """One process, 32 texts a step."""
    config = Config.model_validate({
        "run": {"objective": "ppo", "seed": 1, "dir": str(directory), "device": args.device}, "steps": args.steps,
        "model": {"num_layers": args.layers, "hidden_size": args.hidden, "num_heads": 4, "num_kv_heads": 4,
                  "ffn_hidden_size": 2 * args.hidden, "vocab_size": 1024, "max_seq_len": 32},
        "precision": {"compute": dtype}, "data": {"seq_len": 32}, "batch": {"micro": 16}, "parallel": {"data": 1},
        "optim": {"lr": 1e-3, "decay": "constant"}, "eval": {"every": 0},
        "checkpoint": {"every": 0, "async": False}, "reliability": {"watchdog": None},
        "rollout": {"prompts": 32, "max_new_tokens": NEW_TOKENS}, "ppo": {"epochs": 1, "minibatch": 16},
        "roles": {"reward": {"function": "first_is_good"}}})
    return resolve_layout(config, 1)


def differences(dtype: str, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Log-probabilities of all tokens of a run, [tokens] each: as texts were drawn, and as the training layout says."""
    drawn: list[Tensor] = []
    learned: list[Tensor] = []
    with tempfile.TemporaryDirectory() as folder:
        learner = start(config_of(dtype, args, Path(folder)), Job(args.device), TwoDigits(), [FirstIsGood()], NUM_IDS,
                        {LAST}, lambda: False)
        learn = learner._learn

        def noted(step: int, rollouts: Rollouts, experience: Experience) -> Any:
            old = experience.fields[objectives.OLD_LOG_PROBS]
            for row, response in enumerate(rollouts.responses):
                drawn.append(torch.tensor(response.log_probs, dtype=torch.float64))
                learned.append(old[row].double())
            return learn(step, rollouts, experience)

        learner._learn = noted                                             # type: ignore[method-assign]
        try:
            learner.run()
        finally:
            learner.close()
    return torch.cat(drawn), torch.cat(learned)


def main() -> None:
    """A row for each dtype."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    print("| dtype | tokens | mean of log π | largest of log π | mean of π | largest of π |")
    print("|---|---:|---:|---:|---:|---:|")
    for dtype in ("fp32", "bf16"):
        drawn, learned = differences(dtype, args)
        logs, probabilities = (drawn - learned).abs(), (drawn.exp() - learned.exp()).abs()
        print(f"| {dtype} | {len(drawn):,} | {logs.mean():.1e} | {logs.max():.1e} | {probabilities.mean():.1e} | "
              f"{probabilities.max():.1e} |", flush=True)


if __name__ == "__main__":
    main()
