"""A conversation, whatever file it came from.

An `Example` is what one record of a file holds: one conversation, or several that begin alike and end in different
answers, best first.  SFT learns every answer of the assistant's; what compares answers looks at the last turn of each
alternative only, and what comes before is the prompt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

SYSTEM, USER, ASSISTANT, TOOL = "system", "user", "assistant", "tool"
ROLES = (SYSTEM, USER, ASSISTANT, TOOL)
Learn = Literal["all", "last"]           # which answers: all of them, or only what comes last


@dataclass(frozen=True, slots=True)
class Turn:
    """What somebody said.

    Attributes:
        role: one of `ROLES`.
        learned: False: the file asks for this answer not to be learned.
        extra: what else the file says of it and a template may use: `tool_calls`, `reasoning_content`, `name`.
    """

    role: str
    content: str
    learned: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def message(self) -> dict[str, Any]:
        """As templates know it."""
        return {"role": self.role, "content": self.content, **self.extra}


Turns = tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Example:
    """One record.

    Attributes:
        alternatives: whole conversations, best first; one where there is nothing to compare.
        margin: by how much the first of two is better, where the file says so.
        tools: descriptions of tools, for the template.
        place: the file, and where in it.
    """

    alternatives: tuple[Turns, ...]
    margin: float | None = None
    tools: tuple[Mapping[str, Any], ...] = ()
    place: str = ""

    @property
    def turns(self) -> Turns:
        """The conversation; of several the best."""
        return self.alternatives[0]

    @property
    def prompt(self) -> Turns:
        """What comes before the last answer."""
        return self.turns[:-1]


def problem_of(turns: Turns) -> str | None:
    """What is wrong with the order of a conversation's turns, or with an answer; None where nothing is.

    Systems come first; then somebody (user or tool) and the assistant take turns; the last word is the assistant's.
    A tool speaks after the assistant or another tool.
    """
    return next(_problems(turns), None)


def _problems(turns: Turns) -> Iterator[str]:
    before = None
    for number, turn in enumerate(turns, start=1):
        if not _may_follow(turn.role, before):
            after = f"after that of {before}" if before else "at the beginning"
            yield f"turn {number} is of {turn.role}, {after}: the roles are out of order"
        if turn.role == ASSISTANT and not turn.content.strip() and not turn.extra.get("tool_calls"):
            yield f"turn {number}, an answer, is empty"
        before = turn.role
    if before != ASSISTANT:
        yield "it has no turns" if before is None else f"it ends with a turn of {before}: there is no answer to it"


def _may_follow(role: str, before: str | None) -> bool:
    if role == SYSTEM:
        return before is None
    if role == USER:
        return before in (None, SYSTEM, ASSISTANT)
    if role == TOOL:
        return before in (ASSISTANT, TOOL)
    return before in (USER, TOOL)
