"""Conversations in tokens on disk, mapped: what a run reads.

    PREFIX.bin, PREFIX.idx               token ids; a document is one record of a file, with all its alternatives
    PREFIX.mask.bin, PREFIX.mask.idx     a byte per token: LEARNED, and BEGINS where an alternative begins
    PREFIX.records.bin                   per document: its file, its number there, its margin (not a number: none)
    PREFIX.json                          side file; `chat` says what was done: template, files, what was left out

The first two pairs are corpora as any other (`engine.data.indexed`), so what looks at those works here too.  Nothing
depends on the length of sequences: cutting and packing are a run's own.
"""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from engine.data.corpus import Corpus
from engine.data.indexed import IndexedDataset
from engine.data.sidecar import Sidecar
from engine.errors import DataError

LEARNED, BEGINS = 1, 2
RECORD = np.dtype([("file", "<i4"), ("number", "<i8"), ("margin", "<f4")])
MASK, RECORDS = ".mask", ".records.bin"


class ChatText(NamedTuple):
    """One alternative of a record: its tokens, and which are learned (as labels)."""

    tokens: npt.NDArray[np.int64]
    learned: npt.NDArray[np.bool_]


class ChatCorpus:
    """Random access to the records under a prefix.

    Raises:
        DataError: a file is missing or damaged, or they do not belong together.
    """

    def __init__(self, prefix: str | os.PathLike[str]) -> None:
        self.prefix = os.fspath(prefix)
        corpus = Corpus.open(prefix)
        if corpus.sidecar is None or corpus.sidecar.chat is None:
            raise DataError(f"{self.prefix} is a corpus of text, not of conversations: use it with `kind: pretrain`, "
                            "or make one of conversations with `octant prepare --chat`")
        self.sidecar: Sidecar = corpus.sidecar
        self.about: dict[str, Any] = corpus.sidecar.chat
        self._tokens, self._mask = corpus.dataset, IndexedDataset(self.prefix + MASK)
        self.lengths: npt.NDArray[np.int64] = self._tokens.sequence_lengths.astype(np.int64)
        if not np.array_equal(self._mask.sequence_lengths, self._tokens.sequence_lengths):
            raise DataError(f"{self.prefix}{MASK}.idx: not the mask of {self.prefix}.idx; prepare the conversations "
                            "again")
        self._records = self._read_records()

    def _read_records(self) -> npt.NDArray[Any]:
        path = Path(self.prefix + RECORDS)
        try:
            records = np.fromfile(path, RECORD)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); prepare the conversations again") from None
        if len(records) != len(self.lengths):
            raise DataError(f"{path} is of {len(records)} records, the corpus of {len(self.lengths)}: prepare the "
                            "conversations again")
        return records

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return self._tokens.num_tokens

    @property
    def kind(self) -> str:
        """One of `KINDS` (`engine.data.chat.kinds`)."""
        return str(self.about["kind"])

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return tuple(self.about["end_ids"])

    def texts(self, number: int) -> list[ChatText]:
        """The alternatives of a record, best first."""
        tokens, bits = self._tokens.document(number).astype(np.int64), self._mask.document(number)
        edges = [*np.flatnonzero(bits & BEGINS).tolist(), len(tokens)]
        return [ChatText(tokens[a:b], (bits[a:b] & LEARNED).astype(bool)) for a, b in pairwise(edges)]

    def margin(self, number: int) -> float | None:
        """By how much the first alternative is better, where the file says so."""
        margin = float(self._records[number]["margin"])
        return None if np.isnan(margin) else margin

    def place(self, number: int) -> str:
        """The file that a record came from, and where in it."""
        record = self._records[number]
        file = self.about["files"][int(record["file"])]
        return f"{file['path']}, {file['unit']} {int(record['number'])}"

    def close(self) -> None:
        """Gives the files back."""
        self._tokens.close()
        self._mask.close()
