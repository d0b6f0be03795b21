"""Pretraining data in the actor's loss, so that it does not forget what it knew (Ouyang et al. 2022, section 3.5).

    loss = mean over the minibatch's tokens of the policy's + ptx_coef · mean over as many windows' labels of −log p

Each update takes as many windows as it has texts, and no window comes twice in an epoch of the corpora: update u of the
run takes windows u·minibatch … (u + 1)·minibatch − 1 of the order that pretraining has.  They are microbatches behind
those of the texts, and bring along what makes a sum over their labels a mean beside that over the texts' tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.config import Config
from engine.data.sample import Sample
from engine.data.tokenizer import load_tokenizer
from engine.data.training_data import TrainingData
from engine.distributed.collectives import all_reduce
from engine.errors import DataError
from engine.rl.cast import Member
from engine.rl.objectives import COUNTS, PTX_WEIGHT, Policy
from engine.rl.rows import dealt
from engine.train.batches import HostBatch, collate


@dataclass(frozen=True)
class Pretraining:
    """The windows, and how much they weigh."""

    data: TrainingData
    coef: float
    minibatch: int

    @staticmethod
    def open(config: Config) -> Pretraining | None:
        """What the run's sources with `kind: pretrain` hold; None where it does not learn from such.

        Raises:
            DataError: a corpus cannot be used.
        """
        coef = config.learning.ptx_coef
        if coef == 0:
            return None
        data = config.data
        tokenizer = None if data.tokenizer is None else load_tokenizer(data.tokenizer).info
        sources = [source for source in data.train if source.kind == "pretrain"]
        opened = TrainingData.open(sources, data.seq_len, config.run.seed, config.model.vocab_size,
                                   document_mask=data.document_mask, tokenizer=tokenizer)
        if data.document_mask:
            raise DataError("data.document_mask keeps documents apart, which texts of one's own do not have: set it to "
                            "false")
        return Pretraining(opened, coef, config.learning.minibatch)

    def batches(self, member: Member, update: int, divisor: float) -> list[HostBatch]:
        """Those of an update of the actor, on this rank.

        Args:
            update: of the run, from 0.
            divisor: what the sums of the texts' tokens are divided by.
        """
        mesh = member.state.mesh
        assert mesh is not None
        first = update * self.minibatch
        rows = dealt(range(first, first + self.minibatch), member.config, mesh.data.index)
        samples = [[self.data.sample(index) for index in each] for each in rows]
        labels = torch.tensor(float(sum(_labels(sample) for each in samples for sample in each)), device=mesh.device)
        all_reduce(labels, mesh.data)
        weight = self.coef * max(divisor, 1.0) / max(float(labels), 1.0)
        pinned = mesh.device.type == "cuda"
        return [collate([_weighed(sample, weight) for sample in each], pinned=pinned) for each in samples]


def _labels(sample: Sample) -> int:
    return len(sample.tokens) - 1 if sample.loss_mask is None else int(sample.loss_mask.sum())


def _weighed(sample: Sample, weight: float) -> Sample:
    """With what a text's row has, as far as it is nothing, and the weight of its labels."""
    length = len(sample.tokens) - 1
    mask = np.ones(length, bool) if sample.loss_mask is None else sample.loss_mask
    extra = {field: np.zeros(length if field.sequence_dim is not None else (), np.float32) for field in Policy.fields}
    extra |= {COUNTS: np.array(0, np.float32), PTX_WEIGHT: np.array(weight, np.float32)}
    return replace(sample, loss_mask=mask, extra=extra)
