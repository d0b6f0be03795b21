"""Sizes, counts and tables as text for a person."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def memory_size(num_bytes: float) -> str:
    """`6.01 GiB`, or `361.93 MiB` where that is less than half of one."""
    unit, divisor = ("GiB", 1 << 30) if num_bytes >= 1 << 29 else ("MiB", 1 << 20)
    return f"{num_bytes / divisor:.2f} {unit}"


def counted(number: int) -> str:
    """`1.47T`, `52.4B`, `204,800`."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6)):
        if number >= size:
            return f"{number / size:,.3g}{unit}" if number < 1000 * size else f"{number / size:,.0f}{unit}"
    return f"{number:,}"


def duration(seconds: float) -> str:
    """`4.31 s`, `214 ms`."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.0f} ms"


def table(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Columns that line up, those of `right` at their right edge."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) if i in right else cell.ljust(width)
                        for i, (cell, width) in enumerate(zip(row, widths, strict=True)))
