"""The corpora of a run, opened and checked together; no torch, so that a launcher can refuse bad data at once."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from engine.config import Config, SourceConfig
from engine.data.tokenizer import load_tokenizer
from engine.data.tokenizer_identity import TOKENIZER, TokenizerInfo
from engine.data.training_data import Sample, TrainingData
from engine.errors import DataError


@dataclass(frozen=True)
class Corpora:
    """Training data, held-out data if any, and the tokenizer both were made with if it is known."""

    train: TrainingData
    valid: TrainingData | None
    tokenizer: TokenizerInfo | None

    @staticmethod
    def open(config: Config) -> Corpora:
        """Opens everything `config.data` names.

        Raises:
            DataError: a corpus is missing, damaged, too short, or made with another tokenizer.
        """
        data = config.data
        info, vocab_size = None, config.model.vocab_size
        if data.tokenizer is not None:
            tokenizer = load_tokenizer(data.tokenizer)
            info = tokenizer.info
            if tokenizer.vocab_size > vocab_size:
                raise DataError(f"tokenizer {data.tokenizer} has {tokenizer.vocab_size} ids, the model's vocabulary "
                                f"{vocab_size}: raise model.vocab_size or use another tokenizer")
        train = TrainingData.open(data.train, data.seq_len, config.run.seed, vocab_size, skip=data.skip,
                                  document_mask=data.document_mask, tokenizer=info)
        needed, there = config.steps * config.batch.global_, train.num_samples
        if there is not None and there < needed:
            raise DataError(f"{config.steps} steps of {config.batch.global_} sequences need {needed} samples, but with "
                            f"max_epochs the corpora give {there}: lower steps, raise max_epochs or add data")
        valid = TrainingData.open([_once(source) for source in data.valid], data.seq_len, config.run.seed, vocab_size,
                                  shuffle=False, document_mask=data.document_mask, tokenizer=info) \
            if data.valid else None
        corpora = Corpora(train, valid, info)
        if valid is not None and config.eval.every and data.document_mask:
            num = corpora.num_evaluated(config)
            require_labels(valid, map(valid.sample, range(num)), num)
        return corpora

    def num_evaluated(self, config: Config) -> int:
        """Held-out samples of an evaluation: `eval.batches` global batches, or all where there are fewer."""
        wanted = config.eval.batches * config.batch.global_
        if self.valid is None:
            return 0
        return wanted if self.valid.num_samples is None else min(wanted, self.valid.num_samples)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data of a run, for its checkpoints."""
        return self.train.fingerprint() | (self.tokenizer.fingerprint() if self.tokenizer else {TOKENIZER: None})


def require_labels(data: TrainingData, samples: Iterable[Sample], num_samples: int) -> None:
    """Refuses an evaluation in which nothing would be predicted.

    Raises:
        DataError: of the samples, `num_samples` of `data`, not one has a label that counts.
    """
    masks = (sample.loss_mask for sample in samples)
    if not any(mask is None or mask.any() for mask in masks):
        raise DataError(f"{', '.join(data.source_names)}: not one label counts in the {num_samples} windows of an "
                        "evaluation. With data.document_mask the first token of a document is no label: use longer "
                        "documents, or set it to false")


def _once(source: SourceConfig) -> SourceConfig:
    """The corpus with each window at most once."""
    return source.model_copy(update={"max_epochs": min(1.0, source.max_epochs or 1.0)})
