"""`octant data classifier`: a fastText model that tells good text from bad, for the rule `fasttext` of cleaning.

LLaMA kept the pages that a linear classifier took for references of Wikipedia (Touvron et al. 2023, section 2.1),
GPT-3 those that one took for its own curated texts (Brown et al. 2020, appendix A).  Examples of both sides become one
model of words and pairs of words; a share of them is held back, and says what the model is worth.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from corpus_tools.readers import read_texts
from engine.errors import DataError, RequestError

GOOD, BAD = "good", "bad"
HELD_BACK = 10  # every tenth example
FEWEST = 20  # examples of a side
MOST_CHARACTERS = 4000  # of an example


@dataclass(frozen=True)
class Measured:
    """On the examples held back: shares of the good and of the bad ones that are told right."""

    examples: int
    good: float
    bad: float


def train_classifier(good: Sequence[str], bad: Sequence[str], output: Path, field: str, seed: int = 0) -> Measured:
    """Writes the model.

    Raises:
        RequestError: the package is missing.  DataError: the examples cannot be read, or are too few.
    """
    try:
        import fasttext  # optional package
    except ImportError:
        raise RequestError("a classifier needs the package fasttext: pip install fasttext-wheel") from None
    labelled = [(GOOD, text) for text in read_texts(good, field)] + [(BAD, text) for text in read_texts(bad, field)]
    counts = [sum(label == side for label, _ in labelled) for side in (GOOD, BAD)]
    if min(counts) < FEWEST:
        raise DataError(f"{counts[0]} good and {counts[1]} bad examples: {FEWEST} of each at least")
    random.Random(seed).shuffle(labelled)
    held_back, learned = labelled[::HELD_BACK], [pair for i, pair in enumerate(labelled) if i % HELD_BACK]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.writelines(f"__label__{label} {one_line(text)}\n" for label, text in learned)
        file.flush()
        model = fasttext.train_supervised(file.name, wordNgrams=2, epoch=10, lr=0.5, thread=1, seed=seed, verbose=0)
    model.save_model(str(output))
    right: dict[str, list[bool]] = {GOOD: [], BAD: []}
    for label, text in held_back:
        found = model.f.predict(one_line(text) + "\n", 1, 0.0, "strict")
        right[label].append(bool(found) and found[0][1] == f"__label__{label}")
    shares = {label: sum(each) / max(1, len(each)) for label, each in right.items()}
    return Measured(len(held_back), shares[GOOD], shares[BAD])


def one_line(text: str) -> str:
    """An example as the rule asks about a text: one line, not cut by what it holds."""
    return text[:MOST_CHARACTERS].replace("\n", " ")
