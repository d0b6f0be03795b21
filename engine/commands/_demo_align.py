"""`octant demo align`: a base model is instructed and then preferred, on a task of which everything is known before.

The task (`corpus_tools.digits`) is to sort six digits.  Those who show how make a mistake every second time, so what
can be learned from them is a number, their entropy; of N answers of such a model the best is right with probability
1 − 2^−N; and what knows good answers from bad ones, a reward model, or a policy from comparisons, leaves them behind:

    base      reads text in which digits are followed by themselves in one of four orders
    sft       answers as it was shown                              the loss goes to the entropy of the demonstrations
    lora      the same with the base left alone, by an adapter     as far, with a tenth of the parameters
    reward    which of two answers is better                       nearly always
    dpo       the policy from those comparisons                    its loss begins at log 2, and a part for the answers
                                                                   themselves, which otherwise become less likely, too
    best of N of sft's answers by the reward model                 rises with N
    ppo       sft's policy, by its own answers and what the reward model says of them     soon nearly all are right
    grpo      the same by whether they are right                                          as well

Each stage is a command that is shown, and a configuration that stays in the folder.
"""

from __future__ import annotations

import json
import shutil
import time
from itertools import islice
from math import comb
from pathlib import Path
from typing import Any

from corpus_tools import digits
from engine.commands._stages import LAYOUTS, MARK, make_room, octant
from engine.hints import hint
from engine.report.charts import Chart, Series, line_chart
from engine.report.runs import read_run
from engine.report.svg import standalone
from engine.writing import write_picture

# How many records of each kind, no prompt in two of them.
RECORDS = {"text": 60_000, "chats": 30_000, "held-chats": 1_000, "pairs": 4_000, "held-pairs": 500, "questions": 6_000}
NUM_PROMPTS, BEST_OF = 200, 16
COMMON = MARK + """  What all stages have in common.
model: {{num_layers: 2, hidden_size: 64, num_heads: 4, num_kv_heads: 4, ffn_hidden_size: 160, max_seq_len: 64}}
parallel: {{tensor: {tensor}, pipeline: {pipeline}}}
precision: {{compute: fp32}}
data: {{tokenizer: bytes, seq_len: 56}}
batch: {{micro: {micro}, global: 16}}
checkpoint: {{every: 0}}
reliability: {{watchdog: {{min_seconds: 900}}}}               # a step takes milliseconds, or minutes where others work
log: {{every: 10}}
"""
LEARNING = """
data: {{template: plain, seq_len: 16, train: [{{path: {directory}/questions.jsonl}}]}}
batch: {{micro: 32, global: 128}}
steps: 40
optim: {{lr: 5e-4, decay: constant, weight_decay: 0.0}}
log: {{every: 1}}
"""
STAGES = {
    "base": """
data: {{document_mask: true, train: [{{path: {directory}/text}}]}}
steps: 1200
optim: {{lr: 4e-3, warmup_steps: 20}}
""",
    "sft": """
data: {{template: plain, train: [{{path: {directory}/chats.jsonl}}], valid: [{{path: {directory}/held-chats.jsonl}}]}}
steps: 800
optim: {{lr: 3e-3, warmup_steps: 10, weight_decay: 0.0}}
checkpoint: {{load: {directory}/base}}
eval: {{every: 200, batches: 8}}
""",
    "lora": """
data: {{template: plain, train: [{{path: {directory}/chats.jsonl}}], valid: [{{path: {directory}/held-chats.jsonl}}]}}
adapter: {{rank: 8}}
steps: 800
optim: {{lr: 1e-2, warmup_steps: 10, weight_decay: 0.0}}
checkpoint: {{load: {directory}/base}}
eval: {{every: 200, batches: 8}}
""",
    "reward": """
model: {{head: score}}
data: {{template: plain, seq_len: 16, train: [{{path: {directory}/pairs.jsonl}}],
       valid: [{{path: {directory}/held-pairs.jsonl}}]}}
steps: 200
optim: {{lr: 1e-3, warmup_steps: 10, weight_decay: 0.0}}
checkpoint: {{load: {directory}/sft}}
eval: {{every: 50, batches: 31}}
""",
    "dpo": """
data: {{template: plain, seq_len: 16, train: [{{path: {directory}/pairs.jsonl}}],
       valid: [{{path: {directory}/held-pairs.jsonl}}]}}
dpo: {{sft_weight: 1.0}}
steps: 250
optim: {{lr: 3e-4, warmup_steps: 10, weight_decay: 0.0}}
checkpoint: {{load: {directory}/sft}}
eval: {{every: 50, batches: 31}}
""",
    "ppo": LEARNING + """
rollout: {{prompts: 128, max_new_tokens: 8, batch: 128}}
ppo: {{epochs: 2, minibatch: 32, kl_coef: 0.3}}
roles:
  actor: {{load: {directory}/sft}}
  critic: {{load: {directory}/reward, optim: {{lr: 1e-3}}}}
  reward: [{{load: {directory}/reward}}, {{function: exact_match, weight: 0.0}}]       # the second only to be seen
""",
    "grpo": LEARNING + """
rollout: {{prompts: 16, max_new_tokens: 8, batch: 128}}
grpo: {{epochs: 2, minibatch: 32, group: 8}}
roles: {{actor: {{load: {directory}/sft}}, reward: {{function: exact_match}}}}
""",
}
RIGHT = {"ppo": "critic/score/exact_match", "grpo": "critic/score/mean"}           # the share of a step's texts
OBJECTIVES = {"base": "pretrain", "lora": "sft"}             # of stages that are named otherwise
OURS = {"common.yaml", *STAGES, *(f"{stage}.yaml" for stage in STAGES), "prompts.txt", "ranked.jsonl",
        *(f"answers-{stage}.jsonl" for stage in STAGES), *(f"{part}.jsonl" for part in RECORDS),
        *(f"text{suffix}" for suffix in (".bin", ".idx", ".json", ".parts")), "comparison", "comparison.html",
        "best-of-n.svg", "learning.svg"}


def run(directory: Path, processes: int) -> int:
    """Run all stages; stops at the first that fails."""
    started = time.monotonic()
    make_room(directory / "common.yaml", OURS)
    _write(directory, processes)
    octant("prepare", f"{directory}/text.jsonl", "--tokenizer", "bytes", "--output", f"{directory}/text")
    for stage in STAGES:
        octant("train", f"{directory}/{stage}.yaml")
    right = {stage: _share_right(directory, stage) for stage in ("sft", "lora", "dpo", "ppo", "grpo")}
    best = _best_of(directory)
    _draw_learning(directory)
    octant("report", *(f"{directory}/{stage}" for stage in STAGES), "--output", str(directory))
    _say(directory, right, best)
    print(f"\ndemo: everything in {time.monotonic() - started:.0f} s; {directory}/comparison.html has the curves, "
          f"{directory}/best-of-n.svg and learning.svg what is right; `octant report {directory}/ppo` shows its texts")
    print(hint("data", "preview", f"{directory}/sft.yaml", "--samples", "0:2", why="what sft saw, in colour"))
    return 0


def _write(directory: Path, processes: int) -> None:
    """Data and configurations."""
    asked = digits.prompts()
    make = {"text": digits.text, "chats": digits.demonstrations, "held-chats": digits.demonstrations,
            "pairs": digits.comparisons, "held-pairs": digits.comparisons, "questions": digits.questions}
    for seed, (part, number) in enumerate(RECORDS.items()):
        digits.write(directory / f"{part}.jsonl", make[part](islice(asked, number), seed))
    (directory / "prompts.txt").write_text("\n".join(islice(asked, NUM_PROMPTS)) + "\n", encoding="utf-8")
    print(f"task: six digits in ascending order; every second demonstration has a mistake, so that no loss on them is "
          f"below {digits.DEMONSTRATED:.3f}")
    layout = LAYOUTS[processes]
    (directory / "common.yaml").write_text(COMMON.format(micro=16 // layout["pipeline"], **layout), encoding="utf-8")
    for stage, text in STAGES.items():
        first = f"base: common.yaml\nrun: {{dir: {directory}/{stage}, objective: {OBJECTIVES.get(stage, stage)}}}"
        (directory / f"{stage}.yaml").write_text(first + text.format(directory=directory), encoding="utf-8")


def _generated(directory: Path, stage: str, into: str, *options: str) -> list[dict[str, Any]]:
    octant("generate", f"{directory}/{stage}", "--chat", "--prompt-file", f"{directory}/prompts.txt", *options,
           "--max-new-tokens", "8", "--batch-size", "200", "--json", into=directory / into)
    return [json.loads(line) for line in (directory / into).read_text(encoding="utf-8").splitlines()]


def _share_right(directory: Path, stage: str) -> float:
    answers = _generated(directory, stage, f"answers-{stage}.jsonl")
    return sum(digits.is_right(answer["prompt"], answer["text"]) for answer in answers) / len(answers)


def _best_of(directory: Path) -> dict[int, float]:
    """The share of prompts of which the best of N answers is right, by N: 1, 2, 4 … of the same answers."""
    ranked = _generated(directory, "sft", "ranked.jsonl", "--best-of", str(BEST_OF), "--reward-model",
                        f"{directory}/reward", "--keep-all")
    shares = {2 ** power: sum(expected_best([digits.is_right(record["prompt"], text) for text in record["responses"]],
                                            2 ** power) for record in ranked) / len(ranked)
              for power in range(BEST_OF.bit_length())}
    chart = Chart("Right answers: the best of N, %", [
        Series("by the reward model", [(number, 100 * share) for number, share in shares.items()]),
        Series("1 − 2^−N", [(number, 100 - 100 * 0.5 ** number) for number in shares], 1, "dashed")], across="N")
    write_picture(directory / "best-of-n.svg", standalone(line_chart(chart)))
    return shares


def expected_best(right: list[bool], number: int) -> float:
    """The chance that the best of `number` answers, drawn from ranked ones without putting back, is right.

    The one at place k is the best of those drawn in C(K − 1 − k, number − 1) of C(K, number) ways.
    """
    ways = (comb(len(right) - 1 - place, number - 1) for place in range(len(right)))
    return sum(way for way, is_right in zip(ways, right, strict=True) if is_right) / comb(len(right), number)


def _draw_learning(directory: Path) -> None:
    """How many of the texts that a policy learns from are right, step by step."""
    series = [Series(stage, [(step, None if share is None else 100 * share) for step, share in
                             read_run(directory / stage).points(key)], color)
              for color, (stage, key) in enumerate(RIGHT.items())]
    write_picture(directory / "learning.svg", standalone(line_chart(Chart("Right answers of a step, %", series))))


def _say(directory: Path, right: dict[str, float], best: dict[int, float]) -> None:
    """What has been seen, beside what could be known before."""
    runs = {stage: read_run(directory / stage) for stage in STAGES}
    first, last = ({stage: run.values(key)[place] for stage, run in runs.items() if run.values(key)}
                   for key, place in (("loss", 0), ("valid_loss", -1)))
    accuracy = runs["reward"].values("valid_accuracy")[-1]
    of_steps = {stage: runs[stage].values(key) for stage, key in RIGHT.items()}
    width = min(shutil.get_terminal_size().columns, 110)
    lines = (
        f"sft     loss {first['sft']:.3f} → {last['sft']:.3f} on held-out answers; their entropy is "
        f"{digits.DEMONSTRATED:.3f}; {right['sft']:.0%} right, as those it learned from (50 %)",
        f"lora    loss {first['lora']:.3f} → {last['lora']:.3f}, {last['lora'] / last['sft'] - 1:+.1%} beside sft; "
        f"{right['lora']:.0%} right",
        f"reward  {accuracy:.1%} of held-out pairs in the right order",
        f"dpo     loss {first['dpo']:.3f} → {last['dpo']:.3f} on held-out pairs, log 2 of the first from comparing; "
        f"{right['dpo']:.0%} right",
        *(f"{stage:7} {seen[0]:.0%} → {seen[-1]:.0%} of a step's answers right; of those to held-out prompts "
          f"{right[stage]:.0%}" for stage, seen in of_steps.items()),
        "best of " + ", ".join(f"{number}: {share:.0%}" for number, share in best.items()) + "; 1 − 2^−N: "
        + ", ".join(f"{1 - 0.5 ** number:.0%}" for number in best))
    print("\n" + "─" * width + "\n" + "\n".join(lines))
