"""Supervised fine-tuning: the assistant's answers are learned as text is in pretraining, and nothing else is.

    loss = Σ −log p(label) over the labels of answers / their number in the global batch

One sum over the whole step, divided once, so that a short conversation's tokens weigh as much as a long one's in every
layout.  With pretraining data mixed in (PTX; Ouyang et al. 2022, section 3.5) its labels count `ptx_weight` each:

    loss = (Σ answers + w · Σ pretraining) / (number of answers' labels + w · number of pretraining labels)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import Config
from engine.model.context import Batch
from engine.model.fields import PTX
from engine.model.objective import Head, Objective


class Supervised(Objective):
    """The mean loss of answers' labels."""

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        assert batch.labels_SB is not None and batch.loss_mask_SB is not None
        return [head.weighted_losses(x_SBH, batch.labels_SB, batch.loss_mask_SB)[0]]

    def count(self, batch: Batch) -> Tensor | int:
        assert batch.loss_mask_SB is not None
        return batch.loss_mask_SB.sum()

    def numbers(self, totals: Sequence[float], divisor: float) -> dict[str, float]:
        return {"loss": totals[0] / divisor, "loss_tokens": divisor}


class SupervisedWithPretraining(Objective):
    """Answers and pretraining data together; both means are logged beside the loss."""

    sums = ("loss", "loss/chat", "tokens/chat", "loss/ptx", "tokens/ptx")
    fields = (PTX,)

    def __init__(self, ptx_weight: float) -> None:
        self.ptx_weight = ptx_weight

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        assert batch.labels_SB is not None
        mask, ptx = _mask(batch).float(), batch.extra[PTX].float()
        chat = mask * (1 - ptx)
        loss, losses = head.weighted_losses(x_SBH, batch.labels_SB, chat + self.ptx_weight * mask * ptx)
        return [loss, (losses * chat).sum(), chat.sum(), (losses * mask * ptx).sum(), (mask * ptx).sum()]

    def count(self, batch: Batch) -> Tensor | int:
        weights = torch.where(batch.extra[PTX], self.ptx_weight, 1.0)
        return (_mask(batch) * weights).sum(dtype=torch.float64)

    def numbers(self, totals: Sequence[float], divisor: float) -> dict[str, float]:
        loss, chat, chat_tokens, ptx, ptx_tokens = totals
        return {"loss": loss / divisor, "loss_tokens": chat_tokens + ptx_tokens,
                "loss/chat": chat / max(chat_tokens, 1.0), "loss/ptx": ptx / max(ptx_tokens, 1.0)}


def _mask(batch: Batch) -> Tensor:
    """Where labels count; in a microbatch of pretraining data alone that is everywhere."""
    return torch.ones_like(batch.tokens_SB, dtype=torch.bool) if batch.loss_mask_SB is None else batch.loss_mask_SB


def supervised(config: Config) -> Objective:
    """What `run.objective: sft` trains."""
    weight = config.sft.ptx_weight
    return SupervisedWithPretraining(weight) if weight else Supervised()
