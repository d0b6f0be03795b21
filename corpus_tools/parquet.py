"""Rows of parquet files, a few at a time.  A row group that is damaged takes no other with it.

A file is groups of rows, and in each group every column lies in compressed pages.  So what is broken is found and left
out at three levels: a cell that is no UTF-8, a group whose pages cannot be read, a file whose footer cannot.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, BinaryIO

from corpus_tools.inputs import InputFile, decompressed
from corpus_tools.records import names
from engine.errors import DataError, RequestError
from engine.reading import said

ROWS_AT_A_TIME = 256


@dataclass(frozen=True)
class Rows:
    """Some consecutive rows, each a dictionary of the columns asked for, or None where its text is no UTF-8."""

    first: int  # counted from 1
    values: list[dict[str, Any] | None]
    unreadable: int = 0  # so many more, behind them
    why: str = ""


def parquet_rows(file: InputFile, raw: BinaryIO, column: str | None) -> Iterator[Rows]:
    """The rows of a file; of nested columns `a.b` is what lies in `a`.  `column`: this one only.

    Raises:
        DataError: the file is no parquet file or lacks the column.
        RequestError: pyarrow is missing.
    """
    try:
        import pyarrow  # optional package
        import pyarrow.parquet
    except ImportError as error:
        raise RequestError("reading .parquet files needs the package pyarrow: pip install 'octant[data]'") from error
    unreadable = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError)
    with ExitStack() as stack:
        source = raw
        if file.compression:  # parquet is read from its end, so it has to be unpacked first
            source = stack.enter_context(tempfile.TemporaryFile())
            for chunk in decompressed(raw, file.compression):
                source.write(chunk)
        try:
            table = pyarrow.parquet.ParquetFile(source, page_checksum_verification=True)
            schema = table.schema_arrow
            sizes = [table.metadata.row_group(group).num_rows for group in range(table.num_row_groups)]
            if min(sizes, default=0) < 0 or sum(sizes) != table.metadata.num_rows:
                raise ValueError(f"row groups of {sum(sizes)} rows, in all {table.metadata.num_rows}")
        except unreadable as error:
            raise DataError(f"not a readable parquet file ({said(error)})") from error
        if column is not None and not _has(schema, column):
            raise DataError(f"no column {column!r}; its columns are {names(schema.names)}")
        first = 1
        for group, num_rows in enumerate(sizes):
            done = 0
            try:
                columns = None if column is None else [column]
                for batch in table.iter_batches(ROWS_AT_A_TIME, row_groups=[group], columns=columns):
                    yield Rows(first + done, _values(batch))
                    done += batch.num_rows
            except unreadable as error:
                yield Rows(first + done, [], num_rows - done, f"its row group cannot be read ({said(error)})")
            first += num_rows


def _has(schema: Any, column: str) -> bool:
    """Whether there is a column of this name, or a field of nested ones."""
    if column in schema.names:
        return True
    fields = schema
    for name in column.split("."):
        index = fields.get_field_index(name) if hasattr(fields, "get_field_index") else -1
        if index < 0:
            return False
        fields = fields.field(index).type
    return True


def _values(batch: Any) -> list[dict[str, Any] | None]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:  # somewhere in it
        return [_value(batch, row) for row in range(batch.num_rows)]


def _value(batch: Any, row: int) -> dict[str, Any] | None:
    try:
        return batch.slice(row, 1).to_pylist()[0]
    except UnicodeDecodeError:
        return None
