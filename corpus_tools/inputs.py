"""The files of a corpus: found in folders and globs, told apart by their endings, opened and unpacked in chunks."""

from __future__ import annotations

import codecs
import glob
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from pathlib import Path, PurePath, PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from corpus_tools.remote import is_remote, open_remote, remote_files
from engine.data.sidecar import ASIDE, sidecar_path
from engine.errors import DataError, RequestError
from engine.instead import is_hub_name
from engine.reading import regular_size

Item = TypeVar("Item")

FORMATS = (".txt", ".jsonl", ".json", ".parquet")
COMPRESSIONS = (".gz", ".zst")
READ_BYTES = 1 << 18
OUTPUT_BYTES = 1 << 20  # unpacked at a time
GZ_INPUT_BYTES = 1 << 12  # handed to zlib at a time: as closely is known where damage begins
ZST_INPUT_BYTES = 1 << 11  # handed to zstd at a time: 64 MiB at the very most when unpacked


@dataclass(frozen=True)
class InputFile:
    """A file of the corpus and what tells whether it has changed since."""

    path: str  # "-" is standard input
    format: str
    compression: str = ""
    num_bytes: int = 0
    modified_ns: int = 0


def bytes_before(files: Sequence[InputFile]) -> list[int]:
    """Bytes of all files before each, as they lie on disk, and of all."""
    return [0, *accumulate(file.num_bytes for file in files)]


def expand_inputs(files: Iterable[str | Path]) -> list[InputFile]:
    """Files, folders (searched, sorted), globs, addresses, `-` -> files of the corpus, each once, in the order given.

    In folders, names that begin with `_` or `.` and the side files of corpora are passed over: they are no text.

    Raises:
        RequestError: a name matches nothing, or its format isn't known.
    """
    found: dict[str, InputFile] = {}
    for name in map(str, files):
        if name == "-":
            found.setdefault(name, InputFile(name, ".jsonl", modified_ns=time.time_ns()))  # never the same twice
            continue
        if is_remote(name):
            found.update((file.path, file) for file in _at_address(name) if file.path not in found)
            continue
        for path in _matching(name):
            found.setdefault(str(path.resolve()), _input_file(path))
    if not found:
        raise RequestError("no input files were given")
    return list(found.values())


def _at_address(name: str) -> list[InputFile]:
    there = [(file, _format_of(PurePosixPath(file.name))) for file in remote_files(name)]
    known = [InputFile(file.address, *format, file.num_bytes, file.version) for file, format in there
             if format[0] in FORMATS]
    if not known:
        raise RequestError(f"{name} holds no {', '.join(FORMATS)} files (each also .gz or .zst)")
    return known


def _matching(name: str) -> list[Path]:
    path = Path(name)
    if path.exists() and not path.is_dir():
        try:
            regular_size(path)
        except ValueError as error:
            raise RequestError(f"input {name}: {error}; text from a pipe is read as `-`, JSON lines") from None
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
    raise RequestError(f"input {name} does not exist"
                       + ("; datasets of the Hub are read as hf://datasets/ORG/NAME/FILE" if is_hub_name(name) else ""))


def _is_side_file(path: Path) -> bool:
    """A corpus prepared into the same folder has a `.json` beside its `.bin` and `.idx`, which is no text."""
    name = path.name.removesuffix(ASIDE if path.name.endswith(ASIDE) else ".json")
    beside = all(path.with_name(f"{name}{suffix}").exists() for suffix in (".bin", ".idx"))
    return path.suffix == ".json" and beside and path == sidecar_path(path.with_name(name))


def _format_of(path: PurePath) -> tuple[str, str]:
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
    """The file as it lies on disk or at its address, or standard input."""
    if is_remote(file.path):
        return cast(BinaryIO, open_remote(file.path))
    return sys.stdin.buffer if file.path == "-" else open(file.path, "rb")


def decompressed(raw: BinaryIO, compression: str) -> Iterator[bytes]:
    """The content in chunks of bounded size.

    Raises:
        DataError: a compressed file is damaged or ends early.
    """
    if not compression:
        return iter(lambda: raw.read(READ_BYTES), b"")
    return _gathered(_unzipped(raw) if compression == ".gz" else _unpacked_zst(raw))


def _gathered(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Small pieces joined, so that nobody pays for each."""
    gathered: list[bytes] = []
    num_bytes = 0
    damage: list[DataError] = []
    for piece in until_damage(pieces, damage):
        gathered.append(piece)
        num_bytes += len(piece)
        if num_bytes >= READ_BYTES:
            yield b"".join(gathered)
            gathered, num_bytes = [], 0
    if gathered:
        yield b"".join(gathered)
    if damage:
        raise damage[0]


def until_damage(items: Iterable[Item], damage: list[DataError]) -> Iterator[Item]:
    """The items before a DataError, which ends up in `damage`: what came before it is good all the same."""
    try:
        yield from items
    except DataError as error:
        damage.append(error)


def _unzipped(raw: BinaryIO) -> Iterator[bytes]:
    """gzip: members one after the other, and zeros behind them, which tapes leave."""
    stream: Any = None
    end = 0
    for start, data in _pieces(raw, GZ_INPUT_BYTES):
        end = start + len(data)
        while data := data if stream else data.lstrip(b"\0"):
            stream = stream or zlib.decompressobj(wbits=31)
            try:
                content = stream.decompress(data, OUTPUT_BYTES)
                data = stream.unconsumed_tail
                yield content
                while not data and not stream.eof and len(content) == OUTPUT_BYTES:  # it holds back more
                    content = stream.decompress(b"", OUTPUT_BYTES)
                    yield content
            except zlib.error as error:
                raise _damaged(".gz", start, end, error) from error
            if stream.eof:
                data, stream = stream.unused_data, None
            elif not data:
                break
    if stream is not None:
        raise _cut_off(".gz", end)


def _unpacked_zst(raw: BinaryIO) -> Iterator[bytes]:
    """zstd: frames one after the other.  A block of 128 KiB may take four bytes, so little is handed over at a time."""
    begin = _zst_decompressor()
    stream: Any = None
    end = 0
    for start, data in _pieces(raw, ZST_INPUT_BYTES):
        end = start + len(data)
        while data:
            stream = stream or begin()
            try:
                yield stream.decompress(data)
            except Exception as error:  # ZstdError of an optional package
                raise _damaged(".zst", start, end, error) from error
            data, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
    if stream is not None:
        raise _cut_off(".zst", end)


def _pieces(raw: BinaryIO, size: int) -> Iterator[tuple[int, bytes]]:
    """What lies in a file in pieces of at most `size` bytes, and where each begins."""
    start = 0
    while read := raw.read(READ_BYTES):
        for at in range(0, len(read), size):
            yield start + at, read[at : at + size]
        start += len(read)


def _damaged(suffix: str, start: int, end: int, error: Exception) -> DataError:
    return DataError(f"the {suffix} file is damaged ({error}): bytes {start:,} to {end:,} cannot be unpacked, and all "
                     "that follows them is lost; copy it anew")


def _cut_off(suffix: str, end: int) -> DataError:
    return DataError(f"the {suffix} file ends in the middle, at byte {end:,}: it was cut off; copy it anew")


def _zst_decompressor() -> Callable[[], Any]:
    try:
        import zstandard  # optional package
    except ImportError as error:
        raise RequestError("reading .zst files needs the package zstandard: pip install 'octant[data]'") from error
    return lambda: zstandard.ZstdDecompressor().decompressobj()


def utf8(chunks: Iterable[bytes], *, json: bool) -> Iterator[bytes]:
    """Chunks of a text without its byte order mark.

    Raises:
        DataError: the text begins as UTF-16 or UTF-32 do.
    """
    head, rest = b"", iter(chunks)
    for chunk in rest:
        head += chunk
        if len(head) >= 4:
            break
    if encoding := _wide_encoding(head[:4], json):
        raise DataError(f"line 1: this is {encoding}, not UTF-8; convert it: iconv -f {encoding} -t UTF-8 OLD > NEW")
    yield from filter(None, chain([head.removeprefix(codecs.BOM_UTF8)], rest))


def _wide_encoding(head: bytes, json: bool) -> str | None:
    """By the zeros of a first character of ASCII, which every JSON has; other texts may have the mark alone."""
    zeros = [byte == 0 for byte in head]
    if zeros in ([False, True, True, True], [True, True, True, False]) or head == codecs.BOM_UTF32_LE:
        return "UTF-32"
    marked = head[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) and (not json or True in zeros)
    return "UTF-16" if marked or zeros in ([False, True, False, True], [True, False, True, False]) else None
