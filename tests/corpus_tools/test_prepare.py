"""`octant prepare`: one corpus whatever the format, compression, workers and kills; bad input has a name."""

from __future__ import annotations

import argparse
import errno
import gzip
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from corpus_tools import inputs, readers
from corpus_tools.inputs import expand_inputs
from corpus_tools.prepare import prepare
from corpus_tools.readers import read_blocks, read_texts
from corpus_tools.shards import merge_corpora
from corpus_tools.tokenizers import fast_backend
from corpus_tools.tokenizers.training import train_tokenizer
from engine.commands import data as data_command
from engine.commands import prepare as command
from engine.data.indexed import IndexedDataset
from engine.data.sidecar import Sidecar, describe_file
from engine.data.tokenizer import load_tokenizer
from engine.errors import DataError, RequestError, WorkerError
from tests.kit.texts import chinese_texts, english_texts

TEXTS = [*english_texts(6), *chinese_texts(5), "x", " lead and tail \n", "\n"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_tokenizer([*english_texts(), *chinese_texts()], 1000, tmp_path_factory.mktemp("prepare") / "tok"))


def _json_lines(texts: list[str], name: str = "text") -> bytes:
    return b"".join(json.dumps({"id": i, name: text}).encode() + b"\n" for i, text in enumerate(texts))


def _write(path: Path, texts: list[str]) -> Path:
    """Documents in the format the file's name asks for."""
    data = b""
    if ".jsonl" in path.name:
        data = _json_lines(texts)
    elif ".json" in path.name:
        data = json.dumps([{"text": text} for text in texts], ensure_ascii=False, indent=2).encode()
    elif ".parquet" in path.name:
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        sink = io.BytesIO()
        parquet.write_table(pyarrow.table({"n": list(range(len(texts))), "text": texts}), sink)
        data = sink.getvalue()
    path.write_bytes(_compress(path.suffix)(data))
    return path


def _compress(suffix: str) -> Callable[[bytes], bytes]:
    if suffix == ".gz":
        return lambda data: gzip.compress(data[: len(data) // 2]) + gzip.compress(data[len(data) // 2 :])  # two members
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = zstandard.ZstdCompressor()
        return lambda data: half.compress(data[: len(data) // 2]) + half.compress(data[len(data) // 2 :])
    return lambda data: data


def _documents(prefix: Path) -> list[list[int]]:
    corpus = IndexedDataset(prefix)
    return [corpus.document(i).tolist() for i in range(corpus.num_documents)]


def _bytes(prefix: Path) -> tuple[bytes, bytes, bytes]:
    bin_, idx, json_ = (Path(f"{prefix}{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json"))
    return bin_, idx, json_


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("format", [".jsonl", ".json", ".parquet"])
def test_every_format_holds_the_same_documents(format: str, suffix: str, model: str, tmp_path: Path) -> None:
    file = _write(tmp_path / f"corpus{format}{suffix}", TEXTS)
    counts = prepare([file], model, tmp_path / "out", workers=1)
    tokenizer = load_tokenizer(model)
    assert _documents(tmp_path / "out") == [[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]
    assert counts.documents == len(TEXTS)
    assert counts.text_bytes == sum(len(text.encode()) for text in TEXTS)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_text_file_is_one_document(suffix: str, model: str, tmp_path: Path) -> None:
    for index, text in enumerate(TEXTS):
        (tmp_path / f"{index:02d}.txt{suffix}").write_bytes(_compress(suffix)(text.encode()))
    prepare([tmp_path], model, tmp_path / "out", workers=1)
    tokenizer = load_tokenizer(model)
    assert _documents(tmp_path / "out") == [[*tokenizer.encode(text), tokenizer.eod_id] for text in TEXTS]


@pytest.mark.parametrize("spec", ["bytes", "model"])
def test_a_long_text_is_encoded_in_fragments_with_the_same_ids(
    spec: str, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    spec = model if spec == "model" else spec
    text = "\n".join([*english_texts(5), *chinese_texts(5)])
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    (tmp_path / "b.txt").write_text("short", encoding="utf-8")
    prepare([tmp_path], spec, tmp_path / "out", workers=1, part_seconds=0)
    tokenizer = load_tokenizer(spec)
    blocks = list(read_blocks(expand_inputs([tmp_path / "a.txt"])[0], "text"))
    assert len(blocks) > 20 and sum(block.ends for block in blocks) == 1
    assert _documents(tmp_path / "out") == [[*tokenizer.encode(t), tokenizer.eod_id] for t in (text, "short")]


def test_a_huge_text_becomes_several_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT_BYTES", 5000)
    text = "\n".join(english_texts(8)) + "世" * 7000  # the last line is longer than a document may be
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    for name, join_texts in (("joined", True), ("whole", False)):
        blocks = list(read_blocks(expand_inputs([tmp_path / "a.txt"])[0], "text", join_texts))
        assert "".join(text for block in blocks for text in block.texts) == text, name
        sizes, size = [], 0
        for block in blocks:
            size = (size if block.continues else 0) + len(block.texts[0].encode())
            if block.ends:
                sizes.append(size)
        assert 2500 < max(sizes) <= 5000, name
        assert sum(sizes) == len(text.encode())


def test_blocks_depend_on_content_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 700)
    data = "\n".join(english_texts(6)).encode()
    (tmp_path / "a.txt").write_bytes(data)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(data))
    (tmp_path / "c.txt").write_bytes(data)
    plain, packed = (
        [(b.texts, b.continues, b.ends) for b in read_blocks(file, "text")]
        for file in expand_inputs([tmp_path / "a.txt", tmp_path / "b.txt.gz"])
    )
    assert plain == packed
    monkeypatch.setattr(inputs, "READ_BYTES", 97)
    again = [(b.texts, b.continues, b.ends) for b in read_blocks(expand_inputs([tmp_path / "c.txt"])[0], "text")]
    assert again == plain


def test_the_same_bytes_for_any_number_of_workers(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr("corpus_tools.prepare.BYTES_PER_WORKER", 1)
    (tmp_path / "long.txt").write_text("\n".join(english_texts(20)), encoding="utf-8")
    _write(tmp_path / "many.jsonl.gz", [*TEXTS, *chinese_texts(300, seed=2)])
    results = []
    for workers in (1, 2, 3):
        prepare([tmp_path / "long.txt", tmp_path / "many.jsonl.gz"], model, tmp_path / f"out{workers}", workers=workers)
        results.append(_bytes(tmp_path / f"out{workers}"))
    assert results[0] == results[1] == results[2]


def test_side_file(model: str, tmp_path: Path) -> None:
    prepare([_write(tmp_path / "a.jsonl", TEXTS)], model, tmp_path / "out", workers=1)
    sidecar, tokenizer = Sidecar.read(tmp_path / "out"), load_tokenizer(model)
    assert sidecar is not None
    assert (sidecar.tokenizer.sha256, sidecar.tokenizer.vocab_size) == (tokenizer.sha256, 1000)
    assert (sidecar.tokenizer.kind, sidecar.tokenizer.name) == ("sentencepiece", "tok.model")
    assert sidecar.tokenizer.eod_id == 2
    corpus = IndexedDataset(tmp_path / "out")
    assert (sidecar.num_documents, sidecar.num_tokens) == (len(TEXTS), corpus.num_tokens)
    assert (sidecar.dtype, corpus.dtype) == ("uint16", np.dtype("<u2"))
    assert sidecar.files == {suffix: describe_file(f"{tmp_path / 'out'}{suffix}") for suffix in (".bin", ".idx")}
    assert not (tmp_path / "out.parts").exists()


def test_without_end_of_document(tmp_path: Path) -> None:
    prepare([_write(tmp_path / "a.jsonl", ["ab", "c"])], "bytes", tmp_path / "out", workers=1, append_eod=False)
    assert _documents(tmp_path / "out") == [[97, 98], [99]]


def test_fields_and_lists_of_strings(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"lines": ["ab", "c"]}, {"lines": "d"}, {"lines": []}]))
    counts = prepare([tmp_path / "a.json"], "bytes", tmp_path / "out", workers=1, text_field="lines")
    assert list(read_texts([tmp_path / "a.json"], "lines")) == ["ab\nc", "d", ""]
    assert (counts.documents, counts.empty_documents) == (2, 1)


def test_json_that_is_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "READ_BYTES", 7)
    texts = ["a", "b" * 100, "世界 \\ \" \u2028 end", "", "c"]
    (tmp_path / "lines.json").write_bytes(_json_lines(texts))
    (tmp_path / "list.json").write_text(json.dumps([{"text": text, "n": [1.5, None, {"x": True}]} for text in texts]))
    (tmp_path / "pretty.json").write_text("\n".join(json.dumps({"text": text}, indent=4) for text in texts))
    for name in ("lines", "list", "pretty"):
        assert list(read_texts([tmp_path / f"{name}.json"])) == texts


def test_byte_order_marks_and_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + _json_lines(["a"]) + b"\r\n\n  \n" + _json_lines(["b"]))
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbftext\r\n")
    assert list(read_texts([tmp_path / "a.jsonl", tmp_path / "b.txt"])) == ["a", "b", "text\r\n"]


def test_inputs_are_files_folders_and_globs(tmp_path: Path) -> None:
    names = ["b.jsonl", "a.txt", "sub/c.jsonl.gz", "sub/d.md"]
    (tmp_path / "sub").mkdir()
    for name in names:
        (tmp_path / name).write_bytes(b"x")

    def found(*files: str) -> list[str]:
        return [str(Path(file.path).relative_to(tmp_path)) for file in expand_inputs(tmp_path / f for f in files)]

    assert found(".") == ["a.txt", "b.jsonl", "sub/c.jsonl.gz"]
    assert found("b.jsonl", ".") == ["b.jsonl", "a.txt", "sub/c.jsonl.gz"], "each once, in the order given"
    assert found("**/*.gz", "a.*") == ["sub/c.jsonl.gz", "a.txt"]
    for bad, message in (("none", "does not exist"), ("*.csv", "does not exist"), ("sub/d.md", "unknown format")):
        with pytest.raises(RequestError, match=message):
            found(bad)
    with pytest.raises(RequestError, match="holds no"):
        found("sub/*.md")


def test_side_files_are_no_input(tmp_path: Path) -> None:
    """Preparing a folder into itself, and again after a kill, reads neither the corpus's side file nor its parts'."""
    _write(tmp_path / "a.jsonl", ["one", "two"])
    for _ in range(2):
        counts = prepare([tmp_path], "bytes", tmp_path / "a", workers=1)
        assert counts.documents == 2
        (tmp_path / "a.parts").mkdir()
        for suffix in (".json", ".bin", ".idx"):
            (tmp_path / "a.parts" / f"part-00000{suffix}").write_text("{}")
        assert [Path(file.path).name for file in expand_inputs([tmp_path / "**" / "*"])] == ["a.jsonl"]


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("ab", "cd"):  # the second time nothing of the first may be taken for it
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(_json_lines([text]))))
        prepare(["-"], "bytes", tmp_path / "out", workers=1, overwrite=True)
        assert _documents(tmp_path / "out") == [[*text.encode(), 256]]


GOOD = _json_lines(["one", "two"])
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
    _write(tmp_path / "good.jsonl", ["first", "last"])
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
    assert _documents(tmp_path / "out") == [[*b"good", 256]]


def test_the_first_bad_record_is_reported_with_many_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 20_000)
    monkeypatch.setattr("corpus_tools.prepare.BYTES_PER_WORKER", 1)
    lines = _json_lines(["x" * 1000]) * 900
    (tmp_path / "a.jsonl").write_bytes(lines + b"{bad\n" + lines + b"{worse\n")
    for workers in (1, 3):
        with pytest.raises(DataError, match="line 901: invalid JSON"):
            prepare([tmp_path / "a.jsonl"], "bytes", tmp_path / "out", workers=workers)


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = _write(tmp_path / "a.jsonl", ["text"])
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
        prepare([_write(tmp_path / "a.jsonl", ["", ""])], "bytes", tmp_path / "out", workers=1)
    for wrong in ({"on_error": "ignore"}, {"workers": 0}, {"backend": "other"}):
        with pytest.raises(RequestError, match="--"):
            prepare([tmp_path / "a.jsonl"], "bytes", tmp_path / "out", **wrong)  # type: ignore[arg-type]


def _part_names(prefix: Path) -> list[str]:
    return sorted(path.name for path in Path(f"{prefix}.parts").glob("*.json"))


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], Path]:
    """Four files of which the third is bad: `prepare` stopped there, with two files done."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2000)
    files = [_write(tmp_path / f"{i}.jsonl", chinese_texts(10, seed=i)) for i in range(4)]
    files[2].write_bytes(files[2].read_bytes() + b"{\n")
    with pytest.raises(DataError, match=r"2\.jsonl, line 11"):
        prepare(files, "bytes", tmp_path / "out", workers=1, part_seconds=0)
    return files, tmp_path / "out"


def _run_again(files: list[Path], out: Path, **options: str) -> tuple[str, bool]:
    """What it says about kept parts, and whether the result equals one made from scratch."""
    said: list[str] = []
    prepare(files, "bytes", out, workers=1, say=said.append, **options)  # type: ignore[arg-type]
    prepare(files, "bytes", out.with_name("scratch"), workers=1, say=lambda _: None, **options)  # type: ignore[arg-type]
    return "".join(said), _bytes(out) == _bytes(out.with_name("scratch"))


def test_finished_parts_are_kept(stopped: tuple[list[Path], Path]) -> None:
    files, out = stopped
    num_parts = len(_part_names(out))
    assert num_parts > 4
    files[2].write_bytes(files[2].read_bytes()[:-2])  # the user mends the bad file
    said, equal = _run_again(files, out)
    kept = int(said.split(": ")[1].split()[0])
    assert 2 < kept < num_parts, "the parts of files 0 and 1, not those of the file that changed"
    assert equal


def test_parts_of_a_changed_file_are_done_again(stopped: tuple[list[Path], Path]) -> None:
    files, out = stopped
    files[2].write_bytes(files[2].read_bytes()[:-2])
    data = files[0].read_bytes()
    files[0].write_bytes(data.replace("世".encode(), "界".encode()))  # same size
    said, equal = _run_again(files, out)
    assert said == "" and equal


def test_parts_of_another_tokenizer_or_option_are_done_again(stopped: tuple[list[Path], Path], model: str) -> None:
    files, out = stopped
    files[2].write_bytes(files[2].read_bytes()[:-2])
    prepare(files, model, out, workers=1)
    tokenizer = load_tokenizer(model)
    first = next(read_texts([files[0]]))
    assert _documents(out)[0] == [*tokenizer.encode(first), tokenizer.eod_id]


def test_a_damaged_part_is_done_again(stopped: tuple[list[Path], Path]) -> None:
    files, out = stopped
    files[2].write_bytes(files[2].read_bytes()[:-2])
    os.truncate(f"{out}.parts/part-00001.bin", 10)
    said, equal = _run_again(files, out)
    assert " 1 finished part" in said and equal


KILLED = """
import sys
from corpus_tools.prepare import prepare
prepare([sys.argv[1]], sys.argv[2], sys.argv[3], workers=2, part_seconds=0.0)
"""


def test_a_killed_run_goes_on(model: str, tmp_path: Path) -> None:
    """SIGKILL in the middle: workers leave, the parts stay, the next run gives the same bytes as one never killed."""
    _write(tmp_path / "a.jsonl", chinese_texts(8_000))
    (tmp_path / "script.py").write_text(KILLED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", *sys.path])}
    arguments = [str(tmp_path / "script.py"), str(tmp_path / "a.jsonl"), model, str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, *arguments], env=environment)
    deadline = time.monotonic() + 60
    while len(_part_names(tmp_path / "out")) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    workers = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    num_parts = len(_part_names(tmp_path / "out"))
    assert num_parts >= 3
    while any(_alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(_alive(pid) for pid in workers), "no orphans"
    said: list[str] = []
    prepare([tmp_path / "a.jsonl"], model, tmp_path / "out", workers=1, say=said.append)
    assert f"{num_parts} finished part(s) kept" in said[0]
    prepare([tmp_path / "a.jsonl"], model, tmp_path / "whole", workers=1)
    assert _bytes(tmp_path / "out") == _bytes(tmp_path / "whole")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_dead_worker_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write(tmp_path / "a.jsonl", ["x" * 5_000_000] * 2)
    monkeypatch.setattr("corpus_tools.prepare._encoder", _encoder_that_dies)
    with pytest.raises(WorkerError, match="killed by signal 9"):
        prepare([tmp_path / "a.jsonl"], "bytes", tmp_path / "out", workers=2)


def _encoder_that_dies(*_: object) -> Callable[[object], None]:
    return lambda task: os.kill(os.getpid(), signal.SIGKILL)


def test_a_backend_that_disagrees_on_the_corpus_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reference = load_tokenizer("bytes")
    wrong = fast_backend.FastTokenizer(reference, lambda text: reference.encode_array(text.replace("q", "k")))
    monkeypatch.setattr("corpus_tools.prepare.accelerated", lambda _: wrong)
    file = _write(tmp_path / "a.jsonl", ["quite"])
    with pytest.raises(DataError, match="disagree on the text starting 'quite'"):
        prepare([file], "bytes", tmp_path / "out", workers=1)
    prepare([file], "bytes", tmp_path / "out", workers=1, backend="reference")
    assert _documents(tmp_path / "out") == [[*b"quite", 256]]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_bytes(_json_lines(["one", "", "two"]) + b"{\n")
    arguments = argparse.Namespace(
        files=[str(tmp_path / "a.jsonl")], tokenizer="bytes", output=str(tmp_path / "sub" / "out"), workers=None,
        field="text", on_error="skip", append_eod=True, backend="auto", shard=None, overwrite=False,
    )  # fmt: skip
    assert command.run(arguments) == 0
    printed = capsys.readouterr().out
    assert "2 documents, 6 bytes of text -> 8 tokens" in printed
    assert "1 empty documents were left out" in printed
    assert "a.jsonl, line 4: invalid JSON" in printed
    assert printed.splitlines()[-1] == f"next: octant data inspect {tmp_path / 'sub' / 'out'}"


def test_shards_merge_into_what_one_run_writes(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [_write(tmp_path / f"{i}.jsonl", chinese_texts(1 + 7 * i % 5, seed=i)) for i in range(9)]
    for index in range(3):
        prepare(files, model, tmp_path / "web", workers=1, shard=(index, 3))
    shards = sorted(tmp_path.glob("web-*"))
    assert [path.name for path in shards if path.suffix == ".bin"] == [f"web-0000{i}-of-00003.bin" for i in range(3)]
    names = list(map(str, shards))
    arguments = argparse.Namespace(action="merge", target=names, output=str(tmp_path / "merged"), overwrite=False)
    assert data_command.run(arguments) == 0
    assert "3 corpora, 26 documents" in capsys.readouterr().out
    prepare(files, model, tmp_path / "whole", workers=1)
    assert _bytes(tmp_path / "merged")[:2] == _bytes(tmp_path / "whole")[:2]
    merged, whole = Sidecar.read(tmp_path / "merged"), Sidecar.read(tmp_path / "whole")
    assert merged is not None and whole is not None
    assert replace(merged, made_from=whole.made_from) == whole


def test_shards_that_cannot_be(tmp_path: Path) -> None:
    files = [_write(tmp_path / f"{i}.jsonl", ["text"]) for i in range(2)]
    for shard, message in (((2, 2), "shards are 0/2 to 1/2"), ((-1, 2), "shards are"), ((3, 9), "no file falls to it")):
        with pytest.raises(RequestError, match=message):
            prepare(files, "bytes", tmp_path / "out", shard=shard)


def test_merging_needs_one_tokenizer(model: str, tmp_path: Path) -> None:
    file = _write(tmp_path / "a.jsonl", ["text"])
    prepare([file], "bytes", tmp_path / "a", workers=1)
    prepare([file], model, tmp_path / "b", workers=1)
    before = _bytes(tmp_path / "a")
    with pytest.raises(DataError, match=r"a and .*b were made with different tokenizers: bytes .*, tok\.model "):
        merge_corpora([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(DataError, match="is among the corpora"):
        merge_corpora([tmp_path / "a", tmp_path / "a"], tmp_path / "a")
    assert _bytes(tmp_path / "a") == before
    (tmp_path / "b.json").unlink()
    with pytest.raises(DataError, match="has no side file"):
        merge_corpora([tmp_path / "b"], tmp_path / "c")
