"""The order of training: sample i of a run, as a function of (corpora, weights, seed, i) and nothing else.

    i ──skip──▶ stream index ──mixture──▶ source, position ──permutation──▶ window ──pread──▶ seq_len + 1 tokens

* A *window* w of a corpus covers tokens [w·seq_len, w·seq_len + seq_len] of its flat stream (Megatron's fixed windows): seq_len inputs, and the same
  shifted by one as targets; neighbours share one token.  An epoch has (num_tokens - 1) // seq_len windows.
* Position p of a source is window `permutation(p mod num_windows)` of epoch `p div num_windows`, where every epoch of every source has a
  permutation of its own, keyed by (seed, source, epoch): each window exactly once per epoch.
* The mixture deals samples to sources by weight (`engine.data.mixture`); `skip` leaves out ranges of the stream.

Nothing is built when a run starts and nothing is saved but the number of consumed samples.  The data-parallel size does not occur: ranks take the i that are
theirs, so a run resumed on another number of devices sees every sample exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from engine.data.indexed import IndexedDataset, bin_path
from engine.data.mixture import Mixture
from engine.data.permutation import Permutation, derive_key
from engine.data.sidecar import Sidecar, sidecar_path
from engine.errors import DataError

CACHED_EPOCHS = 64


class SourceLike(Protocol):
    """What a source's configuration needs to offer; `epochs` and `max_epochs` may be absent."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence: inputs `tokens[:-1]`, targets `tokens[1:]`."""

    tokens: np.ndarray                    # int64 [seq_len + 1]
    loss_mask: np.ndarray | None          # bool [seq_len]: False where the target is not learned; None: all are
    document_ids: np.ndarray | None       # int32 [seq_len]: 0, 1, … per document of the inputs; None: no document mask
    source: int
    window: int


@dataclass(frozen=True)
class Source:
    """One corpus of the mixture."""

    name: str                             # the last part of its path
    path: str
    dataset: IndexedDataset
    sidecar: Sidecar | None
    num_windows: int                      # per epoch
    weight: Fraction                      # relative to the other sources
    max_samples: int | None               # max_epochs, in samples

    @property
    def num_tokens(self) -> int:
        return self.dataset.num_tokens


@dataclass(frozen=True)
class SourceShare:
    """A row of the data table: what a run of some length takes from one source."""

    name: str
    share: float
    samples: int
    tokens: int
    epochs: float
    source_tokens: int


class TrainingData:
    """Random access to the samples of a run.  Open it with `TrainingData.open` in every process that reads."""

    def __init__(self, sources: Sequence[Source], seq_len: int, seed: int, vocab_size: int, document_mask: bool,
                 skip: Sequence[tuple[int, int]], shuffle: bool) -> None:
        self.sources = tuple(sources)
        self.seq_len, self.seed, self.vocab_size = seq_len, seed, vocab_size
        self.document_mask, self.shuffle = document_mask, shuffle
        self.skip = merge_ranges(skip)
        self.mixture = Mixture([s.weight for s in sources], [s.max_samples for s in sources])
        self._datasets = [source.dataset for source in sources]
        self._num_windows = [source.num_windows for source in sources]
        self._permutation = lru_cache(CACHED_EPOCHS)(self._make_permutation)

    @staticmethod
    def open(sources: Sequence[SourceLike], seq_len: int, seed: int, vocab_size: int, *, document_mask: bool = False,
             skip: Sequence[tuple[int, int]] = (), tokenizer_sha256: str | None = None, shuffle: bool = True) -> TrainingData:
        """Open a mixture; constant time and memory per source.

        Raises DataError, naming the file and the numbers, for corpora that are missing, damaged, too short for one window, made by another
        tokenizer than `tokenizer_sha256` (where the corpus says which) or with ids beyond `vocab_size`.
        """
        if not sources:
            raise DataError("No corpus is given: name at least one under data.train, e.g. `train: [{path: data/web}]`.")
        opened = [_open_source(source, seq_len, vocab_size, tokenizer_sha256) for source in sources]
        return TrainingData(_with_target_epochs(opened, sources), seq_len, seed, vocab_size, document_mask, skip, shuffle)

    @property
    def num_sources(self) -> int:
        return len(self.sources)

    @property
    def source_names(self) -> list[str]:
        return [source.name for source in self.sources]

    @property
    def num_samples(self) -> int | None:
        """Samples until every source has reached its max_epochs; None where one has no limit."""
        total = self.mixture.num_samples
        return None if total is None else total - sum(max(0, min(stop, total) - start) for start, stop in self.skip)

    def stream_index(self, sample: int) -> int:
        """Index in the stream without skipping of consumed sample `sample`."""
        for start, stop in self.skip:
            if sample < start:
                break
            sample += stop - start
        return sample

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, window) of a sample: all that the order is, without reading a token."""
        source, position = self.mixture.locate(self.stream_index(sample))
        epoch, window = divmod(position, self._num_windows[source])
        return source, self._permutation(source, epoch)(window) if self.shuffle else window

    def sample(self, index: int) -> Sample:
        """Global sample `index` ≥ 0 in the order of consumption.  Raises DataError for a token id outside the vocabulary."""
        source, window = self.locate(index)
        return self.window(source, window)

    def window(self, source: int, window: int) -> Sample:
        """One window of one source, read and checked."""
        start = window * self.seq_len
        raw = self._datasets[source].tokens(start, start + self.seq_len + 1)
        tokens = raw.astype(np.int64)
        if int(raw.max()) >= self.vocab_size or (raw.dtype.kind == "i" and int(raw.min()) < 0):
            self._refuse_tokens(source, window, tokens)
        if not self.document_mask:
            return Sample(tokens, None, None, source, window)
        loss_mask, document_ids = self._document_masks(source, start)
        return Sample(tokens, loss_mask, document_ids, source, window)

    def _document_masks(self, source: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents numbered within the window, and no loss where the target belongs to the next document."""
        first_tokens = self._datasets[source].document_starts(start, start + self.seq_len + 1) - start
        steps = np.zeros(self.seq_len + 1, np.int32)
        steps[first_tokens] = 1
        return steps[1:] == 0, np.cumsum(steps[:-1], dtype=np.int32)

    def _refuse_tokens(self, source: int, window: int, tokens: np.ndarray) -> None:
        position = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        raise DataError(f"{bin_path(self.sources[source].path)}: token {window * self.seq_len + position} is {int(tokens[position])}, outside "
                        f"the model's vocabulary of {self.vocab_size} (0 to {self.vocab_size - 1}). The corpus was made with another tokenizer, or is "
                        "damaged: check it with `octant data verify`.")

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self._num_windows[source], derive_key(self.seed, source, epoch))

    def report(self, num_samples: int) -> list[SourceShare]:
        """What the first `num_samples` samples take from every source: the data table of GPT-3's and LLaMA's papers."""
        counts = self.mixture.counts(self.stream_index(num_samples))
        for start, stop in self.skip:
            before, after = (self.mixture.counts(min(edge, self.stream_index(num_samples))) for edge in (start, stop))
            counts = [count - (b - a) for count, a, b in zip(counts, before, after, strict=True)]
        return [SourceShare(source.name, count / num_samples if num_samples else 0.0, count, count * self.seq_len,
                            count / source.num_windows, source.num_tokens) for source, count in zip(self.sources, counts, strict=True)]

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on, short and JSON-able, for checkpoints."""
        return {
            "sources": [{"name": s.name, "num_tokens": s.num_tokens, "num_documents": s.dataset.num_documents, "weight": str(s.weight),
                         "max_samples": s.max_samples, "sha256": s.sidecar.files[".bin"].sha256 if s.sidecar else None}
                        for s in self.sources],
            "seq_len": self.seq_len, "seed": self.seed, "shuffle": self.shuffle, "document_mask": self.document_mask,
            "skip": [list(pair) for pair in self.skip],
        }

    def close(self) -> None:
        for dataset in self._datasets:
            dataset.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        return (TrainingData, (self.sources, self.seq_len, self.seed, self.vocab_size, self.document_mask, self.skip, self.shuffle))


def merge_ranges(ranges: Sequence[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """Sorted, disjoint `[start, stop)` ranges that cover the same numbers.  Raises DataError for one that runs backwards."""
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(a), int(b)) for a, b in ranges):
        if not 0 <= start <= stop:
            raise DataError(f"data.skip: [{start}, {stop}] is no range of samples; give [first, one past the last].")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def _open_source(source: SourceLike, seq_len: int, vocab_size: int, tokenizer_sha256: str | None) -> Source:
    dataset, sidecar = IndexedDataset(source.path), Sidecar.read(source.path)
    num_windows = max(0, dataset.num_tokens - 1) // seq_len
    if num_windows == 0:
        raise DataError(f"{bin_path(source.path)}: {dataset.num_tokens} tokens, fewer than the {seq_len + 1} of one sample "
                        f"(data.seq_len {seq_len} and its last target). Add text, or lower data.seq_len.")
    if sidecar is not None:
        _check_sidecar(source.path, dataset, sidecar, vocab_size, tokenizer_sha256)
    max_epochs = getattr(source, "max_epochs", None)
    max_samples = None if max_epochs is None else max(1, int(Fraction(str(max_epochs)) * num_windows))
    return Source(Path(source.path).name, source.path, dataset, sidecar, num_windows, Fraction(str(source.weight)), max_samples)


def _with_target_epochs(opened: list[Source], sources: Sequence[SourceLike]) -> list[Source]:
    """Sources that name `epochs` instead of a weight get the weight epochs × windows, so that all reach their target together."""
    targets = [getattr(source, "epochs", None) for source in sources]
    if all(target is None for target in targets):
        return opened
    if any(target is None for target in targets):
        raise DataError("Some sources give `epochs` and others a weight: give all of them the one or all of them the other "
                        f"({', '.join(f'{s.name}: epochs {t}' for s, t in zip(opened, targets, strict=True))}).")
    return [Source(s.name, s.path, s.dataset, s.sidecar, s.num_windows, Fraction(str(target)) * s.num_windows, s.max_samples)
            for s, target in zip(opened, targets, strict=True)]


def _check_sidecar(path: str, dataset: IndexedDataset, sidecar: Sidecar, vocab_size: int, tokenizer_sha256: str | None) -> None:
    """The cheap promises of the side file: counts, file size, tokenizer, vocabulary.  Hashes are `octant data verify`'s."""
    file, made_by = sidecar_path(path), sidecar.tokenizer
    if (sidecar.num_tokens, sidecar.num_documents) != (dataset.num_tokens, dataset.num_documents):
        raise DataError(f"{file}: says {sidecar.num_tokens} tokens in {sidecar.num_documents} documents, the corpus has {dataset.num_tokens} "
                        f"in {dataset.num_documents}. The files do not belong together: prepare the corpus again.")
    if tokenizer_sha256 is not None and made_by.sha256 != tokenizer_sha256:
        raise DataError(f"{file}: this corpus was made with tokenizer {made_by.name} ({made_by.kind}, sha256 {made_by.sha256[:12]}…), the run uses "
                        f"another (sha256 {tokenizer_sha256[:12]}…). Set data.tokenizer to that one, or prepare the corpus again.")
    if made_by.vocab_size > vocab_size:
        raise DataError(f"{file}: tokenizer {made_by.name} has {made_by.vocab_size} ids, the model's vocabulary {vocab_size}. "
                        "Raise model.vocab_size or prepare the corpus with the run's tokenizer.")
