"""Turns as files write them, in one form; what is wrong with one is a ValueError that says so."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from engine.data.chat.conversation import ASSISTANT, SYSTEM, TOOL, USER, Turn
from engine.reading import shown

Record = Mapping[str, Any]

# What files call the four roles (ShareGPT and its descendants, OpenAI, LLaMA-Factory).
ROLE_OF: Mapping[str, str] = MappingProxyType({
    "system": SYSTEM, "developer": SYSTEM,
    "user": USER, "human": USER, "prompter": USER,
    "assistant": ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT,
    "model": ASSISTANT, "bot": ASSISTANT, "function_call": ASSISTANT,
    "tool": TOOL, "function": TOOL, "observation": TOOL, "tool_response": TOOL, "ipython": TOOL})
KEYS = (("role", "content"), ("from", "value"), ("role", "value"), ("from", "content"))
KEPT = ("name", "tool_calls", "tool_call_id", "reasoning_content")
TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant): ?")


def text_in(record: Record, key: str, default: str | None = None) -> str:
    """The text under a key; `default` where it is missing or null."""
    value = record.get(key)
    if value is None and default is not None:
        return default
    if value is None:
        raise ValueError(f"{key} is missing" if key not in record else f"{key} is null")
    return _text(value, key)


def _text(value: Any, what: str) -> str:
    """A text, or OpenAI's list of parts of which all are text."""
    if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
        value = "".join(_text(part.get("text"), what) for part in value)
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shown(value)}, not text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair (a broken \\u escape)") from None
    return value


def turn_of(message: Any, number: int) -> Turn:
    """One message of a list, whichever names its keys have."""
    what = f"turn {number}"
    if not isinstance(message, dict):
        raise ValueError(f"{what} is {shown(message)}, not an object")
    role_key, text_key = next((keys for keys in KEYS if keys[0] in message and keys[1] in message), ("", ""))
    if not role_key:
        role_key, text_key = next((keys for keys in KEYS if keys[0] in message), ("", ""))
        if not role_key or not message.get("tool_calls"):
            raise ValueError(f"{what} has {_keys(message)}, and neither `role` and `content` nor `from` and `value`")
    name = message[role_key]
    if not isinstance(name, str) or name not in ROLE_OF:
        raise ValueError(f"{what} is of {shown(name)}; roles are {', '.join(ROLE_OF)}")
    extra = {key: message[key] for key in KEPT if message.get(key) is not None}
    content = "" if message.get(text_key) is None and extra.get("tool_calls") else \
        _text(message.get(text_key), f"{text_key} of {what}")
    if name == "function_call":
        extra, content = extra | {"tool_calls": _tool_calls(content, what)}, ""
    return Turn(ROLE_OF[name], content, _learned(message, what), extra)


def turns_of(value: Any, key: str) -> list[Turn]:
    """A list of messages."""
    if not isinstance(value, list):
        raise ValueError(f"{key} is {shown(value)}, not a list of turns")
    return [turn_of(message, number) for number, message in enumerate(value, start=1)]


def _learned(message: Record, what: str) -> bool:
    """OpenAI's `weight`: 0 or 1, of an answer."""
    weight = message.get("weight", 1)
    if weight is not None and weight not in (0, 1):
        raise ValueError(f"weight of {what} is {shown(weight)}, not 0 or 1")
    return weight != 0


def _tool_calls(text: str, what: str) -> list[dict[str, Any]]:
    """ShareGPT's `function_call`, `{"name": …, "arguments": …}` as text, in the form of OpenAI's."""
    try:
        calls = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is a function_call that is no JSON: {shown(text)}") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(f"{what} is a function_call without a name: {shown(text)}")
    return [{"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
            for call in calls]


def transcript_of(text: str, what: str) -> list[Turn]:
    """`⏎⏎Human: …⏎⏎Assistant: …` as Anthropic's hh-rlhf has it."""
    parts = TRANSCRIPT.split(text)
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(f"{what} is no transcript of `Human:` and `Assistant:`: {shown(text)}")
    return [Turn(USER if name == "Human" else ASSISTANT, said.strip())
            for name, said in zip(parts[1::2], parts[2::2], strict=True)]


def tools_in(record: Record) -> tuple[Mapping[str, Any], ...]:
    """The descriptions of tools that a record brings: a list, or one as JSON text."""
    tools = record.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError):
            raise ValueError(f"tools is text that is no JSON: {shown(tools)}") from None
    if not tools:
        return ()
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"tools is {shown(tools)}, not a list of objects")
    return tuple(tools)


def margin_in(record: Record) -> float | None:
    """How much better the chosen answer is."""
    margin = record.get("margin")
    if margin is None:
        return None
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise ValueError(f"margin is {shown(margin)}, not a finite number")
    return float(margin)


def _keys(record: Record) -> str:
    return "the keys " + ", ".join(shown(key)[1:-1] for key in [*record][:8]) if record else "no keys"


def with_system(turns: Sequence[Turn], system: str) -> list[Turn]:
    """A system's text before the turns, where there is one."""
    return [Turn(SYSTEM, system), *turns] if system.strip() else list(turns)
