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
from engine.parallel.context.zigzag import context_part


@dataclass(frozen=True)
class StepBatches:
    """This rank's microbatches of one step, and how many labels count in all of them on all ranks."""

    microbatches: list[Batch]
    num_tokens: Tensor | int


def sample_indices(first: int, microbatch: int, config: Config, data_index: int) -> range:
    """Global sample numbers of one microbatch of one data rank, in a step that starts at sample `first`."""
    micro = config.batch.micro
    start = first + (microbatch * config.parallel.data_size + data_index) * micro
    return range(start, start + micro)


def load_step(data: TrainingData, first: int, config: Config, mesh: Mesh) -> StepBatches:
    """The microbatches of the step that starts at consumed sample `first`."""
    samples = [[data.sample(i) for i in sample_indices(first, m, config, mesh.data.index)]
               for m in range(config.num_microbatches)]
    microbatches = [context_part(collate(rows, mesh.device), mesh.context) for rows in samples]
    return StepBatches(microbatches, count_tokens(samples, config, mesh))


def count_tokens(samples: Sequence[Sequence[Sample]], config: Config, mesh: Mesh) -> Tensor | int:
    """Labels that count in the step; arithmetic unless a loss mask makes it a sum over the data ranks."""
    rows = [row for microbatch in samples for row in microbatch]
    if all(row.loss_mask is None for row in rows):
        return config.batch.global_ * config.data.seq_len
    mine = sum(config.data.seq_len if row.loss_mask is None else int(row.loss_mask.sum()) for row in rows)
    total = torch.tensor(float(mine), device=mesh.device)
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
    return Batch(tokens[:-1], positions, tokens[1:], loss_mask, mask)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
