"""Documents that are held out: a corpus of their own, for the loss on what was never trained on.

Whether a document is held out follows from its tokens alone, by their hash:

    a share s   hash < s · 2⁶⁴
    a number n  hash among the n smallest; equal documents go together, so it may be a few more

So the split is the same with any number of workers, on any machine and for a corpus that is prepared in shards, a
document that is added moves no other across (of a share), and no text is on both sides, however often it occurs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from engine.data.indexed import IndexedDataset, IndexedWriter
from engine.errors import DataError, RequestError

VALID = "-valid"  # what the held-out corpus's prefix ends with
ALL_HASHES = 1 << 64


@dataclass(frozen=True)
class Holdout:
    """How much is held out: a share of the documents, below 1, or a number of them."""

    amount: float

    @staticmethod
    def of(text: str | None) -> Holdout | None:
        """`0.01` or `500`; None: nothing is.

        Raises:
            RequestError: it is neither a share nor a number.
        """
        if text is None:
            return None
        try:
            amount = float(text)
        except ValueError:
            amount = 0.0
        if not (0 < amount < 1 or (1 <= amount < ALL_HASHES and amount.is_integer())):
            raise RequestError(f"--holdout {text[:80]}: write a share of the documents, such as 0.01, or a number")
        return Holdout(amount)

    @property
    def is_share(self) -> bool:
        return self.amount < 1

    def chosen(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which documents are held out.

        Raises:
            DataError: none, or all.
        """
        if self.is_share:
            held = hashes < np.uint64(int(self.amount * ALL_HASHES))
        else:
            number = min(int(self.amount), len(hashes))
            held = hashes <= np.partition(hashes, number - 1)[number - 1]
        if held.all() or not held.any():
            raise DataError(
                f"--holdout {self.amount:g} holds out {int(held.sum()):,} of {len(held):,} documents: both corpora "
                "need some"
            )
        return held


def divide(parts: Sequence[Path], holdout: Holdout, train: Path, valid: Path) -> tuple[int, int]:
    """The documents of some corpora, in order, as two.

    Returns:
        Documents and tokens that were held out.

    Raises:
        DataError: as of `Holdout.chosen`.
    """
    held = holdout.chosen(np.fromiter((_hash(tokens) for tokens in _documents(parts)), np.uint64))
    dtype = IndexedDataset(parts[0]).dtype
    num_tokens = 0
    with IndexedWriter(train, dtype) as kept, IndexedWriter(valid, dtype) as out:
        for tokens, is_held in zip(_documents(parts), held.tolist(), strict=True):
            (out if is_held else kept).add_document(tokens)
            num_tokens += len(tokens) if is_held else 0
    return int(held.sum()), num_tokens


def _documents(parts: Sequence[Path]) -> Iterator[np.ndarray]:
    for part in parts:
        dataset = IndexedDataset(part)
        for number in range(dataset.num_documents):
            yield dataset.document(number)
        dataset.close()


def _hash(tokens: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(tokens.astype("<i4").tobytes(), digest_size=8).digest(), "little")
