"""The order of training: sample i of a run, as a function of (corpora, weights, seed, i) and nothing else.

    i ──skip──▶ stream index ──mixture──▶ source, position ──permutation──▶ window ──pread──▶ seq_len + 1 tokens

* A *window* w of a source is a sequence of seq_len + 1 tokens: seq_len inputs, and the same shifted by one as targets.
  Of a corpus it covers tokens w·seq_len … w·seq_len + seq_len of the flat stream (Megatron's fixed windows), so that
  neighbours share a token and an epoch has (num_tokens - 1) // seq_len of them; of conversations it is a row of whole
  ones (`engine.data.chat.rows`).
* Position p of a source is in epoch e = p div num_windows, and every epoch of every source has a permutation of its
  own, keyed by (seed, source, e): each window exactly once per epoch.
* The mixture deals samples to sources by weight.  `skip` takes ranges out of the stream of samples, before they are
  numbered: sample i is the i-th that is left.

Nothing is built when a run starts, and nothing is saved but the number of consumed samples.  The data-parallel size
does not occur: ranks take the i that are theirs, so a run that goes on with another number of devices still sees every
sample exactly once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from engine.data.mixture import Mixture
from engine.data.permutation import Permutation, derive_key
from engine.data.sample import Sample
from engine.data.skipping import merge_ranges, num_left, stream_index
from engine.data.sources import Source, SourceLike, open_sources
from engine.data.tokenizer_identity import TOKENIZER, TokenizerInfo

CACHED_EPOCHS = 64


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
    """Random access to the samples of a run.  Every process opens its own, of sources that it has opened."""

    def __init__(
        self,
        sources: Sequence[Source],
        seq_len: int,
        seed: int,
        *,
        skip: Sequence[tuple[int, int]] = (),
        shuffle: bool = True,
    ) -> None:
        self.sources = tuple(sources)
        self.seq_len, self.seed, self.shuffle = seq_len, seed, shuffle
        self.skip = merge_ranges(skip)
        self.mixture = Mixture([s.weight for s in sources], [s.max_samples for s in sources])
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
        opened = open_sources(sources, seq_len, vocab_size, tokenizer, document_mask)
        return TrainingData(opened, seq_len, seed, skip=skip, shuffle=shuffle).checked()

    def checked(self) -> TrainingData:
        """The same, after a look at the first window of every source.

        Raises:
            DataError: one cannot be read.
        """
        for source in range(self.num_sources):
            self.window(source, 0)
        return self

    def with_sources(self, sources: Sequence[Source]) -> TrainingData:
        """The same order of the same windows, of sources that say more about each."""
        return TrainingData(sources, self.seq_len, self.seed, skip=self.skip, shuffle=self.shuffle)

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
        """One window of one source, read and checked."""
        return self.sources[source].window(window, source)

    def by_source(self, num_samples: int) -> Iterator[tuple[str, Callable[[int], Sample], int]]:
        """The first `num_samples` source by source: a name, samples by their place among the source's, how many.

        The name is the last part of its path, or all of it where two would be called alike.
        """
        indices: dict[int, list[int]] = {}
        for index in range(num_samples):
            indices.setdefault(self.locate(index)[0], []).append(index)
        names = self.source_names
        for source, own in sorted(indices.items()):
            name = names[source] if names.count(names[source]) == 1 else self.sources[source].path
            yield name, partial(self._sample_of, own), len(own)

    def _sample_of(self, indices: Sequence[int], place: int) -> Sample:
        return self.sample(indices[place])

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
                source_tokens=source.num_tokens,
            )
            for source, count in zip(self.sources, self.counts(num_samples), strict=True)
        ]

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on, JSON-able, for checkpoints, and the tokenizer where a side file tells."""
        made_by = [source.made_by for source in self.sources if source.made_by]
        return (made_by[0].fingerprint() if made_by else {TOKENIZER: None}) | {
            "sources": [source.fingerprint() for source in self.sources],
            "seq_len": self.seq_len,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "document_mask": any(source.document_mask for source in self.sources),
            "skip": [list(edges) for edges in self.skip],
        }

    def close(self) -> None:
        """Give the files back."""
        for source in self.sources:
            source.close()

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the files itself."""
        make = partial(TrainingData, skip=self.skip, shuffle=self.shuffle)
        return make, (self.sources, self.seq_len, self.seed)
