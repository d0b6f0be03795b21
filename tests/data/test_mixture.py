"""Mixtures: never more than a sample from the weights' share, random access, caps, and what the dealers promise."""

from __future__ import annotations

from fractions import Fraction
from itertools import accumulate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.dealing import MAX_PERIOD, TableDealer, TreeDealer, make_dealer
from engine.data.mixture import Mixture, exact
from engine.errors import DataError

LLAMA = [0.67, 0.15, 0.045, 0.045, 0.045, 0.025, 0.02]
GPT3 = [0.60, 0.22, 0.08, 0.08, 0.03]  # as printed: 101 %
small_weights = st.lists(st.integers(1, 300), min_size=1, max_size=12)
large_weights = st.lists(st.integers(1, 10**15), min_size=1, max_size=9)


@settings(deadline=None, max_examples=60)
@given(weights=small_weights)
def test_a_table_gives_each_prefix_the_share_rounded_down_or_up(weights: list[int]) -> None:
    dealer = TableDealer(weights)
    counts = [0] * len(weights)
    for sample in range(dealer.period + 1):
        source, position = dealer.locate(sample)
        assert position == counts[source]
        counts[source] += 1
        for count, weight in zip(counts, weights, strict=True):
            share = weight * (sample + 1)
            assert share // dealer.period <= count <= -(-share // dealer.period)


@settings(deadline=None, max_examples=60)
@given(weights=large_weights, start=st.integers(0, 10**15))
def test_a_tree_stays_within_what_it_promises(weights: list[int], start: int) -> None:
    """From any point on, not only from the start: errors must not add up."""
    dealer, total = TreeDealer(weights), sum(weights)
    counts = dealer.counts(start)
    assert sum(counts) == start
    for sample in range(start, start + 300):
        source, position = dealer.locate(sample)
        assert position == counts[source]
        counts[source] += 1
        assert (
            max(
                abs(count - Fraction(weight * (sample + 1), total))
                for count, weight in zip(counts, weights, strict=True)
            )
            <= dealer.max_deviation + 1e-9
        )


@settings(deadline=None, max_examples=200)
@given(weights=st.lists(st.integers(1, 10**12), min_size=1, max_size=5))
def test_up_to_five_sources_a_tree_promises_at_most_one_sample(weights: list[int]) -> None:
    assert TreeDealer(weights).max_deviation <= 1


@pytest.mark.parametrize(
    "weights",
    [
        LLAMA,
        GPT3,
        [1] * 10,
        [1] * 31,
        [0.9, 0.05, 0.02, 0.01, 0.01, 0.005, 0.003, 0.002],
        [3, 1],
        [1],
        [Fraction(1, 3), Fraction(2, 3)],
        [0.123456789, 0.3, 0.000123, 2, 0.5],
    ],
)
def test_weights_people_write_never_stray_by_more_than_a_sample(weights: list[float]) -> None:
    mixture = Mixture(weights)
    assert mixture.max_deviation <= 1
    shares = [exact(weight) / sum(map(exact, weights)) for weight in weights]
    counts = [0] * len(weights)
    for sample in range(3000):
        source, position = mixture.locate(sample)
        assert position == counts[source]
        counts[source] += 1
        assert max(abs(count - share * (sample + 1)) for count, share in zip(counts, shares, strict=True)) <= 1


def test_extreme_weights_of_many_sources_stray_by_little_more() -> None:
    """Where no tree within one sample exists, the deviation promised is still close to it (and known)."""
    weights = [221116629, 221334, 2604722251, 1356217034, 6735401, 302284741, 12364387, 809768323]
    assert 1 < TreeDealer(weights).max_deviation < 1.1


@settings(deadline=None, max_examples=60)
@given(weights=st.one_of(small_weights, large_weights), sample=st.integers(0, 10**13), data=st.data())
def test_random_access_agrees_with_counting(weights: list[int], sample: int, data: st.DataObject) -> None:
    dealer = make_dealer(weights)
    source, position = dealer.locate(sample)
    before, after = dealer.counts(sample), dealer.counts(sample + 1)
    assert sum(before) == sample and before[source] == position
    assert [a - b for a, b in zip(after, before, strict=True)] == [int(s == source) for s in range(len(weights))]
    asked = data.draw(st.integers(0, len(weights) - 1))
    prefix = dealer.prefix_with(asked, 1 + sample % 1000)
    assert dealer.locate(prefix - 1) == (asked, sample % 1000)


def test_a_short_period_is_a_table_and_a_long_one_a_tree() -> None:
    assert isinstance(make_dealer([MAX_PERIOD - 1, 1]), TableDealer)
    assert isinstance(make_dealer([MAX_PERIOD, 1]), TreeDealer)
    assert isinstance(make_dealer([3 * 10**9, 10**9]), TableDealer)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), weights=st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_a_source_leaves_at_its_cap_and_the_others_take_its_share(data: st.DataObject, weights: list[int]) -> None:
    caps = data.draw(st.lists(st.one_of(st.none(), st.integers(1, 60)), min_size=len(weights), max_size=len(weights)))
    mixture = Mixture(weights, caps)
    if None not in caps:
        assert mixture.num_samples == sum(cap for cap in caps if cap is not None)
    counts = [0] * len(weights)
    phase_start, at_start, active = 0, list(counts), set(range(len(weights)))
    for sample in range(mixture.num_samples or 400):
        assert mixture.counts(sample) == counts
        source, position = mixture.locate(sample)
        assert source in active and position == counts[source]
        counts[source] += 1
        total = sum(weights[s] for s in active)
        for s in active:
            share = Fraction(weights[s] * (sample + 1 - phase_start), total)
            assert abs(counts[s] - at_start[s] - share) <= mixture.max_deviation + 1e-9
        if counts[source] == caps[source]:
            active.remove(source)
            phase_start, at_start = sample + 1, list(counts)
    assert all(cap is None or count <= cap for count, cap in zip(counts, caps, strict=True))
    if mixture.num_samples is not None:
        assert mixture.counts(mixture.num_samples) == list(caps)
        with pytest.raises(DataError, match=f"ends after {mixture.num_samples} samples.*max_epochs"):
            mixture.locate(mixture.num_samples)


def test_shares_after_a_cap_by_hand() -> None:
    """1 : 1 : 2 with two samples of the first: 2 2 4 of the first eight at the latest, then 1 : 2."""
    mixture = Mixture([1, 1, 2], [2, None, None])
    gone = next(n for n in range(20) if mixture.counts(n)[0] == 2)
    assert gone <= 8
    assert [b - a for a, b in zip(mixture.counts(gone), mixture.counts(gone + 300), strict=True)] == [0, 100, 200]


def test_weights_mean_what_was_written() -> None:
    assert exact(0.1) * 3 == exact(0.3)
    assert Mixture([0.1, 0.2]).phases[0].dealer.counts(3) == [1, 2]
    for weights in ([], [1, 0], [1, -0.5], [float("nan")], [float("inf")], ["many"]):
        with pytest.raises(DataError, match=r"weights?"):
            Mixture(weights)
    with pytest.raises(DataError, match=r"caps \[0\]"):
        Mixture([1], [0])


def test_a_million_samples_are_dealt_without_being_counted_up() -> None:
    """Equal steps far out: the sum over sources of positions is the sample's number."""
    mixture = Mixture([0.31415926, 0.27182818, 0.41401256], [None, 10**6, 3 * 10**6])
    for sample in [*list(accumulate([7919] * 50, initial=10 ** 9)), 0, 10 ** 18]:
        counts = mixture.counts(sample)
        assert sum(counts) == sample
        source, position = mixture.locate(sample)
        assert position == counts[source]
