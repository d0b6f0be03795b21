"""The held-out loss of a run: the same samples every time, each once."""

from __future__ import annotations

import torch
from torch import Tensor

from engine.data.training_data import TrainingData
from engine.optim.gradients import sum_over_world
from engine.parallel.parallelize import ParallelModel
from engine.train.batches import Loader, up_to


def evaluate(model: ParallelModel, data: TrainingData, stop: int) -> dict[str, float]:
    """The objective's numbers over the first `stop` samples, a global batch at a time; the last may be smaller."""
    config, mesh, objective = model.config, model.mesh, model.objective
    totals: Tensor = torch.zeros(len(objective.sums), dtype=torch.float64, device=mesh.device)
    divisor = torch.zeros((), dtype=torch.float64, device=mesh.device)
    for first in range(0, stop, config.batch.global_):
        samples = data.sample if first + config.batch.global_ <= stop else up_to(data.sample, stop)
        batches = Loader(samples, config, mesh, objective, uses=len(model.chunks)).step(first)
        totals += sum_over_world(model.evaluate(batches.microbatches), [], mesh, num_sums=len(totals),
                                 reproducible=config.parallel.reproducible).sums
        divisor += batches.divisor
    return objective.numbers(totals.tolist(), float(divisor))
