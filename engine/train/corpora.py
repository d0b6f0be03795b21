"""The corpora of a run, opened and checked together; no torch, so that a launcher can refuse bad data at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from engine.config import Config, SourceConfig
from engine.config.objectives import OBJECTIVES
from engine.data.chat.comparisons import ComparisonSource
from engine.data.chat.corpus import ChatCorpus
from engine.data.chat.rows import ConversationSource, Fit
from engine.data.fim import FillInMiddle, sentinels_of
from engine.data.sample import Sample
from engine.data.sources import Source, check_tokenizer, mixed, no_sources, open_corpus
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.data.tokenizer_identity import TOKENIZER, TokenizerInfo
from engine.data.training_data import TrainingData
from engine.errors import DataError
from engine.model.fields import PTX


@dataclass(frozen=True)
class Corpora:
    """Training data, held-out data if any, and the tokenizer both were made with if it is known."""

    train: TrainingData
    valid: TrainingData | None
    tokenizer: TokenizerInfo | None

    @staticmethod
    def open(config: Config, prepared: Mapping[str, str] = MappingProxyType({})) -> Corpora:
        """Opens everything `config.data` names.

        Args:
            prepared: by the path of a conversation file, the prefix where it lies in tokens.

        Raises:
            DataError: a corpus is missing, damaged, too short, or made with another tokenizer.
        """
        data = config.data
        tokenizer = None if data.tokenizer is None else load_tokenizer(data.tokenizer)
        if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
            raise DataError(f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, the model's vocabulary "
                            f"{config.model.vocab_size}: raise model.vocab_size or use another tokenizer")
        opener = _Opener(config, None if tokenizer is None else tokenizer.info, _pad_id(tokenizer), prepared)
        sentinels = sentinels_of(data.fim_tokens, tokenizer, config.model.vocab_size) if data.fim else (0, 0, 0)
        fim = FillInMiddle(data.fim, data.fim_spm, sentinels, None, config.run.seed) if data.fim else None
        train = replace(opener, fim=fim).open(data.train, skip=data.skip)
        needed, there = config.num_samples, train.num_samples
        if there is not None and there < needed:
            batches = "growing batches" if config.batch.ramp else f"{config.batch.global_} sequences"
            raise DataError(f"{config.steps} steps of {batches} need {needed} samples, but with "
                            f"max_epochs the corpora give {there}: lower steps, raise max_epochs or add data")
        valid = opener.open([_once(source) for source in data.valid], shuffle=False) if data.valid else None
        corpora = Corpora(train, valid, opener.tokenizer)
        if valid is not None and config.eval.every and (data.document_mask or config.records is not None):
            num = corpora.num_evaluated(config)
            require_labels(", ".join(valid.source_names), map(valid.sample, range(num)), num)
        return corpora

    @property
    def conversations(self) -> list[ConversationSource]:
        """The sources of conversations among the training data."""
        return [source for source in self.train.sources if isinstance(source, ConversationSource)]

    @property
    def comparisons(self) -> list[ComparisonSource]:
        """All sources of comparisons, held-out ones last."""
        held_out = [] if self.valid is None else self.valid.sources
        return [source for source in (*self.train.sources, *held_out) if isinstance(source, ComparisonSource)]

    @property
    def end_ids(self) -> tuple[int, ...]:
        """What ends an answer in the conversations that are learned."""
        chats: list[ConversationSource | ComparisonSource] = [*self.conversations, *self.comparisons]
        return tuple(sorted({number for source in chats for number in source.corpus.end_ids}))

    def num_evaluated(self, config: Config) -> int:
        """Held-out samples of an evaluation: `eval.batches` global batches, or all where there are fewer."""
        wanted = config.eval.batches * config.batch.global_
        if self.valid is None:
            return 0
        return wanted if self.valid.num_samples is None else min(wanted, self.valid.num_samples)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data of a run, for its checkpoints."""
        return self.train.fingerprint() | (self.tokenizer.fingerprint() if self.tokenizer else {TOKENIZER: None})


@dataclass(frozen=True)
class _Opener:
    """How the sources of a run are opened."""

    config: Config
    tokenizer: TokenizerInfo | None
    pad_id: int
    prepared: Mapping[str, str]
    fim: FillInMiddle | None = None

    def open(self, sources: Sequence[SourceConfig], skip: Sequence[tuple[int, int]] = (),
             shuffle: bool = True) -> TrainingData:
        if not sources:
            raise no_sources()
        data, seed = self.config.data, self.config.run.seed
        opened = mixed([self._source(source) for source in sources], sources)
        return TrainingData(opened, data.seq_len, seed, skip=skip, shuffle=shuffle).checked()

    def _source(self, source: SourceConfig) -> Source:
        config, data = self.config, self.config.data
        objective, vocab_size = config.run.objective, config.model.vocab_size
        of_text = is_of_text(source, objective)
        tags = {PTX: np.array(of_text)} if objective == "sft" and config.sft.ptx_weight > 0 else {}
        if of_text:
            corpus = open_corpus(source, data.seq_len, vocab_size, self.tokenizer, data.document_mask)
            by = corpus.made_by or self.tokenizer
            return replace(corpus, tags=tags, fim=self.fim and replace(self.fim, end=by.eod_id if by else None))
        fit = Fit(data.seq_len, self.pad_id, data.pack, data.too_long, data.on_error)
        prefix = self.prepared.get(source.path, source.path)
        kind = config.records
        if (there := ChatCorpus(prefix).kind) != kind:
            raise DataError(f"{source.path} is of {there}; run.objective {objective} learns from {kind}")
        opened: ConversationSource | ComparisonSource
        if objective == "sft":
            opened = replace(ConversationSource.open(prefix, source, fit, vocab_size), tags=tags)
        else:
            opened = ComparisonSource.open(prefix, source, fit, vocab_size, scored=objective == "reward",
                                           answers=config.rows_per_sample, margins=config.reward.margin)
        check_tokenizer(prefix, opened.corpus.sidecar, vocab_size, self.tokenizer)
        return opened


def is_of_text(source: SourceConfig, objective: str) -> bool:
    """Whether a source is a corpus of text, and not of conversations."""
    return (source.kind or ("chat" if OBJECTIVES[objective].records else "pretrain")) == "pretrain"


def _pad_id(tokenizer: Tokenizer | None) -> int:
    """What rows are filled up with; it is no label, so that it may be any."""
    if tokenizer is None:
        return 0
    return tokenizer.eod_id if tokenizer.pad_id is None else tokenizer.pad_id


def require_labels(names: str, samples: Iterable[Sample], num_samples: int) -> None:
    """Refuses an evaluation in which nothing would be predicted.

    Raises:
        DataError: of the samples not one has a label that counts.
    """
    masks = (sample.loss_mask for sample in samples)
    if not any(mask is None or mask.any() for mask in masks):
        raise DataError(f"{names}: not one label counts in the {num_samples} windows of an evaluation. With "
                        "data.document_mask the first token of a document is no label: use longer documents, or set "
                        "it to false")


def _once(source: SourceConfig) -> SourceConfig:
    """The corpus with each window at most once."""
    return source.model_copy(update={"max_epochs": min(1.0, source.max_epochs or 1.0)})
