"""Layouts drawn at random: whatever is combined is the same mathematics as one process, or is refused with a reason.

Everything that can be combined is drawn together: the four degrees, schedule and chunks, sequence parallelism, ZeRO
level and the ranks it shards over, recomputation, document masks, tied embeddings, query groups, kinds of feed-forward
layers, norms of queries and keys, biases, odd numbers of layers, microbatch size and vocabulary.  `REASONS` says,
independently of the code, which draws cannot work and what the user must be told; all others run.  Memory that the
engine hands out uninitialised is filled with NaN, so that reading it before writing it shows.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from torch import Tensor

from engine.config import Config
from engine.errors import ConfigError
from engine.parallel.data import buckets
from tests.kit.distributed import run_distributed
from tests.kit.layouts import Result, check, reference, tiny_config, train_layout

NUM_LAYOUTS, NUM_STEPS, SEED = 66, 5, 20240
SCHEDULES = ("1f1b", "interleaved", "zb-v", "zb-h1", "gpipe", "zb-h2")
BIASES = (("qkv_bias",), ("attention_bias", "mlp_bias"), ("mlp_bias",))
Draw = dict[str, dict[str, Any]]


def draw(rng: random.Random, index: int) -> Draw:
    """One combination, possible or not.  Schedules and ZeRO levels take turns, so that every pair of them occurs."""
    degrees = (0, 0, 0, 0)
    while not 2 <= degrees[0] * degrees[1] * degrees[2] * degrees[3] <= 8:
        degrees = (rng.choice((1, 1, 2, 2, 4)), rng.choice((1, 1, 2, 2, 3, 4)), rng.choice((1, 1, 2, 4)),
                   rng.choice((1, 2, 2, 3)))
    tensor, pipeline, context, data = degrees
    schedule = SCHEDULES[index % len(SCHEDULES)]
    chunks = {"interleaved": rng.choice((1, 2, 2, 3)), "zb-v": 2}.get(schedule, rng.choice((1, 1, 1, 1, 2)))
    layers = max(1, pipeline * chunks + rng.choice((-1, 0, 1, 1, 2, 3)))
    recompute = rng.choice(("none", "none", "selective", "full"))
    kinds = random.Random(repr((index, degrees, layers)))
    micro = rng.choice((1, 2))
    return {
        "parallel": {
            "tensor": tensor, "pipeline": pipeline, "context": context, "data": data, "schedule": schedule,
            "virtual_stages": chunks, "sequence": rng.random() < 0.7, "zero": index // len(SCHEDULES) % 4,
            "zero_shard": rng.choice((0, 0, 1, 2, data * context)), "recompute": recompute,
            "recompute_layers": rng.choice((None, None, 1, tuple(rng.randrange(3) for _ in range(pipeline)))),
        },
        "model": {"num_layers": layers, "num_kv_heads": rng.choice((4, 4, 2, 1)),
                  **(dict.fromkeys(kinds.choice(BIASES), True) if rng.random() < 0.5 else {}),
                  "tie_embeddings": rng.random() < 0.5, "vocab_size": rng.choice((97, 61)),
                  "mlp": kinds.choice(("swiglu", "gelu", "relu2")), "qk_norm": kinds.random() < 0.4},
        "data": {"seq_len": rng.choice((16, 16, 16, 16, 18, 20)), "document_mask": rng.random() < 0.4},
        "batch": {"micro": micro, "global": rng.choice((micro * data * rng.choice((1, 2, 3, 4)), 6))},
    }


def uneven_context(parallel: dict[str, Any], data: dict[str, Any]) -> bool:
    return parallel["context"] > 1 and data["seq_len"] % (2 * parallel["context"]) != 0


# Who must be refused, and a part of what is said.
REASONS: tuple[tuple[Callable[[Any, Any, Any, Any], bool], str], ...] = (
    (lambda p, m, d, b: p["schedule"] == "interleaved" and p["virtual_stages"] == 1,
     "interleaved schedule needs parallel.virtual_stages ≥ 2"),
    (lambda p, m, d, b: p["schedule"] not in ("interleaved", "zb-v") and p["virtual_stages"] == 2,
     "schedule needs parallel.virtual_stages = 1"),
    (lambda p, m, d, b: m["num_layers"] < p["pipeline"] * p["virtual_stages"], "every chunk needs a layer"),
    (lambda p, m, d, b: uneven_context(p, d),
     "each rank takes one early and one late piece"),
    (lambda p, m, d, b: not uneven_context(p, d) and p["sequence"] and d["seq_len"] // p["context"] % p["tensor"] != 0,
     "change it, or set parallel.sequence to false"),
    (lambda p, m, d, b: b["global"] % (b["micro"] * p["data"]) != 0, "a whole number of microbatches"),
    (lambda p, m, d, b: p["zero_shard"] and p["data"] * p["context"] % p["zero_shard"] != 0,
     "0 shards over all of them"),
)


def reasons_against(drawn: Draw) -> list[str]:
    return [text for applies, text in REASONS if applies(*(drawn[s] for s in ("parallel", "model", "data", "batch")))]


def name_of(drawn: Draw) -> str:
    p, m, d, b = (drawn[section] for section in ("parallel", "model", "data", "batch"))
    name = f"t{p['tensor']}p{p['pipeline']}c{p['context']}d{p['data']}-{p['schedule']}x{p['virtual_stages']}"
    layers = str(p["recompute_layers"]).replace(" ", "")
    name += f"-zero{p['zero']}s{p['zero_shard']}-{p['recompute']}{layers}-L{m['num_layers']}g{m['num_kv_heads']}"
    name += f"-s{d['seq_len']}b{b['micro']}of{b['global']}"
    flags = {"seq": p["sequence"], "tied": m["tie_embeddings"], "docs": d["document_mask"], m["mlp"]: True,
             "qk_norm": m["qk_norm"]} | {key: key in m for key in ("qkv_bias", "attention_bias", "mlp_bias")}
    return name + "".join(f"-{flag}" for flag, on in flags.items() if on)


def draw_all() -> tuple[list[Draw], list[Draw]]:
    """`NUM_LAYOUTS` combinations that work, and those met on the way that do not."""
    rng, possible, refused = random.Random(SEED), [], []
    while len(possible) < NUM_LAYOUTS:
        drawn = draw(rng, len(possible))
        (refused if reasons_against(drawn) else possible).append(drawn)
    return possible, refused


POSSIBLE, REFUSED = draw_all()


# Combinations that were wrong once.
ZB_V: dict[str, Any] = {"schedule": "zb-v", "virtual_stages": 2}
FOUND: dict[str, Draw] = {
    "tied ends on one rank: a bucket's last round leaves parameters out":
        {"parallel": ZB_V | {"pipeline": 4, "zero": 2}, "model": {"tie_embeddings": True, "num_layers": 8}},
    "deferred weight gradients recorded by autograd":
        {"parallel": ZB_V | {"data": 3}, "model": {"tie_embeddings": True}, "batch": {"global": 6}},
}


def allocate_nan(allocate: Callable[[Tensor], None], buffer: Tensor) -> None:
    allocate(buffer)
    buffer.data.fill_(float("nan"))


def train_on_dirty_memory(config: Config, num_steps: int) -> Result:
    """`train_layout`, with NaN in the memory that buckets get back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "allocate", partial(allocate_nan, buckets.allocate))
        return train_layout(config, num_steps)


@pytest.mark.parametrize("drawn", POSSIBLE, ids=name_of)
def test_drawn_layout(drawn: Draw) -> None:
    config = tiny_config(**drawn)
    want = reference(config, NUM_STEPS)
    check(run_distributed(train_on_dirty_memory, config.parallel.world_size, config, NUM_STEPS), want)


@pytest.mark.parametrize("drawn", FOUND.values(), ids=FOUND)
def test_found_layout(drawn: Draw) -> None:
    test_drawn_layout(drawn)


def test_refused_layouts_name_their_reasons() -> None:
    assert {reason for drawn in REFUSED for reason in reasons_against(drawn)} == {text for _, text in REASONS}
    for drawn in REFUSED:
        with pytest.raises(ConfigError) as refusal:
            tiny_config(**drawn)
        missing = [reason for reason in reasons_against(drawn) if reason not in str(refusal.value)]
        assert not missing, f"{name_of(drawn)}: {refusal.value}"
        assert len(reasons_against(drawn)) == str(refusal.value).count("\n  - "), refusal.value


def test_draws_cover_what_they_claim() -> None:
    """A seed that happened to leave a feature out would be a hole in the test."""
    def seen(section: str, key: str) -> set[Any]:
        return {drawn[section][key] for drawn in POSSIBLE}

    assert len(POSSIBLE) >= 60
    pairs = {(drawn["parallel"]["schedule"], drawn["parallel"]["zero"]) for drawn in POSSIBLE}
    assert len(pairs) == len(SCHEDULES) * 4
    assert {2, 4} <= seen("parallel", "tensor") and {2, 4} <= seen("parallel", "context")
    assert {2, 3, 4} <= seen("parallel", "pipeline") and {2, 3} <= seen("parallel", "data")
    assert seen("parallel", "recompute") == {"none", "selective", "full"}
    assert 3 in seen("parallel", "virtual_stages")
    assert any(drawn["parallel"]["tensor"] > drawn["model"]["num_kv_heads"] for drawn in POSSIBLE)
    assert seen("model", "mlp") == {"swiglu", "gelu", "relu2"}
    assert all(any(key in drawn["model"] for drawn in POSSIBLE) for biases in BIASES for key in biases)
    for section, key in (("parallel", "sequence"), ("model", "tie_embeddings"), ("data", "document_mask"),
                         ("model", "qk_norm")):
        assert seen(section, key) == {True, False}
    assert any(isinstance(drawn["parallel"]["recompute_layers"], tuple) for drawn in POSSIBLE)
