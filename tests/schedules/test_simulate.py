"""The simulated times are those of the textbooks and the papers, and so is the memory."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.errors import RequestError
from engine.schedules.lowering import lower
from engine.schedules.simulate import Costs, Timeline, simulate
from engine.schedules.table import build_schedule, default_num_chunks

STAGES = (1, 2, 3, 4, 7, 8, 12, 16)
MICROBATCHES = (1, 2, 4, 7, 8, 15, 16, 23, 31, 40)
EQUAL = Costs(12, 12, 12)                          # divisible by every number of chunks: no rounding


def run(name: str, num_stages: int, num_microbatches: int, costs: Costs, num_chunks: int | None = None) -> Timeline:
    chunks = num_chunks or default_num_chunks(name)
    return simulate(build_schedule(name, num_stages, num_microbatches, chunks), costs)


@pytest.mark.parametrize(("sizes", "costs", "rates"), [
    ((8, 24), Costs(18522, 18086, 9337, 601), (0.2431, 0.1585, 0.1083)),
    ((16, 64), Costs(11307, 11254, 8101, 379), (0.2082, 0.1088, 0.0516)),
])
def test_published_bubble_rates(sizes: tuple[int, int], costs: Costs, rates: tuple[float, ...]) -> None:
    """Qi et al. 2023, bubble rates of 1F1B, ZB-H1 and ZB-H2 with profiled costs and communication."""
    measured = tuple(round(run(name, *sizes, costs).bubble, 4) for name in ("1f1b", "zb-h1", "zb-h2"))
    assert measured == rates


@pytest.mark.parametrize("costs", [EQUAL, Costs(3, 5, 2), Costs(1, 0, 4)])
def test_gpipe_and_1f1b_lose_p_minus_one_microbatches(costs: Costs) -> None:
    for p in STAGES:
        for m in MICROBATCHES:
            for name in ("gpipe", "1f1b"):
                assert run(name, p, m, costs).bubble_time == (p - 1) * costs.work


@pytest.mark.parametrize("num_chunks", [2, 3, 4])
@pytest.mark.parametrize("costs", [EQUAL, Costs(36, 60, 24)])
def test_interleaving_divides_the_bubble_by_the_number_of_chunks(costs: Costs, num_chunks: int) -> None:
    """For every M ≥ P, multiples of P or not."""
    for p in (1, 2, 3, 4, 8):
        for m in (m for m in MICROBATCHES if m >= p):
            assert run("interleaved", p, m, costs, num_chunks).bubble_time == (p - 1) * costs.work / num_chunks


@pytest.mark.parametrize("costs", [EQUAL, Costs(5, 4, 3), Costs(4, 5, 3), Costs(6, 6, 2)])
@pytest.mark.parametrize(("name", "k"), [("zb-h1", 1), ("zb-h2", 2)])
def test_zero_bubble_fills_the_bubble_with_weight_gradients(name: str, k: int, costs: Costs) -> None:
    for p in STAGES:
        for m in (m for m in MICROBATCHES if m >= k * (p - 1) + 1):
            timeline = run(name, p, m, costs)
            assert timeline.bubble_time == (p - 1) * (costs.forward + costs.backward - k * costs.weight)
            assert max(timeline.peak_in_flight) <= k * (p - 1) + 1


def test_zb_v_has_no_bubble_when_f_b_w_are_equal() -> None:
    for p in STAGES:
        for m in (m for m in MICROBATCHES if m >= 2 * p - 1):
            timeline = run("zb-v", p, m, EQUAL)
            assert timeline.bubble_time == 0
            assert timeline.elapsed == timeline.makespan + (p - 1) * EQUAL.forward / 2       # when the last rank begins
            assert timeline.peak_in_flight == (2 * p,) * p                                   # P stages' worth: 1F1B's


def test_activations_in_flight() -> None:
    for p in STAGES:
        for m in MICROBATCHES:
            assert run("1f1b", p, m, EQUAL).peak_in_flight == tuple(min(p - rank, m) for rank in range(p))
            assert run("gpipe", p, m, EQUAL).peak_in_flight == (m,) * p
            assert run("zb-h1", p, m, EQUAL).peak_in_flight == (min(p, m),) * p
            assert run("zb-h2", p, m, EQUAL).peak_in_flight == (min(2 * p - 1, m),) * p
            assert max(run("zb-v", p, m, EQUAL).peak_in_flight) <= 2 * p


def test_activations_of_the_interleaved_schedule_are_its_warm_up_and_one() -> None:
    for p, m, v in ((2, 8, 2), (4, 8, 2), (4, 16, 4), (8, 16, 3)):
        expected = tuple(2 * (p - rank - 1) + (v - 1) * p + 1 for rank in range(p))
        assert run("interleaved", p, m, EQUAL, v).peak_in_flight == expected


def test_a_message_delays_its_receiver_and_occupies_nobody() -> None:
    timeline = run("1f1b", 2, 1, Costs(3, 2, 1, 10))
    times = [[(str(event.action), event.start, event.end) for event in events] for events in timeline.events]
    assert times == [[("0F0", 0, 3), ("0BW0", 3 + 10 + 6 + 10, 32)], [("1F0", 13, 16), ("1BW0", 16, 19)]]
    sender = run("gpipe", 2, 3, Costs(3, 2, 1, 10)).events[0]
    assert [event.start for event in sender[:3]] == [0, 3, 6]


def test_from_the_first_start_to_the_last_end_zb_h2_takes_as_long_as_zb_h1() -> None:
    for p in STAGES:
        for m in (m for m in MICROBATCHES if m >= 2 * p - 1):
            for name in ("zb-h1", "zb-h2"):
                assert run(name, p, m, EQUAL).elapsed == m * EQUAL.work + (p - 1) * EQUAL.forward


def test_makespan_is_that_of_the_longest_rank() -> None:
    """ZB-H2's ranks need 24 each and begin one after the other."""
    timeline = run("zb-h2", 4, 8, Costs())
    assert (timeline.makespan, timeline.elapsed, timeline.bubble) == (24, 27, 0)
    assert [events[0].start for events in timeline.events] == [0, 1, 2, 3]


def test_chunks_share_the_cost_of_a_stage() -> None:
    timeline = run("zb-v", 1, 2, Costs(4, 6, 2))
    assert timeline.makespan == 2 * 12
    assert {event.end - event.start for event in timeline.events[0]} == {2, 3, 1}


def test_a_lowered_schedule_takes_the_same_time() -> None:
    for name in ("1f1b", "interleaved", "zb-v"):
        schedule = build_schedule(name, 4, 8, default_num_chunks(name))
        costs = Costs(3, 4, 2, 0.5)
        assert simulate(lower(schedule), costs).events == simulate(schedule, costs).events


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(["gpipe", "1f1b", "interleaved", "zb-h1", "zb-h2", "zb-v"]), st.integers(1, 6),
       st.integers(1, 12), st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 5))
def test_no_schedule_beats_the_laws(name: str, p: int, m: int, work: tuple[int, int, int], message: int) -> None:
    """A rank does one thing at a time, and nothing begins before its inputs have arrived."""
    costs = Costs(*work, message)
    timeline = run(name, p, m, costs)
    placement = timeline.schedule.placement
    ended = {part: event.end for events in timeline.events for event in events for part in event.action.parts}
    started = {part: event.start for events in timeline.events for event in events for part in event.action.parts}
    for part, start in started.items():
        if part.kind == "W":
            continue
        step = -1 if part.kind == "F" else 1
        if 0 <= part.chunk + step < len(placement):
            before = type(part)(part.kind, part.microbatch, part.chunk + step)
            delay = message if placement[before.chunk] != placement[part.chunk] else 0
            assert start >= ended[before] + delay
    for events in timeline.events:
        assert all(a.end <= b.start for a, b in pairwise(events))
        assert sum(event.end - event.start for event in events) == pytest.approx(m * costs.work)
    assert timeline.elapsed >= timeline.makespan >= m * costs.work * (1 - 1e-12)
    assert timeline.elapsed >= p * (costs.forward + costs.backward) + 2 * (p - 1) * message - 1e-9


@pytest.mark.parametrize("costs", [(-1, 1, 1, 0), (1, 1, 1, -2), (0, 0, 0, 1), (float("nan"), 1, 1, 0),
                                   (1, float("inf"), 1, 0)])
def test_impossible_costs_are_refused(costs: tuple[float, ...]) -> None:
    with pytest.raises(RequestError):
        Costs(*costs)
