"""The files of a corpus: found in folders and globs, told apart by their endings, opened and unpacked in chunks."""

from __future__ import annotations

import glob
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from engine.errors import DataError, RequestError

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")
READ_BYTES = 1 << 18


@dataclass(frozen=True)
class InputFile:
    """A file of the corpus and what tells whether it has changed since."""

    path: str  # "-" is standard input
    format: str
    compression: str = ""
    num_bytes: int = 0
    modified_ns: int = 0


def expand_inputs(files: Iterable[str | Path]) -> list[InputFile]:
    """Files, folders (searched, sorted), globs and `-` -> the files of the corpus, each once, in the order given.

    In folders, names that begin with `_` or `.` and the side files of corpora are passed over: they are no text.

    Raises RequestError for a name that matches nothing or whose format isn't known.
    """
    found: dict[str, InputFile] = {}
    for name in map(str, files):
        if name == "-":
            found.setdefault(name, InputFile(name, ".jsonl", modified_ns=time.time_ns()))  # never the same twice
            continue
        for path in _matching(name):
            found.setdefault(str(path.resolve()), _input_file(path))
    if not found:
        raise RequestError("no input files were given")
    return list(found.values())


def _matching(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    if path.is_dir():
        several = [p for p in sorted(path.rglob("*")) if not any(part[0] in "_." for part in p.relative_to(path).parts)]
    else:
        several = [Path(p) for p in sorted(glob.glob(name, recursive=True))]
    known = [p for p in several if p.is_file() and _format_of(p)[0] in FORMATS and not _is_side_file(p)]
    if known:
        return known
    if path.is_dir() or several:
        raise RequestError(f"{name} holds no {', '.join(FORMATS)} files (each also .gz or .zst)")
    raise RequestError(f"input {name} does not exist")


def _is_side_file(path: Path) -> bool:
    """A corpus prepared into the same folder has a `.json` beside its `.bin` and `.idx`, which is no text."""
    return path.suffix == ".json" and all(path.with_suffix(suffix).exists() for suffix in (".bin", ".idx"))


def _format_of(path: Path) -> tuple[str, str]:
    suffixes = path.suffixes or [""]
    compression = suffixes[-1] if suffixes[-1] in COMPRESSIONS else ""
    return (suffixes[-2] if compression and len(suffixes) > 1 else suffixes[-1]), compression


def _input_file(path: Path) -> InputFile:
    format, compression = _format_of(path)
    if format not in FORMATS:
        raise RequestError(f"{path}: unknown format; inputs end in {', '.join(FORMATS)}, each also with .gz or .zst")
    stat = path.stat()
    return InputFile(str(path), format, compression, stat.st_size, stat.st_mtime_ns)


def open_input(file: InputFile) -> BinaryIO:
    """The file as it lies on disk, or standard input."""
    return sys.stdin.buffer if file.path == "-" else open(file.path, "rb")


def decompressed(raw: BinaryIO, compression: str) -> Iterator[bytes]:
    """The content in chunks.  Raises DataError where a compressed file ends early."""
    if not compression:
        yield from iter(lambda: raw.read(READ_BYTES), b"")
        return
    start = _decompressor(compression)
    stream: Any = None
    while data := raw.read(READ_BYTES):
        while data:
            stream = stream or start()
            try:
                if content := stream.decompress(data):
                    yield content
            except Exception as error:  # zlib.error, or ZstdError of an optional package
                raise DataError(f"the {compression} file is damaged ({error})") from error
            data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream is not None:
        raise DataError(f"the {compression} file ends in the middle; it was cut off")


def _decompressor(compression: str) -> Callable[[], Any]:
    if compression == ".gz":
        return lambda: zlib.decompressobj(wbits=31)
    try:
        import zstandard  # optional package
    except ImportError as error:
        raise RequestError("reading .zst files needs the package zstandard: pip install 'octant[data]'") from error
    return lambda: zstandard.ZstdDecompressor().decompressobj()
