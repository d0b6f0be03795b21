"""Objectives of comparisons: every layout trains what the formulas say, in one process and with full logits.

The plain computations below share nothing with the engine's: log-softmax of whole logits, one pair at a time in
Python's own loops, float64 from there on.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.align.preference import DPO, ORPO
from engine.align.reward import RewardModel
from engine.config import Config, DPOConfig
from engine.model.context import Batch
from engine.model.fields import END, MARGIN, REFERENCE
from engine.model.transformer import Transformer
from tests.kit.layouts import check, reference, run_layout, tiny_config
from tests.kit.reference import Task, global_batch


def comparisons(rows: int, config: Config, step: int) -> Batch:
    """A global batch of samples of so many texts; prompts and answers of random lengths, the third sample fills up.

    With more than two texts some prompts have fewer: their last rows are padding.
    """
    count = config.batch.global_ * rows
    batch = global_batch(config.with_changes(batch={"global": count}), step)
    generator = torch.Generator().manual_seed(step)
    prompt = torch.randint(1, 5, (config.batch.global_,), generator=generator).repeat_interleave(rows)
    end = prompt + torch.randint(1, config.data.seq_len - 6, (count,), generator=generator)
    place, row = torch.arange(config.data.seq_len).unsqueeze(1), torch.arange(count)
    there = torch.ones(count, dtype=torch.bool)
    if rows > 2:
        there = torch.randint(0, 2, (count,), generator=generator).bool() | (row % rows < 2)
        there = there.view(-1, rows).cumprod(1).bool().flatten()              # best first, the missing ones last
    margin = torch.rand(config.batch.global_, generator=generator).repeat_interleave(rows)
    mask = (place >= prompt) & (place < end) & there & (row // rows != 2)
    about_even = -math.log(config.model.vocab_size) * mask.sum(0)               # what a new model says
    extra = {END: (place == end) & there, MARGIN: margin if rows == 2 else torch.zeros(count),
             REFERENCE: about_even + torch.randn(count, generator=generator)}
    return replace(batch, loss_mask_SB=mask, extra=extra)


def num_samples(rows: int, batch: Batch) -> int:
    return int(batch.loss_mask_SB.any(0).view(-1, rows).any(1).sum())


def samples(rows: int, batch: Batch) -> list[list[int]]:
    """The rows of every sample that counts, of texts that are there."""
    found = [list(range(first, first + rows)) for first in range(0, batch.tokens_SB.shape[1], rows)]
    return [[row for row in sample if batch.extra[END][:, row].any()] for sample in found
            if batch.loss_mask_SB[:, sample].any()]


def plain_reward(rows: int, center: float, model: Transformer, batch: Batch) -> list[Tensor]:
    scores = model(batch.tokens_SB, batch).double()
    loss, right, difference, count, total, squares = (torch.zeros((), dtype=torch.float64) for _ in range(6))
    classes = torch.zeros(2, 5, dtype=torch.float64)                # pairs, and right ones, by how sure the model is
    for sample in samples(rows, batch):
        own = [scores[batch.extra[END][:, row].nonzero().item(), row] for row in sample]
        count, total, squares = count + len(own), total + sum(own), squares + sum(score ** 2 for score in own)
        pairs = [(own[i], own[j]) for i in range(len(own)) for j in range(i + 1, len(own))]
        for better, worse in pairs:
            surprise = -torch.log(1 / (1 + torch.exp(-(better - worse - batch.extra[MARGIN][sample[0]]))))
            loss = loss + (surprise + center * (better + worse) ** 2) / len(pairs)
            right = right + (better > worse).double() / len(pairs)
            difference = difference + (better - worse) / len(pairs)
            sure = max(1 / (1 + torch.exp(worse - better)), 1 / (1 + torch.exp(better - worse))).item()
            classes[:, min(int((sure - 0.5) * 10), 4)] += torch.tensor([1.0, float(better > worse)]) / len(pairs)
    return [loss, right, difference, count, total, squares, *classes.flatten()]


def log_probs(model: Transformer, batch: Batch) -> Tensor:
    log_p = model(batch.tokens_SB, batch).double().log_softmax(-1)
    return log_p.gather(-1, batch.labels_SB.unsqueeze(-1)).squeeze(-1)


def plain_dpo(config: DPOConfig, model: Transformer, batch: Batch) -> list[Tensor]:
    of_tokens, sums = log_probs(model, batch), [torch.zeros((), dtype=torch.float64) for _ in range(5)]
    for chosen, rejected in samples(2, batch):
        means, rewards, ratios = [], [], []
        for row in (chosen, rejected):
            own = of_tokens[batch.loss_mask_SB[:, row], row]
            ratio = own.sum() - batch.extra[REFERENCE][row].double()
            ratios.append(ratio / len(own) if config.loss == "ipo" else ratio)
            rewards.append(config.beta * ratio.detach())
            means.append(own.mean())
        delta, beta, eps = ratios[0] - ratios[1], config.beta, config.label_smoothing
        p = 1 / (1 + torch.exp(-beta * delta))
        loss = {"sigmoid": -(1 - eps) * torch.log(p) - eps * torch.log(1 - p), "ipo": (delta - 1 / (2 * beta)) ** 2,
                "hinge": torch.clamp(1 - beta * delta, min=0)}[config.loss]
        numbers = (loss - config.sft_weight * means[0], *rewards, (rewards[0] > rewards[1]).double(),
                   rewards[0] - rewards[1])
        sums = [total + number for total, number in zip(sums, numbers, strict=True)]
    return sums


def plain_orpo(weight: float, model: Transformer, batch: Batch) -> list[Tensor]:
    of_tokens, sums = log_probs(model, batch), [torch.zeros((), dtype=torch.float64) for _ in range(4)]
    for sample in samples(2, batch):
        chosen, rejected = (of_tokens[batch.loss_mask_SB[:, row], row].mean() for row in sample)
        odds = [torch.exp(x) / (1 - torch.exp(x)) for x in (chosen, rejected)]
        loss = -torch.log(1 / (1 + torch.exp(-torch.log(odds[0] / odds[1]))))
        numbers = (-chosen + weight * loss, -chosen, loss, (chosen > rejected).double())
        sums = [total + number for total, number in zip(sums, numbers, strict=True)]
    return sums


def dpo_task(**keys: Any) -> Task:
    config = DPOConfig(**keys)
    return Task(DPO(config), partial(comparisons, 2), partial(plain_dpo, config), partial(num_samples, 2))


def reward_task(rows: int, center: float) -> Task:
    return Task(RewardModel(rows, center), partial(comparisons, rows), partial(plain_reward, rows, center),
                partial(num_samples, rows))


SCORE = {"head": "score"}
TASKS: dict[str, tuple[Task, dict[str, Any]]] = {
    "reward": (reward_task(2, 0.0), SCORE), "kwise": (reward_task(4, 0.01), SCORE),
    "dpo": (dpo_task(label_smoothing=0.1, sft_weight=0.2), {}), "ipo": (dpo_task(loss="ipo", beta=0.4), {}),
    "hinge": (dpo_task(loss="hinge", beta=0.5), {}),
    "orpo": (Task(ORPO(0.3), partial(comparisons, 2), partial(plain_orpo, 0.3), partial(num_samples, 2)), {}),
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {}, "tensor": {"tensor": 2}, "tensor, whole sequences": {"tensor": 2, "sequence": False},
    "context": {"context": 2}, "context × tensor": {"context": 2, "tensor": 2}, "gpipe": {"pipeline": 2, "schedule":
    "gpipe"}, "1f1b × tensor": {"pipeline": 2, "tensor": 2}, "interleaved": {"pipeline": 2, "schedule": "interleaved",
    "virtual_stages": 2}, "zb-h1 × context": {"pipeline": 2, "schedule": "zb-h1", "context": 2}, "zb-h2":
    {"pipeline": 2, "schedule": "zb-h2"}, "zb-v": {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2},
    "zero 0": {"data": 2, "zero": 0}, "zero 1": {"data": 2, "zero": 1}, "zero 2, reproducible": {"data": 2, "zero": 2,
    "reproducible": True}, "zero 3 × tensor": {"data": 2, "zero": 3, "tensor": 2, "recompute": "full"},
}
EVERYWHERE, ONCE = ("reward", "dpo", "orpo"), ("kwise", "ipo", "hinge")
CASES = [*((name, layout) for name in EVERYWHERE for layout in LAYOUTS),
         *((name, layout) for name in ONCE for layout in ("single", "context × tensor", "zb-v"))]


def reward_of_a_text(task: Task) -> float:
    """DPO's rewards are differences of two log-probabilities of up to ten tokens."""
    return task.objective.config.beta * 10 * math.log(97) if isinstance(task.objective, DPO) else 0.0


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_five_steps_are_those_of_the_formulas(name: str, layout: str) -> None:
    task, model = TASKS[name]
    config = tiny_config(parallel=LAYOUTS[layout], model=model)
    check(run_layout(config, 5, task), reference(config, 5, task), cancelled=reward_of_a_text(task))


ADAPTED = [("dpo", "1f1b × tensor"), ("reward", "zero 3 × tensor"), ("orpo", "context × tensor")]


@pytest.mark.parametrize(("name", "layout"), ADAPTED)
def test_adapters_learn_them_too(name: str, layout: str) -> None:
    """A score head is trained besides: it is new."""
    task, model = TASKS[name]
    config = tiny_config(parallel=LAYOUTS[layout], model=model, adapter={"rank": 2, "targets": ["q_proj", "up_proj"]})
    results, want = run_layout(config, 3, task), reference(config, 3, task)
    assert ("score.weight" in want.gradients) == (name == "reward")
    check(results, want, cancelled=reward_of_a_text(task))


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_certainty_is_no_trap(name: str) -> None:
    """Texts of which every token is certain have finite losses and gradients."""
    task, _ = TASKS[name]

    class Certain:
        def token_losses(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.relu(x.sum(-1)) * 0.0

        def sum_over_sequence(self, x: Tensor) -> Tensor:
            return x

        once = sum_over_sequence

    batch = comparisons(2, tiny_config(), 1)
    x = torch.randn(*batch.tokens_SB.shape, 4, requires_grad=True)
    sums = task.objective(x, Certain(), batch)                                       # type: ignore[arg-type]
    sums[0].backward()
    assert all(math.isfinite(total.item()) for total in sums) and x.grad is not None and x.grad.isfinite().all()
