"""The conversations of files, one after the other: JSON, JSON lines and parquet, each also compressed.

A record that cannot be used comes out as a `BadRecord` in its place: file, where in it, and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from corpus_tools.conversations.formats import example_of
from corpus_tools.inputs import InputFile, decompressed, open_input, until_damage, utf8
from corpus_tools.json_values import DECODER, Broken, json_values
from corpus_tools.parquet import parquet_rows
from corpus_tools.readers import line_blocks
from corpus_tools.records import BadRecord
from engine.data.chat.conversation import Example
from engine.errors import DataError, RequestError


@dataclass(frozen=True)
class Found:
    """A record of a file.

    Attributes:
        where: in the file, such as `line 7`.
        position: bytes of the file read so far.
    """

    value: Any
    where: str
    position: int


def examples(file: InputFile, columns: Mapping[str, str] | None = None) -> Iterator[tuple[Example | BadRecord, int]]:
    """Every record of a file, and how far in it (bytes) reading has come.

    Raises:
        RequestError: it is a text file, or a package that it needs is missing.
    """
    for found in records(file):
        if isinstance(found.value, BadRecord):
            yield found.value, found.position
            continue
        try:
            yield example_of(found.value, f"{file.path}, {found.where}", columns), found.position
        except ValueError as error:
            yield BadRecord(file.path, found.where, str(error)), found.position


def records(file: InputFile) -> Iterator[Found]:
    """The records as they are; what cannot be read has a `BadRecord` for its value."""
    if file.format == ".txt":
        raise RequestError(f"{file.path}: conversations are read from .json, .jsonl and .parquet, not from text")
    position = count = 0
    try:
        with open_input(file) as raw:
            for value, where in _values(file, raw):
                position = raw.tell() if file.path != "-" else 0
                count += 1
                yield Found(value, where, position)
        if count == 0:
            raise DataError("it is empty: no record in it" if file.num_bytes else "it is empty (0 bytes)")
    except (DataError, OSError) as error:
        reason = str(error) if isinstance(error, DataError) else error.strerror or str(error)
        yield Found(BadRecord(file.path, "", reason), "", position)


def _values(file: InputFile, raw: BinaryIO) -> Iterator[tuple[Any, str]]:
    if file.format == ".parquet":
        return _rows(file, raw)
    chunks = utf8(decompressed(raw, file.compression), json=True)
    return _listed(file.path, chunks) if file.format == ".json" else _lines(file.path, chunks)


def _lines(path: str, chunks: Iterable[bytes]) -> Iterator[tuple[Any, str]]:
    for block in line_blocks(path, chunks):
        yield from ((bad, bad.where) for bad in block.bad)
        for number, line in enumerate(block.lines.split(b"\n"), start=block.first_line):
            if line and not line.isspace():
                where = f"line {number}"
                yield _parsed(path, line, where), where


def _parsed(path: str, line: bytes, where: str) -> Any:
    try:
        return DECODER.decode(line.decode())
    except UnicodeDecodeError as error:
        return BadRecord(path, where, f"invalid UTF-8 (byte {error.start} of the line)")
    except json.JSONDecodeError as error:
        return BadRecord(path, where, f"invalid JSON: {error.msg} (column {error.colno})")
    except RecursionError:
        return BadRecord(path, where, "nested too deeply")


def _listed(path: str, chunks: Iterable[bytes]) -> Iterator[tuple[Any, str]]:
    damage: list[DataError] = []
    for number, value in enumerate(json_values(until_damage(chunks, damage)), start=1):
        if isinstance(value, Broken):
            if not (damage and value.at_end):                     # else the damage is why it breaks off
                yield BadRecord(path, f"line {value.line}", value.why), ""
        else:
            yield value, f"record {number}"
    if damage:
        raise damage[0]


def _rows(file: InputFile, raw: BinaryIO) -> Iterator[tuple[Any, str]]:
    for rows in parquet_rows(file, raw, None):
        for number, value in enumerate(rows.values, start=rows.first):
            where = f"row {number}"
            yield BadRecord(file.path, where, "invalid UTF-8") if value is None else value, where
        if rows.unreadable:
            first = rows.first + len(rows.values)
            where = f"rows {first:,} to {first + rows.unreadable - 1:,}"
            yield BadRecord(file.path, where, rows.why, rows.unreadable), where
