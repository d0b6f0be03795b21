"""Which samples a rank trains on, and their tensors.

A step consumes `global` samples, numbers [consumed, consumed + global).  Microbatch m of data rank d takes

    consumed + (m · data + d) · micro + r        r = 0 … micro - 1

so the samples of a step are the same set in every layout, and one integer says where the run stands.  Every rank of a
model replica reads its own copy: the corpora are memory-mapped, and reading costs less than sending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from engine.data.training_data import Sample, TrainingData
from engine.distributed.collectives import all_reduce
from engine.distributed.mesh import Mesh
from engine.model.context import Batch, document_mask, document_positions
from engine.model.objective import Objective
from engine.parallel.context.zigzag import context_part


@dataclass(frozen=True)
class StepBatches:
    """This rank's microbatches of one step, and the objective's count of all of them on all ranks."""

    microbatches: list[Batch]
    divisor: Tensor | int


def sample_indices(first: int, microbatch: int, config: Config, data_index: int) -> range:
    """Global sample numbers of one microbatch of one data rank, in a step that starts at sample `first`."""
    micro = config.batch.micro
    start = first + (microbatch * config.parallel.data_size + data_index) * micro
    return range(start, start + micro)


def load_step(data: TrainingData, first: int, config: Config, mesh: Mesh, objective: Objective) -> StepBatches:
    """The microbatches of the step that starts at consumed sample `first`."""
    whole = [collate([data.sample(i) for i in sample_indices(first, m, config, mesh.data.index)], mesh.device)
             for m in range(config.num_microbatches)]
    return StepBatches([context_part(batch, mesh.context) for batch in whole], count_all(objective, whole, mesh))


def count_all(objective: Objective, whole: Sequence[Batch], mesh: Mesh) -> Tensor | int:
    """The objective's count of the step; arithmetic where it is, else a sum over the data ranks (fp32)."""
    counts = [objective.count(batch) for batch in whole]
    if all(isinstance(count, int) for count in counts):
        return sum(counts) * mesh.data.size
    total = torch.stack([torch.as_tensor(count, device=mesh.device) for count in counts]).sum().float()
    all_reduce(total, mesh.data)
    return total


def collate(rows: Sequence[Sample], device: torch.device) -> Batch:
    """Samples → one microbatch, sequence first."""
    tokens = _tensor(np.stack([row.tokens for row in rows], axis=1), device)
    length = tokens.shape[0] - 1
    positions, mask, loss_mask = torch.arange(length, device=device).unsqueeze(1), None, None
    if rows[0].document_ids is not None:
        ids = _tensor(np.stack([row.document_ids for row in rows if row.document_ids is not None]), device)
        positions, mask = document_positions(ids), document_mask(ids)
    if any(row.loss_mask is not None for row in rows):
        everywhere = np.ones(length, dtype=bool)
        loss_mask = _tensor(np.stack([everywhere if row.loss_mask is None else row.loss_mask for row in rows], axis=1),
                            device)
    extra = {field: _tensor(np.stack([row.extra[field] for row in rows], axis=field.batch_dim), device)
             for field in rows[0].extra}
    return Batch(tokens[:-1], positions, tokens[1:], loss_mask, mask, extra=extra)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
