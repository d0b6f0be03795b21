"""A number, or several, for every sample of a source, by the run's own layout and kernels, on every rank.

Data-parallel ranks measure a share each and write it into a vector of zeros; the sum over all ranks is everybody's.
Tensor and context ranks agree on what they measured, so that one of them counts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from engine.distributed.collectives import all_reduce
from engine.model.objective import Measure, Objective
from engine.parallel.parallelize import ParallelModel
from engine.train.batches import Loader, Samples, sample_indices, up_to


def each_sample(model: ParallelModel, samples: Samples, count: int, measure: Measure, objective: Objective,
                rows: int = 1) -> npt.NDArray[np.float32]:
    """What `measure` says of the rows of the first `count` samples, [count, rows]; all ranks call this alike."""
    config, mesh, batch = model.config, model.mesh, model.config.batch.global_
    loader = Loader(up_to(samples, count), config, mesh, objective, uses=len(model.chunks))
    everyone = torch.zeros(count, rows, dtype=torch.float32)
    counts = mesh.tensor.index == 0 and mesh.context.index == 0
    for first in range(0, count, batch):
        measured = model.evaluate(loader.step(first).microbatches, measure)
        if measured is not None and counts:
            for m, row in enumerate(measured.cpu().view(-1, config.batch.micro, rows)):
                for index, numbers in zip(sample_indices(first, m, config, mesh.data.index), row, strict=True):
                    if index < count:
                        everyone[index] = numbers
    all_reduce(everyone, mesh.world)
    return everyone.numpy()
