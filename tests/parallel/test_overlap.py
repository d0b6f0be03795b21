"""What runs under what, read off the order of events: a collective overlaps the work between its start and its wait.

No clock: whether the network is fast enough to be hidden depends on the machine, whether it may be does not.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.kit.layouts import tiny_config
from tests.kit.recording import Event, Recording, record_layout

L = 4


def record(bucket_elements: int = 6000, **parallel: Any) -> tuple[list[Recording], int]:
    config = tiny_config(parallel=parallel, batch={"global": 4})
    return record_layout(config, bucket_elements), config.num_microbatches


def products(flight: list[Event]) -> list[str]:
    return [event.name for event in flight if event.what == "product"]


@pytest.mark.parametrize("sequence", [True, False])
def test_input_gradient_travels_under_the_weight_gradient(sequence: bool) -> None:
    """In every column-parallel layer: qkv and fc1 of each layer, and the output layer."""
    ranks, m = record(tensor=2, sequence=sequence)
    for rank in ranks:
        flights = list(rank.flights("reduce_scatter" if sequence else "all_reduce", "tensor"))
        assert sum(products(flight) == ["weight gradient"] for flight in flights) == m * (2 * L + 1)
        assert all(products(flight) in ([], ["weight gradient"]) for flight in flights)


def test_input_is_gathered_again_under_the_input_gradient() -> None:
    ranks, m = record(tensor=2)
    for rank in ranks:
        under = [products(flight) for flight in rank.flights("all_gather", "tensor")]
        assert under.count(["input gradient"]) == m * 2 * L            # the output layer gathers once


def test_deferred_weight_gradients_leave_nothing_to_hide_under() -> None:
    """A zero-bubble schedule has taken the weight gradient away, but for the output layer's (docs/parallelism.md)."""
    ranks, m = record(tensor=2, schedule="zb-h1")
    assert sum(bool(products(flight)) for flight in ranks[0].flights("reduce_scatter", "tensor")) == m


@pytest.mark.parametrize("level, name", [(0, "all_reduce"), (1, "reduce_scatter"), (2, "reduce_scatter"),
                                         (3, "reduce_scatter")])
def test_gradients_are_reduced_under_the_backward_pass(level: int, name: str) -> None:
    """Each bucket's reduction runs under computation, all but the three that are waited for at the end of the step.

    From level 2 on also one more per microbatch, when too many would be under way at once.
    """
    ranks, m = record(data=2, zero=level)
    for rank in ranks:
        reduced = rank.num_buckets * (m if level >= 2 else 1)
        under = [bool(products(flight)) for flight in rank.flights(name, "shard")]
        assert len(under) == reduced + (level == 0)                # there the gradient norm is of the same kind
        assert sum(under) >= reduced - 3 - (m - 1 if level >= 2 else 0)
        last_product = max(i for i, event in enumerate(rank.events) if event.what == "product")
        started = [i for i, event in enumerate(rank.events) if event.what == "start" and event.name == name]
        assert sum(i < last_product for i in started) >= reduced - 3


def test_zero_3_gathers_the_next_unit_under_this_one() -> None:
    """Forward: while a unit computes, the next one's parameters travel; backward: those of the one before."""
    ranks, m = record(data=2, zero=3, bucket_elements=10**6)
    for rank in ranks:
        flights = list(rank.flights("all_gather", "shard"))
        forward = sum("forward" in products(flight) for flight in flights)
        backward = sum("input gradient" in products(flight) for flight in flights)
        # Forward, the embedding has no product that its successor's gather could run under; the output layer is
        # prefetched.  Backward, from the last layer down to the second each prefetches the unit before it; the output
        # layer has nothing left to compute there that the last layer's gather could run under.
        assert forward == m * 2 * L - m * 2 + m * 2
        assert backward == m * (2 * L - 1)


def test_ring_attention_sends_under_its_own_block() -> None:
    """Keys, values and their gradients travel while a block is computed; only the gradients' last hop is waited for."""
    ranks, m = record(context=4)
    for rank in ranks:
        under = [len(products(flight)) for flight in rank.flights("exchange", "context")]
        assert len(under) == m * L * (3 + 3 + 4)
        assert under.count(0) == m * L


def test_messages_travel_under_the_computation_before_their_use() -> None:
    """A receive is posted before the computation that its schedule puts in front of it."""
    ranks, m = record(pipeline=2, schedule="1f1b")
    first, last = ranks
    under = [sum(any(event.what == "product" for event in flight) for flight in rank.flights("receive", "pipeline"))
             for rank in (first, last)]
    assert all(count >= m - 2 for count in under), under
