"""The loss over samples that are not trained on: the same samples every time, each once.

Sums stay on the device and are read when all of it is done; in between the host runs ahead, as in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from engine.data.training_data import TrainingData
from engine.optim.gradients import sum_over_world
from engine.parallel.parallelize import ParallelModel
from engine.train.batches import Loader, Samples, up_to
from engine.train.reference import informed, passes

Heard = Callable[[int, Tensor], None]                        # samples done, and the sums so far


def evaluate(model: ParallelModel, data: TrainingData, stop: int) -> dict[str, float]:
    """The objective's numbers over the first `stop` samples; of several sources `loss/NAME`, each one's, as well."""
    if data.num_sources == 1:
        return _numbers(model, sums_over(model, data.sample, stop))
    sums = {name: sums_over(model, samples, count) for name, samples, count in data.by_source(stop)}
    return _numbers(model, torch.stack([*sums.values()]).sum(0)) | {
        f"loss/{name}": _numbers(model, own)["loss"] for name, own in sums.items() if own[-1] > 0}


def _numbers(model: ParallelModel, sums: Tensor) -> dict[str, float]:
    *totals, divisor = sums.tolist()
    return model.objective.numbers(totals, divisor)


def sums_over(model: ParallelModel, samples: Samples, stop: int, masked: bool = False,
              heard: Heard | None = None) -> Tensor:
    """The objective's sums over the first `stop` samples and its count of them, fp64 [sums + 1], on every rank.

    Args:
        samples: taken a global batch at a time.
        masked: some sample may say which of its labels count.
        heard: told after every batch.
    """
    config, mesh, objective = model.config, model.mesh, model.objective
    batch, num_sums = config.batch.global_, len(objective.sums)
    whole = stop % batch == 0 and not masked
    loader = Loader(samples if whole else up_to(samples, stop), config, mesh, objective,
                    uses=len(model.chunks) * passes(model))
    totals = torch.zeros(num_sums + 1, dtype=torch.float64, device=mesh.device)
    for first in range(0, stop, batch):
        batches = loader.step(first)
        own = model.evaluate(informed(model, batches.microbatches))
        totals[:-1] += sum_over_world(own, [], mesh, num_sums=num_sums,
                                      reproducible=config.parallel.reproducible).sums
        totals[-1] += batches.divisor
        if heard is not None:
            heard(min(stop, first + batch), totals)
    return totals
