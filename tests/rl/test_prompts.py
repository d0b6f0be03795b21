"""Prompt files: which records are prompts, what becomes of those that are not, and the order of the stream."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from engine.config import Config
from engine.data.chat.conversation import ASSISTANT, USER, Turn
from engine.data.chat.tokens import ChatEncoder
from engine.data.tokenizer import load_tokenizer
from engine.errors import DataError, RequestError
from engine.rl.prompts import Prompts
from tests.kit.chats import hf_tokenizer
from tests.kit.digits import rl_config

BYTES: dict[str, Any] = {"model": {"vocab_size": 300, "max_seq_len": 128}, "roles": {"reward": {"function": "m:f"}}}


def written(path: Path, *records: Any) -> str:
    path.write_text("".join(f"{record if isinstance(record, str) else json.dumps(record)}\n" for record in records))
    return str(path)


def config_of(folder: Path, *paths: str, data: dict[str, Any] | None = None, **sections: Any) -> Config:
    train = [{"path": path} for path in paths]
    return rl_config(folder / "run", **BYTES | sections, data={
        "tokenizer": "bytes", "template": "plain", "seq_len": 32, "train": train} | (data or {}))


def numbered(folder: Path, count: int, name: str = "p.jsonl") -> str:
    return written(folder / name, *({"prompt": f"{name[0]}{number}", "answer": str(number)} for number in range(count)))


@pytest.mark.parametrize("record", [
    {"prompt": "1+1?", "answer": "2"}, {"messages": [{"role": "user", "content": "1+1?"}]},
    {"prompt": [{"role": "user", "content": "1+1?"}]}, {"question": "1+1?", "answer": "so #### 2"},
    {"instruction": "1+1?"}, {"prompt": "1+1?", "completion": "2"},
    {"messages": [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]}])
def test_a_prompt_is_what_comes_before_the_answer(record: dict[str, Any], tmp_path: Path) -> None:
    prompts = Prompts.open(config_of(tmp_path, written(tmp_path / "p.jsonl", record)))
    found = prompts.prompt(0)
    assert (found.text, found.tokens, found.record) == ("1+1?", tuple(b"1+1?"), record)
    assert prompts.decode([50, 256]) == "2" and prompts.end_ids == {256}


def test_a_prompt_ends_where_the_answer_begins(tmp_path: Path) -> None:
    """Prompt and answer together are the tokens that fine-tuning has learned."""
    folder = hf_tokenizer(tmp_path / "tokenizer")
    turns = (Turn("system", "Be brief."), Turn(USER, "你好 😀"))
    path = written(tmp_path / "p.jsonl", {"messages": [turn.message() for turn in turns]})
    config = config_of(tmp_path, path, model={"vocab_size": 1200, "max_seq_len": 128},
                       data={"tokenizer": str(folder), "template": "chatml", "seq_len": 128})
    prompts = Prompts.open(config)
    whole = ChatEncoder(load_tokenizer(str(folder)), "chatml").encode((*turns, Turn(ASSISTANT, "hi")))
    assert prompts.prompt(0).tokens == tuple(whole.tokens[:whole.last_answer].tolist())
    end = prompts.tokenizer.specials["<|im_end|>"]
    assert end in prompts.end_ids and prompts.tokenizer.eod_id in prompts.end_ids
    assert prompts.decode(whole.tokens[whole.last_answer:].tolist()).strip() == "hi"


def test_the_stream_has_every_prompt_once_in_every_epoch_and_no_end(tmp_path: Path) -> None:
    prompts = Prompts.open(config_of(tmp_path, numbered(tmp_path, 7)))
    epochs = [[prompts.prompt(7 * epoch + i).text for i in range(7)] for epoch in range(4)]
    assert all(sorted(epoch) == [f"p{i}" for i in range(7)] for epoch in epochs) and len({*map(tuple, epochs)}) > 1
    assert prompts.prompt(10**12).number == 10**12
    again = Prompts.open(config_of(tmp_path, numbered(tmp_path, 7)))                   # in another process, from there
    assert [again.prompt(i) for i in range(9, 20)] == [prompts.prompt(i) for i in range(9, 20)]
    other = Prompts.open(config_of(tmp_path, numbered(tmp_path, 7), run={"objective": "ppo", "seed": 4}))
    assert [other.prompt(i).text for i in range(28)] != [text for epoch in epochs for text in epoch]
    assert other.fingerprint()["sources"] == prompts.fingerprint()["sources"]


def test_files_are_mixed_by_weight(tmp_path: Path) -> None:
    train = [{"path": numbered(tmp_path, 5, "a.jsonl"), "weight": 3.0}, {"path": numbered(tmp_path, 2, "b.jsonl")}]
    prompts = Prompts.open(config_of(tmp_path, data={"train": train}))
    assert Counter(prompts.prompt(i).text[0] for i in range(400)) == {"a": 300, "b": 100}
    train[1] |= {"max_epochs": 1}
    with pytest.raises(DataError, match=r"300 steps of 4 prompts take 1,200, but with max_epochs the files give 7"):
        Prompts.open(config_of(tmp_path, data={"train": [each | {"max_epochs": 1} for each in train]}, steps=300,
                               rollout={"prompts": 4}))


def test_prompts_may_be_skipped(tmp_path: Path) -> None:
    path = numbered(tmp_path, 7)
    whole, skipping = (Prompts.open(config_of(tmp_path, path, data={"skip": skip})) for skip in ([], [[2, 5]]))
    assert [skipping.prompt(i).text for i in range(6)] == [whole.prompt(i).text for i in (0, 1, 5, 6, 7, 8)]


@pytest.mark.parametrize("settings", [{"too_long": "skip"}, {"on_error": "skip"}])
def test_a_prompt_longer_than_the_context_is_left_out_and_counted(settings: dict[str, Any], tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "x" * 28}, {"prompt": "x" * 29}, {"prompt": "x"})
    [file] = Prompts.open(config_of(tmp_path, path, data=settings)).files
    assert file.about() == f"{path}: 2 prompts, 1 too long and left out"
    assert [len(prompt.tokens) for prompt in file.prompts] == [28, 1]


@pytest.mark.parametrize("too_long", ["cut", "stop"])
def test_a_prompt_longer_than_the_context_is_never_cut(too_long: str, tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "x"}, {"prompt": "x" * 29})
    with pytest.raises(DataError, match=re.escape(f"{path}, line 2: a prompt of 29 tokens; data.seq_len(32) less "
                                                  "rollout.max_new_tokens(4) has room for 28")):
        Prompts.open(config_of(tmp_path, path, data={"too_long": too_long}))


@pytest.mark.parametrize(("record", "why"), [
    ("{", "invalid JSON"), ("[1]", "expected a JSON object"), ({"text": "a"}, "neither prompt nor messages"),
    ({"prompt": ""}, "the prompt is empty"), ({"prompt": 7}, "prompt is 7"), ({"messages": "a"}, "not a list of turns"),
    ({"messages": [{"role": "boss", "content": "a"}]}, "is of 'boss'"), ({"prompt": "\ud800"}, "half of a surrogate")])
def test_what_is_no_prompt_is_named_or_counted(record: Any, why: str, tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "fine"}, record)
    with pytest.raises(DataError, match=rf"{re.escape(path)}.*line 2.*{why}"):
        Prompts.open(config_of(tmp_path, path))
    [file] = Prompts.open(config_of(tmp_path, path, data={"on_error": "skip"})).files
    assert file.num_unusable == 1 and len(file.prompts) == 1
    written(tmp_path / "p.jsonl", record)
    with pytest.raises(DataError, match="not one prompt"):
        Prompts.open(config_of(tmp_path, path, data={"on_error": "skip"}))


def test_what_a_function_compares_with_must_be_there(tmp_path: Path) -> None:
    path = written(tmp_path / "p.jsonl", {"prompt": "1+1?", "answer": "2"}, {"prompt": "1+1?", "solution": "2"})
    exact = {"roles": {"reward": {"function": "exact_match"}}}
    with pytest.raises(DataError, match="line 2: there is no 'answer', with which exact_match compares"):
        Prompts.open(config_of(tmp_path, path, **exact))
    written(tmp_path / "p.jsonl", {"ask": "1+1?", "solution": "2"})
    columns = {"prompt": "ask", "answer": "solution"}
    train = [{"path": path, "columns": columns}]
    [file] = Prompts.open(config_of(tmp_path, data={"train": train}, **exact)).files
    assert file.prompts[0].text == "1+1?" and file.prompts[0].record["answer"] == "2"
    with pytest.raises(RequestError, match="columns has 'promt'"):
        Prompts.open(config_of(tmp_path, data={"train": [{"path": path, "columns": {"promt": "ask"}}]}))
