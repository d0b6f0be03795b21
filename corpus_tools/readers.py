"""Corpora as a stream of blocks: about one mebibyte of whole records each, in an order that only the files decide.

    .txt      the file is one document (cut before a line end into documents of 64 MiB where it is larger)
    .jsonl    one JSON object per line, the document is its `--field`
    .json     a list of objects, or objects one after the other (so JSON lines called .json work, as C4's are)
    .parquet  one document per row, column `--field`

each also gzip (`.gz`) or zstd (`.zst`).  A field that holds a list of strings is joined by line ends.  Nothing here
holds more than a block and the longest record, whatever the size of the corpus; blocks are cut by content only, so
compressing a file, or reading it with more workers, changes nothing.

A record that cannot be used becomes a `BadRecord` (file, where, why) inside its block: the caller decides whether to
stop or to go on.
"""

from __future__ import annotations

import codecs
import json
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from corpus_tools.inputs import InputFile, decompressed, expand_inputs, open_input
from corpus_tools.json_values import LONGEST_RECORD_BYTES, json_values
from engine.errors import DataError, RequestError

Item = TypeVar("Item")

BLOCK_BYTES = 1 << 20  # text handed to a worker at a time
LONGEST_DOCUMENT_BYTES = 1 << 26  # of a .txt file


@dataclass(frozen=True)
class BadRecord:
    """A record that cannot be used: which file, where in it, and why."""

    path: str
    where: str
    why: str

    def __str__(self) -> str:
        return f"{self.path}, {self.where}: {self.why}" if self.where else f"{self.path}: {self.why}"


@dataclass(frozen=True)
class Block:
    """Some consecutive records of one file.

    Exactly one of `lines` (JSON lines, still unparsed) and `texts` is used.  A fragment of a document is a block's only
    text: it `continues` the document of the block before, and leaves it open unless it `ends`.  `abandon`: forget the
    open document.
    """

    path: str
    lines: bytes = b""
    first_line: int = 1
    texts: tuple[str, ...] = ()
    places: tuple[str, ...] = ()  # where in the file each text is, such as "record 7"
    continues: bool = False
    ends: bool = True
    abandon: bool = False
    bad: tuple[BadRecord, ...] = ()
    file_position: int = field(default=0, compare=False)  # bytes of the file read so far, for the progress bar


def read_blocks(file: InputFile, text_field: str, join_texts: bool = True) -> Iterator[Block]:
    """The blocks of one file.  `join_texts`: long texts may be cut into fragments of one document (see `Block`).

    What is wrong with the file as a whole (damaged, empty, a missing column) is the last block's `bad`.
    """
    position = 0
    try:
        with open_input(file) as raw:
            num_blocks = 0
            for block in _blocks_of(file, raw, text_field, join_texts):
                position = raw.tell() if file.path != "-" else 0
                num_blocks += 1
                yield replace(block, file_position=position)
        if num_blocks == 0:
            raise DataError("it is empty: no record in it" if file.num_bytes else "it is empty (0 bytes)")
    except (DataError, OSError, zlib.error) as error:
        yield Block(file.path, abandon=True, bad=(BadRecord(file.path, "", str(error)),), file_position=position)


def _blocks_of(file: InputFile, raw: BinaryIO, text_field: str, join_texts: bool) -> Iterator[Block]:
    if file.format == ".parquet":
        return _parquet_blocks(file, raw, text_field)
    chunks = decompressed(raw, file.compression)
    if file.format == ".txt":
        return _text_blocks(file.path, chunks, BLOCK_BYTES if join_texts else LONGEST_DOCUMENT_BYTES)
    if file.format == ".json":
        return _json_blocks(file.path, chunks, text_field)
    return _line_blocks(file.path, chunks)


def _cut(chunks: Iterable[bytes], size: int, limit: int, keep_newline: bool) -> Iterator[bytes]:
    """Regroup chunks into pieces of at most `size` bytes, cut at the last line end within; longer where a line is.

    With `keep_newline` the line end closes a piece, otherwise it opens the next one.  A line longer than `limit` is cut
    at a space or a character; pieces depend on the content only, never on how it came in chunks.
    """
    buffer = bytearray()
    searched = 0  # no line end before this offset
    damage: list[DataError] = []
    for chunk in _until_damage(chunks, damage):
        buffer += chunk
        while len(buffer) > size:
            window = min(max(size, searched + size), limit)
            if len(buffer) <= window:
                break
            end = buffer.rfind(b"\n", max(1, searched), window)
            if end < 0 and window < limit:
                searched = window
                continue
            end = (end + keep_newline) if end > 0 else _cut_in_line(buffer, window)
            yield bytes(buffer[:end])
            del buffer[:end]
            searched = 0
    if damage:
        del buffer[buffer.rfind(b"\n") + 1 :]  # the whole lines before the damage are good
    if buffer:
        yield bytes(buffer)
    if damage:
        raise damage[0]


def _until_damage(items: Iterable[Item], damage: list[DataError]) -> Iterator[Item]:
    """The items before a DataError, which ends up in `damage`: what came before it is good all the same."""
    try:
        yield from items
    except DataError as error:
        damage.append(error)


def _cut_in_line(buffer: bytearray, end: int) -> int:
    space = buffer.rfind(b" ", 1, end)
    if space > 0:
        return space
    while end > 1 and buffer[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end


def _line_blocks(path: str, chunks: Iterable[bytes]) -> Iterator[Block]:
    line = 1
    for piece in _cut(_without_bom(chunks), BLOCK_BYTES, LONGEST_RECORD_BYTES, keep_newline=True):
        if len(piece) >= LONGEST_RECORD_BYTES - 4:
            raise DataError(f"line {line} is longer than {LONGEST_RECORD_BYTES:,} bytes; is this JSON lines?")
        yield Block(path, lines=piece, first_line=line)
        line += piece.count(b"\n")


def _without_bom(chunks: Iterable[bytes]) -> Iterator[bytes]:
    first = True
    for chunk in filter(None, chunks):
        yield chunk.removeprefix(codecs.BOM_UTF8) if first else chunk
        first = False


def _text_blocks(path: str, chunks: Iterable[bytes], size: int) -> Iterator[Block]:
    """One document, in fragments that begin with a line end; a new document at LONGEST_DOCUMENT_BYTES."""
    pending: Block | None = None
    offset = document_bytes = 0
    for piece in _cut(_without_bom(chunks), size, LONGEST_DOCUMENT_BYTES, keep_newline=False):
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            where = f"invalid UTF-8 at byte {offset + error.start:,} (0x{piece[error.start]:02x})"
            raise DataError(f"{where}; convert the file to UTF-8") from error
        full = document_bytes + len(piece) > LONGEST_DOCUMENT_BYTES
        joins = pending is not None and text[0] == "\n" and not full
        if pending is not None:
            yield replace(pending, ends=not joins)
        pending = Block(path, texts=(text,), continues=joins)
        document_bytes = document_bytes + len(piece) if joins else len(piece)
        offset += len(piece)
    if pending is not None:
        yield pending


def _json_blocks(path: str, chunks: Iterable[bytes], text_field: str) -> Iterator[Block]:
    texts: list[str] = []
    places: list[str] = []
    bad: list[BadRecord] = []
    num_characters = 0
    damage: list[DataError] = []
    for number, record in enumerate(_until_damage(json_values(chunks), damage), start=1):
        try:
            texts.append(text_of(record, text_field))
            places.append(f"record {number}")
            num_characters += len(texts[-1])
        except ValueError as error:
            bad.append(BadRecord(path, f"record {number}", str(error)))
        if num_characters >= BLOCK_BYTES or len(texts) + len(bad) >= 10_000:
            yield Block(path, texts=tuple(texts), places=tuple(places), bad=tuple(bad))
            texts, places, bad, num_characters = [], [], [], 0
    if texts or bad:
        yield Block(path, texts=tuple(texts), places=tuple(places), bad=tuple(bad))
    if damage:
        raise damage[0]


def _parquet_blocks(file: InputFile, raw: BinaryIO, text_field: str) -> Iterator[Block]:
    try:
        import pyarrow  # optional package
        import pyarrow.parquet
    except ImportError as error:
        raise RequestError("reading .parquet files needs the package pyarrow: pip install 'octant[data]'") from error
    with tempfile.TemporaryFile() as unpacked:
        if file.compression:  # parquet is read from its end, so it has to be unpacked first
            for chunk in decompressed(raw, file.compression):
                unpacked.write(chunk)
        try:
            table = pyarrow.parquet.ParquetFile(unpacked if file.compression else raw)
        except pyarrow.ArrowException as error:
            raise DataError(f"not a readable parquet file ({error})") from error
        if text_field not in table.schema_arrow.names:
            raise DataError(f"no column {text_field!r}; its columns are {', '.join(table.schema_arrow.names)}")
        row = 0
        for batch in table.iter_batches(batch_size=256, columns=[text_field]):
            texts, places, bad = [], [], []
            for value in batch.column(0).to_pylist():
                row += 1
                try:
                    texts.append(text_of({text_field: value}, text_field))
                    places.append(f"row {row}")
                except ValueError as error:
                    bad.append(BadRecord(file.path, f"row {row}", str(error)))
            yield Block(file.path, texts=tuple(texts), places=tuple(places), bad=tuple(bad))


@dataclass(frozen=True)
class Records:
    """A block's documents, where each is, and the records that cannot be used."""

    texts: Sequence[str]
    places: Sequence[str]
    bad: Sequence[BadRecord]


def records_of(block: Block, text_field: str) -> Records:
    """The documents of a block; this is where JSON lines are parsed.  Blank lines are passed over."""
    if not block.lines:
        return Records(block.texts, block.places or ("",) * len(block.texts), block.bad)
    texts: list[str] = []
    places: list[str] = []
    bad = list(block.bad)
    for number, line in enumerate(block.lines.split(b"\n"), start=block.first_line):
        if not line or line.isspace():
            continue
        try:
            texts.append(text_of(json.loads(line), text_field))
            places.append(f"line {number}")
        except UnicodeDecodeError as error:
            bad.append(BadRecord(block.path, f"line {number}", f"invalid UTF-8 (byte {error.start} of the line)"))
        except json.JSONDecodeError as error:
            bad.append(BadRecord(block.path, f"line {number}", f"invalid JSON: {error.msg} (column {error.colno})"))
        except (ValueError, RecursionError) as error:
            bad.append(BadRecord(block.path, f"line {number}", str(error)))
    return Records(texts, places, bad)


def read_texts(files: Iterable[str | Path], text_field: str = "text") -> Iterator[str]:
    """Every document of files, in order.  Raises DataError at the first unusable record."""
    for file in expand_inputs(files):
        for block in read_blocks(file, text_field, join_texts=False):
            records = records_of(block, text_field)
            for record in records.bad:
                raise DataError(str(record))
            yield from records.texts


def text_of(record: Any, text_field: str) -> str:
    """The document of a record.  Raises ValueError saying what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError(f"expected a JSON object, found {type(record).__name__}")
    if text_field not in record:
        raise ValueError(f"no field {text_field!r} (see --field); its fields are {', '.join(record) or '(none)'}")
    text = record[text_field]
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = "\n".join(text)
    if not isinstance(text, str):
        raise ValueError(f"field {text_field!r} holds {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"field {text_field!r} holds half of a surrogate pair (a broken \\u escape)") from error
    return text
