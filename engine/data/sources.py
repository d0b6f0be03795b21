"""Opening the corpora of a mixture, and refusing those that do not fit the run before it starts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.data.corpus import Corpus
from engine.data.fim import FillInMiddle
from engine.data.indexed import IndexedDataset, bin_path
from engine.data.mixture import exact
from engine.data.sample import Sample
from engine.data.sidecar import Sidecar, sidecar_path
from engine.data.tokenizer_identity import TokenizerInfo
from engine.errors import DataError
from engine.model.fields import Field


class SourceLike(Protocol):
    """What the configuration of a source offers; `epochs` and `max_epochs` may be absent."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Source(ABC):
    """One source of a mixture: so many windows, in an order of its own."""

    name: str  # the last part of its path
    path: str
    num_windows: int  # per epoch
    weight: Fraction  # relative to the other sources
    max_samples: int | None  # max_epochs, in samples
    tags: Mapping[Field, np.ndarray] = field(default_factory=dict, kw_only=True)  # of each sample

    @property
    def document_mask(self) -> bool:
        """Whether documents of a window are kept apart."""
        return False

    @property
    @abstractmethod
    def num_tokens(self) -> int:
        """In all of it."""

    @property
    @abstractmethod
    def made_by(self) -> TokenizerInfo | None:
        """The tokenizer, where it is known."""

    @abstractmethod
    def window(self, window: int, number: int) -> Sample:
        """One window, read and checked; `number` is the source's own in its mixture.

        Raises:
            DataError: it cannot be read, or has ids outside the vocabulary.
        """

    def lengths(self, window: int) -> tuple[int, ...]:
        """Tokens of each sequence of a window that are no padding; empty: all of them."""
        return ()

    @abstractmethod
    def fingerprint(self) -> dict[str, Any]:
        """What its windows depend on, JSON-able, for checkpoints."""

    @abstractmethod
    def close(self) -> None:
        """Give the files back."""


@dataclass(frozen=True)
class CorpusSource(Source):
    """A corpus, cut in windows of `seq_len` tokens and the one behind."""

    dataset: IndexedDataset
    sidecar: Sidecar | None
    seq_len: int
    vocab_size: int
    masked: bool = False
    fim: FillInMiddle | None = None

    @property
    def document_mask(self) -> bool:
        return self.masked

    @property
    def num_tokens(self) -> int:
        return self.dataset.num_tokens

    @property
    def made_by(self) -> TokenizerInfo | None:
        return self.sidecar.tokenizer if self.sidecar else None

    @property
    def windows_and_rest(self) -> int:
        """Windows that hold every token, the shorter one at the end included."""
        return -(-(self.dataset.num_tokens - 1) // self.seq_len)

    def window(self, window: int, number: int) -> Sample:
        """Training takes the whole windows; there may be one more (`windows_and_rest`), which is shorter and is filled
        up with tokens that do not count.
        """
        start, stop = window * self.seq_len, (window + 1) * self.seq_len + 1
        raw = self.dataset.tokens(start, min(stop, self.dataset.num_tokens))
        if raw.max() >= self.vocab_size or (raw.dtype.kind == "i" and raw.min() < 0):
            self._refuse_tokens(start, raw)
        loss_mask, document_ids = self._document_masks(start) if self.masked else (None, None)
        if (missing := stop - start - len(raw)) > 0:
            raw = np.pad(raw, (0, missing), mode="edge")
            loss_mask = np.ones(self.seq_len, bool) if loss_mask is None else loss_mask
            loss_mask[-missing:] = False
        tokens = raw.astype(np.int64)
        if self.fim is not None:
            starts = self.dataset.document_starts(start, min(stop, self.dataset.num_tokens)) - start
            tokens = self.fim.applied(tokens, starts.tolist(), number, window)
        return Sample(tokens, loss_mask, document_ids, number, window, self.tags)

    def _document_masks(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents numbered within the window, and no loss where the target belongs to the next one."""
        begins = np.zeros(self.seq_len + 1, bool)
        stop = min(start + self.seq_len + 1, self.dataset.num_tokens)
        begins[self.dataset.document_starts(start, stop) - start] = True
        return ~begins[1:], np.cumsum(begins[:-1], dtype=np.int32)

    def _refuse_tokens(self, start: int, tokens: np.ndarray) -> None:
        position = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        raise DataError(
            f"{bin_path(self.path)}: token {start + position} is {int(tokens[position])}, outside the model's "
            f"vocabulary of {self.vocab_size} (0 to {self.vocab_size - 1}). The corpus was made with another "
            "tokenizer or is damaged: check it with `octant data verify`."
        )

    def fingerprint(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "num_tokens": self.dataset.num_tokens,
            "num_documents": self.dataset.num_documents,
            "sha256": self.sidecar.files[".bin"].sha256 if self.sidecar else None,
            "weight": str(self.weight),
            "max_samples": self.max_samples,
        } | ({} if self.fim is None else {"fim": [self.fim.rate, self.fim.spm, *self.fim.sentinels]})

    def close(self) -> None:
        self.dataset.close()


def open_sources(
    sources: Sequence[SourceLike],
    seq_len: int,
    vocab_size: int,
    tokenizer: TokenizerInfo | None,
    document_mask: bool = False,
) -> list[Source]:
    """Open every corpus, in constant time and memory each.

    Raises:
        DataError: with the file and the numbers: a corpus is missing, damaged, too short for one window, or, where side
            files tell, made by another tokenizer than the run's or the others, or has more ids than `vocab_size`.
    """
    if not sources:
        raise no_sources()
    return mixed([open_corpus(source, seq_len, vocab_size, tokenizer, document_mask) for source in sources], sources)


def no_sources() -> DataError:
    return DataError("No corpus is given: name at least one, e.g. `data.train: [{path: data/web}]`.")


def mixed(opened: Sequence[Source], sources: Sequence[SourceLike]) -> list[Source]:
    """Sources as a mixture of them needs them.

    Raises:
        DataError: two were made by different tokenizers, or some have a weight and others `epochs`.
    """
    check_one_tokenizer(opened)
    return _with_target_epochs(list(opened), [getattr(source, "epochs", None) for source in sources])


def open_corpus(
    source: SourceLike, seq_len: int, vocab_size: int, tokenizer: TokenizerInfo | None, document_mask: bool = False
) -> CorpusSource:
    """One corpus.

    Raises:
        DataError: as of `open_sources`.
    """
    corpus = Corpus.open(source.path)
    dataset, sidecar = corpus.dataset, corpus.sidecar
    num_windows = max(0, dataset.num_tokens - 1) // seq_len
    if num_windows == 0:
        raise DataError(
            f"{bin_path(source.path)}: {dataset.num_tokens} tokens, fewer than the {seq_len + 1} of one sample "
            f"(data.seq_len = {seq_len} and the last target). Add text, or lower data.seq_len."
        )
    if sidecar is not None:
        check_tokenizer(source.path, sidecar, vocab_size, tokenizer)
    place = (Path(source.path).name, source.path, num_windows, exact(source.weight), most_samples(source, num_windows))
    return CorpusSource(*place, dataset, sidecar, seq_len, vocab_size, document_mask)


def most_samples(source: SourceLike, num_windows: int) -> int | None:
    """`max_epochs` of a source in samples."""
    max_epochs = getattr(source, "max_epochs", None)
    return None if max_epochs is None else max(1, int(exact(max_epochs) * num_windows))


def check_one_tokenizer(opened: Sequence[Source]) -> None:
    """Also where the run names no tokenizer: ids of two cannot be learned together."""
    known = [(source.path, source.made_by) for source in opened if source.made_by]
    for path, made_by in known[1:]:
        if difference := known[0][1].difference(made_by):
            raise DataError(
                f"{known[0][0]} and {path} were made with different tokenizers: {difference}. Prepare them with the "
                "same one."
            )


def _with_target_epochs(opened: list[Source], targets: list[float | None]) -> list[Source]:
    """Sources that name `epochs` get the weight epochs × windows, so that all reach their targets together."""
    if all(target is None for target in targets):
        return opened
    weighted = []
    for source, target in zip(opened, targets, strict=True):
        if target is None:
            raise DataError(
                f"{source.path}: has a weight, but other sources of the mixture have target `epochs`. "
                "Give all of them epochs, or all of them weights."
            )
        weighted.append(replace(source, weight=exact(target) * source.num_windows))
    return weighted


def check_tokenizer(path: str, sidecar: Sidecar, vocab_size: int, tokenizer: TokenizerInfo | None) -> None:
    file, made_by = sidecar_path(path), sidecar.tokenizer
    if tokenizer is not None and (difference := made_by.difference(tokenizer)):
        raise DataError(
            f"{file}: the corpus was made with another tokenizer than the run's: {difference}. Set data.tokenizer to "
            "that one, or prepare the corpus again."
        )
    if made_by.vocab_size > vocab_size:
        raise DataError(
            f"{file}: tokenizer {made_by.name} has {made_by.vocab_size} ids, the model's vocabulary {vocab_size}. "
            "Raise model.vocab_size, or prepare the corpus with the run's tokenizer."
        )
