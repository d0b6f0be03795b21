"""Chat templates in Jinja, run as `transformers` runs them: untrusted code in a sandbox, with the same names in it.

A template may mark what the model says, `{% generation %} … {% endgeneration %}`.  It changes nothing of the text;
where the marks stand comes back as ranges of characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

from engine.data.tokenizer_base import Span
from engine.errors import DataError
from engine.reading import said

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Template:
    """A compiled template.

    Args:
        name: for messages: a built-in's name, or the file it came from.
        tokens: how special tokens are written, such as `eos_token`.
    """

    def __init__(self, name: str, source: str, tokens: Mapping[str, str]) -> None:
        self.name, self.source, self.tokens = name, source, dict(tokens)
        self.marks = MARK.search(source) is not None
        self._environment = _Environment(trim_blocks=True, lstrip_blocks=True,
                                         extensions=[_Generation, jinja2.ext.loopcontrols])
        try:
            self._template = self._environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, OverflowError, ValueError) as error:
            raise DataError(f"chat template {name}: {said(error)}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = (), *,
               prompt: bool = False) -> tuple[str, list[Span]]:
        """The text, and the ranges that the template marks as the model's.

        Args:
            prompt: end with what comes before an answer.

        Raises:
            DataError: the template refuses these messages, or fails.
        """
        pieces: list[str] = []
        spans: list[Span] = []
        variables = {"messages": list(messages), "tools": list(tools) or None, "documents": None,
                     "add_generation_prompt": prompt}
        try:
            context = self._template.new_context({**self.tokens, **variables})
            with self._environment.tracked(pieces, spans):
                for piece in self._template.root_render_func(context):
                    pieces.append(piece)
        except Exception as error:                              # whatever a template, foreign code, does wrong
            raise DataError(f"the chat template {self.name} fails: {said(error)}") from None
        return "".join(pieces), spans


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The sandbox, with what templates expect to find in it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = _to_json
        self.globals |= {"raise_exception": _raise, "strftime_now": lambda format: datetime.now().strftime(format),
                         "namespace": _Namespace, "dict": lambda *items, **named: dict(*items, **named)}
        self._tracking: tuple[list[str], list[Span]] = [], []

    def tracked(self, pieces: list[str], spans: list[Span]) -> _Tracking:
        """While it is entered, marked ranges are noted in `spans`; `pieces` is the text so far."""
        return _Tracking(self, pieces, spans)

    def note(self, text: str) -> str:
        """A marked part has been rendered, and will be appended to the text."""
        pieces, spans = self._tracking
        start = sum(map(len, pieces))
        spans.append((start, start + len(text)))
        return text


class _Namespace(jinja2.utils.Namespace):
    """No names that lead to what Python keeps for itself."""

    def __init__(*args: Any, **named: Any) -> None:             # a name may be `self`
        self, values = args[0], dict(*args[1:], **named)
        jinja2.utils.Namespace.__init__(self)
        for name, value in values.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.sandbox.SecurityError(f"a namespace has no {name!r}")
        super().__setitem__(name, value)


class _Tracking:
    def __init__(self, environment: _Environment, pieces: list[str], spans: list[Span]) -> None:
        self._environment, self._new = environment, (pieces, spans)

    def __enter__(self) -> None:
        self._environment._tracking = self._new

    def __exit__(self, *_: object) -> None:
        self._environment._tracking = [], []


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`."""

    tags = {"generation"}                                                                          # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: jinja2.runtime.Macro) -> str:
        assert isinstance(self.environment, _Environment)
        return self.environment.note(caller())


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None,
             separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    """Without the escapes of HTML that Jinja's own makes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def unused_characters(texts: Iterable[str]) -> Iterator[str]:
    """Characters of a private area that occur in none of the texts."""
    used = set().union(*map(set, texts))
    return (character for code in range(0x100000, 0x10FFFE) if (character := chr(code)) not in used)
