"""`PREFIX.json`, the file beside a corpus that says what it is: which tokenizer made it, how much there is, and
every file's hash.

Megatron's format records neither.  With this file training refuses a corpus made by another tokenizer before it
starts, and `octant data verify` finds a flipped bit.  Foreign Megatron data has none and is read all the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engine.data.tokenizer_identity import TokenizerInfo
from engine.errors import DataError
from engine.reading import read_object, shown

VERSION = 1
SUFFIXES = (".bin", ".idx")
ASIDE = ".octant.json"
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class FileInfo:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Sidecar:
    """The contents of `PREFIX.json`; `files` is keyed by suffix (`.bin`, `.idx`)."""

    tokenizer: TokenizerInfo
    num_documents: int
    num_tokens: int
    dtype: str
    files: dict[str, FileInfo]
    made_from: str | None = None  # a hash of inputs, options and tokenizer; foreign and older side files have none
    chat: dict[str, Any] | None = None  # of conversations: how they were made (`engine.data.chat.corpus`)
    version: int = VERSION

    def write(self, prefix: str | os.PathLike[str]) -> None:
        """Write `PREFIX.json` by rename."""
        path = sidecar_path(prefix)
        partial = path.with_name(path.name + ".partial")
        with open(partial, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=1, ensure_ascii=False)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)

    @staticmethod
    def read(prefix: str | os.PathLike[str]) -> Sidecar | None:
        """The side file of a corpus, or None where there is none.

        Raises:
            DataError: what has its name is no side file.
        """
        path = sidecar_path(prefix)
        if not path.exists():
            return None
        fields = read_object(path, "the side file of a corpus", DataError)
        try:
            return _parse(fields)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}: not a corpus's side file of version {VERSION} ({type(error).__name__}: {error}). "
                "Prepare the corpus again, or remove the file to read it as foreign Megatron data, unchecked."
            ) from error


def _parse(fields: dict[str, Any]) -> Sidecar:
    if fields["version"] != VERSION:
        raise ValueError(f"version is {shown(fields['version'])}")
    files = {suffix: FileInfo(_count(info["bytes"]), _text(info["sha256"])) for suffix, info in fields["files"].items()}
    made_by = fields["tokenizer"]
    tokenizer = TokenizerInfo(
        _text(made_by["kind"]),
        _text(made_by["name"]),
        _text(made_by["sha256"]),
        _count(made_by["vocab_size"]),
        *(None if made_by.get(key) is None else _count(made_by[key]) for key in ("eod_id", "bos_id")),
    )
    counts = _count(fields["num_documents"]), _count(fields["num_tokens"])
    made_from, chat = fields.get("made_from"), _chat(fields.get("chat"))
    return Sidecar(tokenizer, *counts, _text(fields["dtype"]), files, made_from, chat)


def _chat(value: Any) -> dict[str, Any] | None:
    """What later reading relies on is there."""
    if value is None:
        return None
    for file in value["files"]:
        _text(file["path"]), _text(file["unit"])
    _text(value["kind"]), _count(value["skipped"]), [_count(number) for number in value["end_ids"]]
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is no text")
    return value


def _count(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{shown(value)} is no count")
    return value


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    """`PREFIX.json`; `PREFIX.octant.json` where the text that the corpus was made from has that name."""
    aside = Path(f"{os.fspath(prefix)}{ASIDE}")
    return aside if aside.exists() else Path(f"{os.fspath(prefix)}.json")


def describe_file(path: str | os.PathLike[str]) -> FileInfo:
    """Size and SHA-256 of a file, read in chunks."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileInfo(num_bytes, digest.hexdigest())


def make_sidecar(
    prefix: str | os.PathLike[str],
    tokenizer: TokenizerInfo,
    num_documents: int,
    num_tokens: int,
    dtype: str,
    made_from: str | None = None,
) -> Sidecar:
    """The side file for a finished corpus: its counts as given, its files hashed."""
    return Sidecar(
        tokenizer,
        num_documents,
        num_tokens,
        dtype,
        {suffix: describe_file(f"{os.fspath(prefix)}{suffix}") for suffix in SUFFIXES},
        made_from,
    )
