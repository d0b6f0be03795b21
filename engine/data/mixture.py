"""Mixing corpora: sample i → (source, position in that source), as arithmetic with random access.

While all sources have data left, one dealer (`engine.data.dealing`) hands out samples by weight.  A source may
be capped, say at four epochs.  When it has given its last sample it leaves, and from then on its share goes to
the others in proportion: a new *phase*, with a dealer of its own over the sources that remain.  There is at
most one phase per source, so all of them are laid out when the mixture is made, and finding a sample is a
search among a few phase starts and one question to a dealer.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from numbers import Rational

from engine.data.dealing import Dealer, make_dealer
from engine.errors import DataError


@dataclass(frozen=True)
class Phase:
    """A stretch of samples over which the same sources take part."""

    start: int  # its first sample
    active: tuple[int, ...]  # sources taking part: the dealer's 0, 1, … are these
    dealer: Dealer
    given: tuple[int, ...]  # per source of the mixture: samples it gave before


class Mixture:
    """Deals samples 0, 1, 2, … to sources in the proportion of `weights`.

    `caps[s]` is the number of samples source s can give (None: no limit).  When every source has reached its
    cap the mixture ends, after `num_samples` (None: never).

    Raises:
        DataError: a weight is not a positive number, or a cap is below 1.
    """

    def __init__(self, weights: Sequence[Rational | float], caps: Sequence[int | None] | None = None) -> None:
        self.weights = tuple(exact(weight) for weight in weights)
        self.caps = tuple(caps) if caps is not None else (None,) * len(self.weights)
        if not self.weights or min(self.weights) <= 0 or any(cap is not None and cap < 1 for cap in self.caps):
            raise DataError(
                "A mixture needs sources with positive weights and caps; these have weights "
                f"{[float(w) for w in self.weights]} and caps {list(self.caps)}."
            )
        self.num_samples: int | None = None
        self.phases = tuple(self._plan())
        self._starts = [phase.start for phase in self.phases]

    def _plan(self) -> list[Phase]:
        scale = lcm(*(weight.denominator for weight in self.weights))
        whole = [int(weight * scale) for weight in self.weights]
        phases: list[Phase] = []
        start, given, active = 0, [0] * len(whole), list(range(len(whole)))
        while active:
            dealer = make_dealer([whole[source] for source in active])
            phases.append(Phase(start, tuple(active), dealer, tuple(given)))
            ends = [
                dealer.prefix_with(place, cap - given[source])
                for place, source in enumerate(active)
                if (cap := self.caps[source]) is not None
            ]
            if not ends:
                return phases
            for source, count in zip(active, dealer.counts(min(ends)), strict=True):
                given[source] += count
            start += min(ends)
            active = [source for source in active if given[source] != self.caps[source]]
        self.num_samples = start
        return phases

    def locate(self, sample: int) -> tuple[int, int]:
        """(source, position in that source) of a sample.

        Raises:
            DataError: past the end of the mixture.
        """
        if sample < 0:
            raise DataError(f"Sample {sample} was asked for; samples are numbered from 0.")
        if self.num_samples is not None and sample >= self.num_samples:
            raise DataError(
                f"Sample {sample} was asked for, but the mixture ends after {self.num_samples} samples: every "
                "source has reached its max_epochs. Raise max_epochs, add data, or train fewer steps."
            )
        phase = self._phase(sample)
        place, position = phase.dealer.locate(sample - phase.start)
        source = phase.active[place]
        return source, phase.given[source] + position

    def counts(self, num_samples: int) -> list[int]:
        """Samples per source among the first `num_samples`."""
        phase = self._phase(num_samples)
        counts = list(phase.given)
        for source, count in zip(phase.active, phase.dealer.counts(num_samples - phase.start), strict=True):
            counts[source] += count
        return counts

    @property
    def max_deviation(self) -> float:
        """Proven bound of |count - share| within every phase, over all sources and prefixes, in samples."""
        return max(phase.dealer.max_deviation for phase in self.phases)

    def _phase(self, sample: int) -> Phase:
        return self.phases[bisect_right(self._starts, sample) - 1]


def exact(weight: Rational | float) -> Fraction:
    """The decimal the user wrote: 0.1 is one tenth, not the nearest binary number."""
    try:
        return Fraction(weight) if isinstance(weight, Rational) else Fraction(str(weight))
    except ValueError:
        raise DataError(f"A weight must be a positive number, not {weight!r}.") from None
