"""`octant prepare` stopped, killed and in shards: the bytes are those of one run from end to end."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from corpus_tools import readers
from corpus_tools.prepare import prepare
from corpus_tools.readers import read_texts
from corpus_tools.shards import merge_corpora
from engine.commands import data as data_command
from engine.data.sidecar import Sidecar
from engine.data.tokenizer import load_tokenizer
from engine.errors import DataError, RequestError
from tests.kit.corpora import corpus_bytes, documents_of, write_documents
from tests.kit.texts import chinese_texts


def _part_names(prefix: Path) -> list[str]:
    return sorted(path.name for path in Path(f"{prefix}.parts").glob("*.json"))


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Path], Path]:
    """Four files of which the third is bad: `prepare` stopped there, with two files done."""
    monkeypatch.setattr(readers, "BLOCK_BYTES", 2000)
    files = [write_documents(tmp_path / f"{i}.jsonl", chinese_texts(10, seed=i)) for i in range(4)]
    files[2].write_bytes(files[2].read_bytes() + b"{\n")
    with pytest.raises(DataError, match=r"2\.jsonl, line 11"):
        prepare(files, "bytes", tmp_path / "out", workers=1, part_seconds=0)
    return files, tmp_path / "out"


def _run_again(files: list[Path], out: Path, **options: str) -> tuple[str, bool]:
    """What it says about kept parts, and whether the result equals one made from scratch."""
    said: list[str] = []
    prepare(files, "bytes", out, workers=1, say=said.append, **options)  # type: ignore[arg-type]
    prepare(files, "bytes", out.with_name("scratch"), workers=1, say=lambda _: None, **options)  # type: ignore[arg-type]
    return "".join(said), corpus_bytes(out) == corpus_bytes(out.with_name("scratch"))


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
    assert documents_of(out)[0] == [*tokenizer.encode(first), tokenizer.eod_id]


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
    write_documents(tmp_path / "a.jsonl", chinese_texts(8_000))
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
    assert corpus_bytes(tmp_path / "out") == corpus_bytes(tmp_path / "whole")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_shards_merge_into_what_one_run_writes(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [write_documents(tmp_path / f"{i}.jsonl", chinese_texts(1 + 7 * i % 5, seed=i)) for i in range(9)]
    for index in range(3):
        prepare(files, model, tmp_path / "web", workers=1, shard=(index, 3))
    shards = sorted(tmp_path.glob("web-*"))
    assert [path.name for path in shards if path.suffix == ".bin"] == [f"web-0000{i}-of-00003.bin" for i in range(3)]
    names = list(map(str, shards))
    arguments = argparse.Namespace(action="merge", target=names, output=str(tmp_path / "merged"), overwrite=False)
    assert data_command.run(arguments) == 0
    assert "3 corpora, 26 documents" in capsys.readouterr().out
    prepare(files, model, tmp_path / "whole", workers=1)
    assert corpus_bytes(tmp_path / "merged")[:2] == corpus_bytes(tmp_path / "whole")[:2]
    merged, whole = Sidecar.read(tmp_path / "merged"), Sidecar.read(tmp_path / "whole")
    assert merged is not None and whole is not None
    assert replace(merged, made_from=whole.made_from) == whole


def test_shards_that_cannot_be(tmp_path: Path) -> None:
    files = [write_documents(tmp_path / f"{i}.jsonl", ["text"]) for i in range(2)]
    for shard, message in (((2, 2), "shards are 0/2 to 1/2"), ((-1, 2), "shards are"), ((3, 9), "no file falls to it")):
        with pytest.raises(RequestError, match=message):
            prepare(files, "bytes", tmp_path / "out", shard=shard)


def test_merging_needs_one_tokenizer(model: str, tmp_path: Path) -> None:
    file = write_documents(tmp_path / "a.jsonl", ["text"])
    prepare([file], "bytes", tmp_path / "a", workers=1)
    prepare([file], model, tmp_path / "b", workers=1)
    before = corpus_bytes(tmp_path / "a")
    with pytest.raises(DataError, match=r"a and .*b were made with different tokenizers: bytes .*, tok\.model "):
        merge_corpora([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    with pytest.raises(DataError, match="is among the corpora"):
        merge_corpora([tmp_path / "a", tmp_path / "a"], tmp_path / "a")
    assert corpus_bytes(tmp_path / "a") == before
    (tmp_path / "b.json").unlink()
    with pytest.raises(DataError, match="has no side file"):
        merge_corpora([tmp_path / "b"], tmp_path / "c")
