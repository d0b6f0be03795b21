"""`octant prepare` on bad input and in trouble: every failure has a name, and no half document stays."""

from __future__ import annotations

import errno
import gzip
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus_tools import readers
from corpus_tools.prepare import prepare
from corpus_tools.tokenizers import fast_backend
from engine.data.tokenizer import load_tokenizer
from engine.errors import DataError, RequestError, WorkerError
from tests.kit.corpora import documents_of, json_lines, write_documents

GOOD = json_lines(["one", "two"])

BAD_FILES = {
    "json.jsonl": (GOOD + b'{"text": "thr\n' + GOOD, r"json\.jsonl, line 3: invalid JSON", 4),
    "utf8.jsonl": (GOOD + b'{"text": "\xff"}\n' + GOOD, r"utf8\.jsonl, line 3: invalid UTF-8", 4),
    "field.jsonl": (GOOD + b'{"txt": "a", "n": 1}\n', r"field\.jsonl, line 3: no field 'text'.*fields are txt, n", 2),
    "type.jsonl": (GOOD + b'{"text": 3}\n', r"type\.jsonl, line 3: field 'text' holds a number, not text", 2),
    "array.jsonl": (GOOD + b'["a"]\n', r"array\.jsonl, line 3: expected a JSON object, found list", 2),
    "half.jsonl": (GOOD + b'{"text": "\\ud83d"}\n', r"half\.jsonl, line 3: .*surrogate", 2),
    "deep.jsonl": (GOOD + b'{"text": ' + b"[" * 100_000 + b"\n", r"deep\.jsonl, line 3: nested too deeply", 2),
    "list.json": (b'[{"text": "a"},\n {"text": "b"},\n {"text" "c"}]', r"list\.json, line 3: invalid JSON", 2),
    "open.json": (b'[{"text": "a"},\n {"text": "b"}', r"open\.json, line 2: the list never ends", 2),
    "after.json": (b'[{"text": "a"}]]', r"after\.json, line 1: invalid JSON", 1),
    "record.json": (b'[{"text": "a"}, {"text": null}]', r"record\.json, record 2: field 'text' holds NoneType", 1),
    "utf8.txt": (b"text \xff", r"utf8\.txt: invalid UTF-8 at byte 5 \(0xff\)", 0),
    "cut.txt": ("世".encode()[:2], r"cut\.txt: invalid UTF-8 at byte 0", 0),
    "empty.txt": (b"", r"empty\.txt: it is empty \(0 bytes\)", 0),
    "empty.jsonl": (b"", r"empty\.jsonl: it is empty", 0),
    "empty.json": (b"[]", r"empty\.json: it is empty", 0),
    "deep.json": (b'[{"text": "a"}, ' + b"[" * 100_000, r"deep\.json, line 1: nested too deeply", 1),
    "cut.jsonl.gz": (gzip.compress(GOOD * 50, 0)[:-30], r"cut\.jsonl\.gz: the \.gz file ends in the middle", 99),
    "flip.jsonl.gz": (gzip.compress(GOOD)[:-6] + b"\0" * 6, r"flip\.jsonl\.gz: the \.gz file is damaged", 0),
    "not.txt.gz": (b"plain", r"not\.txt\.gz: the \.gz file is damaged", 0),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_input_has_a_name(name: str, tmp_path: Path) -> None:
    """`stop` names file and place; `skip` keeps every good record, before and after, and counts."""
    data, message, good = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    write_documents(tmp_path / "good.jsonl", ["first", "last"])
    files = [tmp_path / "good.jsonl", tmp_path / name]
    with pytest.raises(DataError, match=message) as raised:
        prepare(files, "bytes", tmp_path / "out", workers=1)
    assert "--on-error skip" in str(raised.value)
    assert not (tmp_path / "out.idx").exists()
    counts = prepare(files, "bytes", tmp_path / "skipped", workers=1, on_error="skip")
    assert counts.skipped_records == 1 and len(counts.skipped_examples) == 1
    assert counts.documents == 2 + good


def test_damaged_zst_and_parquet(tmp_path: Path) -> None:
    zstandard = pytest.importorskip("zstandard")
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    (tmp_path / "cut.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(GOOD * 1000)[:-5])
    (tmp_path / "not.parquet").write_bytes(b"PAR1 or so")
    parquet.write_table(pyarrow.table({"body": ["a"]}), tmp_path / "column.parquet")
    parquet.write_table(pyarrow.table({"text": ["a", None, "b"]}), tmp_path / "null.parquet")
    for name, message in {
        "cut.jsonl.zst": "ends in the middle",
        "not.parquet": "not a readable parquet file",
        "column.parquet": "no column 'text'; its columns are body",
        "null.parquet": "null.parquet, row 2: field 'text' holds NoneType",
    }.items():
        with pytest.raises(DataError, match=message):
            prepare([tmp_path / name], "bytes", tmp_path / "out", workers=1)
    assert prepare([tmp_path / "null.parquet"], "bytes", tmp_path / "out", workers=1, on_error="skip").documents == 2


def test_a_text_that_turns_bad_leaves_no_half_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    (tmp_path / "a.txt").write_bytes(b"fine\n" * 200 + b"\xff")
    (tmp_path / "b.txt").write_bytes(b"good")
    counts = prepare([tmp_path / "a.txt", tmp_path / "b.txt"], "bytes", tmp_path / "out", workers=1, on_error="skip")
    assert (counts.documents, counts.skipped_records) == (1, 1)
    assert documents_of(tmp_path / "out") == [[*b"good", 256]]


def test_the_first_bad_record_is_reported_with_many_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr("corpus_tools.prepare.BYTES_PER_WORKER", 1)
    lines = json_lines(["x" * 1000]) * 900
    (tmp_path / "a.jsonl").write_bytes(lines + b"{bad\n" + lines + b"{worse\n")
    for workers in (1, 3):
        with pytest.raises(DataError, match="line 901: invalid JSON"):
            prepare([tmp_path / "a.jsonl"], "bytes", tmp_path / "out", workers=workers)


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_documents(tmp_path / "a.jsonl", ["text"])
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match=r"cannot write .*file/out: Not a directory"):
        prepare([file], "bytes", tmp_path / "file" / "out", workers=1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("engine.data.indexed.IndexedWriter.add_documents", full)
    with pytest.raises(RequestError, match=r"cannot write .*out: No space left on device"):
        prepare([file], "bytes", tmp_path / "out", workers=1)
    assert not (tmp_path / "out.idx").exists()


def test_nothing_to_prepare(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no documents: 2 empty, 0 unusable"):
        prepare([write_documents(tmp_path / "a.jsonl", ["", ""])], "bytes", tmp_path / "out", workers=1)
    for wrong in ({"on_error": "ignore"}, {"workers": 0}, {"backend": "other"}):
        with pytest.raises(RequestError, match="--"):
            prepare([tmp_path / "a.jsonl"], "bytes", tmp_path / "out", **wrong)  # type: ignore[arg-type]


def test_a_dead_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_documents(tmp_path / "a.jsonl", ["x" * 5_000_000] * 2)
    monkeypatch.setattr("corpus_tools.prepare._encoder", _encoder_that_dies)
    with pytest.raises(WorkerError, match="killed by signal 9"):
        prepare([tmp_path / "a.jsonl"], "bytes", tmp_path / "out", workers=2)


def _encoder_that_dies(*_: object) -> Callable[[object], None]:
    return lambda task: os.kill(os.getpid(), signal.SIGKILL)


def test_a_backend_that_disagrees_on_the_corpus_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_tokenizer("bytes")
    wrong = fast_backend.FastTokenizer(reference, lambda text: reference.encode_array(text.replace("q", "k")))
    monkeypatch.setattr("corpus_tools.prepare.accelerated", lambda _: wrong)
    file = write_documents(tmp_path / "a.jsonl", ["quite"])
    with pytest.raises(DataError, match="disagree on the text starting 'quite'"):
        prepare([file], "bytes", tmp_path / "out", workers=1)
    prepare([file], "bytes", tmp_path / "out", workers=1, backend="reference")
    assert documents_of(tmp_path / "out") == [[*b"quite", 256]]
