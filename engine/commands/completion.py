"""`octant completion SHELL`: a script that completes verbs, options and files in a shell (by shtab, an extra)."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from engine.errors import RequestError

FILES = ("FILE", "CONFIG.yaml", "CHECKPOINT", "RUN_DIR", "PREFIX", "DIR", "PATH", "FROM", "OUT", "MODEL", "TARGET", "T")


def run(args: argparse.Namespace) -> int:
    """Print the script.

    Raises:
        RequestError: shtab is not installed.
    """
    try:
        import shtab
    except ImportError:
        raise RequestError("completion needs the package shtab: pip install 'octant[completion]'") from None
    for action in _actions(args.parser):
        if isinstance(action, argparse._SubParsersAction):
            action.help = ""                                 # hidden from --help, which has a list of its own
        if action.choices is None and str(action.metavar) in FILES:
            vars(action)["complete"] = shtab.FILE
    print(shtab.complete(args.parser, shell=args.shell), end="")
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Every argument of a parser and of those below it."""
    for action in parser._actions:
        yield action
        below: Any = action.choices
        if isinstance(action, argparse._SubParsersAction):
            for inner in below.values():
                yield from _actions(inner)
