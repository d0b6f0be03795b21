"""`octant data inspect` and `octant data verify`: what they say is what is there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from corpus_tools.inspect import segments, statistics
from corpus_tools.verify import verify
from engine.cli import run
from engine.data.indexed import IndexedDataset, IndexedWriter
from engine.data.sidecar import Sidecar, make_sidecar
from engine.data.tokenizer import ByteTokenizer
from engine.data.tokenizer_identity import TokenizerInfo
from engine.data.training_data import Sample, TrainingData
from tests.kit.made import Made, random_documents, write_corpus

TEXTS = ["hello world", "grüße aus 北京", "", "x" * 300]


def prepared(prefix: Path) -> Path:
    """TEXTS in bytes with the end of document, and the side file."""
    tokenizer = ByteTokenizer()
    with IndexedWriter(prefix, "u2") as writer:
        for text in TEXTS:
            writer.add_document([*text.encode(), 256])
        info = TokenizerInfo("bytes", "bytes", tokenizer.sha256, 257, 256)
        counts = writer.num_documents, writer.num_tokens
    make_sidecar(prefix, info, *counts, "uint16").write(prefix)
    return prefix


def octant(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = run(["data", *arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_statistics_count_every_document(tmp_path: Path) -> None:
    documents = [*random_documents(200, longest=500), [], [1], [2] * 4095, [3] * 4096]
    found = statistics(IndexedDataset(write_corpus(tmp_path / "c", documents)))
    lengths = [len(document) for document in documents]
    assert (found.documents, found.tokens) == (204, sum(lengths))
    assert (found.shortest, found.longest, found.mean_length) == (0, 4096, sum(lengths) / 204)
    for row in found.histogram:
        inside = [length for length in lengths if row.low <= length <= row.high]
        assert (row.documents, row.tokens) == (len(inside), sum(inside))
    assert sum(row.documents for row in found.histogram) == 204
    assert found.histogram[0].high == 0 and found.histogram[-1].low == 4096
    assert statistics(IndexedDataset(write_corpus(tmp_path / "empty", []))).histogram == ()


def test_inspecting_a_corpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prefix = str(prepared(tmp_path / "c"))
    code, out, _ = octant(capsys, "inspect", prefix)
    assert (
        code == 0
        and "4 documents, 333 tokens (uint16)" in out
        and "tokenizer bytes" in out
        and "256 –        511" in out
    )
    assert out.splitlines()[-1].startswith("next: octant data")
    code, out, _ = octant(capsys, "inspect", f"{prefix}.bin", "--json")
    fields = json.loads(out)
    assert (fields["documents"], fields["tokens"], fields["tokenizer"]["eod_id"]) == (4, 333, 256)
    code, out, _ = octant(capsys, "inspect", prefix, "--document", "1", "--tokenizer", "bytes")
    assert code == 0 and TEXTS[1] in out
    code, out, _ = octant(capsys, "inspect", prefix, "--document", "1", "--json")
    assert json.loads(out)["tokens"] == [*TEXTS[1].encode(), 256]
    code, _, err = octant(capsys, "inspect", prefix, "--document", "4")
    assert code == 2 and "document 4 asked for, it holds 4" in err
    code, _, err = octant(capsys, "inspect", prefix, "--samples", "0:3")
    assert code == 2 and "CONFIG.yaml" in err


def config_for(tmp_path: Path, *extra: str) -> list[str]:
    prepared(tmp_path / "a")
    write_corpus(tmp_path / "b", random_documents(100, vocab_size=257))
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {preset: tiny}\n"
        "data:\n  tokenizer: bytes\n  seq_len: 16\n"
        f"  train: [{{path: {tmp_path}/a, weight: 0.3}}, {{path: {tmp_path}/b, weight: 0.7}}]\n"
        "batch: {global: 4}\nsteps: 25\n"
    )
    return [str(path), *extra]


def test_the_samples_shown_are_the_samples_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = octant(capsys, "inspect", *config_for(tmp_path, "run.seed=5"), "--samples", "7:19", "--json")
    data = TrainingData.open([Made(str(tmp_path / "a"), 0.3), Made(str(tmp_path / "b"), 0.7)], 16, 5, 257)
    lines = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [line["index"] for line in lines] == list(range(7, 19))
    for line in lines:
        assert set(line) == {"index", "source", "window", "tokens"}
        sample = data.sample(line["index"])
        assert (line["source"], line["window"], line["tokens"]) == (
            sample.source,
            sample.window,
            sample.tokens.tolist(),
        )


def test_samples_as_text_with_their_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = config_for(tmp_path, "data.document_mask=true", "data.train=" + json.dumps([{"path": f"{tmp_path}/a"}]))
    code, out, _ = octant(capsys, "inspect", *arguments, "--samples", "0:20")
    assert code == 0 and out.count("── sample") == 20
    assert "sample 0: source 0 (a), window" in out and ", not learned" in out and "xxxxxxxxxxxxxxxx" in out
    code, _, err = octant(capsys, "inspect", *arguments, "--samples", "4")
    assert code == 2 and "give A:B" in err
    code, _, err = octant(capsys, "inspect", *arguments, "--document", "4")
    assert code == 2 and "PREFIX" in err


def test_the_data_table_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = octant(capsys, "inspect", *config_for(tmp_path), "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [(row["name"], row["samples"], row["tokens"]) for row in rows] == [
        ("a", 30, 480),
        ("b", 70, 1120),
    ]
    assert rows[0]["epochs"] == 30 / ((333 - 1) // 16)
    _, out, _ = octant(capsys, "inspect", *config_for(tmp_path))
    assert "25 steps of 4 samples of 16 tokens" in out and "30.00%" in out


def test_segments_cut_where_documents_or_masks_change() -> None:
    sample = Sample(np.arange(7), np.array([1, 1, 0, 1, 1, 0], bool), np.array([0, 0, 0, 1, 1, 1], np.int32), 0, 0)
    found = [(s.document, s.learned, s.tokens.tolist()) for s in segments(sample)]
    assert found == [(0, True, [1, 2]), (0, False, [3]), (1, True, [4, 5]), (1, False, [6])]
    assert [s.tokens.tolist() for s in segments(Sample(np.arange(4), None, None, 0, 0))] == [[1, 2, 3]]


def overwrite(path: str, offset: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        os.pwrite(file.fileno(), data, offset)


@pytest.mark.parametrize(
    ("suffix", "offset", "content", "match"),
    [
        (".bin", 20, b"\x41\x00", r"c\.bin: sha256 \w+…, c\.json says \w+…"),
        (".bin", 20, b"\xff\xff", "holds token id 65535, but its tokenizer bytes ends at 256"),
        (".idx", 34, b"\x0d", r"sequence 0 has 13 tokens|sequence 1 has"),
        (".idx", 37, b"\xff", "sequence 0 has -"),
        (".idx", 34 + 16 + 8, b"\x02", "sequence 1 has 19 tokens and starts at byte 2; those before it end at byte 24"),
        (".idx", 34 + 48 + 8, b"\x03", "document 1 begins at sequence 3, the next one before it, at 2"),
        (".idx", 0, b"X", "an index starts with"),
    ],
)
def test_any_damage_is_found(tmp_path: Path, suffix: str, offset: int, content: bytes, match: str) -> None:
    prefix = str(prepared(tmp_path / "c"))
    assert verify(prefix).problems == [] and verify(prefix).notes == []
    overwrite(prefix + suffix, offset, content)
    problems = "\n".join(verify(prefix).problems)
    with pytest.raises(AssertionError, match=match):
        raise AssertionError(problems)


def test_every_single_flipped_bit_is_found(tmp_path: Path) -> None:
    prefix = str(prepared(tmp_path / "c"))
    for suffix in (".bin", ".idx"):
        content = Path(prefix + suffix).read_bytes()
        for position in range(0, len(content), 1 if suffix == ".idx" else 37):
            Path(prefix + suffix).write_bytes(
                content[:position] + bytes([content[position] ^ 1 << position % 8]) + content[position + 1 :]
            )
            assert verify(prefix).problems, f"{suffix}, byte {position}"
        Path(prefix + suffix).write_bytes(content)
    assert not verify(prefix).problems


def test_a_side_file_that_tells_something_else(tmp_path: Path) -> None:
    prefix = prepared(tmp_path / "c")
    sidecar = Sidecar.read(prefix)
    assert sidecar is not None and sidecar.files[".bin"].bytes == 666
    changed = Sidecar(sidecar.tokenizer, 5, 999, "int32", {".bin": sidecar.files[".bin"]})
    changed.write(prefix)
    assert Sidecar.read(prefix) == changed
    problems = "\n".join(verify(str(prefix)).problems)
    for part in (
        "tokens 999, the corpus has 333",
        "documents 5, the corpus has 4",
        "dtype int32",
        "says nothing about",
    ):
        assert part in problems


def test_verify_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut = str(prepared(tmp_path / "whole")), str(prepared(tmp_path / "cut"))
    foreign = str(write_corpus(tmp_path / "foreign", random_documents(5)))
    code, out, _ = octant(capsys, "verify", whole, foreign)
    assert code == 0 and "whole: whole" in out and "foreign.json is not there" in out
    os.truncate(f"{cut}.bin", 99)
    code, out, _ = octant(capsys, "verify", whole, cut, foreign)
    assert code == 1 and "cut: DAMAGED" in out and "99 bytes, but its index ends at 666 bytes" in out
    code, out, _ = octant(capsys, "verify", cut, "--json")
    assert code == 1 and not json.loads(out)["whole"]
    Path(f"{cut}.bin").unlink()
    assert octant(capsys, "verify", cut)[0] == 1
    code, _, err = octant(capsys, "verify", str(tmp_path / "nothing"))
    assert code == 2 and "neither" in err
