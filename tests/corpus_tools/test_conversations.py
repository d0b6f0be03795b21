"""Conversation files: every format in every kind of file, and what is wrong with one is said with its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from corpus_tools.conversations.files import examples
from corpus_tools.conversations.formats import FORMATS, example_of, require_columns
from corpus_tools.conversations.prepare import Plan, Wanted, prepare_chats
from corpus_tools.inputs import expand_inputs
from corpus_tools.records import BadRecord
from engine.data.chat.conversation import Example, Turn
from engine.errors import RequestError
from tests.kit.chats import RECORDS
from tests.kit.fuzz import Reader, damaged, fuzz


def answers(example: Example) -> list[str]:
    return [turn.content for turn in example.turns if turn.role == "assistant"]


@pytest.mark.parametrize("name", RECORDS)
def test_every_format_gives_the_same_value(name: str) -> None:
    record, wanted = RECORDS[name]
    example = example_of(record, "f, line 1")
    assert answers(example) == wanted and example.place == "f, line 1"
    others = ["messages", "conversations", "responses", "output", "margin", "chosen", "rejected"]
    padded = dict.fromkeys(others) | record
    assert example_of(padded).alternatives == example.alternatives, "tables have every column in every row"


def test_what_pairs_and_ranks_hold() -> None:
    pair = example_of(RECORDS["pair of texts"][0])
    assert [turns[-1].content for turns in pair.alternatives] == ["this one", "no idea"] and pair.margin == 0.5
    assert pair.prompt == (Turn("user", "Which is better?"),)
    ranked = example_of(RECORDS["ranked"][0])
    assert [turns[-1].content for turns in ranked.alternatives] == ["best", "middle", "worst"]
    scored = example_of({"messages": [{"role": "user", "content": "q"}],
                         "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2.5}]})
    assert [turns[-1].content for turns in scored.alternatives] == ["b", "a"]
    transcript = example_of(RECORDS["hh-rlhf"][0])
    assert [turn.content for turn in transcript.alternatives[1]] == ["hi", "hello, human", "more", "go away"]


def test_other_names() -> None:
    record = {"frage": "q", "antwort": "a", "prompt": 7}
    assert answers(example_of(record, columns={"prompt": "frage", "completion": "antwort"})) == ["a"]
    with pytest.raises(ValueError, match=r"there is no 'frage'.*its keys are text"):
        example_of({"text": "x"}, columns={"prompt": "frage"})
    with pytest.raises(RequestError, match="columns has 'promt'; formats have answer, chosen, completion"):
        require_columns({"promt": "frage"}, "data.train")


@pytest.mark.parametrize("ending", ["json", "jsonl", "jsonl.gz", "parquet"])
def test_every_kind_of_file(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"chats.{ending}"
    records = [RECORDS["sharegpt"][0], RECORDS["sharegpt"][0] | {"system": None}]
    if ending == "parquet":
        pytest.importorskip("pyarrow")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    else:
        text = json.dumps(records) if ending == "json" else "\n".join(map(json.dumps, records))
        path.write_bytes(gzip.compress(text.encode()) if ending.endswith("gz") else text.encode())
    found = [found.value for found in examples(expand_inputs([path])[0])]
    assert [answers(example) for example in found if isinstance(example, Example)] == [RECORDS["sharegpt"][1]] * 2
    where = {"json": "record", "parquet": "row"}.get(ending, "line")
    assert [getattr(example, "place", "") for example in found] == [f"{path}, {where} {n}" for n in (1, 2)]


@pytest.mark.parametrize(("record", "problem"), [
    ([1], "expected a JSON object"),
    ({"text": "a"}, "no known format has the keys text.*columns"),
    ({"messages": "hi"}, "messages is 'hi', not a list"),
    ({"messages": []}, "no turns"),
    ({"messages": [{"role": "user", "content": "a"}]}, "no answer"),
    ({"messages": [{"role": "assistant", "content": "a"}]}, "turn 1 is of assistant, at the beginning"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]},
     "turn 2, an answer, is empty"),
    ({"messages": [{"role": "boss", "content": "a"}]}, "turn 1 is of 'boss'; roles are system"),
    ({"messages": [{"role": "user", "text": "a"}]}, "turn 1 has the keys role, text, and neither"),
    ({"messages": [{"role": "user", "content": 5}]}, "content of turn 1 is 5, not text"),
    ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "content of turn 1 is .*not text"),
    ({"messages": [3]}, "turn 1 is 3, not an object"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 2}]},
     "weight of turn 2"),
    ({"conversations": [{"from": "function_call", "value": "no json"}]}, "function_call that is no JSON"),
    ({"instruction": "a", "output": None}, "output is null"),
    ({"instruction": "a", "output": ""}, "turn 2, an answer, is empty"),
    ({"instruction": "a", "output": "b", "history": [["x"]]}, "history, pair 1"),
    ({"prompt": "a", "completion": 1}, "completion is 1, not text"),
    ({"prompt": "a", "completion": "\ud800"}, "half of a surrogate pair"),
    ({"prompt": "a", "chosen": "b", "rejected": ""}, "rejected: turn 2, an answer, is empty"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": float("nan")}, "margin is nan, not a finite number"),
    ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"}, "margin is 'much'"),
    ({"chosen": "b", "rejected": "c"}, "chosen is no transcript"),
    ({"prompt": "a", "responses": ["b"]}, "not a list of two or more"),
    ({"prompt": "a", "responses": ["b", "c"], "ranks": [1]}, "ranks of the responses"),
    ({"responses": ["b", "c"]}, "neither prompt nor messages"),
    ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "tools": "{"},
     "tools is text"),
])
def test_what_is_wrong_is_said(record: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        example_of(record)


def test_one_bad_record_takes_no_other_with_it(tmp_path: Path) -> None:
    good = json.dumps(RECORDS["gsm8k"][0])
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\n".join([good.encode(), b'{"question": ', b'"\xff"', b"", b'{"a": 1}', good.encode()]))
    found = [found.value for found in examples(expand_inputs([path])[0])]
    assert [type(example) for example in found] == [Example, BadRecord, BadRecord, BadRecord, Example]
    said = [str(example) for example in found if isinstance(example, BadRecord)]
    reasons = ("line 2: invalid JSON", "line 3: invalid UTF-8", "line 5: no known format")
    for line, why in zip(said, reasons, strict=True):
        assert line.startswith(f"{path}, {why}")


def test_a_line_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is longer than any record is one bad record, and never held as a whole."""
    monkeypatch.setattr("corpus_tools.readers.BLOCK_BYTES", 1_000)
    monkeypatch.setattr("corpus_tools.readers.LONGEST_RECORD_BYTES", 10_000)
    good = json.dumps(RECORDS["gsm8k"][0])
    (tmp_path / "chats.jsonl").write_text(f'{good}\n{{"prompt": "{"x" * 3_000_000}"}}\n{good}')
    found = list(examples(expand_inputs([tmp_path / "chats.jsonl"])[0]))
    assert [type(each.value) for each in found] == [Example, BadRecord, Example]
    assert "line 2: longer than 10,000 bytes; is this JSON lines?" in str(found[1].value)
    assert found[2].value.place.endswith("line 3")


def chats_read(folder: Path) -> None:
    """For the fuzzer: takes a file or refuses it."""
    files = tuple(expand_inputs([folder / "chats.jsonl"]))
    wanted = Wanted(files, "bytes", "chatml", "conversations")
    prepare_chats(Plan.of(wanted, ["x"]), folder / "made", workers=1)


def test_damaged_files(request: pytest.FixtureRequest) -> None:
    good = "\n".join(json.dumps(record, ensure_ascii=False) for name, (record, _) in RECORDS.items()
                     if name in ("alpaca with history", "sharegpt", "openai", "completion of turns", "gsm8k"))
    fuzz(Reader("conversations", chats_read), st.fixed_dictionaries({"chats.jsonl": damaged(good.encode())}), request)


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    [bad] = examples(expand_inputs([tmp_path / "empty.jsonl"])[0])
    assert "it is empty" in str(bad.value)
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(RequestError, match="not from text"):
        list(examples(expand_inputs([tmp_path / "a.txt"])[0]))


def test_formats_are_told_apart() -> None:
    assert [row.name for row in FORMATS] == ["ranked", "pair", "openai", "sharegpt", "alpaca", "completion", "gsm8k"]
    record = RECORDS["openai"][0] | RECORDS["pair of texts"][0]
    assert len(example_of(record).alternatives) == 2, "with answers to compare, the messages are what they answer"
