"""Is a corpus whole?  What opening it checks, all of it, and what opening cannot check because it takes reading it.

The tokens: none negative, none beyond the tokenizer's vocabulary.  And where there is a side file: the SHA-256 of both
files.  A flipped bit in `.bin` is a valid token more often than not; only its hash finds it.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from engine.data.corpus import mismatches
from engine.data.indexed import IndexedDataset, bin_path
from engine.data.sidecar import FileInfo, Sidecar, describe_file, sidecar_path
from engine.errors import DataError

READ_BYTES = 1 << 23
Advance = Callable[[int], None]  # called with every number of bytes read


@dataclass
class Verdict:
    """What is wrong with a corpus (nothing: it is whole), and what could not be looked at."""

    prefix: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(prefix: str, advance: Advance = lambda num_bytes: None) -> Verdict:
    """Check a corpus in one pass over its bytes, in bounded memory."""
    verdict = Verdict(prefix)
    sidecar: Sidecar | None = None
    try:
        sidecar = Sidecar.read(prefix)
        if sidecar is None:
            verdict.notes.append(f"{sidecar_path(prefix)} is not there: hashes and tokenizer cannot be checked")
        dataset = IndexedDataset(prefix, checked=True)
    except DataError as error:
        verdict.problems.append(str(error))
        return verdict
    verdict.problems += dataset.problems()
    found, lowest, highest = _read_tokens(dataset, advance)
    if lowest < 0:
        verdict.problems.append(f"{bin_path(prefix)}: holds the negative token id {lowest}")
    if sidecar is not None:
        verdict.problems += mismatches(dataset, sidecar)
        others = {suffix: Path(f"{os.fspath(prefix)}{suffix}") for suffix in sidecar.files if suffix != ".bin"}
        verdict.problems += [f"{path}: no such file" for path in others.values() if not path.is_file()]
        there = {suffix: describe_file(path) for suffix, path in others.items() if path.is_file()}
        verdict.problems += _changed(dataset, sidecar, {".bin": found} | there)
        if highest >= sidecar.tokenizer.vocab_size:
            verdict.problems.append(
                f"{bin_path(prefix)}: holds token id {highest}, but its tokenizer {sidecar.tokenizer.name} ends at "
                f"{sidecar.tokenizer.vocab_size - 1}"
            )
    return verdict


def num_bytes_to_read(prefix: str) -> int:
    """How many bytes `verify` will report to `advance`."""
    return bin_path(prefix).stat().st_size if bin_path(prefix).exists() else 0


def _read_tokens(dataset: IndexedDataset, advance: Advance) -> tuple[FileInfo, int, int]:
    """(size and hash of .bin, smallest id, largest id)."""
    digest, num_bytes, lowest, highest = hashlib.sha256(), 0, 0, 0
    with open(bin_path(dataset.prefix), "rb") as file:
        while chunk := file.read(READ_BYTES):
            digest.update(chunk)
            tokens = np.frombuffer(chunk, dataset.dtype)
            lowest, highest = min(lowest, int(tokens.min())), max(highest, int(tokens.max()))
            num_bytes += len(chunk)
            advance(len(chunk))
    return FileInfo(num_bytes, digest.hexdigest()), lowest, highest


def _changed(dataset: IndexedDataset, sidecar: Sidecar, found: dict[str, FileInfo]) -> Iterator[str]:
    file = sidecar_path(dataset.prefix)
    for suffix, info in found.items():
        expected = sidecar.files.get(suffix)
        if expected is not None and expected.sha256 != info.sha256:
            path = f"{os.fspath(dataset.prefix)}{suffix}"
            yield f"{path}: sha256 {info.sha256[:16]}…, {file.name} says {expected.sha256[:16]}…: it was changed"
