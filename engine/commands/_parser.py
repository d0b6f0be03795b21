"""argparse as people type: options before, between and behind the words, and a mistake answered with what to type.

A verb that takes `key=value` is often given a key as an option (`--steps 1`), or one of another trainer's options
(`--tensor-model-parallel-size 2`): the message then has the words that would have worked.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import Any

GREEDY = (argparse.PARSER, argparse.REMAINDER)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` with the nearest name where a word is not known."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args: Sequence[str] | None = None,  # type: ignore[override]
                         namespace: argparse.Namespace | None = None) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but words need not stand together; what is not known is an error of this parser."""
        if args is None or any(action.nargs in GREEDY for action in self._get_positional_actions()):
            return super().parse_known_args(args, namespace)
        options, words, unknown = self._sorted(args)
        if unknown:
            self.error("; ".join(self._instead(option, value) for option, value in unknown))
        return super().parse_known_args([*options, *(["--", *words] if words else [])], namespace)

    def _sorted(self, args: Sequence[str]) -> tuple[list[str], list[str], list[tuple[str, str | None]]]:
        """Options with their values, the other words, and what looks like an option and is none with what follows."""
        options: list[str] = []
        words: list[str] = []
        unknown: list[tuple[str, str | None]] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            name, equals, value = word.partition("=")
            if word == "--":
                words += rest
                break
            if not word.startswith("-") or word == "-" or (name not in self._option_string_actions and " " in word):
                words.append(word)
            elif (action := self._option_string_actions.get(name)) is None:
                follows = rest[0] if rest and not rest[0].startswith("-") and "=" not in rest[0] else None
                unknown.append((name, value if equals else follows))
            elif equals or action.nargs == 0:
                options.append(word)
            elif action.nargs in ("+", "*"):
                options += [word, *_values(rest)]
            elif rest and rest[0] not in self._option_string_actions:    # joined, so that a value may begin with a dash
                options.append(f"{word}={rest.pop(0)}")
            else:
                options.append(word)
        return options, words, unknown

    def _instead(self, option: str, value: str | None) -> str:
        """What to type in the place of an option that is none."""
        takes_keys = any(action.dest == "overrides" for action in self._actions)
        if takes_keys and option in ("--config", "--config-file", "--config_file", "-c"):
            return f"unknown option {option}; the configuration is given as it is: {self.prog} {value or 'CONFIG.yaml'}"
        if takes_keys and (key := _key_for(option)):
            return f"unknown option {option}; configuration keys are written key=value: {key}={value or '…'}"
        close = get_close_matches(option, self._option_string_actions, n=1)
        return f"unknown option {option}" + (f"; did you mean {close[0]}?" if close else "; --help lists them")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is None or value in action.choices:
            return
        known = [str(choice) for choice in action.choices]
        close = get_close_matches(str(value), known, n=1)
        hint = f"did you mean `{close[0]}`?" if close else "known: " + ", ".join(known)
        raise argparse.ArgumentError(action, f"unknown: {value!r}; {hint}")


def _values(rest: list[str]) -> Iterator[str]:
    """Takes the values of an option that has several off the words behind it."""
    while rest and not rest[0].startswith("-"):
        yield rest.pop(0)


def _key_for(option: str) -> str | None:
    """The configuration key that is meant: ours, ours without its section, or what another trainer calls it."""
    name = option.lstrip("-").replace("-", "_")
    known = list(import_module("engine.config.problems").dotted_keys())          # pydantic: only after a mistake
    if found := [key for key in known if name in (key, key.rpartition(".")[2])]:
        return str(found[0])
    row = import_module("engine.config.synonyms").ours(name)
    return None if row is None else str(row.key)


def add_actions(parser: Parser, *actions: tuple[str, str, str]) -> list[Parser]:
    """Sub-parsers, one per (name, help, example), stored in `args.action`."""
    table = parser.add_subparsers(dest="action", required=True, metavar="ACTION", help=argparse.SUPPRESS,
                                  parser_class=Parser)
    parser.usage = f"{parser.prog} ACTION …"
    parser.description = f"{parser.description}\n\nactions:\n" + "\n".join(
        f"  {name:<15}{text}" for name, text, _ in actions)
    return [table.add_parser(name, help=text, description=sentence(text), epilog=f"example:\n  octant {example}")
            for name, text, example in actions]


def sentence(text: str) -> str:
    """A line of help as a sentence."""
    return text[0].upper() + text[1:] + "."
