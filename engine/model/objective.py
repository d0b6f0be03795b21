"""What is trained: from the hidden states behind the last layer to sums.  Knows no ranks.

    hidden states [S, B, H] ── head ──▶ numbers per token ── objective ──▶ sums          loss = first sum / divisor

The engine differentiates the first sum, divided by the objective's own count of what it is a mean of (tokens, pairs)
over the whole global batch; so no microbatch, data-parallel rank or context rank can change it.  All sums are added up
over microbatches and ranks and come out as numbers to log.

The head is handed in, however it is cut over ranks; full logits exist nowhere.  Every call of it returns what belongs
to this context rank's tokens, the same on all tensor ranks.  Each sum that an objective returns is this context rank's
*share*: shares add up to the sum.  A sum over tokens is one as it stands.  What is a function of a whole text (a ratio
of two texts' probabilities, the score at the end) takes two steps more:

    total = head.sum_over_sequence(part)         the same on every context rank, differentiable
    loss = head.once(f(total).sum())             everyone has computed it, one of them counts it
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from engine.config import Config
from engine.model.context import Batch
from engine.model.fields import Field

HeadKind = Literal["language_model", "score"]


class Head(Protocol):
    """The last chunk's end.  One of the first four is called, once per microbatch: it uses the head's parameters.

    Attributes:
        scale: in a step of training what the sum that is differentiated is multiplied by; else None.
    """

    scale: Tensor | None

    def weighted_losses(self, x_SBH: Tensor, labels_SB: Tensor, weights_SB: Tensor | None,
                        z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
        """Σ −weight·log p(label), weights of 1 for None, and −log p(label) itself, fp32 [S, B], not differentiable.

        With `z_loss` the sum is of weight·(−log p(label) + z_loss·log²Z), where Z is the softmax's denominator.

        The cheapest way to train: the sum must be the objective's first one as it stands, because its gradients are
        computed together with it.
        """
        ...

    def token_losses(self, x_SBH: Tensor, labels_SB: Tensor) -> Tensor:
        """−log p(label), fp32 [S, B]."""
        ...

    def token_log_probs_and_entropy(self, x_SBH: Tensor, labels_SB: Tensor, temperature: float = 1.0,
                                    num_ids: int | None = None) -> tuple[Tensor, Tensor]:
        """log p(label) and the entropy of p, in nats, fp32 [S, B] each.

        Args:
            temperature: logits are divided by it.
            num_ids: p is over the first so many ids, those that can be chosen; None: over all that the model has.
        """
        ...

    def scores(self, x_SBH: Tensor) -> Tensor:
        """A number per token, fp32 [S, B], of a model with `head: score`."""
        ...

    def sum_over_sequence(self, x: Tensor) -> Tensor:
        """Sums what context ranks have computed from their parts of the sequence; every one of them must call it."""
        ...

    def once(self, x: Tensor) -> Tensor:
        """What all context ranks have computed alike, as a share: it counts on one of them."""
        ...


# Hidden states behind the last layer, head, microbatch → tensors of one shape (scalars, for an objective).
Measure = Callable[[Tensor, Head, Batch], Sequence[Tensor]]


class Objective(ABC):
    """One way to train; itself a `Measure` that returns its sums.

    Attributes:
        sums: names of what it returns; the first is the loss that is differentiated.
        head: which head the model must have.
        fields: what its samples add to a batch (`Batch.extra`).
        rows_per_sample: rows of a batch that one sample takes, one behind the other; 2 for pairs.
    """

    sums: ClassVar[tuple[str, ...]] = ("loss",)
    head: ClassVar[HeadKind] = "language_model"
    fields: ClassVar[tuple[Field, ...]] = ()
    rows_per_sample: int = 1

    @abstractmethod
    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        """This context rank's share of every sum, fp32 scalars in the order of `sums`."""

    @abstractmethod
    def count(self, batch: Batch) -> Tensor | int:
        """What a microbatch, not cut over context ranks, adds to the divisor.

        An `int` says that it follows from shapes alone and is the same for every microbatch of every rank; else it is a
        scalar tensor, and summed up over them.  Where some are the one and some the other, all are summed up.
        """

    def numbers(self, totals: Sequence[float], divisor: float) -> dict[str, float]:
        """What is logged, from sums over everybody and the divisor: by default the mean of each."""
        return {name: total / divisor for name, total in zip(self.sums, totals, strict=True)}


class NextToken(Objective):
    """Pretraining: the mean loss of the labels that count."""

    z_loss = 0.0

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        return [self._summed(x_SBH, head, batch)[0]]

    def _summed(self, x_SBH: Tensor, head: Head, batch: Batch) -> tuple[Tensor, Tensor]:
        assert batch.labels_SB is not None
        return head.weighted_losses(x_SBH, batch.labels_SB, batch.loss_mask_SB, self.z_loss)

    def count(self, batch: Batch) -> Tensor | int:
        return batch.tokens_SB.numel() if batch.loss_mask_SB is None else batch.loss_mask_SB.sum()


class NextTokenWithZLoss(NextToken):
    """The same, and z_loss·log²Z of each label, which keeps the logits from drifting (PaLM, section 5).

    `loss` is the label's alone, to be compared with other runs' losses.
    """

    sums = ("loss", "loss/labels")

    def __init__(self, z_loss: float) -> None:
        self.z_loss = z_loss

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        total, losses = self._summed(x_SBH, head, batch)
        return [total, (losses if batch.loss_mask_SB is None else losses * batch.loss_mask_SB).sum()]

    def numbers(self, totals: Sequence[float], divisor: float) -> dict[str, float]:
        total, labels = totals
        return {"loss": labels / divisor, "z_loss": (total - labels) / divisor}


NEXT_TOKEN = NextToken()


def next_token(config: Config) -> Objective:
    """What `run.objective: pretrain` trains."""
    return NextTokenWithZLoss(config.optim.z_loss) if config.optim.z_loss else NEXT_TOKEN
