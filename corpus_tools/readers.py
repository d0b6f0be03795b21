"""Corpora as a stream of blocks: about one mebibyte of whole records each, in an order that only the files decide.

    .txt      the file is one document (cut before a line end into documents of 64 MiB where it is larger)
    .jsonl    one JSON object per line, the document is its `--field`
    .json     a list of objects, or objects one after the other (so JSON lines called .json work, as C4's are)
    .parquet  one document per row, column `--field`

each also gzip (`.gz`) or zstd (`.zst`).  A field that holds a list of strings is joined by line ends.  Nothing here
holds more than a block and the longest record, whatever the size of the corpus; blocks are cut by content only, so
compressing a file, or reading it with more workers, changes nothing.

A record that cannot be used becomes a `BadRecord` (file, where, why) inside its block: the caller decides whether to
stop or to go on.  It takes no other with it: reading goes on with the next line, the next JSON value, the next row, the
next document of a text.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from corpus_tools.inputs import InputFile, decompressed, expand_inputs, open_input, until_damage, utf8
from corpus_tools.json_values import DECODER, LONGEST_RECORD_BYTES, Broken, json_values
from corpus_tools.parquet import parquet_rows
from corpus_tools.records import BadRecord, text_of
from engine.errors import DataError

BLOCK_BYTES = 1 << 20  # text handed to a worker at a time
LONGEST_DOCUMENT_BYTES = 1 << 26  # of a .txt file


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
    except (DataError, OSError) as error:
        reason = str(error) if isinstance(error, DataError) else error.strerror or str(error)
        yield Block(file.path, abandon=True, bad=(BadRecord(file.path, "", reason),), file_position=position)


def _blocks_of(file: InputFile, raw: BinaryIO, text_field: str, join_texts: bool) -> Iterator[Block]:
    if file.format == ".parquet":
        return _parquet_blocks(file, raw, text_field)
    chunks = utf8(decompressed(raw, file.compression), json=file.format != ".txt")
    if file.format == ".txt":
        return _text_blocks(file.path, chunks, BLOCK_BYTES if join_texts else LONGEST_DOCUMENT_BYTES)
    if file.format == ".json":
        return _json_blocks(file.path, chunks, text_field)
    return line_blocks(file.path, chunks)


def _cut(chunks: Iterable[bytes], size: int, limit: int, keep_newline: bool) -> Iterator[bytes]:
    """Regroup chunks into pieces of at most `size` bytes, cut at the last line end within; longer where a line is.

    With `keep_newline` the line end closes a piece, otherwise it opens the next one.  A line longer than `limit` is cut
    at a space or a character; pieces depend on the content only, never on how it came in chunks.
    """
    buffer = bytearray()
    searched = 0  # no line end before this offset
    damage: list[DataError] = []
    for chunk in until_damage(chunks, damage):
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
            yield _front(buffer, end)
            del buffer[:end]
            searched = 0
    if damage:
        del buffer[buffer.rfind(b"\n") + 1 :]  # the whole lines before the damage are good
    if buffer:
        yield bytes(buffer)
    if damage:
        raise damage[0]


def _front(buffer: bytearray, end: int) -> bytes:
    with memoryview(buffer) as view:  # a slice of the buffer itself would be one more copy
        return bytes(view[:end])


def _cut_in_line(buffer: bytearray, end: int) -> int:
    space = buffer.rfind(b" ", 1, end)
    if space > 0:
        return space
    while end > 1 and buffer[end] & 0xC0 == 0x80:  # inside a UTF-8 character
        end -= 1
    return end


def line_blocks(path: str, chunks: Iterable[bytes]) -> Iterator[Block]:
    line = 1
    for piece in _cut(_shortened(chunks, LONGEST_RECORD_BYTES), BLOCK_BYTES, sys.maxsize, keep_newline=True):
        if len(piece) > LONGEST_RECORD_BYTES and piece.find(b"\n", 0, LONGEST_RECORD_BYTES + 1) < 0:
            why = f"longer than {LONGEST_RECORD_BYTES:,} bytes; is this JSON lines?"
            yield Block(path, bad=(BadRecord(path, f"line {line}", why),))
            _, _, piece = piece.partition(b"\n")
            line += 1
        if piece:
            yield Block(path, lines=piece, first_line=line)
        line += piece.count(b"\n")


def _shortened(chunks: Iterable[bytes], limit: int) -> Iterator[bytes]:
    """The same lines, each without what goes beyond its first `limit` + 1 bytes: enough to see that it is too long."""
    length = 0  # of the line that has begun
    for chunk in chunks:
        for begin in range(0, len(chunk), limit):
            piece = chunk[begin : begin + limit]
            end = piece.find(b"\n")
            line = len(piece) if end < 0 else end
            if length + line > limit:
                yield piece[: max(0, limit + 1 - length)] + piece[line:]
            else:
                yield piece
            length = length + line if end < 0 else len(piece) - piece.rfind(b"\n") - 1


def _text_blocks(path: str, chunks: Iterable[bytes], size: int) -> Iterator[Block]:
    """One document, in fragments that begin with a line end; a new document at LONGEST_DOCUMENT_BYTES.

    A document with an invalid byte is abandoned; the one behind it begins where it would have begun anyway.
    """
    pending: Block | None = None
    offset = document_bytes = 0
    spoiled = False
    for piece in _cut(chunks, size, LONGEST_DOCUMENT_BYTES, keep_newline=False):
        full = document_bytes + len(piece) > LONGEST_DOCUMENT_BYTES
        joins = document_bytes > 0 and piece[:1] == b"\n" and not full
        document_bytes = document_bytes + len(piece) if joins else len(piece)
        spoiled = spoiled and joins
        if pending is not None:
            yield replace(pending, ends=not joins)
            pending = None
        try:
            text = piece.decode()
        except UnicodeDecodeError as error:
            if not spoiled:
                where = f"invalid UTF-8 at byte {offset + error.start:,} (0x{piece[error.start]:02x})"
                yield Block(path, abandon=True, bad=(BadRecord(path, "", f"{where}; convert the file to UTF-8"),))
            spoiled = True
        if not spoiled:
            pending = Block(path, texts=(text,), continues=joins)
        offset += len(piece)
    if pending is not None:
        yield pending


def _json_blocks(path: str, chunks: Iterable[bytes], text_field: str) -> Iterator[Block]:
    texts: list[str] = []
    places: list[str] = []
    bad: list[BadRecord] = []
    num_characters = 0
    damage: list[DataError] = []
    for number, record in enumerate(json_values(until_damage(chunks, damage)), start=1):
        if isinstance(record, Broken):
            if not (damage and record.at_end):  # else the damage is why it breaks off
                bad.append(BadRecord(path, f"line {record.line}", record.why))
            continue
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
    for rows in parquet_rows(file, raw, text_field):
        texts, places, bad = [], [], []
        for row, value in enumerate(rows.values, start=rows.first):
            try:
                if value is None:
                    raise ValueError("invalid UTF-8")
                texts.append(text_of(value, text_field))
                places.append(f"row {row}")
            except ValueError as error:
                bad.append(BadRecord(file.path, f"row {row}", str(error)))
        if rows.unreadable:
            first = rows.first + len(rows.values)
            where = f"rows {first:,} to {first + rows.unreadable - 1:,}"
            bad.append(BadRecord(file.path, where, rows.why, rows.unreadable))
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
            texts.append(text_of(DECODER.decode(line.decode()), text_field))
            places.append(f"line {number}")
        except UnicodeDecodeError as error:
            bad.append(BadRecord(block.path, f"line {number}", f"invalid UTF-8 (byte {error.start} of the line)"))
        except json.JSONDecodeError as error:
            bad.append(BadRecord(block.path, f"line {number}", f"invalid JSON: {error.msg} (column {error.colno})"))
        except RecursionError:
            bad.append(BadRecord(block.path, f"line {number}", "nested too deeply"))
        except ValueError as error:
            bad.append(BadRecord(block.path, f"line {number}", str(error)))
    return Records(texts, places, bad)


def read_texts(files: Iterable[str | Path], text_field: str = "text") -> Iterator[str]:
    """Every document of files, in order.

    Raises:
        DataError: at the first unusable record.
    """
    for file in expand_inputs(files):
        for block in read_blocks(file, text_field, join_texts=False):
            records = records_of(block, text_field)
            for record in records.bad:
                raise DataError(str(record))
            yield from records.texts
