"""No command destroys what it didn't make: every command that writes, onto files that are somebody else's."""

from __future__ import annotations

import errno
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from corpus_tools.inputs import expand_inputs
from engine.cli import run
from engine.data.indexed import IndexedDataset
from engine.errors import RequestError
from engine.writing import MARK, named_file, write_errors, write_picture, write_whole
from tests.kit.texts import english_texts

FOREIGN = b"somebody's work of months\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """Texts, a tokenizer and corpora, from which every command has something to write."""
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in english_texts(3)))
    Path("b.jsonl").write_text('{"text": "another text"}\n' * 2)
    Path("words.txt").write_text("the quick brown fox jumps over the lazy dog 0123456789\n" * 50)
    octant("prepare a.jsonl --tokenizer bytes --output one --workers 1")
    octant("prepare b.jsonl --tokenizer bytes --output two --workers 1")
    octant("tokenizer train words.txt --vocab-size 310 --output tok.model")
    capsys.readouterr()
    return tmp_path


def octant(command: str) -> None:
    assert run(shlex.split(command)) == 0, command


WRITING = [  # a command, and the files it would write
    ("prepare a.jsonl --tokenizer bytes --output out --workers 1", ("out.bin", "out.idx", "out.json")),
    ("prepare a.jsonl --tokenizer bytes --output out --shard 0/1", ("out-00000-of-00001.bin",)),
    ("data merge one two --output out", ("out.bin", "out.idx", "out.json")),
    ("data clean a.jsonl --output out --workers 1", ("out/clean-00000.jsonl.gz", "out/report.md", "out/notes.txt")),
    ("tokenizer train words.txt --vocab-size 310 --output out.model", ("out.model", "out.vocab")),
    ("tokenizer extend tok.model --with tok.model --output out", ("out.model", "out.plan.json")),
    ("schedule 1f1b --stages 2 --microbatches 4 --svg out.svg", ("out.svg",)),
    ("plan CONFIG --schedule-svg out.svg", ("out.svg",)),
    ("bench matmul --json out.json --repeats 1 --size 8", ("out.json",)),
    ("bench network --json out.json --markdown out.md", ("out.json", "out.md")),
    ("bench mfu CONFIG --json out.json --markdown out.md --svg out.svg", ("out.json", "out.md", "out.svg")),
    ("demo --dir out", ("out/notes.txt", "out/demo.yaml")),
]
CASES = [(command, name) for command, names in WRITING for name in names]


def refusal(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    try:
        code = run(shlex.split(command))
    except SystemExit as exit:  # argparse
        code = exit.code  # type: ignore[assignment]
    assert code == 2, command
    return capsys.readouterr().err


@pytest.mark.parametrize(("command", "name"), CASES, ids=[f"{c.split(' --')[0]} onto {n}" for c, n in CASES])
def test_what_is_there_stays(folder: Path, command: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = Path(__file__).parents[1] / "configs" / "tiny.yaml"
    Path(name).parent.mkdir(exist_ok=True)
    Path(name).write_bytes(FOREIGN)
    before = sorted(folder.rglob("*"))
    said = refusal(command.replace("CONFIG", str(config)), capsys)
    assert name.split("/")[-1] in said or "out" in said
    assert Path(name).read_bytes() == FOREIGN
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize("command", [command for command, _ in WRITING[:6]])
def test_overwrite_replaces(folder: Path, command: str) -> None:
    for name in ("out.bin", "out.idx", "out.json", "out.model", "out.vocab", "out.plan.json"):
        Path(name).write_bytes(FOREIGN)
    if "clean" in command:
        Path("out").mkdir()
        Path("out/clean-00007.jsonl.gz").write_bytes(FOREIGN)
    octant(f"{command} --overwrite")
    if "clean" in command:
        names = ["_report.json", "clean-00000.jsonl.gz", "report.md"]
        assert sorted(path.name for path in Path("out").iterdir()) == names


def test_the_same_command_again_has_nothing_to_do(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, names in (
        ("prepare a.jsonl b.jsonl --tokenizer bytes --output out --workers 1", ("out.bin", "out.idx", "out.json")),
        ("data merge one two --output merged", ("merged.bin", "merged.idx", "merged.json")),
        ("data clean a.jsonl --output clean --workers 1", ("clean/_report.json", "clean/report.md")),
    ):
        octant(command)
        before = [(path, Path(path).read_bytes(), os.stat(path).st_mtime_ns) for path in names]
        capsys.readouterr()
        octant(command)
        assert "nothing to do" in capsys.readouterr().out
        assert [(path, Path(path).read_bytes(), os.stat(path).st_mtime_ns) for path in names] == before


@pytest.mark.parametrize("change", [
    "prepare b.jsonl --tokenizer bytes --output out", "prepare a.jsonl b.jsonl --tokenizer bytes --output out",
    "prepare a.jsonl --tokenizer tok.model --output out",
    "prepare a.jsonl --tokenizer bytes --output out --no-append-eod",
    "prepare a.jsonl --tokenizer bytes --output out --on-error skip", "data merge one two --output out",
])
def test_a_corpus_of_something_else_is_refused(folder: Path, change: str, capsys: pytest.CaptureFixture[str]) -> None:
    octant("prepare a.jsonl --tokenizer bytes --output out")
    before = [Path(f"out{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")]
    assert "are there already" in refusal(change, capsys)
    assert [Path(f"out{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")] == before
    octant(f"{change} --overwrite")
    assert [Path(f"out{suffix}").read_bytes() for suffix in (".bin", ".idx", ".json")] != before


def test_changed_input_is_another_corpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    octant("prepare a.jsonl --tokenizer bytes --output out")
    Path("a.jsonl").write_text('{"text": "changed"}\n')
    assert "--overwrite" in refusal("prepare a.jsonl --tokenizer bytes --output out", capsys)
    octant("data clean a.jsonl --output clean")
    Path("a.jsonl").write_text('{"text": "changed once more"}\n')
    assert "--overwrite" in refusal("data clean a.jsonl --output clean", capsys)


def test_a_damaged_corpus_is_made_again(folder: Path) -> None:
    octant("prepare a.jsonl --tokenizer bytes --output out")
    before = Path("out.bin").read_bytes()
    os.truncate("out.bin", 3)
    octant("prepare a.jsonl --tokenizer bytes --output out")
    assert Path("out.bin").read_bytes() == before


@pytest.mark.parametrize("moved", [0, 1, 2, 3])
def test_a_kill_between_the_renames(folder: Path, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever it dies, the same command again ends with the whole corpus, and no other is taken for it."""
    real, calls = os.replace, []

    def dies(source: object, target: object) -> None:
        if Path(str(target)).parent == Path():
            if len(calls) == moved:
                raise KeyboardInterrupt
            calls.append(target)
        real(source, target)  # type: ignore[arg-type]

    octant("prepare a.jsonl --tokenizer bytes --output whole")
    monkeypatch.setattr(os, "replace", dies)
    assert run(shlex.split("prepare a.jsonl --tokenizer bytes --output out")) == (1 if moved < 3 else 0)
    monkeypatch.setattr(os, "replace", real)
    octant("prepare a.jsonl --tokenizer bytes --output out")
    for suffix in (".bin", ".idx", ".json"):
        assert Path(f"out{suffix}").read_bytes() == Path(f"whole{suffix}").read_bytes()
    assert not Path("out.parts").exists()


@pytest.mark.parametrize("moved", range(4))
def test_a_kill_while_a_cleaned_corpus_moves(folder: Path, moved: int, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.replace, []

    def dies(source: object, target: object) -> None:
        if Path(str(target)).parent.name == "out":
            if len(calls) == moved:
                raise KeyboardInterrupt
            calls.append(target)
        real(source, target)  # type: ignore[arg-type]

    octant("data clean a.jsonl --output whole --workers 1")
    monkeypatch.setattr(os, "replace", dies)
    assert run(shlex.split("data clean a.jsonl --output out --workers 1")) == (1 if moved < 3 else 0)
    monkeypatch.setattr(os, "replace", real)
    octant("data clean a.jsonl --output out --workers 1")
    names = sorted(path.name for path in Path("whole").iterdir())
    assert sorted(path.name for path in Path("out").iterdir()) == names
    for name in names:
        assert Path("out", name).read_bytes() == Path("whole", name).read_bytes()


def test_files_in_the_folder_of_parts_are_left_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("out.parts").mkdir()
    Path("out.parts/notes.txt").write_bytes(FOREIGN)
    assert "notes.txt is not of octant's making" in refusal("prepare a.jsonl --tokenizer bytes --output out", capsys)
    assert Path("out.parts/notes.txt").read_bytes() == FOREIGN


def test_two_at_once_do_not_write_the_same_corpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = subprocess.Popen(
        [sys.executable, "-m", "engine", "prepare", "-", "--tokenizer", "bytes", "--output", "out", "--workers", "1"],
        stdin=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not Path("out.parts").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert "another process prepares this corpus" in refusal("prepare a.jsonl --tokenizer bytes --output out", capsys)
    held.send_signal(signal.SIGKILL)
    held.wait()
    octant("prepare a.jsonl --tokenizer bytes --output out")


@pytest.mark.parametrize("output", ["dd/", "nowhere/", "..", "dd/.."])
@pytest.mark.parametrize("command", [
    "prepare a.jsonl --tokenizer bytes", "data merge one two", "tokenizer train words.txt --vocab-size 310",
    "tokenizer extend tok.model --with tok.model",
])
def test_a_folder_is_no_name(folder: Path, command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("dd").mkdir()
    before = sorted(folder.parent.rglob("*"))
    assert f"{output} is a folder; give a name in it, such as" in refusal(f"{command} --output {output}", capsys)
    assert sorted(folder.parent.rglob("*")) == before


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".json"])
def test_the_name_of_a_file_is_its_prefix(folder: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    octant(f"prepare a.jsonl --tokenizer bytes --output x{suffix}")
    assert capsys.readouterr().out.splitlines()[-1] == "next: octant data inspect x"
    octant(f"data merge one.bin two.idx --output y{suffix}")
    assert capsys.readouterr().out.splitlines()[-1] == "next: octant data inspect y"
    assert {path.name for path in folder.glob("[xy]*")} == {f"{p}{s}" for p in "xy" for s in (".bin", ".idx", ".json")}
    assert IndexedDataset("x").num_documents == 3 and IndexedDataset("y").num_documents == 5


def test_an_output_that_is_an_input(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, said in (
        ("data merge one two --output one.bin --overwrite", "is among the corpora"),
        ("tokenizer extend tok.model --with tok.model --output tok --overwrite", "would replace one of the models"),
    ):
        before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
        assert said in refusal(command, capsys)
        assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("overwrite", ["", " --overwrite"])
def test_a_text_that_has_the_name_of_the_side_file(folder: Path, overwrite: str) -> None:
    """`prepare web.json --output web`: the text stays, and the side file goes beside it by another name."""
    command = f"prepare web.json --tokenizer bytes --output web{overwrite}"
    text = '[{"text": "a"}, {"text": "b"}]'
    Path("web.json").write_text(text)
    for _ in range(2):
        octant(command)
        assert Path("web.json").read_text() == text
        assert sorted(path.suffix for path in folder.glob("web*")) == [".bin", ".idx", ".json", ".json"]
    octant("data verify web")
    octant("data inspect web.octant.json")
    assert [file.path for file in expand_inputs(["web.*"])] == ["web.json"], "still a text, and the side file is none"
    octant("prepare a.jsonl --tokenizer bytes --output web --overwrite")
    assert Path("web.json").read_text() == text
    assert IndexedDataset("web").num_documents == 3
    octant("data merge one two --output web --overwrite")
    assert Path("web.json").read_text() == text


def test_a_run_does_not_replace_a_configuration(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`run.dir` may be the folder of one's own configuration."""
    text = """
run: {dir: ., device: cpu}
model: {num_layers: 1, hidden_size: 16, num_heads: 2, ffn_hidden_size: 16, vocab_size: 257, max_seq_len: 8}
precision: {compute: fp32}
data: {tokenizer: bytes, seq_len: 4, train: [{path: one}]}
batch: {micro: 1, global: 1}
steps: 1
"""
    Path("config.yaml").write_text(text)
    assert "holds a config.yaml that no run wrote" in refusal("train config.yaml", capsys)
    assert Path("config.yaml").read_text() == text
    assert not Path("checkpoints").exists() and not Path("metrics.jsonl").exists()


def test_pictures_replace_their_own_kind(tmp_path: Path) -> None:
    path = tmp_path / "sub" / "a.svg"
    write_picture(path, "<svg>1</svg>")
    write_picture(path, "<svg>2</svg>\n")
    assert path.read_bytes() == b"<svg>2</svg>\n" + MARK
    path.write_bytes(b"")
    write_picture(path, "<svg/>")
    with pytest.raises(RequestError, match="is a folder"):
        write_picture(tmp_path, "<svg/>")


def test_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    (tmp_path / "link").symlink_to(path)

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(RequestError, match=r"cannot write .*a: No space left"):
        patched.setattr(os, "fsync", full)
        with write_errors(path):
            write_whole(path, "after")
    assert path.read_bytes() == b"before" and sorted(tmp_path.iterdir()) == [path, tmp_path / "link"]
    write_whole(tmp_path / "link", "after")
    assert path.read_bytes() == b"after" and (tmp_path / "link").is_symlink()


def test_a_device_is_written_to_and_stays_one(tmp_path: Path) -> None:
    """A rename onto /dev/null, which root may do, would take it from everybody."""
    write_whole(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    os.mkfifo(tmp_path / "pipe")
    reader = subprocess.Popen(["cat", str(tmp_path / "pipe")], stdout=subprocess.PIPE)
    write_whole(tmp_path / "pipe", "text")
    assert reader.communicate()[0] == b"text"
    assert (tmp_path / "pipe").is_fifo()


def test_names_of_files() -> None:
    assert named_file("a/b", "x") == Path("a/b")
    for name in ("", "a/", "/", "..", "a/.."):
        with pytest.raises(RequestError, match="is a folder"):
            named_file(name, "x")
