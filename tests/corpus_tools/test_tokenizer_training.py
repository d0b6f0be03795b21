"""`tokenizer train`: errors say what happened, and the files are there whole or not at all."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import sentencepiece

from corpus_tools.readers import read_texts
from corpus_tools.tokenizers import training
from corpus_tools.tokenizers.training import train_tokenizer
from engine.data.tokenizer import load_tokenizer
from engine.errors import DataError, RequestError, WorkerError
from tests.kit.texts import chinese_texts, english_texts

COMMAND = ["tokenizer", "train", "a.txt", "--vocab-size", "20000", "--output", "tok"]
ROOT = Path(__file__).parents[2]


def test_the_files_are_those_of_sentencepiece(tmp_path: Path) -> None:
    """The vocabulary as its own trainer writes it beside the model."""
    path = train_tokenizer([*english_texts(5), *chinese_texts(5)], 600, tmp_path / "ours")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(line for text in english_texts(5) for line in text.split("\n")),
        model_prefix=str(tmp_path / "theirs"), vocab_size=500, model_type="bpe", byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "theirs.model"))
    written = (tmp_path / "theirs.vocab").read_text().splitlines()
    assert written == [f"{theirs.id_to_piece(i)}\t{theirs.get_score(i):g}" for i in range(500)]
    ours = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert (tmp_path / "ours.vocab").read_text().split("\n")[:-1] == [
        f"{ours.id_to_piece(i)}\t{ours.get_score(i):g}" for i in range(600)
    ]
    assert sorted(p.name for p in tmp_path.glob("ours*")) == ["ours.model", "ours.vocab"]


def test_a_record_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "some text"}\n{"text": bad}\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 2: invalid JSON"):
        train_tokenizer(read_texts([tmp_path / "a.jsonl"]), 300, tmp_path / "tok")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known before the work where it can be, and after it with the reason."""
    def never() -> Iterator[str]:
        raise AssertionError("it was read")
        yield ""

    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RequestError, match=r"cannot write .*file/tok\.model: (Not a directory|File exists)"):
        train_tokenizer(never(), 300, tmp_path / "file" / "tok")
    with pytest.raises(RequestError, match=r"cannot write /proc/tok\.model"):
        train_tokenizer(never(), 300, "/proc/tok")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RequestError, match=r"cannot write .*tok\.model: No space left on device"):
        train_tokenizer(english_texts(5), 400, tmp_path / "tok")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_numbers_that_make_no_vocabulary(tmp_path: Path) -> None:
    for size, message in ((0, "too small"), (-5, "too small"), (10**9, "at most"), (20_000, "could not be trained on")):
        with pytest.raises(RequestError, match=message):
            train_tokenizer(english_texts(2), size, tmp_path / "tok")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("trains", [False, True], ids=["reading", "training"])
def test_an_interrupt_ends_it_at_once_and_leaves_nothing(tmp_path: Path, trains: bool) -> None:
    """Ctrl-C while the program reads and while SentencePiece trains, which is made to take for ever."""
    draw = random.Random(0)
    words = ("".join(draw.choices("abcdefghijklmnop", k=draw.randrange(3, 9))) for _ in range(200_000))
    (tmp_path / "a.txt").write_text("".join(f"{word}\n" if draw.random() < 0.1 else f"{word} " for word in words))
    process = subprocess.Popen(
        [sys.executable, "-m", "engine", *COMMAND], cwd=tmp_path, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True, env={**os.environ, "PYTHONPATH": str(ROOT)},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    wait_until(lambda: children.read_text() != "")
    trainer = int(children.read_text())
    wait_until(lambda: "serve()" in Path(f"/proc/{trainer}/cmdline").read_text())         # it has been started wholly
    lines = os.readlink(f"/proc/{trainer}/fd/0")
    open_while_reading = {lines, str(tmp_path / "a.txt")}                                  # or neither, when it trains
    wait_until(lambda: open_while_reading & open_files(process.pid) == (set() if trains else open_while_reading))
    os.kill(trainer, signal.SIGSTOP)
    process.send_signal(signal.SIGINT)
    try:
        _, said = process.communicate(timeout=2)
    except subprocess.TimeoutExpired:       # it came just before a write to the stopped process, which nothing ends
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "octant tokenizer: interrupted\n")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert not Path(f"/proc/{trainer}").exists(), "no orphan"


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def open_files(pid: int) -> set[str]:
    """What the process has open: the targets of its descriptors, those that vanish meanwhile left out."""
    found = set()
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            found.add(os.readlink(descriptor))
    return found


def test_a_process_that_is_killed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "START", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(WorkerError, match="killed by signal 9"):
        train_tokenizer(english_texts(3), 400, tmp_path / "tok")


def test_a_model_without_its_ending(tmp_path: Path) -> None:
    assert train_tokenizer(english_texts(3), 400, tmp_path / "v1.5") == tmp_path / "v1.5.model"
    assert load_tokenizer(tmp_path / "v1.5.model").vocab_size == 400
