"""What starting, resuming, saving and hanging costs each rank of a large job, counted."""

from __future__ import annotations

import math

import pytest

from benchmarks.scale import STEPS, Count, count, table

SMALL, LARGE = 64, 2_048


@pytest.fixture(scope="module")
def counts() -> dict[int, dict[str, Count]]:
    return {size: count(size) for size in (SMALL, LARGE)}


@pytest.mark.parametrize("step", STEPS)
def test_nothing_grows_faster_than_the_logarithm_or_by_more_than_a_kilobyte_per_rank(
        step: str, counts: dict[int, dict[str, Count]]) -> None:
    small, large = (counts[size][step] for size in (SMALL, LARGE))
    assert small.messages > 0 and small.num_bytes > 0
    assert large.messages / small.messages <= math.log2(LARGE) / math.log2(SMALL)
    assert (large.num_bytes - small.num_bytes) / (LARGE - SMALL) <= 1_000


def test_the_table() -> None:
    """Of any counts: a row for each step, a column for each size."""
    lines = table((8, 1_024), lambda size: dict.fromkeys(STEPS, Count(size, 1_000 * size))).splitlines()
    assert len(lines) == 2 + len(STEPS)
    assert lines[0] == "| | 8 ranks | 1,024 ranks |" and lines[2].endswith("| 8, 8.0 kB | 1,024, 1,024.0 kB |")
