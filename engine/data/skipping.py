"""Leaving out samples: ranges of the stream that training passes over, as after a loss spike (PaLM, section 5.1).

The *stream* is the order of samples without any skipping.  `data.skip` lists ranges [start, stop) of stream indices;
the samples that are left are numbered 0, 1, 2, … without gaps, and that number is what `consumed_samples` counts.
Without earlier skips the two numbers agree.  A range may be added ahead of where a run stands: go back to a checkpoint
from before the spike and skip it.  Added behind, it would move every later number, so samples would be lost: that is
refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from engine.errors import DataError

Ranges = tuple[tuple[int, int], ...]


def merge_ranges(ranges: Iterable[Sequence[int]]) -> Ranges:
    """Sorted, disjoint ranges that cover the same numbers.

    Raises:
        DataError: one of them runs backwards.
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((int(start), int(stop)) for start, stop in ranges):
        if not 0 <= start <= stop:
            raise DataError(f"data.skip: [{start}, {stop}] is no range of samples; give [first, last + 1].")
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(stop, merged[-1][1]))
        elif start < stop:
            merged.append((start, stop))
    return tuple(merged)


def stream_index(skip: Ranges, sample: int) -> int:
    """Where in the stream the sample with this number is."""
    for start, stop in skip:
        if sample < start:
            break
        sample += stop - start
    return sample


def num_left(skip: Ranges, stream_length: int) -> int:
    """How many samples are left of the first `stream_length` of the stream."""
    return stream_length - sum(max(0, min(stop, stream_length) - start) for start, stop in skip)


def require_same_past(saved: Iterable[Sequence[int]], current: Iterable[Sequence[int]], consumed_samples: int,
                      where: str = "") -> None:
    """Refuses lists that leave out different samples up to here; `where` begins the message.

    Raises:
        DataError: the lists leave out different samples up to here.
    """
    before, now = merge_ranges(saved), merge_ranges(current)
    if _passed(before, consumed_samples) != _passed(now, consumed_samples):
        raise DataError(
            f"{where}data.skip was {[list(r) for r in before]} and is {[list(r) for r in now]}, which differ among the "
            f"{consumed_samples} samples already consumed. Ranges may be added ahead only: to leave those out, "
            "resume from a checkpoint saved before them."
        )


def _passed(skip: Ranges, consumed_samples: int) -> Ranges:
    """What was left out until `consumed_samples` had been read."""
    end = stream_index(skip, consumed_samples - 1) + 1 if consumed_samples else 0
    return tuple((start, min(stop, end)) for start, stop in skip if start < end)
