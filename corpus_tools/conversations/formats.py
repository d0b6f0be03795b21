"""The formats of conversation files, recognised by their keys: one row each.

    format      keys                                    is
    ranked      responses [, prompt | messages]         K answers, best first, or with `rank` or `score` each
    pair        chosen, rejected [, the prompt]         texts, turns, or hh-rlhf transcripts; margin
    openai      messages [, tools]                      OpenAI's
    sharegpt    conversations [, system, tools]         ShareGPT's
    alpaca      instruction, output                     with input, system, history
    completion  prompt, completion                      texts, or lists of turns
    gsm8k       question, answer                        GSM8K's

The first row whose keys a record has reads it.  Other names are given as `columns: {prompt: question}`: the key that a
format knows, and the file's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from corpus_tools.conversations.turns import (
    Record,
    margin_in,
    text_in,
    tools_in,
    transcript_of,
    turn_of,
    turns_of,
    with_system,
)
from engine.data.chat.conversation import ASSISTANT, SYSTEM, USER, Example, Turn, problem_of
from engine.errors import RequestError
from engine.reading import shown


@dataclass(frozen=True)
class Format:
    """A row: the keys by which it is known, and how a record with them is read.

    Raises:
        ValueError: from `read`, where the record is not what its keys promise.
    """

    name: str
    keys: tuple[str, ...]
    read: Callable[[Record], Sequence[Sequence[Turn]]]
    others: tuple[str, ...] = ()                                  # keys that it reads where they are there


def _openai(record: Record) -> list[list[Turn]]:
    return [turns_of(record["messages"], "messages")]


def _sharegpt(record: Record) -> list[list[Turn]]:
    return [with_system(turns_of(record["conversations"], "conversations"), text_in(record, "system", ""))]


def _alpaca_prompt(record: Record) -> list[Turn]:
    """Everything before the answer: system, the history of pairs, and the instruction with its input."""
    turns: list[Turn] = []
    history = record.get("history") or []
    if not isinstance(history, list):
        raise ValueError(f"history is {shown(history)}, not a list of pairs")
    for number, pair in enumerate(history, start=1):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise ValueError(f"history, pair {number}, is {shown(pair)}, not two texts")
        turns += (Turn(USER, pair[0]), Turn(ASSISTANT, pair[1]))
    asked = [text for key in ("instruction", "input") if (text := text_in(record, key, ""))]
    return with_system([*turns, Turn(USER, "\n".join(asked))], text_in(record, "system", ""))


def _alpaca(record: Record) -> list[list[Turn]]:
    text_in(record, "instruction")
    return [[*_alpaca_prompt(record), Turn(ASSISTANT, text_in(record, "output"))]]


def _completion(record: Record) -> list[list[Turn]]:
    prompt, completion = record["prompt"], record["completion"]
    if isinstance(prompt, list) or isinstance(completion, list):
        return [[*_as_turns(prompt, "prompt", USER), *_as_turns(completion, "completion", ASSISTANT)]]
    return [[Turn(USER, text_in(record, "prompt")), Turn(ASSISTANT, text_in(record, "completion"))]]


def _gsm8k(record: Record) -> list[list[Turn]]:
    return [[Turn(USER, text_in(record, "question")), Turn(ASSISTANT, text_in(record, "answer"))]]


def _pair(record: Record) -> list[list[Turn]]:
    prompt = prompt_of(record)
    return [_alternative(record[key], key, prompt) for key in ("chosen", "rejected")]


def prompt_of(record: Record) -> list[Turn]:
    """What both answers of a pair answer, as far as the record says it beside them; or what is to be answered."""
    for key in ("conversations", "messages"):
        if record.get(key) is not None:
            turns = with_system(turns_of(record[key], key), text_in(record, "system", ""))
            return turns[:-1] if turns and turns[-1].role == ASSISTANT else turns      # one of the answers, again
    if "instruction" in record:
        return _alpaca_prompt(record)
    for key in ("prompt", "question"):
        if record.get(key) is not None:
            return with_system(_as_turns(record[key], key, USER), text_in(record, "system", ""))
    return []


def _alternative(value: Any, key: str, prompt: Sequence[Turn]) -> list[Turn]:
    """A whole conversation from one answer, which may bring its prompt along."""
    if isinstance(value, str) and not prompt:
        return transcript_of(value, key)
    turns = _as_turns(value, key, ASSISTANT)
    brings_its_own = any(turn.role in (USER, SYSTEM) for turn in turns)
    return turns if brings_its_own else [*prompt, *turns]


def _as_turns(value: Any, key: str, role: str) -> list[Turn]:
    """A text, one message, or a list of them."""
    if isinstance(value, str):
        return [Turn(role, text_in({key: value}, key))]
    return [turn_of(value, 1)] if isinstance(value, dict) else turns_of(value, key)


def _ranked(record: Record) -> list[list[Turn]]:
    responses, prompt = record["responses"], prompt_of(record)
    if not isinstance(responses, list) or len(responses) < 2:
        raise ValueError(f"responses is {shown(responses)}, not a list of two or more")
    if not prompt:
        raise ValueError("it has responses, and neither prompt nor messages")
    return [[*prompt, *_response(response, number)] for number, response in _in_order(responses, record)]


def _response(response: Any, number: int) -> list[Turn]:
    what = f"response {number}"
    if isinstance(response, dict) and "role" not in response and "from" not in response:
        key = next((key for key in ("content", "text", "response", "value") if key in response), "")
        if not key:
            raise ValueError(f"{what} is {shown(response)}, without a text (content, text, response or value)")
        return [Turn(ASSISTANT, text_in(response, key))]
    return _as_turns(response, what, ASSISTANT)


def _in_order(responses: Sequence[Any], record: Record) -> list[tuple[int, Any]]:
    """Best first: as they stand, or by the ranks (1 is best) or scores (most is best) that they or the record have."""
    numbered = list(enumerate(responses, start=1))
    for key, sign in (("rank", 1), ("score", -1)):
        found = record.get(f"{key}s")
        if found is None and any(isinstance(response, dict) and key in response for response in responses):
            found = [response.get(key) if isinstance(response, dict) else None for response in responses]
        if found is None:
            continue
        whole = isinstance(found, list) and len(found) == len(responses)
        if not whole or not all(isinstance(x, int | float) and not isinstance(x, bool) and x == x for x in found):
            raise ValueError(f"{key}s of the responses are {shown(found)}, not a number for each of {len(responses)}")
        order = sorted(range(len(found)), key=lambda i, values=found, sign=sign: sign * values[i])    # type: ignore[misc]
        return [numbered[i] for i in order]
    return numbered


FORMATS: tuple[Format, ...] = (
    Format("ranked", ("responses",), _ranked, ("prompt", "messages", "conversations", "ranks", "scores", "system")),
    Format("pair", ("chosen", "rejected"), _pair,
           ("prompt", "question", "messages", "conversations", "instruction", "input", "history", "system", "margin")),
    Format("openai", ("messages",), _openai, ("tools",)),
    Format("sharegpt", ("conversations",), _sharegpt, ("system", "tools")),
    Format("alpaca", ("instruction", "output"), _alpaca, ("input", "history", "system")),
    Format("completion", ("prompt", "completion"), _completion),
    Format("gsm8k", ("question", "answer"), _gsm8k),
)
COLUMNS = tuple(sorted({key for row in FORMATS for key in (*row.keys, *row.others)}))


def example_of(record: Any, place: str = "", columns: Mapping[str, str] | None = None) -> Example:
    """What a record of a file holds.

    Args:
        place: the file, and where in it.
        columns: names that differ: a key of `COLUMNS`, and what the file calls it.

    Raises:
        ValueError: it is of no known format, or not what its keys promise; says why.
    """
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {shown(record)}")
    renamed = columns or {}
    for known, theirs in renamed.items():
        if theirs not in record:
            raise ValueError(f"there is no {theirs!r} (columns: {known}); its keys are {_names(record)}")
    record = {key: value for key, value in record.items() if key not in renamed} | {
        known: record[theirs] for known, theirs in renamed.items()}
    row = next((row for has in (_holds, _has) for row in FORMATS if all(has(record, key) for key in row.keys)), None)
    if row is None:
        known_keys = "; ".join(", ".join(row.keys) for row in FORMATS)
        raise ValueError(f"no known format has the keys {_names(record)}. Known are {known_keys}; other names are "
                         "given as `columns`")
    alternatives = tuple(map(tuple, row.read(record)))
    for number, turns in enumerate(alternatives, start=1):
        if (problem := problem_of(turns)) is not None:
            which = f"{('chosen', 'rejected')[number - 1]}: " if row.name == "pair" else \
                f"response {number}: " if len(alternatives) > 1 else ""
            raise ValueError(which + problem)
    return Example(alternatives, margin_in(record) if row.name == "pair" else None, tools_in(record), place)


def _holds(record: Record, key: str) -> bool:
    return record.get(key) is not None                            # tables have every column in every row


def _has(record: Record, key: str) -> bool:
    return key in record


def require_columns(columns: Mapping[str, str], where: str) -> None:
    """
    Raises:
        RequestError: they name something that no format has.
    """
    for known in columns:
        if known not in COLUMNS:
            raise RequestError(f"{where}: columns has {known!r}; formats have {', '.join(COLUMNS)}")


def _names(record: Record) -> str:
    return ", ".join(shown(key)[1:-1] for key in [*record][:20]) or "(none)"
