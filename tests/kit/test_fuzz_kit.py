"""The kit for damaged inputs sees what it is there to see, and hypothesis gives it as many inputs as were asked for."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.errors import DataError, WorkerError
from tests.kit.fuzz import TOTALS, Box, Reader, bent, damaged, fuzz, hostile


class Raw(DataError):
    def __str__(self) -> str:
        return super().__str__() + "\x1b[2J"


def read(folder: Path) -> None:
    """A reader with every fault there is, chosen by its file."""
    word = (folder / "file").read_bytes()
    if word == b"refuse":
        raise DataError(f"{folder}/file: not a file of ours")
    if word == b"silent":
        raise DataError("something is wrong")
    if word == b"raw":
        raise Raw(f"{folder}/file: holds an escape")
    if word == b"endless":
        raise DataError(f"{folder}/file: " + "a" * 10_000)
    if word == b"ours":
        raise WorkerError(f"{folder}/file: died")
    if word == b"nonsense":
        raise AssertionError("minus one layers")
    if word == b"bug":
        raise ZeroDivisionError
    if word == b"exit":
        raise SystemExit(2)
    if word == b"hungry":
        bytearray(1 << 32)
    while word == b"busy":
        pass
    if word == b"stuck":
        time.sleep(100)
    if word == b"dead":
        os.kill(os.getpid(), 11)


@pytest.mark.parametrize(("word", "kind", "text"), [
    ("take", "accepted", ""), ("refuse", "refused", "not a file of ours"), ("silent", "unclear", "names no file"),
    ("raw", "unclear", "control character"), ("endless", "unclear", "characters"), ("ours", "unclear", "exit code 1"),
    ("nonsense", "nonsense", "minus one layers"), ("bug", "traceback", "ZeroDivisionError"),
    ("exit", "traceback", "SystemExit"), ("hungry", "traceback", "MemoryError"), ("busy", "hang", "in read"),
    ("stuck", "hang", "in read"), ("dead", "killed", ""),
])
def test_every_fault_is_seen(word: str, kind: str, text: str) -> None:
    box = Box(Reader("example", read, limit_seconds=0.5))
    outcome = box({"file": word.encode()})
    assert outcome.kind == kind and text in outcome.text, outcome
    again = box({"file": b"take"})
    box.close()
    assert again.kind == "accepted"


def test_faults_are_counted_and_kept(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"take")
    words = st.sampled_from((b"take", b"refuse", b"bug"))
    with pytest.raises(AssertionError, match=r"inputs were neither refused nor rightly accepted\n  (\S+)") as caught:
        fuzz(Reader("example of the kit", read, tmp_path), st.fixed_dictionaries({"file": words}), request)
    counts = TOTALS.pop("example of the kit")
    assert counts["traceback"] > 0 and set(counts) <= {"accepted", "refused", "traceback"}
    kept = Path(str(caught.value).splitlines()[1].split()[0])
    assert (kept / "file").read_bytes() == b"bug"


@given(damaged(b"0123456789"), bent({"a": [1, {"b": 2}], "c": "d"}), hostile())
def test_strategies_give_damage(data: bytes, value: object, other: bytes) -> None:
    assert isinstance(data, bytes) and isinstance(other, bytes)
