"""Opening the corpora of a mixture, and refusing those that do not fit the run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from engine.data.corpus import Corpus
from engine.data.indexed import IndexedDataset, bin_path
from engine.data.mixture import exact
from engine.data.sidecar import Sidecar, sidecar_path
from engine.data.tokenizer_identity import TokenizerInfo
from engine.errors import DataError


class SourceLike(Protocol):
    """What the configuration of a source offers; `epochs` and `max_epochs` may be absent."""

    @property
    def path(self) -> str: ...
    @property
    def weight(self) -> float: ...


@dataclass(frozen=True)
class Source:
    """One corpus of a mixture."""

    name: str  # the last part of its path
    path: str  # prefix of .bin and .idx
    dataset: IndexedDataset
    sidecar: Sidecar | None
    num_windows: int  # per epoch
    weight: Fraction  # relative to the other sources
    max_samples: int | None  # max_epochs, in samples


def open_sources(
    sources: Sequence[SourceLike], seq_len: int, vocab_size: int, tokenizer: TokenizerInfo | None
) -> list[Source]:
    """Open every corpus, in constant time and memory each.

    Raises:
        DataError: with the file and the numbers: a corpus is missing, damaged, too short for one window, or, where side
            files tell, made by another tokenizer than the run's or the others, or has more ids than `vocab_size`.
    """
    if not sources:
        raise DataError("No corpus is given: name at least one, e.g. `data.train: [{path: data/web}]`.")
    opened = [_open_source(source, seq_len, vocab_size, tokenizer) for source in sources]
    _check_one_tokenizer(opened)
    return _with_target_epochs(opened, [getattr(source, "epochs", None) for source in sources])


def _open_source(source: SourceLike, seq_len: int, vocab_size: int, tokenizer: TokenizerInfo | None) -> Source:
    corpus = Corpus.open(source.path)
    dataset, sidecar = corpus.dataset, corpus.sidecar
    num_windows = max(0, dataset.num_tokens - 1) // seq_len
    if num_windows == 0:
        raise DataError(
            f"{bin_path(source.path)}: {dataset.num_tokens} tokens, fewer than the {seq_len + 1} of one sample "
            f"(data.seq_len = {seq_len} and the last target). Add text, or lower data.seq_len."
        )
    if sidecar is not None:
        _check_tokenizer(source.path, sidecar, vocab_size, tokenizer)
    max_epochs = getattr(source, "max_epochs", None)
    max_samples = None if max_epochs is None else max(1, int(exact(max_epochs) * num_windows))
    name = Path(source.path).name
    return Source(name, source.path, dataset, sidecar, num_windows, exact(source.weight), max_samples)


def _check_one_tokenizer(opened: Sequence[Source]) -> None:
    """Also where the run names no tokenizer: ids of two cannot be learned together."""
    known = [(source.path, source.sidecar.tokenizer) for source in opened if source.sidecar]
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


def _check_tokenizer(path: str, sidecar: Sidecar, vocab_size: int, tokenizer: TokenizerInfo | None) -> None:
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
