"""What is no such file is said to be what it is, and nothing waits for it or allocates what it claims."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from engine.errors import CheckpointError
from engine.reading import read_object, shown

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 2471645608\n"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


@pytest.mark.parametrize(("content", "message"), [
    (b"", "it is no JSON: Expecting value: line 1 column 1"),
    (b"[1, 2]", r"it holds \[1, 2\], not an object"),
    (b"[" * 100_000, "it is nested too deep"),
    (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "it is nested too deep"),
    (b"1" * 5000, "a number of thousands of digits"),
    (b"3", "it holds 3, not an object"),
    (b'"' + b"x" * 5000 + b'"', "it holds 'xxx.{1,200}$"),
    (b'{"a": 1', "it is no JSON"),
    (b'{"a": "\xff"}', "byte 7 is no UTF-8"),
    (b"\xff\xfe{\0}\0", "byte 0 is no UTF-8"),
    (POINTER.encode(), "a Git LFS pointer to a file of 2,471,645,608 bytes that was not fetched; run `git lfs pull`"),
    (Path.mkdir, "it is a folder"),
    (pipe, "it is a pipe"),
    (sparse, "it has 1,099,511,627,776 bytes, and no more than 268,435,456 are read"),
    (None, "No such file or directory"),
], ids=range(15))
def test_one_sentence_says_what_is_there_instead(content: object, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=f"config.json cannot be read as a list of things: .*{message}") as caught:
        read_object(path, "a list of things", CheckpointError)
    assert "\n" not in str(caught.value) and caught.value.exit_code == 2 and time.monotonic() - start < 5


def test_an_object_is_read(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": [1, null, "ä"]}', encoding="utf-8")
    assert read_object(tmp_path / "x", "it", CheckpointError) == {"a": [1, None, "ä"]}


def test_values_are_shown_on_one_short_line() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    for value in ("x\n" * 1000, list(range(10**5)), 10**5000, deep, {"a": {"b": "c" * 900}}, b"\0" * 500, None):
        assert len(shown(value)) < 200 and "\n" not in shown(value)
