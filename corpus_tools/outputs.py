"""A corpus under its final name: put there whole, and never in the place of another.

What a corpus was made from (inputs, options, tokenizer) is hashed into its side file.  So the same command again knows
that there is nothing to do, and any other is refused unless it says `--overwrite`.

`.bin`, `.idx` and `.json` are three renames.  Before the first, all three lie complete under a passing name; the side
file there is the sign that they do.  A command that was killed between the renames finishes them when it is given
again.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

from engine.data.corpus import mismatches
from engine.data.indexed import IndexedDataset
from engine.data.sidecar import ASIDE, Sidecar
from engine.errors import DataError, RequestError
from engine.writing import named_file, sync_directory

SUFFIXES = (".bin", ".idx", ".json")


def output_prefix(output: str | os.PathLike[str], shard: tuple[int, int] | None = None) -> Path:
    """The PREFIX that a user means, also when it is given as the name of one of its files; of a shard its own.

    Raises:
        RequestError: it is a folder.
    """
    path = named_file(output, "corpus")
    path = path.with_name(prefix_name(path.name))
    return path if shard is None else path.with_name(f"{path.name}-{shard[0]:05d}-of-{shard[1]:05d}")


def prefix_name(name: str) -> str:
    """`web`, also of `web.bin`, `web.idx`, `web.json` and `web.octant.json`."""
    ending = next((suffix for suffix in (ASIDE, *SUFFIXES) if name.endswith(suffix) and name != suffix), "")
    return name.removesuffix(ending)


def unused_prefix(prefix: str) -> str:
    """This prefix, or the first of `PREFIX-2`, `PREFIX-3` … that no corpus has: for a command that is suggested."""
    numbered = (f"{prefix}-{number}" for number in count(2))
    return next(name for name in chain([prefix], numbered) if not any(path.exists() for path in files_of(name)))


def files_of(prefix: str | os.PathLike[str], inputs: Collection[Path] = ()) -> list[Path]:
    """The three files of a corpus.  The side file goes by another name where an input has its own: texts are not ours.

    `inputs`: resolved paths.
    """
    files = [Path(f"{os.fspath(prefix)}{suffix}") for suffix in SUFFIXES]
    aside = Path(f"{os.fspath(prefix)}{ASIDE}")
    return [*files[:2], aside if files[2].resolve() in inputs or aside.exists() else files[2]]


def recipe(*parts: Any) -> str:
    """A hash of everything that a corpus is made from."""
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()


def is_made(files: Sequence[Path], made_from: str, overwrite: bool) -> bool:
    """Whether the corpus of these `files_of` is there already, made from just this; then there is nothing to do.

    Raises:
        RequestError: another is there, or other files of these names, and `overwrite` was not asked for.
    """
    prefix = files[0].with_suffix("")
    there = [path for path in files if path.exists()]
    if not there or overwrite:
        return False
    try:
        sidecar = Sidecar.read(prefix)
    except DataError:
        sidecar = None
    if sidecar is None or sidecar.made_from != made_from:
        raise RequestError(
            f"{', '.join(map(str, there))} {'is' if len(there) == 1 else 'are'} there already, made from other inputs, "
            "with other options or another tokenizer: give another --output, or replace what is there with --overwrite"
        )
    try:
        return not list(mismatches(IndexedDataset(prefix), sidecar))
    except DataError:
        return False  # ours, but no longer whole


def commit(staged: Path, files: Sequence[Path]) -> None:
    """Three complete files under a passing name -> the corpus of these `files_of`."""
    if Path(f"{staged}.bin").exists():
        files[2].unlink(missing_ok=True)  # it describes the files that are replaced now
    for source, final in zip(files_of(staged), files, strict=True):
        if source.exists():
            os.replace(source, final)
    sync_directory(files[0].absolute().parent)


def finish_commit(staged: Path, files: Sequence[Path], made_from: str) -> bool:
    """Whether this very corpus was being put in place when a command was killed; the rest of the renames is done."""
    try:
        sidecar = Sidecar.read(staged)
    except DataError:
        return False
    if sidecar is None or sidecar.made_from != made_from:
        return False
    pairs = list(zip(files_of(staged), files, strict=True))
    if any(source.exists() == final.exists() for source, final in pairs):
        return False  # something is lost, or in the way
    commit(staged, files)
    return True
