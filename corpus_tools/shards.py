"""A corpus prepared in pieces by several jobs, and the pieces as one.

Shards are runs of consecutive files, so that the merged shards are byte for byte what one job would have written.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from corpus_tools.inputs import InputFile
from engine.data.indexed import merge
from engine.data.sidecar import Sidecar, make_sidecar, sidecar_path
from engine.errors import DataError, RequestError


def shard_of(inputs: Sequence[InputFile], index: int, count: int) -> list[InputFile]:
    """A run of consecutive files, about 1/count of all bytes: those whose middle lies in that stretch.

    Raises RequestError where the index is out of range or no file falls to it.
    """
    if not 0 <= index < count:
        raise RequestError(f"--shard {index}/{count}: shards are 0/{count} to {count - 1}/{count}")
    total = sum(file.num_bytes for file in inputs)
    ends = accumulate(file.num_bytes for file in inputs)
    middles = (end - file.num_bytes / 2 for end, file in zip(ends, inputs, strict=True))
    mine = [file for file, middle in zip(inputs, middles, strict=True) if int(count * middle / max(1, total)) == index]
    if not mine:
        raise RequestError(f"--shard {index}/{count}: no file falls to it, there are {len(inputs)}; take fewer shards")
    return mine


def shard_prefix(output: str | Path, index: int, count: int) -> str:
    """Where a shard of the corpus `output` goes."""
    return f"{output}-{index:05d}-of-{count:05d}"


def merge_corpora(prefixes: Sequence[str | Path], output: str | Path) -> Sidecar:
    """Corpora of one tokenizer, in the order given, as one with a side file of its own.

    Raises DataError where side files are missing, tokenizers differ, or `output` is among them.
    """
    if Path(output).resolve() in [Path(prefix).resolve() for prefix in prefixes]:
        raise DataError(f"{output} is among the corpora to merge: give the merged one another name")
    sidecars = []
    for prefix in prefixes:
        sidecar = Sidecar.read(prefix)
        if sidecar is None:
            raise DataError(f"{prefix} has no side file {prefix}.json, so nothing says which tokenizer made it")
        sidecars.append(sidecar)
    for prefix, sidecar in zip(prefixes, sidecars, strict=True):
        if difference := sidecars[0].tokenizer.difference(sidecar.tokenizer):
            raise DataError(
                f"{prefixes[0]} and {prefix} were made with different tokenizers: {difference}; prepare them with the "
                "same one"
            )
    sidecar_path(output).unlink(missing_ok=True)  # it described what is replaced now
    merge(prefixes, output)
    num_documents = sum(sidecar.num_documents for sidecar in sidecars)
    num_tokens = sum(sidecar.num_tokens for sidecar in sidecars)
    whole = make_sidecar(output, sidecars[0].tokenizer, num_documents, num_tokens, sidecars[0].dtype)
    whole.write(output)
    return whole
