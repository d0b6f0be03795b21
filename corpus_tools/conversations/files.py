"""The conversations of files, one after the other: JSON, JSON lines and parquet, each also compressed.

A record that cannot be used comes out as a `BadRecord` in its place: file, where in it, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

from corpus_tools.conversations.formats import example_of
from corpus_tools.inputs import InputFile, decompressed, open_input, until_damage, utf8
from corpus_tools.json_values import DECODER, Broken, json_values
from corpus_tools.parquet import parquet_rows
from corpus_tools.readers import line_blocks
from corpus_tools.records import BadRecord
from engine.errors import DataError, RequestError


@dataclass(frozen=True)
class Found:
    """A record of a file, or what was made of it.

    Attributes:
        number: in the file: its line, its place among the records or its row (`UNITS`); 0 of the file as a whole.
        position: bytes of the file read so far.
    """

    value: Any
    number: int
    position: int = 0


UNITS = {".jsonl": "line", ".json": "record", ".parquet": "row"}


def examples(file: InputFile, columns: Mapping[str, str] | None = None) -> Iterator[Found]:
    """Every record of a file, as an `Example` or a `BadRecord`.

    Raises:
        RequestError: it is a text file, or a package that it needs is missing.
    """
    for found in records(file):
        if isinstance(found.value, BadRecord):
            yield found
            continue
        where = f"{UNITS[file.format]} {found.number}"
        try:
            yield replace(found, value=example_of(found.value, f"{file.path}, {where}", columns))
        except ValueError as error:
            yield replace(found, value=BadRecord(file.path, where, str(error)))


def records(file: InputFile) -> Iterator[Found]:
    """The records as they are; what cannot be read has a `BadRecord` for its value."""
    if file.format == ".txt":
        raise RequestError(f"{file.path}: conversations are read from .json, .jsonl and .parquet, not from text")
    position = count = 0
    try:
        with open_input(file) as raw:
            for value, number in _values(file, raw):
                position = raw.tell() if file.path != "-" else 0
                count += 1
                yield Found(value, number, position)
        if count == 0:
            raise DataError("it is empty: no record in it" if file.num_bytes else "it is empty (0 bytes)")
    except (DataError, OSError) as error:
        reason = str(error) if isinstance(error, DataError) else error.strerror or str(error)
        yield Found(BadRecord(file.path, "", reason), 0, position)


def _values(file: InputFile, raw: BinaryIO) -> Iterator[tuple[Any, int]]:
    if file.format == ".parquet":
        return _rows(file, raw)
    chunks = utf8(decompressed(raw, file.compression), json=True)
    return _listed(file.path, chunks) if file.format == ".json" else _lines(file.path, chunks)


def _lines(path: str, chunks: Iterable[bytes]) -> Iterator[tuple[Any, int]]:
    for block in line_blocks(path, chunks):
        yield from ((bad, block.first_line) for bad in block.bad)
        for number, line in enumerate(block.lines.split(b"\n"), start=block.first_line):
            if line and not line.isspace():
                yield _parsed(path, line, f"line {number}"), number


def _parsed(path: str, line: bytes, where: str) -> Any:
    try:
        return DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(path, where, f"invalid UTF-8 (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return BadRecord(path, where, f"invalid JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return BadRecord(path, where, "nested too deeply")


def _listed(path: str, chunks: Iterable[bytes]) -> Iterator[tuple[Any, int]]:
    damage: list[DataError] = []
    for number, value in enumerate(json_values(until_damage(chunks, damage)), start=1):
        if isinstance(value, Broken):
            if not (damage and value.at_end):                     # else the damage is why it breaks off
                yield BadRecord(path, f"line {value.line}", value.why), number
        else:
            yield value, number
    if damage:
        raise damage[0]


def _rows(file: InputFile, raw: BinaryIO) -> Iterator[tuple[Any, int]]:
    for rows in parquet_rows(file, raw, None):
        for number, value in enumerate(rows.values, start=rows.first):
            yield BadRecord(file.path, f"row {number}", "invalid UTF-8") if value is None else value, number
        if rows.unreadable:
            first = rows.first + len(rows.values)
            where = f"rows {first:,} to {first + rows.unreadable - 1:,}"
            yield BadRecord(file.path, where, rows.why, rows.unreadable), first
