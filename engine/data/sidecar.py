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

from engine.errors import DataError

VERSION = 1
SUFFIXES = (".bin", ".idx")
HASH_CHUNK_BYTES = 1 << 22


@dataclass(frozen=True)
class TokenizerInfo:
    """What made the ids.  `kind`: bytes, sentencepiece or hf; `sha256`: of the tokenizer's file or definition."""

    kind: str
    name: str
    sha256: str
    vocab_size: int
    eod_id: int | None


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
        """The side file of a corpus, or None where there is none.  Raises DataError for one that is no side file."""
        path = sidecar_path(prefix)
        try:
            return _parse(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{path}: not a corpus's side file of version {VERSION} ({type(error).__name__}: {error}). "
                "Prepare the corpus again, or remove the file to read it as foreign Megatron data, unchecked."
            ) from error


def _parse(fields: dict[str, Any]) -> Sidecar:
    if fields["version"] != VERSION:
        raise ValueError(f"version is {fields['version']}")
    files = {suffix: FileInfo(int(info["bytes"]), str(info["sha256"])) for suffix, info in fields["files"].items()}
    return Sidecar(
        TokenizerInfo(**fields["tokenizer"]),
        int(fields["num_documents"]),
        int(fields["num_tokens"]),
        str(fields["dtype"]),
        files,
    )


def sidecar_path(prefix: str | os.PathLike[str]) -> Path:
    return Path(f"{os.fspath(prefix)}.json")


def describe_file(path: str | os.PathLike[str]) -> FileInfo:
    """Size and SHA-256 of a file, read in chunks."""
    digest, num_bytes = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while chunk := file.read(HASH_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileInfo(num_bytes, digest.hexdigest())


def make_sidecar(
    prefix: str | os.PathLike[str], tokenizer: TokenizerInfo, num_documents: int, num_tokens: int, dtype: str
) -> Sidecar:
    """The side file for a finished corpus: its counts as given, its files hashed."""
    return Sidecar(
        tokenizer,
        num_documents,
        num_tokens,
        dtype,
        {suffix: describe_file(f"{os.fspath(prefix)}{suffix}") for suffix in SUFFIXES},
    )
