"""What demonstrations are made of: a folder of their own, and commands that are shown before they run."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from collections.abc import Collection, Sequence
from pathlib import Path

from engine.errors import OctantError, RequestError
from engine.writing import write_errors, write_whole

MARK = "# Written by `octant demo`."
LAYOUTS = {1: {"tensor": 1, "pipeline": 1}, 2: {"tensor": 1, "pipeline": 2}, 4: {"tensor": 2, "pipeline": 2}}


def make_room(config: Path, ours: Collection[str]) -> None:
    """An empty folder for a configuration; an earlier demo in it is replaced.

    Args:
        ours: what a demo writes there.

    Raises:
        RequestError: anything else is there, and left alone.
    """
    directory = config.parent
    content = sorted(directory.iterdir()) if directory.is_dir() else []
    if content and not (config.is_file() and config.read_bytes().startswith(MARK.encode())):
        raise RequestError(f"{directory} is not empty and no earlier demo; give another folder with --dir")
    if foreign := [path.name for path in content if path.name not in ours]:
        raise RequestError(f"{directory} holds an earlier demo and other files ({', '.join(foreign[:3])}); move them "
                           "elsewhere, or give another folder with --dir")
    with write_errors(directory):
        if content:
            print(f"replacing the earlier demo in {directory}")
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)


def octant(*arguments: str, into: Path | None = None) -> None:
    """Shows a command and runs it.

    Args:
        into: a file for what it prints; it is there when the command has succeeded.

    Raises:
        OctantError: it failed.
    """
    print(f"\n$ octant {shlex.join(arguments)}" + (f" > {shlex.quote(str(into))}" if into else ""), flush=True)
    done = subprocess.run([sys.executable, "-m", "engine", *arguments], check=False,
                          stdout=None if into is None else subprocess.PIPE)
    if done.returncode:
        raise OctantError(f"`octant {_verb(arguments)}` ended with exit code {done.returncode}; its message is above")
    if into is not None:
        write_whole(into, done.stdout)


def _verb(arguments: Sequence[str]) -> str:
    return " ".join(arguments[:2]) if arguments[0] in ("tokenizer", "convert") else arguments[0]
