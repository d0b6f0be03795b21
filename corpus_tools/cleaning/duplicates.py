"""Exact and near duplicates: of several copies the first in the corpus's order stays.

Exact: texts that agree in all their words share a 128-bit hash, so case, spacing and punctuation don't hide a copy.

Near (Broder 1997): the similarity of two texts is the Jaccard similarity of their sets of shingles (five words in a
row).  MinHash keeps, for each of 128 random orders, the smallest shingle; the share of orders in which two texts agree
estimates their similarity.  To find candidates without comparing all pairs the 128 values are cut into bands, and
texts that agree in any whole band are compared.  Sketches are made by the workers with `rensa`, compared by one
process in order: the result is the same for any number of workers.  Memory is about 4 KB per document kept.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from corpus_tools.cleaning.rules import Duplicates
from engine.errors import RequestError

EXACT, NEAR = "exact_duplicate", "near_duplicate"
VALUES_PER_BAND = 4  # at similarity 0.8 one of 32 bands agrees with probability 1 - (1 - 0.8^4)^32 = 0.99999995
SEED = 1


@dataclass(frozen=True)
class Fingerprint:
    """What is compared of a document: a hash of its words, and its MinHash sketch (None where that is off)."""

    exact: bytes
    sketch: Any


def fingerprint(text: str, words: Sequence[str], rules: Duplicates) -> Fingerprint:
    """Of a text and its words (`tokens`); computed by the workers.

    Raises:
        RequestError: rensa is absent.
    """
    words = words or [text]
    whole = " ".join(words)
    sketch = None
    if rules.near is not None:
        sketch = _rensa().RMinHash(num_perm=rules.permutations, seed=SEED)
        shingles = zip(*(words[start:] for start in range(rules.shingle)), strict=False)
        sketch.update(list(map(" ".join, shingles)) or [whole])
    return Fingerprint(hashlib.blake2b(whole.encode(), digest_size=16).digest(), sketch)


class Deduplicator:
    """The documents kept so far, by where they are from."""

    def __init__(self, rules: Duplicates) -> None:
        self._rules = rules
        self._exact: dict[bytes, int] = {}
        self._sources: list[str] = []
        self._sketches: list[Any] = []
        if rules.near is not None:
            bands = rules.permutations // VALUES_PER_BAND
            self._index = _rensa().RMinHashLSH(threshold=rules.near, num_perm=rules.permutations, num_bands=bands)

    def seen(self, document: Fingerprint, source: str) -> tuple[str, str] | None:
        """(EXACT or NEAR, source of the first copy), or None for a new document, which is remembered."""
        if self._rules.exact and (first := self._exact.get(document.exact)) is not None:
            return EXACT, self._sources[first]
        if self._rules.near is not None and (first := self._nearest(document.sketch)) is not None:
            return NEAR, self._sources[first]
        self._exact[document.exact] = len(self._sources)
        if self._rules.near is not None:
            self._index.insert(len(self._sources), document.sketch)
            self._sketches.append(document.sketch)
        self._sources.append(source)
        return None

    def _nearest(self, sketch: Any) -> int | None:
        """The earliest kept document that is similar enough."""
        similar = (i for i in self._index.query(sketch) if sketch.jaccard(self._sketches[i]) >= self._rules.near)
        return min(similar, default=None)


def _rensa() -> Any:
    try:
        import rensa  # optional package
    except ImportError as error:
        raise RequestError(
            "near-duplicate removal needs the package rensa: pip install 'octant[data]', or `near: null` in the rules"
        ) from error
    return rensa
