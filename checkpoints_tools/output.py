"""What is written appears whole or not at all: beside its final name first, then one rename."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from engine.checkpoint.folder import leftover_path
from engine.errors import CheckpointError
from engine.writing import sync_directory

Item = TypeVar("Item")


@contextmanager
def committed(output: Path, num_bytes: int) -> Iterator[Path]:
    """Yields a path, not there yet, beside `output`; what the block makes of it becomes `output`, unless it raises.

    Args:
        num_bytes: about how much will be written, for the message when the disk is full.

    Raises:
        CheckpointError: `output` is there and not an empty folder, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} is there already and not empty; choose another place, or remove it")
    writing = leftover_path(output.absolute(), "writing", secrets.token_hex(6))
    try:
        writing.parent.mkdir(parents=True, exist_ok=True)
        yield writing
        _sync(writing)
        os.replace(writing, output)
        sync_directory(writing.parent)
    except OSError as error:
        raise CheckpointError(f"{output} was not written: {error}; it needs about {num_bytes:,} bytes, "
                              f"{shutil.disk_usage(_existing(output)).free:,} are free there") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(folder for folder in path.absolute().parents if folder.is_dir())


def _sync(folder: Path) -> None:
    """Makes every file and name below `folder` last."""
    for path in [folder, *folder.rglob("*")]:
        if path.is_dir():
            sync_directory(path)
        else:
            with open(path, "rb") as file:
                os.fsync(file.fileno())


def divide(items: Sequence[Item], size: Callable[[Item], int], most: int) -> list[list[Item]]:
    """Consecutive items in groups of at most `most` bytes; a larger item is a group of its own."""
    groups: list[list[Item]] = []
    left = 0
    for item in items:
        if not groups or size(item) > left:
            groups.append([])
            left = most
        groups[-1].append(item)
        left -= size(item)
    return groups
