"""Collectives per step, counted, equal what docs/parallelism.md derives.

L layers on the rank, M microbatches, B buckets, C context ranks; 1 is the all-reduce of gradient norm and loss, along
every axis.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.kit.layouts import tiny_config
from tests.kit.recording import Recording, record_layout

L, SEQ_LEN, HIDDEN = 4, 16, 32


def record(bucket_elements: int = 6000, model: dict[str, Any] | None = None, batch: dict[str, Any] | None = None,
           **parallel: Any) -> tuple[list[Recording], int]:
    """A recorded step by rank, and M."""
    config = tiny_config(parallel=parallel, model=model or {}, batch=batch or {"global": 4})
    return record_layout(config, bucket_elements), config.num_microbatches


def test_one_process_sends_nothing() -> None:
    (only,), _ = record()
    assert not only.collectives


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_tensor_with_sequence_parallelism(recompute: str) -> None:
    """A layer gathers twice and scatters twice forward; twice and twice backward, and gathers twice again for W."""
    ranks, m = record(tensor=2, recompute=recompute)
    again = 2 * L if recompute == "full" else 0
    for rank in ranks:
        assert rank.collectives == {
            "all_gather tensor": m * ((2 + 2 + 2) * L + again + 3),      # + output layer, embedding, loss
            "reduce_scatter tensor": m * ((2 + 2) * L + again + 2),      # + embedding, output layer
            "all_reduce tensor": 1 + rank.extra["partial"],              # gradients of norms: a bucket
        }


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_tensor_without_sequence_parallelism(recompute: str) -> None:
    ranks, m = record(tensor=2, sequence=False, recompute=recompute)
    again = 2 * L if recompute == "full" else 0
    for rank in ranks:
        assert rank.collectives == {"all_reduce tensor": m * ((2 + 2) * L + again + 2) + 1, "all_gather tensor": m}


def test_norm_gradients_are_summed_whenever_their_bucket_is_reduced() -> None:
    (rank, *_), m = record(tensor=2, data=2, zero=2, batch={"global": 8})
    assert m == 4 and rank.collectives["all_reduce tensor"] == 1 + m * rank.extra["partial"] > 1


def test_sequence_parallelism_sends_what_plain_tensor_parallelism_does() -> None:
    """An all-reduce is a reduce-scatter and an all-gather; only gathers for the layers' weight gradients are extra."""
    (sequence, *_), m = record(tensor=2)
    (plain, *_), _ = record(tensor=2, sequence=False)
    activation = SEQ_LEN * HIDDEN * 4
    losses = 2 * SEQ_LEN * 4 * m
    norms = 4 * sum(64 for _ in range(2 * L + 1))                        # a bucket, each aligned to 64 elements
    assert plain.nbytes["all_reduce tensor"] == m * (4 * L + 2) * activation + 12
    assert sequence.nbytes["reduce_scatter tensor"] == m * (4 * L + 2) * activation
    assert sequence.nbytes["all_gather tensor"] == m * (6 * L + 2) * activation // 2 + losses
    assert sequence.nbytes["all_reduce tensor"] == norms + 12


@pytest.mark.parametrize("level", [0, 1, 2])
def test_zero_reduces_and_gathers_each_bucket_once(level: int) -> None:
    """Once per step; from level 2 on a bucket's gradients are reduced and dropped once per microbatch."""
    for rank in (result := record(data=2, zero=level))[0]:
        b, m = rank.num_buckets, result[1]
        assert b > 5 and m == 2
        assert rank.collectives == Counter([
            {"all_reduce shard": b + 1},
            {"reduce_scatter shard": b, "all_gather shard": b, "all_reduce shard": 1},
            {"reduce_scatter shard": b * m, "all_gather shard": b, "all_reduce shard": 1}][level])


def test_zero_3_gathers_around_each_use() -> None:
    """Forward and backward per microbatch; the turning points are still there: the last unit, and the first again."""
    ranks, m = record(data=2, zero=3, bucket_elements=10**6)
    layers, embedding, output = 2 * L, 1, 2                              # buckets: matrices and norms apart
    for rank in ranks:
        assert rank.num_buckets == layers + embedding + output
        assert rank.collectives == {
            "all_gather shard": 2 * m * layers + (m + 1) * embedding + m * output,
            "reduce_scatter shard": m * rank.num_buckets, "all_reduce shard": 1}


def test_hybrid_sharding_adds_a_sum_over_the_copies() -> None:
    ranks, m = record(data=4, zero=2, zero_shard=2, batch={"global": 8})
    for rank in ranks:
        b = rank.num_buckets
        assert rank.collectives == {"reduce_scatter shard": b * m, "all_reduce replicate": b * m,
                                    "all_gather shard": b, "all_reduce gradient": 1}


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("context", [2, 4])
def test_ring_shifts(context: int, recompute: str) -> None:
    """Keys and values go round forward and backward, and their gradients once more, all the way home."""
    ranks, m = record(context=context, recompute=recompute)
    passes = 3 if recompute == "full" else 2
    for rank in ranks:
        shifts = passes * (context - 1) + context
        assert rank.collectives["exchange context"] == m * L * shifts
        assert rank.nbytes["exchange context"] == m * L * shifts * 2 * (SEQ_LEN // context) * HIDDEN * 4


@pytest.mark.parametrize("schedule, chunks", [("gpipe", 1), ("1f1b", 1), ("zb-h1", 1), ("zb-h2", 1), ("interleaved", 2),
                                              ("zb-v", 2)])
def test_pipeline_messages(schedule: str, chunks: int) -> None:
    """Every chunk boundary between ranks is crossed once per microbatch and direction; a neighbour at home is free."""
    ranks, m = record(pipeline=2, schedule=schedule, virtual_stages=chunks)
    boundaries = 2 * chunks - 1 - (schedule == "zb-v")
    for rank in ranks:      # of two stages each has an end of every boundary
        assert rank.collectives["send pipeline"] == rank.collectives["receive pipeline"] == m * boundaries
        assert rank.nbytes["send pipeline"] == m * boundaries * SEQ_LEN * HIDDEN * 4


def test_longer_pipeline_messages() -> None:
    ranks, m = record(pipeline=4, schedule="1f1b")
    assert [rank.collectives["send pipeline"] for rank in ranks] == [m, 2 * m, 2 * m, m]


def test_tied_embedding_is_exchanged_once() -> None:
    ranks, _ = record(pipeline=3, model={"tie_embeddings": True})
    assert [rank.collectives["all_reduce ends"] for rank in ranks] == [1, 0, 1]


def test_everything_together() -> None:
    """Nothing else appears when cuts are combined: the sum over all axes of what each needs."""
    ranks, m = record(tensor=2, pipeline=2, data=2, zero=1)
    first, last = ranks[0], ranks[-1]
    for rank, at_the_end in ((first, (1, 1)), (last, (2, 1))):           # embedding; output layer and loss
        gathers, scatters = at_the_end
        assert rank.collectives == {
            "all_gather tensor": m * (6 * L // 2 + gathers), "reduce_scatter tensor": m * (4 * L // 2 + scatters),
            "all_reduce tensor": 1 + rank.extra["partial"], "send pipeline": m, "receive pipeline": m,
            "reduce_scatter shard": rank.num_buckets, "all_gather shard": rank.num_buckets,
            "all_reduce shard": 1, "all_reduce pipeline": 1}
