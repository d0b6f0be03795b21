"""From demonstrations of which half are wrong to a policy that is right, in minutes on two cores: SFT, a reward model,
PPO and GRPO, each by `octant train` and a file that stays in the folder.

A prompt is four different digits, the right answer the same in ascending order.  Those who demonstrate it write them
in descending order in half of all cases, and so does what has learned from them; what is compared tells the reward
model which order is meant.

    ppo        2,000 comparisons, β = 0.3
    reversed   the same from demonstrations of which 70 % are descending
    grpo       no reward model: 1 for an exact match, else 0
    loose      32 comparisons, the reward model's scores as they are, β = 0.05
    tight      the same reward model, β = 0.3

`loose` shows what a reward model is: right where it was compared, anything elsewhere.  It has only seen the two orders
of the prompt's own digits, and nothing holds the policy near those.

Both rewards of a step are in `metrics.jsonl`: that of the model, and with weight 0, so that nothing is learned from it,
whether the text is right.  All texts are drawn at temperature 1.

    python -m benchmarks.rl.learning [--seeds 0 1 2] [--variants ppo …] [--dir DIR] [--markdown FILE]

A run that is whole in DIR is only read.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

import numpy as np
import torch

from engine import cli
from engine.bench.harness import describe_environment
from engine.report.runs import Run, read_run

DIGITS, NUMBER = "0123456789", 4
SFT_STEPS = 600
STEPS, AROUND = 60, 5                                        # of learning; over which steps a mean is taken
CHATS, PAIRS, FEW, HELD_OUT = 20_000, 2_000, 32, 256

COMMON = """
run: {{dir: {folder}/{name}, objective: {objective}, seed: {seed}, device: cpu}}
model: {{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 4, ffn_hidden_size: 192, max_seq_len: 16}}
parallel: {{data: 1}}
precision: {{compute: fp32}}
eval: {{every: 0}}
checkpoint: {{every: 0}}
"""
SFT = """
base: {folder}/common-{name}.yaml
data: {{tokenizer: bytes, template: plain, seq_len: 12, pack: false, train: [{{path: {folder}/{chats}.jsonl}}]}}
batch: {{micro: 64, global: 64}}
steps: {steps}
optim: {{lr: 4.0e-3, warmup_steps: 20, weight_decay: 0.0}}
log: {{every: 100}}
"""
REWARD = """
base: {folder}/common-{name}.yaml
model: {{head: score}}
data: {{tokenizer: bytes, template: plain, seq_len: 12, pack: false, train: [{{path: {folder}/{pairs}.jsonl}}]{valid}}}
batch: {{micro: 16, global: 16}}
steps: {steps}
optim: {{lr: 1.0e-3, warmup_steps: 10, weight_decay: 0.0}}
checkpoint: {{load: {folder}/{chats}}}
eval: {{every: {eval_every}}}
log: {{every: 20}}
"""
LEARN = """
base: {folder}/common-{name}.yaml
data: {{tokenizer: bytes, template: plain, seq_len: 13, train: [{{path: {folder}/prompts.jsonl}}]}}
batch: {{micro: 32}}
steps: {steps}
optim: {{lr: 5.0e-4, decay: constant, weight_decay: 0.0}}
log: {{every: 1}}
rollout: {{prompts: {prompts}, max_new_tokens: 6}}
"""
PPO = LEARN + """
ppo: {{epochs: 2, minibatch: 32, kl_coef: {beta}}}
roles:
  actor: {{load: {folder}/{chats}}}
  critic: {{load: {folder}/{reward}, optim: {{lr: 1.0e-3}}}}
  reward: [{{load: {folder}/{reward}}}, {{function: exact_match, weight: 0.0}}]
"""
GRPO = LEARN + """
grpo: {{epochs: 2, minibatch: 64, group: 8}}
roles: {{actor: {{load: {folder}/{chats}}}, reward: {{function: exact_match}}}}
"""


@dataclass(frozen=True)
class Variant:
    """What differs.

    Attributes:
        descending: share of the demonstrations that are wrong.
        few: comparisons are few and none is held back, so that the reward model's scores stay as they are.
        beta: price of divergence; None: GRPO.
    """

    descending: float = 0.5
    few: bool = False
    beta: float | None = 0.3


VARIANTS = {"ppo": Variant(), "reversed": Variant(descending=0.7), "grpo": Variant(beta=None),
            "loose": Variant(few=True, beta=0.05), "tight": Variant(few=True)}
MATCH, SCORE, KL = "critic/score/exact_match", "critic/score/mean", "objective/kl"


def write_data(folder: Path, seed: int) -> None:
    """Demonstrations of both kinds, comparisons, prompts; nobody is asked what the reward model is measured on."""
    draw = random.Random(seed)
    everything = ["".join(digits) for digits in permutations(DIGITS, NUMBER)]
    draw.shuffle(everything)
    asked, held = everything[HELD_OUT:], everything[:HELD_OUT]

    def write(name: str, records: Iterable[dict[str, str]]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    for share in sorted({variant.descending for variant in VARIANTS.values()}):
        write(_chats(share), ({"prompt": f"{digits}>", "completion": _ordered(digits, draw.random() < share)}
                              for digits in draw.choices(asked, k=CHATS)))
    for name, digits in (("pairs", draw.choices(asked, k=PAIRS)), ("few", draw.sample(asked, FEW)), ("held", held)):
        write(name, ({"prompt": f"{each}>", "chosen": _ordered(each, False), "rejected": _ordered(each, True)}
                     for each in digits))
    write("prompts", ({"prompt": f"{digits}>", "answer": _ordered(digits, False)} for digits in asked))


def _ordered(digits: str, descending: bool) -> str:
    return "".join(sorted(digits, reverse=descending))


def _chats(descending: float) -> str:
    return f"chats-{round(100 * descending)}"


def _train(folder: Path, name: str, objective: str, seed: int, text: str, **values: object) -> None:
    """One run of `octant train`, unless it is there."""
    if (folder / name / "DONE").exists():
        return
    given = {"folder": folder, "name": name, "objective": objective, "seed": seed} | values
    (folder / f"common-{name}.yaml").write_text(COMMON.format(**given))
    (folder / f"{name}.yaml").write_text(text.format(**given))
    if cli.run(["train", str(folder / f"{name}.yaml")]):
        raise SystemExit(f"{name} failed; its message is above")


def run(name: str, seed: int, folder: Path, steps: int = STEPS) -> Run:
    """A variant from its data on; what is in the folder already is not made again."""
    variant = VARIANTS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "prompts.jsonl").exists():
        write_data(folder, seed)
    chats = _chats(variant.descending)
    _train(folder, chats, "sft", seed, SFT, chats=chats, steps=SFT_STEPS)
    if variant.beta is None:
        _train(folder, name, "grpo", seed, GRPO, chats=chats, steps=steps, prompts=16)
    else:
        reward = f"reward-{chats}" + ("-few" if variant.few else "")
        held = "" if variant.few else f", valid: [{{path: {folder}/held.jsonl}}]"
        _train(folder, reward, "reward", seed, REWARD, chats=chats, pairs="few" if variant.few else "pairs", valid=held,
               steps=40 if variant.few else 100, eval_every=0 if variant.few else 50)
        _train(folder, name, "ppo", seed, PPO, chats=chats, reward=reward, beta=variant.beta, steps=steps, prompts=64)
    return read_run(folder / name)


def row(name: str, seed: int, seen: Run) -> str:
    """A line of the table: the first step, the steps in which accuracy is highest, the last steps."""
    scores = seen.values(SCORE)
    right = seen.values(MATCH) or scores                                # of one source its parts are not logged
    last = len(right) - AROUND
    best = int(np.argmax(np.convolve(right, np.ones(AROUND), "valid")))

    def around(values: Sequence[float], first: int) -> str:
        return f"{np.mean(values[first:first + AROUND]):.2f}"

    kl = around(seen.values(KL), last) if VARIANTS[name].beta else "–"   # GRPO pays for none and asks no reference
    return (f"| {name} | {seed} | {right[0]:.2f} | {around(right, best)} (from {best + 1}) | {around(right, last)} | "
            f"{scores[0]:.2f} | {around(scores, best)} | {around(scores, last)} | {kl} |")


COLUMNS = ("variant", "seed", "accuracy at first", "highest", "at the end", "score at first", "then", "at the end",
           "KL at the end")


def main() -> None:
    """Prints the table, and writes it anew after every run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--dir", type=Path, help="folder for the runs (default: one that is removed)")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the table goes there, too")
    given = parser.parse_args()
    torch.set_num_threads(1)                                             # models so small gain nothing from a second
    rows: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for name in given.variants:
            for seed in given.seeds:
                rows.append(row(name, seed, run(name, seed, (given.dir or Path(temporary)) / str(seed))))
                table = "\n".join([f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *rows])
                if given.markdown:
                    about = "\n".join(f"{key}: {value}" for key, value in describe_environment().items())
                    given.markdown.write_text(f"{table}\n\n{about}\n")
    print(table)


if __name__ == "__main__":
    main()
