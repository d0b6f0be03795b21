"""Which characters of a rendered conversation the model is to say: every answer with what ends it.

Where a template marks them (`engine.data.chat.jinja`) it has said so.  Where it doesn't, it is asked a second time,
with a private character put before and behind every text, inside the blanks at its ends, so that a template that trims
still does.  Without these characters the second rendering must be the first, or the template is one that changes what
it says by what it is told, and is refused; then they show where each text came to stand:

    <|im_start|>user⏎  ⟨Hi⟩  <|im_end|>⏎<|im_start|>assistant⏎  ⟨Hello⟩  <|im_end|>  ⏎<|im_start|>…
                            └──────── lead-in ──────────────┘   └ learned ───────┘

What an answer begins behind (the *lead-in*) and what ends it are the template's, and are read off two conversations
that are rendered when it is opened: one that asks for an answer, and one that ends with it.  So what a template puts
between the lead-in and the answer, such as an empty thought, is learned as well: the model has to say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.data.chat.conversation import ASSISTANT, USER, Turn, Turns
from engine.data.chat.jinja import Template, unused_characters
from engine.data.tokenizer_base import Span, Tokenizer
from engine.errors import DataError

EDGES = re.compile(r"(\s*)(.*?)(\s*)", re.DOTALL)
KINDS = ("type", "id")  # keys whose texts say of which kind something is, and are compared, not written
REMEDY = "mark them in the template with {% generation %} … {% endgeneration %}"
Tools = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        answers: the range of every answer of the assistant's, in order.
        plain: ranges that are somebody's own text, in which nothing is a special token, ascending.
    """

    text: str
    answers: list[Span]
    plain: list[Span]


class Renderer:
    """A template and what is known of it: where answers begin and end.

    Args:
        tokenizer: says which texts are special tokens.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.template, self._specials = template, tuple(tokenizer.specials)

    def render(self, turns: Turns, tools: Tools = ()) -> Rendered:
        """The conversation as text, and which of it is what.

        Raises:
            DataError: the template refuses it or fails, or does not let its answers be found.
        """
        text, answers = self.template.render([turn.message() for turn in turns], tools)
        count = sum(turn.role == ASSISTANT for turn in turns)
        if not self.template.marks:
            found = self._found(text, turns, tools)
            plain = sorted(span for spans in found for span in spans)
            return Rendered(text, [*self._answers(text, turns, found)], plain)
        if len(answers) != count:
            raise DataError(f"the chat template {self.template.name} marks {len(answers)} answers of {count}")
        return Rendered(text, answers, self._plain(text, turns, tools))

    def prompt(self, turns: Turns, tools: Tools = ()) -> Rendered:
        """The text up to where an answer begins; its answers are those before."""
        text, _ = self.template.render([turn.message() for turn in turns], tools, prompt=True)
        return Rendered(text, [], self._plain(text, turns, tools, prompt=True))

    def _plain(self, text: str, turns: Turns, tools: Tools, prompt: bool = False) -> list[Span]:
        """Where what people said stands; looked for only where it holds what could be taken for a special token."""
        if not any(special in turn.content for turn in turns for special in self._specials):
            return []
        return sorted(span for spans in self._found(text, turns, tools, prompt) for span in spans)

    def _found(self, text: str, turns: Turns, tools: Tools, prompt: bool = False) -> list[list[Span]]:
        """For every turn, where what it holds stands in `text`, without the blanks at its ends."""
        marks = _Marks([text, *(turn.content for turn in turns)])
        messages = [marks.around(number, turn) for number, turn in enumerate(turns)]
        probe, _ = self.template.render(messages, tools, prompt=prompt)
        if marks.without(probe) != text:
            raise DataError(f"the chat template {self.template.name} writes this conversation differently by what its "
                            f"texts hold, so that its answers cannot be found: {REMEDY}")
        found = marks.places(probe, len(turns))
        for turn, spans in zip(turns, found, strict=True):
            if not spans and turn.role == ASSISTANT:
                raise DataError(f"the chat template {self.template.name} leaves out an answer: {REMEDY}")
        return found

    def _answers(self, text: str, turns: Turns, found: Sequence[Sequence[Span]]) -> Iterator[Span]:
        for number, turn in enumerate(turns):
            if turn.role == ASSISTANT:
                before = max((spans[-1][1] for spans in found[:number] if spans), default=0)
                following = next((spans[0][0] for spans in found[number + 1:] if spans), len(text))
                first, last = found[number][0][0], max(end for _, end in found[number])
                asked = turns[number - 1].content if number and turns[number - 1].role == USER else None
                yield self._begin(text[before:first], asked) + before, self._end(text, last, following)

    def _begin(self, between: str, asked: str | None) -> int:
        """Where an answer begins in what stands between the text before, of a user perhaps, and its own.

        Behind the lead-in; where a template has another in this place, with the blanks before the answer.
        """
        if asked is not None and asked.strip():
            for kept in (asked[len(asked.rstrip()):], ""):
                if between.startswith(kept + self._lead_in[0]):
                    return len(kept + self._lead_in[0])
        for lead_in in self._lead_in if asked is not None else self._lead_in[1:]:
            if lead_in and (place := between.rfind(lead_in)) >= 0:
                return place + len(lead_in)
        return len(between.rstrip())

    def _end(self, text: str, answer: int, following: int) -> int:
        """Behind the special token that ends an answer, or behind what the template puts there."""
        between = text[answer:following]
        special = self._ends_with
        if special is not None:
            place = between.find(special)
            return answer + place + len(special) if place >= 0 else answer
        ending = self._ending.rstrip()
        place = between.find(ending) if ending else -1
        return answer + place + len(ending) if place >= 0 else answer

    @cached_property
    def _lead_in(self) -> tuple[str, str]:
        """What a template writes behind a user's text when it asks for an answer; and what of it only then."""
        mark = next(unused_characters([self.template.source]))
        asking = [Turn(USER, mark).message()]
        without, with_it = self.template.render(asking)[0], self.template.render(asking, prompt=True)[0]
        return with_it.rpartition(mark)[2], with_it.removeprefix(without)

    @cached_property
    def _ending(self) -> str:
        """What follows an answer that is the last turn."""
        mark = next(unused_characters([self.template.source]))
        text, _ = self.template.render([Turn(USER, "a").message(), Turn(ASSISTANT, mark).message()])
        return text.rpartition(mark)[2]

    @cached_property
    def _ends_with(self) -> str | None:
        """The first special token in that."""
        places = [(place, -len(special), special) for special in self._specials
                  if (place := self._ending.find(special)) >= 0]
        return min(places)[2] if places else None


class _Marks:
    """A private character for every text, put before and behind it, which shows where it comes to stand.

    Of a text that a template divides, as between thought and answer, one of the two may be left.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._unused = unused_characters(texts)
        self._turn_of: dict[str, int] = {}

    def around(self, number: int, turn: Turn) -> dict[str, Any]:
        """The message of turn `number`, with the names of the tools that it calls and what it hands them marked too."""
        message = turn.message()
        for key in ("tool_calls", "reasoning_content"):
            if key in message:
                message[key] = self._marked(number, message[key])
        message["content"] = self._marked(number, turn.content)
        return message

    def _marked(self, number: int, value: Any) -> Any:
        """A nested value with every text in it marked, but for blank ones and those that say of which kind it is."""
        if isinstance(value, str) and not value.strip():
            return value
        if isinstance(value, str):
            found, mark = EDGES.fullmatch(value), next(self._unused)
            assert found is not None
            self._turn_of[mark] = number
            return f"{found[1]}{mark}{found[2]}{mark}{found[3]}"
        if isinstance(value, Mapping):
            return {key: inner if key in KINDS else self._marked(number, inner) for key, inner in value.items()}
        return [self._marked(number, inner) for inner in value] if isinstance(value, list) else value

    def without(self, probe: str) -> str:
        """The text as it is when nothing is marked."""
        return probe.translate(dict.fromkeys(map(ord, self._turn_of)))

    def places(self, probe: str, num_turns: int) -> list[list[Span]]:
        """For every turn the ranges between its marks, ascending, counted without them."""
        edges: dict[str, list[int]] = {}
        for number, (place, mark) in enumerate((i, c) for i, c in enumerate(probe) if c in self._turn_of):
            edges.setdefault(mark, []).append(place - number)
        found: list[list[Span]] = [[] for _ in range(num_turns)]
        for mark, places in edges.items():
            found[self._turn_of[mark]].append((places[0], places[-1]))
        return [sorted(spans) for spans in found]
