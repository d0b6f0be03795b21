"""A corpus and its side file, opened together: whether they belong together is seen at once, without reading a token.

The side file knows what the index alone cannot tell: how many tokens and documents there should be, in which dtype,
and, as only Octant writes side files, that every document is one sequence.  What takes hashing is for
`octant data verify`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from engine.data.indexed import IndexedDataset, bin_path, idx_path
from engine.data.sidecar import Sidecar, sidecar_path
from engine.errors import DataError


@dataclass(frozen=True)
class Corpus:
    """The documents under a prefix, and what is known of them; foreign Megatron data has no side file."""

    dataset: IndexedDataset
    sidecar: Sidecar | None

    @staticmethod
    def open(prefix: str | os.PathLike[str]) -> Corpus:
        """Open both.

        Raises:
            DataError: one is missing or damaged, or is not the other's.
        """
        dataset, sidecar = IndexedDataset(prefix), Sidecar.read(prefix)
        for problem in mismatches(dataset, sidecar) if sidecar else ():
            raise DataError(f"{problem}. They do not belong together: prepare the corpus again.")
        return Corpus(dataset, sidecar)


def mismatches(dataset: IndexedDataset, sidecar: Sidecar) -> Iterator[str]:
    """Where a side file and the corpus beside it contradict each other."""
    file, prefix = sidecar_path(dataset.prefix), dataset.prefix
    for name, says, found in (
        ("tokens", sidecar.num_tokens, dataset.num_tokens),
        ("documents", sidecar.num_documents, dataset.num_documents),
        ("dtype", sidecar.dtype, dataset.dtype.name),
    ):
        if says != found:
            yield f"{file}: {name} {says}, the corpus has {found}"
    for path in (bin_path(prefix), idx_path(prefix)):
        described, num_bytes = sidecar.files.get(path.suffix), path.stat().st_size
        if described is None:
            yield f"{file}: says nothing about {path}"
        elif described.bytes != num_bytes:
            yield f"{path}: {num_bytes} bytes, {file.name} says {described.bytes}"
    if sidecar.num_documents == dataset.num_documents and (document := dataset.first_divided_document()) is not None:
        yield f"{idx_path(prefix)}: document {document} is not one sequence, though Octant wrote it"
