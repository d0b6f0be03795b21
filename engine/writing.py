"""Files that we write: whole or not at all, and never in the place of what somebody else put there.

*Whole.*  A file is written beside its name and renamed onto it, so a full disk or a kill leaves what was there before.
A pipe or a device is written to as it is, since a rename would replace it by a file.

*Never in the place of another.*  What is there already is left alone, unless it is what the command itself made, or the
user says `--overwrite`.  Pictures and pages end with a mark by which they are known again.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engine.errors import RequestError

MARK = b"<!-- made by Octant -->\n"
MOST_READ = 1 << 26  # of a file that is looked at before it is replaced


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file that is complete, or leave what was there, and make its name last.

    Raises:
        OSError: it cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    final = path.resolve()  # of a link, what it leads to
    beside = final.with_name(f".{final.name}.{os.getpid()}.partial")
    try:
        with open(beside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, final)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_directory(final.parent)


def write_picture(path: Path, text: str) -> None:
    """An SVG or HTML file, in the place of an earlier one of ours, with the folders above it.

    Raises:
        RequestError: another file is there, or it cannot be written.
    """
    refuse_other_files([path], lambda data: data.endswith(MARK))
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.rstrip("\n").encode() + b"\n" + MARK)


def refuse_other_files(paths: Iterable[Path], is_ours: Callable[[bytes], bool]) -> None:
    """Nothing but what a command itself made may be replaced by it.

    Args:
        is_ours: tells from a file's content.

    Raises:
        RequestError: there is something else.
    """
    for path in paths:
        if path.is_dir():
            raise RequestError(f"{path} is a folder; give the name of a file")
        if path.is_file() and (size := path.stat().st_size):
            if size > MOST_READ or not is_ours(path.read_bytes()):
                raise RequestError(f"{path} is there already, and is not of this command's making: give another name, "
                                   "or remove it")


def refuse_existing(paths: Iterable[Path], overwrite: bool) -> None:
    """
    Raises:
        RequestError: one of the files is there, and `overwrite` was not asked for; or it is no file.
    """
    for path in paths:
        if path.is_dir():
            raise RequestError(f"{path} is a folder; give the name of a file")
        if path.exists() and not overwrite:
            raise RequestError(f"{path} is there already: give another name, remove it, or replace it with --overwrite")


def named_file(name: str | os.PathLike[str], example: str) -> Path:
    """The path that a user gave for a file to be written.

    Args:
        example: a name that such files have, for the message.

    Raises:
        RequestError: it names a folder.
    """
    text = os.fspath(name)
    if text.endswith(os.sep) or Path(text).name in ("", ".."):
        shown = text or "(nothing)"
        raise RequestError(f"{shown} is a folder; give a name in it, such as {os.path.join(text, example)}")
    return Path(text)


@contextlib.contextmanager
def write_errors(path: str | os.PathLike[str], left: str = "") -> Iterator[None]:
    """A full disk or a forbidden folder becomes a RequestError that names what was being written.

    Args:
        left: what has become of the work, for the message.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # that is the terminal's reader, not a file
    except OSError as error:
        raise RequestError(f"cannot write {os.fspath(path)}: {error.strerror or error}{left and '; '}{left}") from error


def sync_directory(directory: Path) -> None:
    """Makes the names in a directory last."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
