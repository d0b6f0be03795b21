"""The corpora of a run, opened and checked together; no torch, so that a launcher can refuse bad data at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from engine.config import Config
from engine.data.tokenizer import load_tokenizer
from engine.data.tokenizer_identity import TOKENIZER, TokenizerInfo
from engine.data.training_data import TrainingData
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
        valid = TrainingData.open(data.valid, data.seq_len, config.run.seed, vocab_size, shuffle=False,
                                  document_mask=data.document_mask, tokenizer=info) if data.valid else None
        return Corpora(train, valid, info)

    def fingerprint(self) -> dict[str, Any]:
        """What identifies the data of a run, for its checkpoints."""
        return self.train.fingerprint() | (self.tokenizer.fingerprint() if self.tokenizer else {TOKENIZER: None})
