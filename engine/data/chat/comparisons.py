"""Comparisons as a source of training samples: the answers to one prompt, a row each, best first.

A text is cut at its end where it is longer than a row (`data.too_long: cut`), and then ends there; the sample is left
out (`skip`) or the run refused (`stop`).  A sample of which one answer has nothing left, because its prompt is as long
as a row, is never cut: it is left out where `data.on_error` is `skip`, and refused otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.chat.corpus import ChatCorpus, ChatText
from engine.data.chat.rows import Fit, require_in_vocabulary
from engine.data.mixture import exact
from engine.data.packing import laid_out
from engine.data.sample import Sample
from engine.data.sources import Source, SourceLike, most_samples
from engine.data.tokenizer_identity import TokenizerInfo
from engine.errors import DataError
from engine.model.fields import END, MARGIN, REFERENCE, Field


@dataclass(frozen=True)
class ComparisonSource(Source):
    """Samples of several rows.

    Attributes:
        records: the numbers of those that are used.
        answers: rows of a sample; where a record has fewer, the last are padding.
        scored: rows say where their text ends, and the margin.
        margins: the file's; else 0.
        reference: log-probability of each answer [samples, answers]; None: not known (yet).
        num_cut, num_left_out: records with a text that was too long.
    """

    corpus: ChatCorpus
    records: Sequence[int]
    fit: Fit
    vocab_size: int
    answers: int
    scored: bool
    margins: bool
    num_cut: int
    num_left_out: int
    reference: npt.NDArray[np.float32] | None = None

    @staticmethod
    def open(prefix: str, source: SourceLike, fit: Fit, vocab_size: int, *, answers: int = 2, scored: bool = False,
             margins: bool = True) -> ComparisonSource:
        """
        Args:
            prefix: where the comparisons of `source` lie in tokens.

        Raises:
            DataError: they are missing or damaged; one does not fit, or has more answers; none is left.
        """
        corpus = ChatCorpus(prefix)
        records, num_cut = _fitting(corpus, fit, answers)
        if not records:
            raise DataError(f"{source.path}: none of its {len(corpus):,} comparisons fits in data.seq_len "
                            f"({fit.seq_len})")
        return ComparisonSource(Path(source.path).name, source.path, len(records), exact(source.weight),
                                most_samples(source, len(records)), corpus, records, fit, vocab_size, answers, scored,
                                margins, num_cut, len(corpus) - len(records))

    @property
    def num_tokens(self) -> int:
        return self.corpus.num_tokens

    @property
    def made_by(self) -> TokenizerInfo:
        return self.corpus.sidecar.tokenizer

    def window(self, window: int, number: int) -> Sample:
        record = self.records[window]
        texts: list[ChatText | None] = [*self.corpus.texts(record)]
        texts += [None] * (self.answers - len(texts))
        margin = self.corpus.margin(record) if self.margins else None
        first, *rest = (self._row(window, place, text, margin or 0.0, number) for place, text in enumerate(texts))
        return replace(first, rest=tuple(rest))

    def lengths(self, window: int) -> tuple[int, ...]:
        found = [min(len(text.tokens), self.fit.seq_len) for text in self.corpus.texts(self.records[window])]
        return (*found, *[0] * (self.answers - len(found)))

    def _row(self, window: int, place: int, text: ChatText | None, margin: float, number: int) -> Sample:
        seq_len, extra = self.fit.seq_len, dict[Field, np.ndarray](self.tags)
        tokens, learned = (np.zeros(0, np.int64), np.zeros(0, bool)) if text is None else text
        if text is not None:
            require_in_vocabulary(tokens, self.vocab_size, self.corpus.place(self.records[window]))
        tokens, mask, _ = laid_out([(tokens[:seq_len], learned[:seq_len])], seq_len, self.fit.pad_id)
        if self.scored:
            ends = np.zeros(seq_len, bool)
            ends[min(len(learned), seq_len) - 1 :][:1] = text is not None
            extra |= {END: ends, MARGIN: np.float32(margin)}                     # type: ignore[dict-item]
        if self.reference is not None:
            extra[REFERENCE] = self.reference[window, place]
        return Sample(tokens, mask, None, number, window, extra, min(len(learned), seq_len))

    def fingerprint(self) -> dict[str, Any]:
        return self.content() | {"weight": str(self.weight), "max_samples": self.max_samples}

    def content(self) -> dict[str, Any]:
        """What the samples depend on, however they are mixed."""
        files: Mapping[str, Any] = self.corpus.sidecar.files
        return {"name": self.name, "num_tokens": self.num_tokens, "num_documents": len(self.corpus),
                "sha256": files[".bin"].sha256, "mask_sha256": files[".mask.bin"].sha256, "margins": self.margins,
                "answers": self.answers, "too_long": self.fit.too_long, "num_windows": self.num_windows}

    def close(self) -> None:
        self.corpus.close()


def _fitting(corpus: ChatCorpus, fit: Fit, answers: int) -> tuple[list[int], int]:
    """The records that are used, and in how many of them a text is cut."""
    records, num_cut = [], 0
    for number, length in enumerate(corpus.lengths.tolist()):
        if length <= fit.seq_len and answers == 2:                # of all texts together, and a pair has two
            records.append(number)
            continue
        texts = corpus.texts(number)
        if len(texts) > answers:
            raise DataError(f"{corpus.place(number)}: {len(texts)} ranked answers, and reward.answers is {answers}: "
                            "raise it")
        longest = max(len(text.tokens) for text in texts)
        if longest > fit.seq_len:
            has_labels = all(text.learned[1 : fit.seq_len].any() for text in texts)
            if fit.too_long == "stop" or (fit.too_long == "cut" and not has_labels and fit.on_error == "stop"):
                raise DataError(_too_long(corpus.place(number), longest, fit, has_labels))
            if fit.too_long == "skip" or not has_labels:
                continue
            num_cut += 1
        records.append(number)
    return records, num_cut


def _too_long(place: str, length: int, fit: Fit, has_labels: bool) -> str:
    if has_labels:
        return (f"{place}: a comparison with a text of {length:,} tokens, data.seq_len {fit.seq_len:,}: raise it, or "
                "set data.too_long to `cut` or `skip`")
    return (f"{place}: a prompt longer than the context: {length:,} tokens, and no answer begins within data.seq_len "
            f"{fit.seq_len:,}: raise it, or leave such comparisons out with data.on_error: skip")
