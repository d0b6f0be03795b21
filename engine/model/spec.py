"""One `ParamSpec` per parameter: its global name and shape, its rule, and what of it a rank holds.

Everything that must know what a rank holds reads the spec and nothing else: initialisation, gradient norm, ZeRO,
checkpoints, conversion, resharding.  Parameters are stored in shapes whose tensor-parallel slice is a plain box; the
fused QKV weight, for example, is `[kv_groups, q_per_group + 2, head_dim, hidden]`, cut along the first dimension.

A parameter is made with a *rule*, which says how tensor parallelism treats it; there is none without one.  Tensor
ranks work on *regions*: between the entrance of a column-parallel layer and the exit of a row-parallel one each rank
has its own heads or features, of all tokens.  Outside they all have the same hidden states, or with sequence
parallelism each its part of the tokens.

    column, row    a dimension is divided: output features, input features
    vocabulary     dimension 0 is the vocabulary and is divided, padded where it does not divide
    between        held whole, used outside the regions: the gradient is a partial sum with sequence parallelism (each
                   rank has seen some of the tokens), and without it the same on every rank
    inside         held whole, used inside a region: the gradient is a partial sum (each rank has seen its heads)

Where a divided dimension has fewer entries than there are ranks, each entry goes to several ranks (`copies`), if the
rule says how: they divide its rows, those of the next dimension, but for the last few (`copied`), of which each has a
copy.  So do query heads that share a key and a value with others on more ranks than there are keys.  The gradient of a
copy is a partial sum: each rank has seen its own rows.  It is added up over these ranks, and counts in one of them.

    [G, Q + 2, D, h] on 2·G ranks, copied = 2:    group g, rows 0 … Q/2 − 1 and Q, Q + 1   on rank 2·g
                                                  group g, rows Q/2 … Q − 1 and Q, Q + 1   on rank 2·g + 1

A cut dimension that the axis does not divide otherwise is only for the vocabulary (`padded`): every rank then holds the
same number of rows, a multiple of `ROW_ALIGNMENT`, and the rows beyond the true vocabulary are local padding at the end
of the last ranks.  Padding is in no box, so it never reaches a checkpoint, a norm or an export.

A spec is integers and words, no tensor: this module needs no torch, so that a model's parameters can be counted before
it is imported (`engine.model.inventory`).  `engine.model.parameters` makes tensors of specs.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Literal, NamedTuple

from engine.distributed.boxes import Box

# Rows of a padded dimension per rank are a multiple of this: 16 bytes of bf16, what tensor cores want.
ROW_ALIGNMENT = 8


class Rule(NamedTuple):
    """How tensor parallelism treats a parameter, and the dimension it divides; see the module docstring.

    Attributes:
        copied: the last rows of the next dimension that ranks have copies of where they share an entry of `dim`, the
            first dimension; None: they may not share one.
    """

    kind: Literal["column", "row", "vocabulary", "between", "inside"]
    dim: int | None = None
    copied: int | None = None


VOCABULARY, BETWEEN, INSIDE = Rule("vocabulary", 0), Rule("between"), Rule("inside")


@dataclass(frozen=True)
class Cut:
    """Tensor dimension `dim` divided over `parts` ranks, of which this is number `index`."""

    dim: int
    parts: int
    index: int


@dataclass(frozen=True)
class ParamSpec:
    """What a parameter is, globally, and what this rank holds of it.

    Attributes:
        name: global name; layer indices are global, so it does not change with the pipeline cut.
        shape: global shape, vocabulary unpadded.
        rule: how tensor parallelism treats it.
        init: `normal` with `init_std`, or `ones`, or `zeros`.
        decay: whether it is a matrix, which multiplies activations and decays; norms and biases do neither.
        trainable: it takes gradients; what lies under an adapter does not.
        cut: how the tensor axis cuts it; None means that every tensor rank holds all of it.
        partial_sum: every tensor rank sees a part of the tokens, so gradients must be summed over the tensor axis.
        tied: the embedding is also the output layer; where these are on two pipeline stages, each holds a copy.
        tied_copy: this is the output layer's copy, which counts as a replica.
    """

    name: str
    shape: tuple[int, ...]
    rule: Rule
    init: Literal["normal", "ones", "zeros"] = "normal"
    init_std: float = 0.02
    decay: bool = True
    trainable: bool = True
    cut: Cut | None = None
    partial_sum: bool = False
    tied: bool = False
    tied_copy: bool = False

    @property
    def num_elements(self) -> int:
        """Of the global tensor."""
        return prod(self.shape)

    @property
    def padded(self) -> bool:
        """Whether the divided dimension is padded so that it divides."""
        return self.rule.kind == "vocabulary"

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the tensor this rank allocates, padding included."""
        if self.cut is None:
            return self.shape
        shape = list(self.shape)
        shape[self.cut.dim] = self._rows_per_rank()
        if self.copies > 1:
            shape[1] = self._own_rows() + self._copied_rows
        return tuple(shape)

    @property
    def copies(self) -> int:
        """Tensor ranks that share an entry of the divided dimension."""
        if self.cut is None or self.rule.copied is None:
            return 1
        return max(1, self.cut.parts // self.shape[self.cut.dim])

    @property
    def copy_index(self) -> int:
        """This rank's number among them; the first one's copy counts."""
        return 0 if self.cut is None else self.cut.index % self.copies

    @property
    def copied(self) -> slice:
        """The copied elements of the flat local tensor, which are its last."""
        total = prod(self.local_shape)
        number = 0 if self.copies == 1 else self._copied_rows * prod(self.shape[2:])
        return slice(total - number, total)

    @property
    def held(self) -> tuple[tuple[Box, Box], ...]:
        """Boxes of the global tensor that this rank holds, and where they are in the local one.

        It is made of them, end to end; but for padding, which comes last, so a box may be empty.
        """
        whole = Box.whole(self.shape)
        if self.cut is None:
            return ((whole, whole),)
        if self.copies > 1:
            entry, rows = whole.narrow(0, self.cut.index // self.copies, 1), self._own_rows()
            own = entry.narrow(1, self.copy_index * rows, rows)
            copied = entry.narrow(1, self.shape[1] - self._copied_rows, self._copied_rows)
            local = Box.whole(self.local_shape)
            both = (own, local.narrow(1, 0, rows)), (copied, local.narrow(1, rows, self._copied_rows))
            return tuple((box, place) for box, place in both if box.num_elements)
        rows, total = self._rows_per_rank(), self.shape[self.cut.dim]
        first = min(self.cut.index * rows, total)
        box = whole.narrow(self.cut.dim, first, min(rows, total - first))
        return ((box, Box.whole(box.size)),)

    @property
    def box(self) -> Box:
        """The part of the global tensor that this rank holds, where it is one."""
        (box, _), = self.held
        return box

    def _rows_per_rank(self) -> int:
        assert self.cut is not None
        if self.copies > 1:
            return 1
        rows = -(-self.shape[self.cut.dim] // self.cut.parts)
        return -(-rows // ROW_ALIGNMENT) * ROW_ALIGNMENT if self.padded else rows

    def _own_rows(self) -> int:
        """Rows of its entry that this rank does not share."""
        return (self.shape[1] - self._copied_rows) // self.copies

    @property
    def _copied_rows(self) -> int:
        return self.rule.copied or 0

    def with_cut(self, dim: int, parts: int, index: int) -> ParamSpec:
        """The spec of one of `parts` slices along `dim`; one part is no cut at all."""
        shared = self.rule.copied is not None and parts % self.shape[dim] == 0 \
            and (self.shape[1] - self._copied_rows) % (parts // self.shape[dim]) == 0
        if parts > 1 and self.shape[dim] % parts and not (self.padded or shared):
            raise ValueError(f"{self.name}: dimension {dim} of {self.shape} does not divide into {parts} parts")
        return self if parts == 1 else replace(self, cut=Cut(dim, parts, index))

    def on_tensor_rank(self, parts: int, index: int, sequence: bool) -> ParamSpec:
        """The spec on rank `index` of `parts`, by its rule; `sequence`: tokens are divided outside the regions.

        Raises:
            ValueError: the divided dimension does not divide.
        """
        if parts == 1:
            return self
        if self.rule.dim is not None:
            return self.with_cut(self.rule.dim, parts, index)
        return replace(self, partial_sum=sequence or self.rule.kind == "inside")
