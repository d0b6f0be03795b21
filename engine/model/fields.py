"""What a tensor of a microbatch is called, and which of its dimensions is what.

Whoever collates samples, cuts a microbatch over context ranks or takes some of its rows does so in one loop over the
fields that are there, and asks each field along which dimension.  A new kind of tensor is one more `Field`: an
objective names those that its samples bring (`Objective.fields`), and they travel in `Batch.extra`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Field:
    """One tensor of a batch.

    Attributes:
        name: unique among the fields of a batch.
        sequence_dim: dimension of the tokens, cut over context ranks; None: what it says holds for whole rows.
        batch_dim: dimension of the rows.
    """

    name: str
    sequence_dim: int | None = 0
    batch_dim: int = 1


TOKENS = Field("tokens_SB")
POSITIONS = Field("positions_SB")
LABELS = Field("labels_SB")
LOSS_MASK = Field("loss_mask_SB")
OWN = (TOKENS, POSITIONS, LABELS, LOSS_MASK)

NOISE = Field("noise_SB")                                    # int64: the tokens' numbers in random masks
PTX = Field("is_ptx_B", sequence_dim=None, batch_dim=0)      # in fine-tuning: which rows are pretraining data

# Of comparisons: a sample is several rows, one for each answer to a prompt, best first.  The loss mask of a row is on
# its answer; where it is off in all rows of a sample, that only fills up a step and does not count.
END = Field("end_SB")                                        # bool: the last token of the text; none: no such answer
MARGIN = Field("margin_B", sequence_dim=None, batch_dim=0)   # fp32: by how much the first is better, on every row
REFERENCE = Field("reference_B", sequence_dim=None, batch_dim=0)         # fp32: log π(answer) under the reference
