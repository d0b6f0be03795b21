"""What is read at an address gives the same corpus as the same files on disk; no network is needed to try."""

from __future__ import annotations

import gzip
import io
import json
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from corpus_tools.inputs import expand_inputs
from engine import cli
from engine.errors import RequestError

DOCUMENTS = [json.dumps({"text": f"document {i}, some words of it"}) + "\n" for i in range(50)]
SUFFIXES = (".bin", ".idx")


@pytest.fixture()
def memory() -> Any:
    """An empty file system that lives in this process, with three files of a corpus and what is none."""
    system = fsspec.filesystem("memory")
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    system.pipe({"/web/a.jsonl": "".join(DOCUMENTS[:20]).encode(), "/web/b.jsonl.gz": gzip.compress(
        "".join(DOCUMENTS[20:40]).encode()), "/web/sub/c.jsonl": "".join(DOCUMENTS[40:]).encode(),
        "/web/_SUCCESS": b"", "/web/.hidden.jsonl": b"no", "/web/readme.md": b"no"})
    return system


def prepare(output: Path, *files: object) -> int:
    return cli.run(["prepare", *map(str, files), "--tokenizer", "bytes", "--output", str(output), "--workers", "1"])


@pytest.mark.parametrize("files", [["memory://web"], ["memory://web/*.jsonl*", "memory://web/sub/c.jsonl"],
                                   ["memory://web/a.jsonl", "memory://web/b.jsonl.gz", "memory://web/sub"]])
def test_the_corpus_is_that_of_the_same_files_on_disk(files: list[str], memory: Any, tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text("".join(DOCUMENTS))
    assert prepare(tmp_path / "local", tmp_path / "all.jsonl") == 0
    assert prepare(tmp_path / "remote", *files) == 0
    for suffix in SUFFIXES:
        assert (tmp_path / f"remote{suffix}").read_bytes() == (tmp_path / f"local{suffix}").read_bytes()


def test_parquet_is_read_in_place(memory: Any, tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [json.loads(line)["text"] for line in DOCUMENTS]
    with memory.open("/t.parquet", "wb") as file:
        parquet.write_table(arrow.table({"text": texts}), file)
    (tmp_path / "all.jsonl").write_text("".join(DOCUMENTS))
    assert prepare(tmp_path / "local", tmp_path / "all.jsonl") == 0
    assert prepare(tmp_path / "remote", "memory://t.parquet") == 0
    for suffix in SUFFIXES:
        assert (tmp_path / f"remote{suffix}").read_bytes() == (tmp_path / f"local{suffix}").read_bytes()


def test_a_file_address_is_the_file(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text("".join(DOCUMENTS))
    [file] = expand_inputs([f"file://{tmp_path}/all.jsonl"])
    assert (file.format, file.num_bytes) == (".jsonl", (tmp_path / "all.jsonl").stat().st_size)
    assert prepare(tmp_path / "out", f"file://{tmp_path}/all.jsonl") == 0


def test_what_has_changed_at_the_address_is_noticed(memory: Any) -> None:
    before = expand_inputs(["memory://web/a.jsonl"])
    assert expand_inputs(["memory://web/a.jsonl"]) == before
    memory.pipe("/web/a.jsonl", b"".join(line.encode() for line in reversed(DOCUMENTS[:20])))
    assert expand_inputs(["memory://web/a.jsonl"]) != before


def test_the_query_of_an_address_is_not_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda address: (Web(), address))
    monkeypatch.setattr("fsspec.get_filesystem_class", lambda protocol: Web)
    address = "https://example.org/data/a.jsonl.gz?download=true"
    [file] = expand_inputs([address])
    assert (file.path, file.format, file.compression) == (address, ".jsonl", ".gz")


class Web:
    """As much of a web server as is asked before reading."""

    def info(self, path: str) -> dict[str, Any]:
        return {"name": path, "size": None, "type": "file"}

    def ukey(self, path: str) -> str:
        return path

    def unstrip_protocol(self, path: str) -> str:
        return path


@pytest.mark.parametrize(("address", "message"), [
    ("memory://nowhere/a.jsonl", "input memory://nowhere/a.jsonl does not exist"),
    ("memory://nowhere/*.jsonl", "memory://nowhere/*.jsonl holds no .txt, .jsonl"),
    ("memory://web/readme.md", "memory://web/readme.md holds no .txt, .jsonl"),
    ("nonsense://a.jsonl", "input nonsense://a.jsonl: no package reads nonsense://; known are https, s3, gs, hf and"),
    ("allenai/c4", "input allenai/c4 does not exist; datasets of the Hub are read as hf://datasets/ORG/NAME/FILE"),
])
def test_what_cannot_be_read_is_refused(address: str, message: str, memory: Any) -> None:
    with pytest.raises(RequestError) as caught:
        expand_inputs([address])
    assert str(caught.value).startswith(message)


def test_a_protocol_without_its_package_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError("Please install s3fs to access S3")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    with pytest.raises(RequestError, match="s3:// needs a package that is not installed: Please install s3fs"):
        expand_inputs(["s3://bucket/a.jsonl"])
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(RequestError, match=r"an address is read with the package fsspec: pip install 'octant\[data\]'"):
        expand_inputs(["s3://bucket/a.jsonl"])


class Broken(io.BytesIO):
    """A file whose server has gone."""

    def read(self, size: int | None = -1, /) -> bytes:
        raise ConnectionResetError("peer has gone")


def test_a_connection_that_breaks_is_one_message_with_the_place(memory: Any, tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch,
                                                                capsys: pytest.CaptureFixture[str]) -> None:
    """It is no bad record to be skipped; and the same command goes on when it is back."""
    opened = MemoryFileSystem._open

    def breaking(self: MemoryFileSystem, path: str, *arguments: Any, **options: Any) -> Any:
        return Broken() if path.endswith("c.jsonl") else opened(self, path, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "_open", breaking)
        assert prepare(tmp_path / "out", "memory://web") == 1
        assert prepare(tmp_path / "out", "memory://web", "--on-error", "skip") == 1
    said = capsys.readouterr().err
    assert "memory:///web/sub/c.jsonl: reading broke off at byte 0 (ConnectionResetError: peer has gone)" in said
    assert prepare(tmp_path / "out", "memory://web") == 0
    (tmp_path / "all.jsonl").write_text("".join(DOCUMENTS))
    assert prepare(tmp_path / "local", tmp_path / "all.jsonl") == 0
    assert (tmp_path / "out.bin").read_bytes() == (tmp_path / "local.bin").read_bytes()
