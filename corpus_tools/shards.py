"""A corpus prepared in pieces by several jobs, and the pieces as one.

Shards are runs of consecutive files, so that the merged shards are byte for byte what one job would have written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path

from corpus_tools.inputs import InputFile
from corpus_tools.outputs import commit, files_of, finish_commit, is_made, output_prefix, recipe
from engine.data.corpus import Corpus
from engine.data.indexed import merge
from engine.data.sidecar import Sidecar, make_sidecar
from engine.errors import DataError, RequestError
from engine.writing import write_errors


def shard_of(inputs: Sequence[InputFile], index: int, count: int) -> list[InputFile]:
    """A run of consecutive files, about 1/count of all bytes: those whose middle lies in that stretch.

    Raises:
        RequestError: the index is out of range or no file falls to it.
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


def merge_corpora(
    prefixes: Sequence[str | Path], output: str | Path, *, overwrite: bool = False, say: Callable[[str], None] = print
) -> Sidecar:
    """Corpora of one tokenizer, in the order given, as one with a side file of its own.

    Args:
        overwrite: replace what is there under these names; else the same corpus is left as it is and any other refused.

    Raises:
        DataError: side files are missing, tokenizers differ, or `output` is among them.
        RequestError: something else is there.
    """
    prefix = output_prefix(output)
    if prefix.resolve() in [Path(part).resolve() for part in prefixes]:
        raise DataError(f"{prefix} is among the corpora to merge: give the merged one another name")
    sidecars = [_sidecar_of(part) for part in prefixes]
    for part, sidecar in zip(prefixes, sidecars, strict=True):
        if sidecar.chat is not None:
            raise DataError(f"{part} is of conversations: prepare all files at once, or name each in data.train")
        if difference := sidecars[0].tokenizer.difference(sidecar.tokenizer):
            raise DataError(
                f"{prefixes[0]} and {part} were made with different tokenizers: {difference}; prepare them with the "
                "same one"
            )
    made_from = recipe("merge", [asdict(sidecar) for sidecar in sidecars])
    files = files_of(prefix)
    staged = prefix.with_name(f".{prefix.name}.merging")
    if finish_commit(staged, files, made_from) or is_made(files, made_from, overwrite):
        say(f"nothing to do: {prefix} is there, merged from these corpora")
        return _sidecar_of(prefix)
    with write_errors(prefix):
        try:
            merge(prefixes, staged)
            num_documents = sum(sidecar.num_documents for sidecar in sidecars)
            num_tokens = sum(sidecar.num_tokens for sidecar in sidecars)
            made_by, dtype = sidecars[0].tokenizer, sidecars[0].dtype
            whole = make_sidecar(staged, made_by, num_documents, num_tokens, dtype, made_from)
            whole.write(staged)
        except BaseException:
            for path in files_of(staged):
                path.unlink(missing_ok=True)
            raise
        commit(staged, files)
    return whole


def _sidecar_of(prefix: str | Path) -> Sidecar:
    sidecar = Corpus.open(prefix).sidecar
    if sidecar is None:
        raise DataError(f"{prefix} has no side file {prefix}.json, so nothing says which tokenizer made it")
    return sidecar
