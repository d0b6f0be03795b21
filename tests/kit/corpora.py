"""Files of documents in every format, and what a prepared corpus holds."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.data.indexed import IndexedDataset


def json_lines(texts: list[str], name: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, name: text}).encode() + b"\n" for i, text in enumerate(texts))


def write_documents(path: Path, texts: list[str]) -> Path:
    """Documents in the format the file's name asks for."""
    data = b""
    if ".jsonl" in path.name:
        data = json_lines(texts)
    elif ".json" in path.name:
        data = json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=2).encode()
    elif ".parquet" in path.name:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        sink = io.BytesIO()
        parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), sink)
        data = sink.getvalue()
    path.write_bytes(compressed(path.suffix)(data))
    return path


def compressed(suffix: str) -> Callable[[bytes], bytes]:
    if suffix == ".gz":
        return lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])  # two members
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = zstandard.ZstdCompressor()
        return lambda data: half.compress(data[: len(data) // 2]) + half.compress(data[len(data) // 2 :])
    return lambda data: data


def documents_of(prefix: Path) -> list[list[int]]:
    corpus = IndexedDataset(prefix)
    return [corpus.document(i).tolist() for i in range(corpus.num_documents)]


def corpus_bytes(prefix: Path) -> tuple[bytes, bytes, bytes]:
    bin_, idx, json_ = (Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json"))
    return bin_, idx, json_
