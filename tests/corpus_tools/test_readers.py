"""What is skipped is what is broken: every other record is read, and the count is the count."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus_tools import inputs, json_recovery, json_values, readers
from corpus_tools.inputs import decompressed, expand_inputs
from corpus_tools.json_values import Broken
from corpus_tools.readers import read_blocks, records_of
from engine.errors import DataError, RequestError

Read = tuple[list[str], list[str], int]


def read(path: Path, field: str = "text") -> Read:
    """Texts, places of what cannot be used, and how many records those are."""
    texts, bad, count = [], [], 0
    for file in expand_inputs([path]):
        for block in read_blocks(file, field, join_texts=False):
            records = records_of(block, field)
            texts += records.texts
            bad += [str(record).removeprefix(str(path)).lstrip(",: ") for record in records.bad]
            count += sum(record.count for record in records.bad)
    return texts, bad, count


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def test_a_line_over_the_limit_takes_no_other_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_RECORD_BYTES", 1000)
    monkeypatch.setattr(readers, "BLOCK_BYTES", 100)
    longest = "y" * (1000 - len('{"text": ""}'))
    lines = [json.dumps({"text": text}) for text in ("a", "x" * 5000, "b", longest, longest + "y", "c", "z" * 3000)]
    for chunk in (1, 7, 300, 1000, 100_000):
        monkeypatch.setattr(inputs, "READ_BYTES", chunk)
        for end in ("", "\n"):
            texts, bad, count = read(write(tmp_path / "a.jsonl", "\n".join(lines) + end))
            assert texts == ["a", "b", longest, "c"] and count == 3
            assert [place.split(":")[0] for place in bad] == ["line 2", "line 5", "line 7"]
            assert "longer than 1,000 bytes" in bad[0]


def test_a_line_of_a_gigabyte_costs_no_more_memory_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONGEST_RECORD_BYTES", 1 << 20)

    def chunks() -> Iterator[bytes]:
        yield b'{"text": "a"}\n{"text": "'
        for _ in range(4096):
            yield b"x" * (1 << 18)
        yield b'"}\n{"text": "b"}\n'

    sizes, texts = [], []
    for block in readers.line_blocks("a.jsonl", chunks()):
        sizes.append(len(block.lines))
        texts += records_of(block, "text").texts
    assert texts == ["a", "b"] and max(sizes) <= (1 << 20) + 100


BROKEN = [  # content, texts, broken
    ('{"text":"a"}\n{"text":bad}\n{"text":"b"}\n{"text":"c"}\n', "abc", 1),
    ('{"text":"a"}\n{"text":bad}\n{"text":worse}\n{"text":"c"}\n', "ac", 2),
    ('{"text":"a"\n{"text":"b"}\n{"text":"c"}\n', "bc", 1),
    ('{"text":"a}\n{"text":"b"}\n{"text":"c"}\n', "bc", 1),
    ('{"text":"a"}\n"text":"x"}\n{"text":"b"}\n', "ab", 1),
    ('garbage\n{"text":"b"}\nmore\nand more\n{"text":"c"}\n', "bc", 3),
    ('{"text":"a"}{"text":"b"}{"text":oops}{"text":"c"}', "abc", 1),
    ('{"l":[{"a":1},{"b":2}],"text":bad}\n{"text":"c"}', "c", 1),
    ('[{"text":"a"},{"text":bad},{"text":"b"}]', "ab", 1),
    ('[{"text":"a"},{"text":"b},{"text":"c"},{"text":"d"}]', "acd", 1),
    ('[{"text":"a"},{"text":"b",{"text":"c"},{"text":"d"}]', "acd", 1),
    ('[{"text":"a"},text":"x"},{"text":"c"}]', "ac", 1),
    ('[{"text":"a"} {"text":"b"}]', "ab", 1),
    ('[{"text":"a"}, oops, {"text":"b"}]', "ab", 1),
    ('[{"text":"a"}],{"text":"b"},{"text":"c"}]', "abc", 1),
    ('[{"l":[{"a":1},{"b":2}],"text":bad}, {"text":"c"}]', "c", 1),
    ('[\n  {\n    "text": "a"\n  },\n  {\n    "text": "x,\n    "n": 5\n  },\n  {\n    "text": "c"\n  }\n]', "ac", 1),
    ('[\n  {\n    "text": "a"\n  },\n  {\n    "l": [\n      {}\n    ],\n    "text" 1\n  },\n {"text":"c"}]', "ac", 1),
    ('[\n  {\n    "text": "a"\n  },\n ??\n    "text": "b"\n  },\n  {\n    "text": "c"\n  }\n]', "ac", 1),
    ('[{"text":"a"},\n {"text":"b"}', "ab", 1),
    ('[{"text":"a"}, {"text":"z}]', "a", 1),
    ('[{"text":"a"}]\n[{"text":"b"}]\n{"text":"c"}', "abc", 0),
    ('{"text":"a"}\n{"n": ' + "[" * 100_000 + '\n{"text":"b"}\n', "ab", 1),
    ('{"n": ' + "9" * 6000 + ', "text":"a"}\n{"text":"b"}', "ab", 0),
]


@pytest.mark.parametrize(("content", "texts", "broken"), BROKEN, ids=range(len(BROKEN)))
def test_json_goes_on_behind_what_is_broken(content: str, texts: str, broken: int) -> None:
    for size in (1, 5, len(content)):
        data = content.encode()
        found = list(json_values.json_values(data[start : start + size] for start in range(0, len(data), size)))
        assert [value["text"] for value in found if not isinstance(value, Broken)] == list(texts)
        assert sum(isinstance(value, Broken) for value in found) == broken


def test_a_record_over_the_limit_in_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_values, "LONGEST_RECORD_BYTES", 5000)
    monkeypatch.setattr(json_recovery, "FARTHEST_END", 1000)
    content = json.dumps([{"text": text} for text in ("a", "x" * 200_000, "b", "c")]).encode()
    found = list(json_values.json_values(content[start : start + 999] for start in range(0, len(content), 999)))
    assert [value.get("text") for value in found if not isinstance(value, Broken)] == ["a", "b", "c"]
    assert ["longer than" in str(value) for value in found if isinstance(value, Broken)] == [True]


def as_lines(records: list[str]) -> str:
    return "\n".join(records) + "\n"


def as_list(records: list[str]) -> str:
    return "[" + ", ".join(records) + "]"


def as_indented_list(records: list[str]) -> str:
    pretty = (json.dumps(json.loads(record), indent=2) if record[:1] == "{" and _good(record) else record
              for record in records)
    return "[\n" + ",\n".join("  " + record.replace("\n", "\n  ") for record in pretty) + "\n]"


def _good(record: str) -> bool:
    try:
        json.loads(record)
    except ValueError:
        return False
    return True


@st.composite
def spoiled_records(draw: st.DrawFn) -> tuple[list[str], list[str], int]:
    """Records, the texts of the good ones, and how many are broken: a token is wrong, or a quote, or a bracket."""
    word, plain = (st.text(st.sampled_from(letters), max_size=12) for letters in ('ab {}[],:"\\世\n', "ab 世"))
    records, good, broken = [], [], 0
    for index in range(draw(st.integers(1, 12))):
        damage = draw(st.sampled_from(("none", "none", "none", "token", "quote", "key", "comma")))
        text = f"{index} {draw(word if damage == 'none' else plain)}"  # a bracket behind a missing quote is anybody's
        record = json.dumps({"n": [{"a": index}, {"b": []}], "text": text, "z": None}, ensure_ascii=draw(st.booleans()))
        if damage == "none":
            good.append(text)
        else:
            broken += 1
            record = {"token": record.replace("null", "nul"), "quote": record.replace('"text":', '"text:'),
                      "key": record.replace('"z"', "z"), "comma": record.replace(', "z"', ' "z"')}[damage]
        records.append(record)
    return records, good, broken


@pytest.mark.parametrize(("suffix", "layout"), [(".jsonl", as_lines), (".json", as_lines), (".json", as_list),
                                                (".json", as_indented_list)])
@given(spoiled=spoiled_records())
@settings(max_examples=60)
def test_every_good_record_is_read(
    spoiled: tuple[list[str], list[str], int], suffix: str, layout: Callable[[list[str]], str],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    records, good, broken = spoiled
    texts, bad, count = read(write(tmp_path_factory.getbasetemp() / f"spoiled{suffix}", layout(records)))
    assert texts == good
    assert count == len(bad) == broken


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_a_byte_that_is_no_utf8_spoils_its_own_record(tmp_path: Path, suffix: str) -> None:
    lines = [b'{"text":"a"}', b'{"text":"\xff"}', b'{"n":"\xe4\xb8","text":"x"}', '{"text":"世"}'.encode()]
    texts, bad, count = read(write(tmp_path / f"a{suffix}", b"\n".join([*lines, b'{"text":"c"}'])))
    assert texts == ["a", "世", "c"] and count == 2
    assert [place.split(":")[0] for place in bad] == ["line 2", "line 3"] and "invalid UTF-8" in bad[0]


def test_a_text_goes_on_with_the_document_behind_an_invalid_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, "BLOCK_BYTES", 10)
    monkeypatch.setattr(readers, "LONGEST_DOCUMENT_BYTES", 40)
    whole = write(tmp_path / "a.txt", b"123456789\n" * 20)
    before, _, _ = read(whole)
    data = bytearray(whole.read_bytes())
    data[45] = data[61] = 0xFF
    texts, bad, count = read(write(whole, bytes(data)))
    assert len(before) > 3 and count == 1 and "invalid UTF-8 at byte 45" in bad[0]
    assert texts == before[:1] + before[2:]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt"])
def test_wide_encodings_are_named(tmp_path: Path, encoding: str, suffix: str) -> None:
    texts, bad, count = read(write(tmp_path / f"a{suffix}", '{"text":"a"}\n{"text":"b"}\n'.encode(encoding)))
    assert texts == [] and count == 1
    assert bad[0].startswith(f"line 1: this is {encoding[:6].upper()}, not UTF-8")


def test_wide_chinese_texts_and_what_only_begins_like_one(tmp_path: Path) -> None:
    assert "this is UTF-16" in read(write(tmp_path / "a.txt", "世界你好".encode("utf-16")))[1][0]
    assert read(write(tmp_path / "b.jsonl", b'\xff\xfe\n{"text":"b"}'))[::2] == (["b"], 1)


def test_nested_fields(tmp_path: Path) -> None:
    records = [{"data": {"text": "deep"}}, {"data.text": "as it stands"}, {"data": {"words": 1}}, {"data": 1}]
    texts, bad, count = read(write(tmp_path / "a.jsonl", as_lines(list(map(json.dumps, records)))), "data.text")
    assert texts == ["deep", "as it stands"] and count == 2
    assert bad[0] == "line 3: no field 'data.text' (see --field); its fields are data"


def test_field_names_are_shown_printably(tmp_path: Path) -> None:
    record = json.dumps({"a\nb\x1b": 1} | {f"key{index}": 1 for index in range(1000)})
    _, [bad], _ = read(write(tmp_path / "a.jsonl", record))
    assert bad.isprintable() and "a\\nb\\x1b" in bad and len(bad) < 500


class TestParquet:
    @pytest.fixture(autouse=True)
    def pyarrow(self) -> None:
        self.pa: Any = pytest.importorskip("pyarrow")
        self.parquet: Any = pytest.importorskip("pyarrow.parquet")

    def test_binary_nested_and_other_columns(self, tmp_path: Path) -> None:
        pa = self.pa
        columns = {
            "binary": pa.array([b"a", "世".encode(), b"\xff"]),
            "large": pa.array(["a", "b", "c"], pa.large_string()),
            "dictionary": pa.array(["a", "b", "a"]).dictionary_encode(),
            "lines": pa.array([["a", "b"], [], ["c"]]),
            "data": pa.array([{"n": 1, "text": "deep"}, {"n": 2, "text": None}, {"n": 3, "text": "x"}]),
            "number": pa.array([1, 2, 3]),
        }
        self.parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
        expected = {
            "binary": (["a", "世"], 1), "large": (["a", "b", "c"], 0), "dictionary": (["a", "b", "a"], 0),
            "lines": (["a\nb", "", "c"], 0), "data.text": (["deep", "x"], 1), "number": ([], 3),
        }  # fmt: skip
        for field, (texts, count) in expected.items():
            found = read(tmp_path / "a.parquet", field)
            assert found[::2] == (texts, count), found[1]
        assert "row 3: field 'binary' holds bytes that are no UTF-8" in read(tmp_path / "a.parquet", "binary")[1][0]
        for field in ("data.words", "words", "number.text", "data.text.x"):
            assert "its columns are binary, large" in read(tmp_path / "a.parquet", field)[1][0]

    def test_a_damaged_row_group_takes_no_other_with_it(self, tmp_path: Path) -> None:
        texts = [f"text {index}" for index in range(50)]
        self.parquet.write_table(self.pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=10,
                                 compression="none", use_dictionary=False, write_page_checksum=True)
        data = bytearray((tmp_path / "a.parquet").read_bytes())
        data[data.index(b"text 23")] ^= 1
        found, bad, count = read(write(tmp_path / "a.parquet", bytes(data)))
        assert found == texts[:20] + texts[30:] and count == 10
        assert len(bad) == 1 and bad[0].startswith("rows 21 to 30: its row group cannot be read")

    def test_a_cell_that_is_no_utf8(self, tmp_path: Path) -> None:
        self.parquet.write_table(self.pa.table({"text": ["a", "bad", "c"]}), tmp_path / "a.parquet", compression="none",
                                 use_dictionary=False, write_statistics=False)
        data = (tmp_path / "a.parquet").read_bytes()
        assert data.count(b"bad") == 1
        assert read(write(tmp_path / "a.parquet", data.replace(b"bad", b"b\xffd")))[::2] == (["a", "c"], 1)


def test_zeros_behind_a_gzip_file_are_no_damage(tmp_path: Path) -> None:
    lines = b'{"text":"a"}\n' * 3
    content = gzip.compress(lines) + b"\0" * 700 + gzip.compress(lines) + b"\0" * 512
    assert read(write(tmp_path / "a.jsonl.gz", content)) == (["a"] * 6, [], 0)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_bomb_is_unpacked_in_pieces(tmp_path: Path, suffix: str) -> None:
    """A gigabyte of zeros in one member takes about a megabyte as .gz, and about 33 KB as .zst."""
    path = tmp_path / f"bomb.txt{suffix}"
    if suffix == ".gz":
        with gzip.open(path, "wb", 9) as packed:
            for _ in range(256):
                packed.write(bytes(1 << 22))
    else:
        zstandard = pytest.importorskip("zstandard")
        with open(path, "wb") as raw, zstandard.ZstdCompressor(19).stream_writer(raw) as packed:
            for _ in range(256):
                packed.write(bytes(1 << 22))
    assert path.stat().st_size < 1_100_000
    total = 0
    with open(path, "rb") as file:
        for chunk in decompressed(file, suffix):
            assert len(chunk) <= 65 << 20
            total += len(chunk)
    assert total == 1 << 30


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1 << 18])
def test_unpacking_however_it_is_read(tmp_path: Path, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "READ_BYTES", size)
    monkeypatch.setattr(inputs, "OUTPUT_BYTES", 100)
    content = b"".join(b"%d zeros\n" % index + bytes(index) for index in range(0, 2000, 97))
    path = write(tmp_path / "a.gz", gzip.compress(content[:5000]) + gzip.compress(content[5000:]))
    with open(path, "rb") as file:
        assert b"".join(decompressed(file, ".gz")) == content
    for cut in (1, 9, len(path.read_bytes()) // 2):
        with open(write(tmp_path / "cut.gz", path.read_bytes()[:-cut]), "rb") as file:
            with pytest.raises(DataError, match="ends in the middle"):
                list(decompressed(file, ".gz"))


@pytest.mark.parametrize(("suffix", "place"), [(".gz", r"bytes 4,096 to 8,192"), (".zst", r"bytes 4,096 to 6,144")])
def test_damage_in_a_member_has_a_place_and_says_what_is_lost(tmp_path: Path, suffix: str, place: str) -> None:
    """Of three members of random text the second has a damaged header; the records that came before are kept."""
    numbers = random.Random(1)
    members = [b"".join(b'{"text": "%d %x"}\n' % (member, numbers.getrandbits(2000)) for _ in range(16))
               for member in range(3)]
    packed = [gzip.compress(member) if suffix == ".gz" else
              pytest.importorskip("zstandard").ZstdCompressor().compress(member) for member in members]
    assert 4096 < len(packed[0]) < 6000
    packed[1] = b"\xff\xff" + packed[1][2:]
    path = write(tmp_path / f"a.jsonl{suffix}", b"".join(packed))
    texts, bad, skipped = read(path)
    assert [text[0] for text in texts] == ["0"] * 16 and skipped == 1
    assert re.search(f"{place} cannot be unpacked, and all that follows them is lost", bad[0]), bad


def test_pipes_and_devices_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    write(tmp_path / "a.jsonl", '{"text":"a"}')
    for path in (tmp_path / "pipe.jsonl", Path("/dev/zero"), Path("/dev/null")):
        with pytest.raises(RequestError, match=r"it is a (pipe|device); text from a pipe is read as `-`"):
            expand_inputs([path])
    assert [Path(file.path).name for file in expand_inputs([tmp_path])] == ["a.jsonl"]
