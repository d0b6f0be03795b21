"""What is given in the place of something else is recognised, and the message has the words that would have worked."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine import cli

CONFIG = "model: {preset: tiny}\nsteps: 1\ndata: {train: [{path: x}]}\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a configuration, a run, and models of other kinds."""
    folder = tmp_path_factory.mktemp("place")
    for name in ("configs", "hf", "megatron/iter_0000010", "runs/x"):
        (folder / name).mkdir(parents=True)
    (folder / "configs" / "mine.yaml").write_text(CONFIG)
    (folder / "runs" / "x" / "config.yaml").write_text(CONFIG)
    (folder / "hf" / "config.json").write_text("{}")
    (folder / "hf" / "model.safetensors").write_bytes(b"")
    (folder / "megatron" / "latest_checkpointed_iteration.txt").write_text("10")
    return folder


@pytest.mark.parametrize(("command", "expected"), [
    ("train mine", "no such file; did you mean configs/mine.yaml?"),
    ("train configs/mien.yaml", "no such file; did you mean configs/mine.yaml?"),
    ("train llama3-70b", "llama3-70b is a preset: a file says `model: {preset: llama3-70b}`"),
    ("train optim.lr=1e-3 mine", "the file or name of a configuration comes first, what is changed of it behind that"),
    ("plan runs/x", "it is a folder; the configuration in it is runs/x/config.yaml"),
    ("config https://example.org/a.yaml", "it is an address; download it and give the file"),
    ("generate hf --prompt x", "it is a Hugging Face model: `octant convert from-hf hf OUT` makes a checkpoint of it"),
    ("eval meta-llama/Llama-3.2-1B --data x", "`octant convert from-hf meta-llama/Llama-3.2-1B OUT` fetches it"),
    ("checkpoint verify megatron", "it is Megatron's: `octant convert from-megatron megatron OUT --config"),
    ("checkpoint list https://example.org/x", "it is an address: download it, here a checkpoint is a folder"),
    ("checkpoint inspect hf/model.safetensors", "(safetensors belong into a Hugging Face folder, beside a config.json"),
    ("convert to-hf hf out", "it is a Hugging Face model"),
    ("train configs/mine.yaml checkpoint.load=hf", "it is a Hugging Face model: `octant convert from-hf hf OUT`"),
    ("train configs/mine.yaml checkpoint.resume=a/b", "if it is a model on the Hugging Face Hub"),
    ("prepare configs/mine.yaml --tokenizer meta-llama/Llama-3.2-1B --output x", ""),
    ("tokenizer verify x.txt --tokenizer meta-llama/Llama-3.2-1B", "`hf download meta-llama/Llama-3.2-1B --include"),
])
def test_the_message_has_the_right_words(command: str, expected: str, place: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    (place / "x.txt").write_text("some text")
    if command.startswith("eval"):
        monkeypatch.setattr("engine.commands.eval.IndexedDataset", lambda prefix: open("x.txt"))
    assert cli.run(command.split()) == 2
    said = capsys.readouterr().err
    assert expected in said and "Traceback" not in said


def test_what_could_be_anything_is_asked_for_plainly(place: Path, monkeypatch: pytest.MonkeyPatch,
                                                     capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(place)
    for command in ("checkpoint list configs", "checkpoint list runs/x"):
        assert cli.run(command.split()) == 2
        assert "no checkpoint there; give a folder with manifest.json, or a run's that has" in capsys.readouterr().err
