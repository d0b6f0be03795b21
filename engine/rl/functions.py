"""Reward functions: what says of texts how good they are, by a rule.

    f(prompts: list[str], responses: list[str], records: list[dict]) -> list[float]

Text i is `responses[i]`, made of `prompts[i]`; `records[i]` is the line of the prompt file that it came from, in which
the right answer stands.  Built in are

    exact_match   1 where the response is the record's `answer`, without blanks at both ends; else 0
    gsm8k         1 where the number behind the last `####` of the response is the one of the record's `answer` (there
                  behind its last `####`, or the whole answer); else 0 (Cobbe et al. 2021)

and any other is named by where it lies, `module:function`, in the working directory or installed.

Numbers of `gsm8k` are compared by value: 1,234 = 1234.0 = $1234 = +1,234.  Commas are left out wherever they stand
between digits, so that 1,2 is 12.  A currency sign before the number and anything behind it is passed over, as in
`#### $18 a day`; a response without `####`, or with no number behind it, has no answer and gets 0.

This module is all that a worker process imports: nothing here needs torch.
"""

from __future__ import annotations

import importlib
import inspect
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from types import MappingProxyType
from typing import Any

from engine.reading import said, shown

Record = Mapping[str, Any]
RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], Sequence[float]]

ANSWER = "answer"
MARK = "####"
NUMBER = re.compile(r"\s*([-+−]?)\s*[$€£¥]?\s*([-+−]?)([0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)")
PLACE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def exact_match(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """1 for the response that is the record's `answer`, else 0."""
    return [float(response.strip() == _answer_of(record).strip())
            for response, record in zip(responses, records, strict=True)]


def gsm8k(prompts: list[str], responses: list[str], records: list[dict[str, Any]]) -> list[float]:
    """1 for the response whose number behind the last `####` is that of the record's `answer`, else 0.

    Raises:
        ValueError: an `answer` holds no number.
    """
    scores = []
    for response, record in zip(responses, records, strict=True):
        answer = _answer_of(record)
        wanted = number_in(answer.rpartition(MARK)[2])
        if wanted is None:
            raise ValueError(f"there is no number in the answer {shown(answer)}")
        _, mark, behind = response.rpartition(MARK)
        scores.append(float(bool(mark) and number_in(behind) == wanted))
    return scores


def number_in(text: str) -> Decimal | None:
    """The number that a text begins with; None: it begins with none."""
    found = NUMBER.match(text)
    if found is None:
        return None
    number = Decimal(found[3].replace(",", ""))
    return -number if (found[1] or found[2]) in ("-", "−") else number


def _answer_of(record: Record) -> str:
    answer = record.get(ANSWER)
    if isinstance(answer, int | float):
        return str(answer)
    if not isinstance(answer, str):
        raise ValueError(f"{ANSWER} of the record is {'missing' if ANSWER not in record else shown(answer)}; it is to "
                         "be a text")
    return answer


BUILT_IN: Mapping[str, RewardFunction] = MappingProxyType({"exact_match": exact_match, "gsm8k": gsm8k})


def keys_needed(name: str) -> tuple[str, ...]:
    """Keys that every record must have for this function, as far as that is known."""
    return (ANSWER,) if name in BUILT_IN else ()


def find(name: str) -> RewardFunction:
    """The function of this name.

    Raises:
        ValueError: there is none, it cannot be imported, or takes other arguments.
    """
    if name in BUILT_IN:
        return BUILT_IN[name]
    if not PLACE.fullmatch(name):
        raise ValueError(f"there is {', '.join(BUILT_IN)}, or module:function")
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except BaseException as error:                               # a module does whatever it likes when it is imported
        raise ValueError(f"importing {module_name} raises {type(error).__name__}: {said(error)}") from None
    function = getattr(module, attribute, None)
    if function is None:
        raise ValueError(f"{module_name} ({getattr(module, '__file__', None)}) has no {attribute}")
    if not callable(function):
        raise ValueError(f"{attribute} of {module_name} is {shown(function)}, not a function")
    try:
        inspect.signature(function).bind([], [], [])
    except TypeError as error:
        raise ValueError(f"it is called as {attribute}(prompts, responses, records): {error}") from None
    except ValueError:
        pass                                                     # a built-in of Python's does not say what it takes
    found: RewardFunction = function
    return found


def scores_in(returned: object, count: int) -> list[float]:
    """What a function has returned, as so many numbers; None among them is NaN.

    Raises:
        ValueError: it is something else.
    """
    values: Any = returned.tolist() if callable(getattr(returned, "tolist", None)) else returned  # type: ignore[attr-defined]
    if not isinstance(values, list | tuple):
        raise ValueError(f"it returned {shown(returned)} for {count} texts, not a list of numbers")
    if len(values) != count:
        raise ValueError(f"it returned {len(values)} numbers for {count} texts")
    return [_number(value) for value in values]


def _number(value: object) -> float:
    if value is None:
        return float("nan")
    if not isinstance(value, numbers.Real):
        raise ValueError(f"it returned {shown(value)} for a text, not a number")
    try:
        return float(value)
    except OverflowError:
        return float("inf")
