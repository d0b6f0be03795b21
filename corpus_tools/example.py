"""Text to try things with, where nobody has any yet: the sources and docstrings of this Python's standard library.

It is on every machine that can run this, it is the same on every machine with the same Python, and a small model
learns something visible from it in minutes.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from engine.writing import refuse_other_files, write_errors, write_whole

DEFAULT_BYTES = 3_000_000                # enough to learn from, quick to prepare
LEAST_BYTES_OF_A_MODULE = 2000


def standard_library(num_bytes: int = DEFAULT_BYTES) -> Iterator[str]:
    """Modules as texts, in a fixed order, until they hold so many bytes."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        if num_bytes <= 0:
            return
        inside = path.relative_to(library).parts
        if "site-packages" in inside or "test" in inside or path.stat().st_size <= LEAST_BYTES_OF_A_MODULE:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        num_bytes -= len(text.encode())
        yield text


def as_json_lines(texts: Iterator[str]) -> str:
    """One record with the key `text` per line."""
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)


def write_example(path: Path, num_bytes: int) -> int:
    """Writes the texts; returns the number of documents.  A file that holds them already is left as it is.

    Raises:
        RequestError: something else is there, or it cannot be written.
    """
    content = as_json_lines(standard_library(num_bytes))
    refuse_other_files([path], lambda data: data == content.encode())
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
    return content.count("\n")
