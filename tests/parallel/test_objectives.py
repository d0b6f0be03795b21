"""Objectives that are none of the engine's: what the seam promises them holds in every layout.

Between them the two use all of it.  `Preference` compares the texts of a pair (a non-linear function of a sum over the
sequence), adds a term per token, needs numbers per row and per token, and is divided by a number that follows from
shapes.  `Ranking` trains a score, reads it at one token of each row, and counts what it is divided by.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import Config
from engine.data.training_data import Sample
from engine.distributed.collectives import all_gather
from engine.distributed.topology import Topology
from engine.model.context import Batch
from engine.model.fields import Field
from engine.model.objective import Head, Objective
from engine.model.parameters import initial_values, take_local
from engine.model.transformer import Transformer
from engine.optim.gradients import sum_over_world
from engine.parallel.context.zigzag import positions_of
from engine.parallel.parallelize import parallelize
from engine.train.batches import Loader
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import TINY, check, microbatches, reference, run_layout, tiny_config
from tests.kit.reference import Task, global_batch

REFERENCE = Field("reference_B", sequence_dim=None, batch_dim=0)
BONUS = Field("bonus_SB")
MARGIN = Field("margin_B", sequence_dim=None, batch_dim=0)
IS_LAST = Field("is_last_SB")
TEMPERATURE, BETA, BONUS_COEF = 0.8, 0.3, 0.05
FEW = TINY["model"]["vocab_size"] * 2 // 5                                   # type: ignore[index]


class Preference(Objective):
    sums = ("loss", "accuracy", "entropy")
    fields = (REFERENCE, BONUS)
    rows_per_sample = 2
    num_ids: int | None = None

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        assert batch.labels_SB is not None and batch.loss_mask_SB is not None
        log_probs, entropy = head.token_log_probs_and_entropy(x_SBH, batch.labels_SB, TEMPERATURE, self.num_ids)
        of_rows = head.sum_over_sequence((log_probs * batch.loss_mask_SB).sum(0))
        chosen, rejected = (of_rows - batch.extra[REFERENCE]).unflatten(0, (-1, 2)).unbind(1)
        logits = BETA * (chosen - rejected)
        bonus = (entropy * batch.extra[BONUS]).sum()
        return [head.once(-F.logsigmoid(logits).sum()) - BONUS_COEF * bonus, head.once((logits > 0).float().sum()),
                (entropy * batch.loss_mask_SB).sum()]

    def count(self, batch: Batch) -> int:
        return batch.tokens_SB.shape[1] // 2


class PreferenceOfFew(Preference):
    """The distribution is over the first ids only; with four tensor ranks the last two have none of them."""

    num_ids = FEW


class Ranking(Objective):
    sums = ("loss", "difference")
    head = "score"
    fields = (MARGIN, IS_LAST)
    rows_per_sample = 2

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        scores = head.sum_over_sequence((head.scores(x_SBH) * batch.extra[IS_LAST]).sum(0))
        better, worse = scores.unflatten(0, (-1, 2)).unbind(1)
        losses = -F.logsigmoid(better - worse - batch.extra[MARGIN][::2])
        return [head.once(losses.sum()), head.once((better - worse).sum())]

    def count(self, batch: Batch) -> Tensor:
        return batch.extra[IS_LAST][:, ::2].sum()


def pairs(config: Config, step: int) -> Batch:
    """A global batch of pairs with all that both objectives need; rows end at different places."""
    rows = config.batch.global_ * 2
    batch = global_batch(config.with_changes(batch={"global": rows}), step)
    generator = torch.Generator().manual_seed(step)
    last = torch.randint(2, config.data.seq_len, (rows,), generator=generator)
    place = torch.arange(config.data.seq_len).unsqueeze(1)
    extra = {REFERENCE: -5 * torch.rand(rows, generator=generator), MARGIN: torch.rand(rows, generator=generator),
             BONUS: torch.rand(config.data.seq_len, rows, generator=generator), IS_LAST: place == last}
    return replace(batch, loss_mask_SB=(place > 1) & (place <= last), extra=extra)


def pairs_of_few(config: Config, step: int) -> Batch:
    batch = pairs(config, step)
    assert batch.labels_SB is not None
    return replace(batch, labels_SB=batch.labels_SB % FEW)


def plain_preference(model: Transformer, batch: Batch, num_ids: int | None = None) -> list[Tensor]:
    log_p = (model(batch.tokens_SB, batch)[..., :num_ids] / TEMPERATURE).log_softmax(-1)
    chosen_tokens = log_p.gather(-1, batch.labels_SB.unsqueeze(-1)).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    ratio = (chosen_tokens * batch.loss_mask_SB).sum(0) - batch.extra[REFERENCE]
    logits = BETA * (ratio[0::2] - ratio[1::2])
    return [F.softplus(-logits).sum() - BONUS_COEF * (entropy * batch.extra[BONUS]).sum(), (logits > 0).float().sum(),
            (entropy * batch.loss_mask_SB).sum()]


def plain_ranking(model: Transformer, batch: Batch) -> list[Tensor]:
    scores = model(batch.tokens_SB, batch)
    row = torch.arange(scores.shape[1])
    at_the_end = scores[batch.extra[IS_LAST].int().argmax(0), row]
    difference = at_the_end[0::2] - at_the_end[1::2]
    return [F.softplus(batch.extra[MARGIN][0::2] - difference).sum(), difference.sum()]


def num_pairs(batch: Batch) -> int:
    return batch.tokens_SB.shape[1] // 2


TASKS = {"preference": (Task(Preference(), pairs, plain_preference, num_pairs), {}),
         "ranking": (Task(Ranking(), pairs, plain_ranking, num_pairs), {"head": "score"})}
LAYOUTS = {
    "single": {}, "tensor": {"tensor": 2},
    "tensor, whole sequences": {"tensor": 2, "sequence": False}, "context 4": {"context": 4},
    "context × tensor": {"context": 2, "tensor": 2},
    "context × tensor, whole sequences": {"context": 2, "tensor": 2, "sequence": False},
    "context × data": {"context": 2, "data": 2, "zero": 2, "reproducible": True},
    "zb-v": {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2},
    "zb-h1 × context": {"pipeline": 2, "schedule": "zb-h1", "context": 2},
    "interleaved × tensor": {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2, "tensor": 2},
    "zero 3": {"data": 2, "zero": 3}, "recomputed": {"tensor": 2, "data": 2, "recompute": "full"},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", TASKS)
def test_every_layout_is_one_process(name: str, layout: str) -> None:
    task, model = TASKS[name]
    config = tiny_config(parallel=LAYOUTS[layout], model=model, batch={"micro": 2 if "data" in layout else 1})
    check(run_layout(config, 3, task), reference(config, 3, task))


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"tensor": 4}, {"context": 2, "tensor": 2, "sequence": False}])
def test_a_distribution_may_be_over_some_ids_only(layout: dict[str, Any]) -> None:
    task = Task(PreferenceOfFew(), pairs_of_few, partial(plain_preference, num_ids=FEW), num_pairs)
    config = tiny_config(parallel=layout, batch={"micro": 1})
    check(run_layout(config, 2, task), reference(config, 2, task))


def sample_of(batch: Batch, index: int) -> Sample:
    """A pair as a data source gives it: two rows, and what belongs to each."""
    def row(i: int) -> Sample:
        tokens = torch.cat((batch.tokens_SB[:1, i], batch.labels_SB[:, i]))
        extra = {field: x.select(field.batch_dim, i).numpy() for field, x in batch.extra.items()}
        return Sample(tokens.numpy(), batch.loss_mask_SB[:, i].numpy(), None, 0, 0, extra)

    return replace(row(2 * index), rest=(row(2 * index + 1),))


def counted_and_evaluated(config: Config, name: str) -> tuple[float, list[float]]:
    """Runs on one rank: what a step that was read from samples is divided by, and its sums without training."""
    task, _ = TASKS[name]
    mesh = mesh_for(Topology.of(config))
    model = parallelize(config, mesh, objective=task.objective)
    model.initialise(config.run.seed)
    step = Loader(partial(sample_of, task.batch(config, 1)), config, mesh, task.objective).step(0)
    own = model.evaluate(step.microbatches)
    return float(step.divisor), sum_over_world(own, [], mesh, num_sums=len(task.objective.sums)).sums.tolist()


@pytest.mark.parametrize("name", TASKS)
def test_samples_bring_rows_and_fields(name: str) -> None:
    task, model = TASKS[name]
    config = tiny_config(parallel={"data": 2, "context": 2}, model=model)
    want = reference(config, 1, task).totals[0]
    for divisor, totals in run_distributed(counted_and_evaluated, 4, config, name):
        assert divisor == config.batch.global_ and totals == pytest.approx(want, rel=1e-5)


def numbers_per_token(x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    assert batch.labels_SB is not None
    return head.token_log_probs_and_entropy(x_SBH, batch.labels_SB)


def measured_per_token(config: Config) -> Tensor | None:
    """Runs on one rank: log-probability and entropy of every token, [microbatches, 2, S, B], put together again."""
    mesh = mesh_for(Topology.of(config))
    model = parallelize(config, mesh, training=False)
    for chunk in model.chunks.values():
        for parameter in chunk.parameters():
            values = initial_values(parameter.spec, config.run.seed)
            parameter.data.copy_(take_local(parameter.spec, values))
    measured = model.evaluate(microbatches(config, global_batch(config, 1), mesh), numbers_per_token)
    if measured is None:
        return None
    parts = all_gather(measured.permute(2, 0, 1, 3).contiguous(), mesh.context)
    order = torch.cat([positions_of(i, mesh.context.size, config.data.seq_len) for i in range(mesh.context.size)])
    return parts[order.argsort()]


def test_what_is_measured_may_be_a_number_per_token() -> None:
    [want] = run_distributed(measured_per_token, 1, tiny_config())
    assert want.shape == (16, 8, 2, 1)
    for parallel in ({"tensor": 2}, {"context": 2, "pipeline": 2}):
        results = run_distributed(measured_per_token, 2 * len(parallel), tiny_config(parallel=parallel))
        found = [each for each in results if each is not None]
        assert len(found) == 2
        for got in found:
            assert torch.allclose(got, want, atol=1e-5)
