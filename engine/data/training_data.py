"""The order of training: sample i of a run, as a function of (corpora, weights, seed, i) and nothing else.

    i ──skip──▶ stream index ──mixture──▶ source, position ──permutation──▶ window ──pread──▶ seq_len + 1 tokens

* A *window* w of a corpus covers tokens w·seq_len … w·seq_len + seq_len of its flat stream (Megatron's fixed windows):
  seq_len inputs, and the same shifted by one as targets.  Neighbours share a token; an epoch has
  (num_tokens - 1) // seq_len windows.
* Position p of a source is in epoch e = p div num_windows, and every epoch of every source has a permutation of its
  own, keyed by (seed, source, e): each window exactly once per epoch.
* The mixture deals samples to sources by weight.  `skip` takes ranges out of the stream of samples, before they are
  numbered: sample i is the i-th that is left.

Nothing is built when a run starts, and nothing is saved but the number of consumed samples.  The data-parallel size
does not occur: ranks take the i that are theirs, so a run that goes on with another number of devices still sees every
sample exactly once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from engine.data.indexed import bin_path
from engine.data.mixture import Mixture
from engine.data.permutation import Permutation, derive_key
from engine.data.skipping import merge_ranges, num_left, stream_index
from engine.data.sources import Source, SourceLike, open_sources
from engine.data.tokenizer_identity import TOKENIZER, TokenizerInfo
from engine.errors import DataError
from engine.model.fields import Field

CACHED_EPOCHS = 64


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence: inputs `tokens[:-1]`, targets `tokens[1:]`."""

    tokens: np.ndarray  # int64 [seq_len + 1]
    loss_mask: np.ndarray | None  # bool [seq_len]: False where the target is not to be learned; None: all are
    document_ids: np.ndarray | None  # int32 [seq_len]: the inputs' documents, 0, 1, …; None: no document mask
    source: int
    window: int
    extra: Mapping[Field, np.ndarray] = field(default_factory=dict)  # what the objective needs besides, without rows
    rest: tuple[Sample, ...] = ()  # further sequences that belong to the same sample: the other text of a pair


@dataclass(frozen=True)
class SourceShare:
    """A row of the data table: what a run of some length takes from one source."""

    name: str
    share: float  # of all samples
    samples: int
    tokens: int
    epochs: float
    source_tokens: int  # in the corpus


class TrainingData:
    """Random access to the samples of a run.  Every process opens its own, with `TrainingData.open`."""

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        seed: int,
        vocab_size: int,
        document_mask: bool = False,
        skip: Sequence[tuple[int, int]] = (),
        shuffle: bool = True,
    ) -> None:
        self.sources = tuple(sources)
        self.seq_len, self.seed, self.vocab_size = seq_len, seed, vocab_size
        self.document_mask, self.shuffle = document_mask, shuffle
        self.skip = merge_ranges(skip)
        self.mixture = Mixture([s.weight for s in sources], [s.max_samples for s in sources])
        self._datasets = [source.dataset for source in sources]
        self._num_windows = [source.num_windows for source in sources]
        self._permutation = lru_cache(CACHED_EPOCHS)(self._make_permutation)

    @staticmethod
    def open(
        sources: Sequence[SourceLike],
        seq_len: int,
        seed: int,
        vocab_size: int,
        *,
        document_mask: bool = False,
        skip: Sequence[tuple[int, int]] = (),
        tokenizer: TokenizerInfo | None = None,
        shuffle: bool = True,
    ) -> TrainingData:
        """Open a mixture of corpora; `shuffle=False` keeps every source in its own order, for validation.

        Raises:
            DataError: as in `open_sources`, or the first window of a source has ids outside the vocabulary.
        """
        opened = open_sources(sources, seq_len, vocab_size, tokenizer)
        data = TrainingData(opened, seq_len, seed, vocab_size, document_mask, skip, shuffle)
        for source in range(data.num_sources):
            data.window(source, 0)
        return data

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
        return None if total is None else num_left(self.skip, total)

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, window) of a sample: the order itself, without reading a token."""
        source, position = self.mixture.locate(stream_index(self.skip, int(sample)))
        epoch, place = divmod(position, self._num_windows[source])
        return source, self._permutation(source, epoch)(place) if self.shuffle else place

    def _make_permutation(self, source: int, epoch: int) -> Permutation:
        return Permutation(self._num_windows[source], derive_key(self.seed, source, epoch))

    def sample(self, index: int) -> Sample:
        """Sample `index` ≥ 0 of the run, in the order of consumption over all epochs.

        Raises:
            DataError: the mixture is exhausted before that, or token ids lie outside the vocabulary.
        """
        source, window = self.locate(index)
        return self.window(source, window)

    def window(self, source: int, window: int) -> Sample:
        """One window of one source, read and checked.

        Training takes the whole windows; there may be one more (`windows_and_rest`), which is shorter and is filled up
        with tokens that do not count.
        """
        start, stop = window * self.seq_len, (window + 1) * self.seq_len + 1
        raw = self._datasets[source].tokens(start, min(stop, self._datasets[source].num_tokens))
        if raw.max() >= self.vocab_size or (raw.dtype.kind == "i" and raw.min() < 0):
            self._refuse_tokens(source, start, raw)
        loss_mask, document_ids = self._document_masks(source, start) if self.document_mask else (None, None)
        if (missing := stop - start - len(raw)) > 0:
            raw = np.pad(raw, (0, missing), mode="edge")
            loss_mask = np.ones(self.seq_len, bool) if loss_mask is None else loss_mask
            loss_mask[-missing:] = False
        return Sample(raw.astype(np.int64), loss_mask, document_ids, source, window)

    def windows_and_rest(self, source: int) -> int:
        """Windows that hold every token of a source, the shorter one at the end included."""
        return -(-(self._datasets[source].num_tokens - 1) // self.seq_len)

    def _document_masks(self, source: int, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Documents numbered within the window, and no loss where the target belongs to the next one."""
        begins = np.zeros(self.seq_len + 1, bool)
        stop = min(start + self.seq_len + 1, self._datasets[source].num_tokens)
        begins[self._datasets[source].document_starts(start, stop) - start] = True
        return ~begins[1:], np.cumsum(begins[:-1], dtype=np.int32)

    def _refuse_tokens(self, source: int, start: int, tokens: np.ndarray) -> None:
        position = int(np.flatnonzero((tokens < 0) | (tokens >= self.vocab_size))[0])
        raise DataError(
            f"{bin_path(self.sources[source].path)}: token {start + position} is {int(tokens[position])}, outside the "
            f"model's vocabulary of {self.vocab_size} (0 to {self.vocab_size - 1}). The corpus was made with another "
            "tokenizer or is damaged: check it with `octant data verify`."
        )

    def counts(self, num_samples: int) -> list[int]:
        """Samples per source among the first `num_samples`."""
        end = stream_index(self.skip, num_samples)
        counts = self.mixture.counts(end)
        for edges in self.skip:
            before, after = (self.mixture.counts(min(edge, end)) for edge in edges)
            counts = [count - (b - a) for count, a, b in zip(counts, before, after, strict=True)]
        return counts

    def report(self, num_samples: int) -> list[SourceShare]:
        """What the first `num_samples` take from every source: the data table of the GPT-3 and LLaMA papers."""
        return [
            SourceShare(
                name=source.name,
                share=count / max(1, num_samples),
                samples=count,
                tokens=count * self.seq_len,
                epochs=count / source.num_windows,
                source_tokens=source.dataset.num_tokens,
            )
            for source, count in zip(self.sources, self.counts(num_samples), strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on, JSON-able, for checkpoints, and the tokenizer where a side file tells."""
        made_by = [source.sidecar.tokenizer.fingerprint() for source in self.sources if source.sidecar]
        return (made_by[0] if made_by else {TOKENIZER: None}) | {
            "sources": [
                {
                    "name": source.name,
                    "num_tokens": source.dataset.num_tokens,
                    "num_documents": source.dataset.num_documents,
                    "sha256": source.sidecar.files[".bin"].sha256 if source.sidecar else None,
                    "weight": str(source.weight),
                    "max_samples": source.max_samples,
                }
                for source in self.sources
            ],
            "seq_len": self.seq_len,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "document_mask": self.document_mask,
            "skip": [list(edges) for edges in self.skip],
        }

    def close(self) -> None:
        """Give the files back."""
        for dataset in self._datasets:
            dataset.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        state = (self.seq_len, self.seed, self.vocab_size, self.document_mask, self.skip, self.shuffle)
        return TrainingData, (self.sources, *state)

