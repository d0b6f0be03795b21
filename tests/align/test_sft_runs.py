"""Fine-tuning runs: from files to checkpoints, what is kept by content, what is refused, and where they go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from corpus_tools.conversations import prepare as preparing
from corpus_tools.conversations.start import open_corpora, prepared
from engine import cli
from engine.checkpoint.folder import committed_steps
from engine.checkpoint.resume import find_latest
from engine.config import Config
from engine.data.chat.corpus import ChatCorpus
from engine.errors import ConfigError, DataError
from tests.align.test_sft import chat_config, write_chats
from tests.kit.layouts import assemble
from tests.kit.runs import metrics, train, trained, write_corpus
from tests.kit.texts import english_texts


def quiet(_: str) -> None:
    """Nobody listens."""


def lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def test_a_run_learns_and_keeps_its_best_weights(tmp_path: Path) -> None:
    config = chat_config(tmp_path, steps=6, optim={"lr": 3e-2, "decay": "constant"})
    train(config)
    rows = metrics(config)
    assert rows[-1]["loss"] < rows[0]["loss"] and all(row["loss_tokens"] > 0 for row in rows)
    valid = {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row}
    best = min(valid, key=lambda step: valid[step])
    folder = Path(config.run.dir) / "best"
    assert list(committed_steps(folder)) == [best]
    reader, _ = find_latest(folder)
    assert reader is not None and reader.metadata["valid_loss"] == valid[best] and "state" not in reader.metadata
    assert reader.end_ids == (256,)
    again = chat_config(tmp_path, "from the best", steps=1, checkpoint={"load": str(folder), "every": 0})
    train(again)
    assert metrics(again)[0]["loss"] < rows[0]["loss"]


def test_worse_is_not_kept(tmp_path: Path) -> None:
    config = chat_config(tmp_path, steps=2, eval={"every": 1}, checkpoint={"every": 0})
    train(config)
    kept = committed_steps(Path(config.run.dir) / "best")
    worse = chat_config(tmp_path, steps=6, eval={"every": 1}, checkpoint={"every": 0},
                        optim={"lr": 5.0, "decay": "constant", "warmup_steps": 0, "grad_clip": 0.0})
    train(worse)
    assert max(row["valid_loss"] for row in metrics(worse) if "valid_loss" in row) > metrics(config)[0]["valid_loss"]
    assert committed_steps(Path(config.run.dir) / "best").keys() <= {*kept, *range(3, 7)}
    off = chat_config(tmp_path, "off", steps=2, checkpoint={"keep_best": False})
    train(off)
    assert not (Path(off.run.dir) / "best").exists()


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2, "schedule": "zb-h1"}, {"data": 2, "zero": 3}])
def test_a_run_that_is_stopped_goes_on_bit_for_bit(layout: dict[str, Any], tmp_path: Path) -> None:
    whole, parts = (chat_config(tmp_path, name, steps=5, parallel=layout) for name in ("whole", "parts"))
    want = assemble(train(whole))
    train(parts, stop_at=3)
    assert metrics(parts)[-1]["step"] == 3
    got = assemble(train(parts))
    assert trained(parts) == trained(whole)
    assert all((got[name] == want[name]).all() for name in want) and got.keys() == want.keys()


def test_another_layout_goes_on_where_the_first_stood(tmp_path: Path) -> None:
    whole = chat_config(tmp_path, "whole", steps=5)
    train(whole)
    train(chat_config(tmp_path, "parts", steps=5), stop_at=3)
    moved = chat_config(tmp_path, "parts", steps=5, parallel={"tensor": 2, "pipeline": 2})
    train(moved)
    for got, want in zip(trained(moved), trained(whole), strict=True):
        assert got == pytest.approx(want, rel=1e-4)


def test_pretraining_data_in_a_run(tmp_path: Path) -> None:
    text = write_corpus(tmp_path / "text")
    sources = [{"path": str(tmp_path / "train.jsonl"), "weight": 0.5},
               {"path": text, "weight": 0.5, "kind": "pretrain"}]
    config = chat_config(tmp_path, steps=3, data={"train": sources}, sft={"ptx_weight": 0.5})
    train(config)
    row = metrics(config)[0]
    assert row["loss/chat"] > 0 and row["loss/ptx"] > 0
    data = open_corpora(config, quiet).train
    samples = [data.sample(index) for index in range(4)]
    chat = sum(int(sample.loss_mask.sum()) for sample in samples if sample.source == 0)
    ptx = sum(len(sample.tokens) - 1 for sample in samples if sample.source == 1)
    assert row["loss_tokens"] == chat + ptx
    assert row["loss"] == pytest.approx((row["loss/chat"] * chat + 0.5 * row["loss/ptx"] * ptx) / (chat + 0.5 * ptx))
    with pytest.raises(ConfigError, match=r"sft\.ptx_weight is 0"):
        _refused(tmp_path, train=sources)


def _refused(folder: Path, **data: Any) -> Config:
    try:
        return chat_config(folder, data=data)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def test_tokens_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, said = chat_config(tmp_path), list[str]()
    first = prepared(config, said.append)
    assert len(said) == 2 and "60 conversations" in said[0]
    monkeypatch.setattr(preparing, "_write", None)               # nothing is made again
    assert prepared(config, said.append) == first and len(said) == 2
    (tmp_path / "train.jsonl").touch()
    assert prepared(config, said.append) == first, "the content is the same"
    monkeypatch.undo()
    changed = write_chats(tmp_path / "train.jsonl", number=61)
    for other in (config, chat_config(tmp_path, data={"template": "alpaca"}),
                  chat_config(tmp_path, data={"tokenizer": "bytes", "on_error": "skip"})):
        assert prepared(other, quiet)[str(changed)] != first[str(changed)]


def test_what_a_kill_leaves_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = chat_config(tmp_path)
    want = prepared(config, quiet)
    content = {path: Path(f"{path}.bin").read_bytes() for path in want.values()}
    other = config.with_changes(run={"dir": str(tmp_path / "other")})

    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        raise Killed

    renames = 0
    rename = preparing.os.replace

    def kill_in_the_middle(source: str, target: str) -> None:
        nonlocal renames
        renames += 1
        if renames == 3:
            raise Killed
        rename(source, target)

    for name, action in (("describe_file", kill), ("make_sidecar", kill)):
        monkeypatch.setattr(preparing, name, action)
        with pytest.raises(Killed):
            _without_hashes(preparing, other)
        monkeypatch.undo()
        assert not list(Path(other.run.dir, "data").glob("*.json"))
    monkeypatch.setattr(preparing.os, "replace", kill_in_the_middle)
    with pytest.raises(Killed):
        prepared(other, quiet)
    monkeypatch.undo()
    got = prepared(other, quiet)
    assert [Path(f"{path}.bin").read_bytes() for path in got.values()] == list(content.values())
    assert all(len(ChatCorpus(path)) == 60 for path in got.values())


def _without_hashes(module: Any, config: Config) -> None:
    """`prepared`, whose first use of `describe_file` is the content of the file."""
    content = module.content_of
    module.content_of = lambda file: Path(file.path).read_text(encoding="utf-8")
    try:
        prepared(config, quiet)
    finally:
        module.content_of = content


@pytest.mark.parametrize(("record", "problem"), [
    ('{"messages": ', "invalid JSON"),
    ('{"messages": [{"role": "user", "content": "a"}]}', "ends with a turn of user: there is no answer"),
    ('{"prompt": "a", "completion": " "}', "turn 2, an answer, is empty"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN}', "margin is nan"),
    ('{"prompt": "a", "chosen": "b", "rejected": "c"}', "two answers to compare, and conversations of one are needed"),
    ('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]}',
     "nothing of it would be learned"),
])
def test_records_that_cannot_be_used(record: str, problem: str, tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([*lines(path), record]), encoding="utf-8")
    with pytest.raises(DataError, match=rf"train\.jsonl, line 61: .*{problem}.*on_error: skip"):
        prepared(config, quiet)
    skipping, said = chat_config(tmp_path, data={"on_error": "skip"}), list[str]()
    corpora = open_corpora(skipping, said.append)
    [source] = corpora.conversations
    assert source.corpus.about["skipped"] == 1 and problem in "\n".join(said) and len(source.corpus) == 60


def test_a_template_that_fails_names_the_record(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_text("{{ raise_exception('no such turns') }}")
    config = chat_config(tmp_path, data={"template": str(tmp_path / "own.jinja")})
    with pytest.raises(DataError, match=r"train\.jsonl, line 1: the chat template .* fails: no such turns"):
        prepared(config, quiet)


def test_what_is_too_long(tmp_path: Path) -> None:
    config = chat_config(tmp_path)
    path = tmp_path / "train.jsonl"
    cut = json.dumps({"prompt": "a" * 10, "completion": "b" * 100})
    hopeless = json.dumps({"prompt": "a" * 100, "completion": "b"})
    path.write_text("\n".join([*lines(path), cut]), encoding="utf-8")
    [source] = open_corpora(config, quiet).conversations
    assert (source.num_cut, source.num_left_out) == (1, 0)
    row = next(row for row in range(source.num_windows) if 60 in source.rows[row])
    assert source.window(row, 0).loss_mask.tolist() == [False] * 9 + [True] * 55
    [source] = open_corpora(chat_config(tmp_path, data={"too_long": "skip"}), quiet).conversations
    assert (source.num_cut, source.num_left_out) == (0, 1)
    with pytest.raises(DataError, match=r"train\.jsonl, line 61: a conversation of 111 tokens, data\.seq_len 64"):
        open_corpora(chat_config(tmp_path, data={"too_long": "stop"}), quiet)
    path.write_text("\n".join([*lines(path), hopeless]), encoding="utf-8")
    with pytest.raises(DataError, match=r"line 62: a prompt longer than the context: 102 tokens.*on_error: skip"):
        open_corpora(config, quiet)
    [source] = open_corpora(chat_config(tmp_path, data={"on_error": "skip"}), quiet).conversations
    assert (source.num_cut, source.num_left_out) == (1, 1)


def test_refused_before_anything_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = chat_config(tmp_path)
    (tmp_path / "train.jsonl").write_text('{"a": 1}')
    (tmp_path / "run.yaml").write_text(config.dump())
    assert cli.run(["train", str(tmp_path / "run.yaml")]) == 2
    assert "line 1: no known format has the keys a" in capsys.readouterr().err
    assert not (Path(config.run.dir) / "checkpoints").exists()


def test_preview_shows_what_is_learned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = chat_config(tmp_path)
    (tmp_path / "run.yaml").write_text(config.dump())
    assert cli.run(["data", "preview", str(tmp_path / "run.yaml"), "--samples", "3:5", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["index"] for row in rows] == [3, 4] and {*rows[0]} == {"index", "source", "tokens", "loss_mask"}
    data = open_corpora(config, quiet).train
    for row in rows:
        assert len(row["tokens"]) == len(row["loss_mask"]) <= 65
        heard = bytes(token if token < 256 else 10 for token, mask in zip(row["tokens"], row["loss_mask"], strict=True)
                      if mask).decode().split("\n")
        assert all(text == "" or text == "".join(sorted(text[:-1])) + "!" for text in heard)
        mask = data.sample(row["index"]).loss_mask
        assert row["loss_mask"][1:] == mask[: len(row["tokens"]) - 1].astype(int).tolist() and row["loss_mask"][0] == 0
    assert cli.run(["data", "preview", str(tmp_path / "run.yaml"), "data.template=chatml", "--samples", "0:1"]) == 0
    assert "<|im_start|>assistant" in capsys.readouterr().out


def test_preview_of_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"prompt": "which?", "chosen": "this", "rejected": "that one"}
    (tmp_path / "pairs.jsonl").write_text("\n".join([json.dumps(pair)] * 4))
    sources = [{"path": str(tmp_path / "pairs.jsonl")}]
    config = chat_config(tmp_path, run={"objective": "dpo"}, data={"train": sources, "valid": []})
    (tmp_path / "run.yaml").write_text(config.dump())
    assert cli.run(["data", "preview", str(tmp_path / "run.yaml"), "--samples", "0:1", "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["role"] for row in rows] == ["chosen", "rejected"]
    for row, answer in zip(rows, ("this", "that one"), strict=True):
        learned = [token for token, mask in zip(row["tokens"], row["loss_mask"], strict=True) if mask]
        assert bytes(learned[:-1]).decode() == answer and learned[-1] == 256
        assert bytes(row["tokens"][:-1]).decode() == "which?" + answer, "without padding"


def test_answers_without_an_end(tmp_path: Path) -> None:
    said: list[str] = []
    prepared(chat_config(tmp_path, data={"template": "chatml"}), said.append)
    assert all("would not know where to stop" in line for line in said)
    assert not any("where to stop" in line for line in _said(chat_config(tmp_path)))


def _said(config: Config) -> list[str]:
    said: list[str] = []
    prepared(config, said.append)
    return said


def test_prepared_ahead_is_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = chat_config(tmp_path)
    command = ["prepare", "--chat", str(tmp_path / "train.jsonl"), "--tokenizer", "bytes", "--template", "plain",
               "--output", str(tmp_path / "ahead" / "chats")]
    assert cli.run(command) == 0 and cli.run(command) == 0
    assert "60 conversations" in capsys.readouterr().out
    ahead = chat_config(tmp_path, data={"train": [{"path": str(tmp_path / "ahead" / "chats")}]})
    samples = [open_corpora(which, quiet).train.sample(7) for which in (config, ahead)]
    assert all(np.array_equal(getattr(samples[0], name), getattr(samples[1], name))
               for name in ("tokens", "loss_mask", "document_ids"))
    assert cli.run([word if word != "plain" else "alpaca" for word in command]) == 2
    assert "there already" in capsys.readouterr().err
    assert cli.run(["data", "verify", str(tmp_path / "ahead" / "chats")]) == 0
    mask = tmp_path / "ahead" / "chats.mask.bin"
    mask.write_bytes(bytes([mask.read_bytes()[0] ^ 1]) + mask.read_bytes()[1:])
    assert cli.run(["data", "verify", str(tmp_path / "ahead" / "chats")]) == 1
    with pytest.raises(DataError, match="of text, not of conversations"):
        open_corpora(chat_config(tmp_path, data={"train": [{"path": write_corpus(tmp_path / "text")}]}), quiet)


def test_many_workers_make_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = english_texts(12)
    records = [json.dumps({"prompt": f"{i}", "completion": text[i % 12][i : i + 300] + "."}) for i in range(600)]
    (tmp_path / "many.jsonl").write_text("\n".join(records))
    command = ["prepare", "--chat", str(tmp_path / "many.jsonl"), "--tokenizer", "bytes", "--template", "chatml"]
    monkeypatch.setattr(preparing, "useful_workers", lambda wanted, files: wanted)
    for number in (1, 2):
        assert cli.run([*command, "--output", str(tmp_path / f"by{number}"), "--workers", str(number)]) == 0
    for suffix in (".bin", ".idx", ".mask.bin", ".records.bin"):
        assert (tmp_path / f"by1{suffix}").read_bytes() == (tmp_path / f"by2{suffix}").read_bytes()


