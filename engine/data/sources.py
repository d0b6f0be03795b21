"""Opening the corpora of a mixture, and refusing those that do not fit the run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Protocol

from engine.data.indexed import IndexedDataset, bin_path
from engine.data.mixture import exact
from engine.data.sidecar import Sidecar, sidecar_path
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
    sources: Sequence[SourceLike], seq_len: int, vocab_size: int, tokenizer_sha256: str | None
) -> list[Source]:
    """Open every corpus, in constant time and memory each.

    Raises DataError, naming the file and the numbers, for corpora that are missing, damaged, too short for one window,
    or, where the side file tells, made by another tokenizer or with more ids than `vocab_size`.
    """
    if not sources:
        raise DataError("No corpus is given: name at least one, e.g. `data.train: [{path: data/web}]`.")
    opened = [_open_source(source, seq_len, vocab_size, tokenizer_sha256) for source in sources]
    return _with_target_epochs(opened, [getattr(source, "epochs", None) for source in sources])


def _open_source(source: SourceLike, seq_len: int, vocab_size: int, tokenizer_sha256: str | None) -> Source:
    dataset, sidecar = IndexedDataset(source.path), Sidecar.read(source.path)
    num_windows = max(0, dataset.num_tokens - 1) // seq_len
    if num_windows == 0:
        raise DataError(
            f"{bin_path(source.path)}: {dataset.num_tokens} tokens, fewer than the {seq_len + 1} of one sample "
            f"(data.seq_len = {seq_len} and the last target). Add text, or lower data.seq_len."
        )
    if sidecar is not None:
        _check_sidecar(source.path, dataset, sidecar, vocab_size, tokenizer_sha256)
    max_epochs = getattr(source, "max_epochs", None)
    max_samples = None if max_epochs is None else max(1, int(exact(max_epochs) * num_windows))
    name = Path(source.path).name
    return Source(name, source.path, dataset, sidecar, num_windows, exact(source.weight), max_samples)


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


def _check_sidecar(
    path: str, dataset: IndexedDataset, sidecar: Sidecar, vocab_size: int, tokenizer_sha256: str | None
) -> None:
    """What a side file promises and can be checked at once; hashes are for `octant data verify`."""
    file, made_by = sidecar_path(path), sidecar.tokenizer
    if (sidecar.num_tokens, sidecar.num_documents) != (dataset.num_tokens, dataset.num_documents):
        raise DataError(
            f"{file}: says {sidecar.num_tokens} tokens in {sidecar.num_documents} documents, the corpus has "
            f"{dataset.num_tokens} in {dataset.num_documents}. They do not belong together: prepare the corpus again."
        )
    if tokenizer_sha256 is not None and made_by.sha256 != tokenizer_sha256:
        raise DataError(
            f"{file}: the corpus was made with tokenizer {made_by.name} ({made_by.kind}, sha256 "
            f"{made_by.sha256[:12]}…), the run uses another (sha256 {tokenizer_sha256[:12]}…). "
            "Set data.tokenizer to that one, or prepare the corpus again."
        )
    if made_by.vocab_size > vocab_size:
        raise DataError(
            f"{file}: tokenizer {made_by.name} has {made_by.vocab_size} ids, the model's vocabulary {vocab_size}. "
            "Raise model.vocab_size, or prepare the corpus with the run's tokenizer."
        )
