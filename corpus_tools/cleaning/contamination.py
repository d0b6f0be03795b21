"""Finding evaluation texts in a corpus, so that a benchmark measures ability and not memory.

As for GPT-3 (Brown et al. 2020, appendix C): 13 words in a row that also stand in an evaluation set mark a document;
texts shorter than that are looked for whole, down to a length below which everything would match.  Every sequence is
one 64-bit hash: a polynomial over the words' CRC-32 values, computed for a whole document at once and looked up in a
sorted array.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpus_tools.cleaning.characters import tokens
from corpus_tools.cleaning.rules import Contamination
from corpus_tools.inputs import InputFile, decompressed, expand_inputs, open_input, utf8
from corpus_tools.json_values import Broken, json_values
from corpus_tools.parquet import parquet_rows
from engine.errors import DataError

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd, so multiplying by it loses nothing


@dataclass(frozen=True)
class EvaluationIndex:
    """Hashes of the evaluation texts' word sequences: per length, the sorted hashes and the file each is from."""

    files: tuple[str, ...] = ()
    hashes: tuple[tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.int32]], ...] = ()
    num_texts: int = 0
    num_too_short: int = 0

    def overlap(self, words: Sequence[str]) -> str | None:
        """The first sequence a document's words share with an evaluation file, and which; None without one."""
        if not self.hashes:
            return None
        hashes = word_hashes(words)
        for length, known, sources in self.hashes:
            found = ngram_hashes(hashes, length)
            places = np.minimum(np.searchsorted(known, found), len(known) - 1)
            matches = np.flatnonzero(known[places] == found)
            if len(matches):
                first = int(matches[0])
                return f"shares {' '.join(words[first : first + length])!r} with {self.files[sources[places[first]]]}"
        return None


def word_hashes(words: Sequence[str]) -> npt.NDArray[np.uint64]:
    """CRC-32 of each word: uint64 [words]."""
    return np.array([zlib.crc32(word.encode()) for word in words], np.uint64)


def ngram_hashes(words: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.uint64]:
    """Hashes of all sequences of `length` words: uint64 [max(0, words - length + 1)]."""
    num = max(0, len(words) - length + 1)
    total = np.zeros(num, np.uint64)
    for start in range(length):
        total = total * FACTOR + words[start : start + num]  # modulo 2^64
    return total


def evaluation_index(files: Sequence[str | Path], rules: Contamination) -> EvaluationIndex:
    """Read evaluation sets: every string anywhere in a JSON record or parquet row, every line of a .txt file.

    Raises:
        DataError: a file cannot be read.
    """
    inputs = expand_inputs(files) if files else []
    found: dict[int, list[tuple[npt.NDArray[np.uint64], int]]] = {}
    num_texts = num_too_short = 0
    for index, file in enumerate(inputs):
        for text in _evaluation_texts(file):
            words = word_hashes(tokens(text))
            num_texts += 1
            if len(words) < min(rules.min_words, rules.ngram):
                num_too_short += 1
                continue
            length = min(len(words), rules.ngram)
            found.setdefault(length, []).append((ngram_hashes(words, length), index))
    if inputs and num_texts == num_too_short:
        raise DataError(f"no text of at least {rules.min_words} words in {', '.join(file.path for file in inputs)}")
    hashes = tuple((length, *_sorted(parts)) for length, parts in sorted(found.items()))
    return EvaluationIndex(tuple(file.path for file in inputs), hashes, num_texts, num_too_short)


def _sorted(parts: list[tuple[npt.NDArray[np.uint64], int]]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int32]]:
    hashes = np.concatenate([part for part, _ in parts])
    sources = np.repeat(np.array([index for _, index in parts], np.int32), [len(part) for part, _ in parts])
    unique, first = np.unique(hashes, return_index=True)
    return unique, sources[first]


def _evaluation_texts(file: InputFile) -> Iterator[str]:
    """Every string in a file.

    Raises:
        DataError: something cannot be read: a text left out here would be trained on.
    """
    try:
        with open_input(file) as raw:
            if file.format == ".parquet":
                for rows in parquet_rows(file, raw, None):
                    if rows.unreadable or None in rows.values:
                        raise DataError(f"rows from {rows.first:,} on: {rows.why or 'invalid UTF-8'}")
                    yield from _strings(rows.values)
                return
            chunks = utf8(decompressed(raw, file.compression), json=file.format != ".txt")
            if file.format == ".txt":
                yield from filter(str.strip, b"".join(chunks).decode(errors="replace").split("\n"))
                return
            for record in json_values(chunks):
                if isinstance(record, Broken):
                    raise DataError(str(record))
                yield from _strings(record)
    except DataError as error:
        raise DataError(f"{file.path}: {error}") from error


def _strings(value: Any) -> Iterator[str]:
    """Every string in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)
