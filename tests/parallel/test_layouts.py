"""Every layout is the same mathematics as one process: loss, every gradient, all steps; initial weights bit for bit."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from engine.config import Config
from tests.kit.layouts import assemble, check, reference, run_layout, tiny_config

NUM_STEPS, MANY_STEPS = 3, 10      # every step is compared; many where a mistake would take time to show


def layouts_up_to_four() -> list[dict[str, object]]:
    """Every (tensor, pipeline, data) with product ≤ 4, with sequence parallelism on and off, and the schedules."""
    found: list[dict[str, object]] = []
    for tensor, pipeline, data in product((1, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4)):
        if tensor * pipeline * data > 4 or data == 3:
            continue
        for sequence in ((True, False) if tensor > 1 else (True,)):
            for schedule in (("gpipe", "1f1b", "interleaved") if pipeline > 1 else ("1f1b",)):
                chunks = 2 if schedule == "interleaved" else 1
                if pipeline * chunks > 4:
                    continue
                found.append({"tensor": tensor, "pipeline": pipeline, "data": data, "sequence": sequence,
                              "schedule": schedule, "virtual_stages": chunks})
    return found


def name_of(layout: dict[str, object]) -> str:
    return "-".join(f"{k[0:2]}{v}" for k, v in layout.items())


LARGER = [
    {"tensor": 2, "pipeline": 3, "data": 1}, {"tensor": 2, "pipeline": 1, "data": 3},
    {"tensor": 1, "pipeline": 3, "data": 2, "schedule": "gpipe"}, {"tensor": 1, "pipeline": 2, "data": 3},
    {"tensor": 2, "pipeline": 2, "data": 2}, {"tensor": 2, "pipeline": 2, "data": 2, "sequence": False, "zero": 0},
    {"tensor": 2, "pipeline": 2, "data": 2, "schedule": "interleaved", "virtual_stages": 2},
    {"tensor": 2, "pipeline": 2, "data": 2, "schedule": "gpipe"}, {"tensor": 4, "pipeline": 2, "data": 1},
    {"tensor": 4, "pipeline": 1, "data": 2}, {"tensor": 1, "pipeline": 4, "data": 2},
    {"tensor": 2, "pipeline": 4, "data": 1}, {"tensor": 2, "pipeline": 1, "data": 4},
    {"tensor": 1, "pipeline": 2, "data": 4, "zero": 0},
    {"tensor": 2, "pipeline": 4, "data": 1, "sequence": False, "schedule": "gpipe"},
]
# What the model and the data can bring into a layout, each in layouts that it touches.
SHAPES = {
    "gqa-bias": {"num_kv_heads": 2, "qkv_bias": True},
    "tied-odd-vocabulary": {"tie_embeddings": True, "vocab_size": 61},
    "five-layers": {"num_layers": 5},
    "one-kv-head": {"num_kv_heads": 1, "head_dim": 12},
    "qk-norm-all-biases": {"num_kv_heads": 2, "qk_norm": True, "attention_bias": True, "mlp_bias": True},
    "gelu": {"mlp": "gelu", "mlp_bias": True, "qk_norm": True, "qkv_bias": True},
}
EVERYTHING = {"mlp": "relu2", "qk_norm": True, "attention_bias": True, "mlp_bias": True}


def run_case(layout: dict[str, object], model: dict[str, object], data: dict[str, object], batch: dict[str, int],
             num_steps: int = NUM_STEPS) -> None:
    config = tiny_config(parallel=layout, model=model, data=data, batch=batch)
    check(run_layout(config, num_steps), reference(config, num_steps))


@pytest.mark.parametrize("layout", layouts_up_to_four(), ids=name_of)
def test_layout(layout: dict[str, object]) -> None:
    run_case(layout, {}, {}, {}, MANY_STEPS)


@pytest.mark.parametrize("layout", LARGER, ids=name_of)
def test_larger_layout(layout: dict[str, object]) -> None:
    global_batch = 12 if layout["data"] == 3 else 8
    run_case(layout, {}, {}, {"global": global_batch}, MANY_STEPS)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("layout", [
    {"tensor": 2, "pipeline": 2}, {"tensor": 2, "pipeline": 2, "sequence": False}, {"tensor": 1, "pipeline": 3},
    {"tensor": 2, "pipeline": 1, "data": 2}, {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
    {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2},
], ids=name_of)
def test_model_shapes(layout: dict[str, object], shape: str) -> None:
    if shape == "one-kv-head":
        layout = layout | {"tensor": 1}
    run_case(layout, SHAPES[shape], {}, {})


@pytest.mark.parametrize(("layout", "groups"), [
    ({"tensor": 4}, 2), ({"tensor": 4, "sequence": False, "pipeline": 2, "zero": 0}, 2), ({"tensor": 4, "zero": 2}, 1),
    ({"tensor": 2, "context": 2, "data": 2, "zero": 3}, 1), ({"tensor": 2, "data": 2, "recompute": "full"}, 1),
    ({"tensor": 2, "data": 2, "reproducible": True, "zero": 2}, 1),
], ids=lambda value: name_of(value) if isinstance(value, dict) else f"g{value}")
def test_more_tensor_ranks_than_key_value_heads(layout: dict[str, object], groups: int) -> None:
    run_case(layout, EVERYTHING | {"num_kv_heads": groups}, {}, {}, 5)


@pytest.mark.parametrize("layout", [
    {"tensor": 2, "pipeline": 2, "schedule": "zb-h1"}, {"pipeline": 4, "schedule": "zb-h2", "data": 2},
    {"tensor": 2, "pipeline": 2, "schedule": "zb-v", "virtual_stages": 2}, {"pipeline": 1, "schedule": "zb-h1"},
], ids=name_of)
def test_zero_bubble(layout: dict[str, object]) -> None:
    run_case(layout, {}, {}, {})


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", [
    {"data": 4}, {"tensor": 2, "data": 2}, {"pipeline": 2, "data": 2, "schedule": "zb-h1"},
    {"data": 4, "zero_shard": 2}, {"pipeline": 2, "data": 2, "schedule": "interleaved", "virtual_stages": 2},
], ids=name_of)
def test_zero_levels(layout: dict[str, object], zero: int) -> None:
    run_case(layout | {"zero": zero}, EVERYTHING | {"tie_embeddings": True}, {}, {})


@pytest.mark.parametrize("masked", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("layout", [
    {"context": 2}, {"context": 4}, {"context": 2, "tensor": 2}, {"context": 2, "tensor": 2, "sequence": False},
    {"context": 2, "pipeline": 2, "schedule": "zb-v", "virtual_stages": 2}, {"context": 2, "data": 2, "zero": 3},
    {"context": 2, "data": 2, "tensor": 2, "recompute": "full"},
    {"context": 4, "data": 2, "zero": 2, "zero_shard": 4},
], ids=name_of)
def test_context_parallelism(layout: dict[str, object], masked: bool) -> None:
    run_case(layout, EVERYTHING | {"num_kv_heads": 2}, {"document_mask": masked}, {"micro": 2})


@pytest.mark.parametrize("recompute", [
    {"recompute": "full"}, {"recompute": "selective"}, {"recompute": "full", "recompute_layers": 1}], ids=name_of)
@pytest.mark.parametrize("layout", [
    {}, {"tensor": 2, "pipeline": 2, "schedule": "zb-h1"}, {"data": 2, "zero": 3}, {"tensor": 2, "sequence": False},
], ids=name_of)
def test_recomputation_changes_no_bit(layout: dict[str, object], recompute: dict[str, object]) -> None:
    model = EVERYTHING if "pipeline" in layout else {}
    kept, recomputed = (run_layout(tiny_config(parallel=layout | extra, model=model), 2) for extra in ({}, recompute))
    for a, b in zip(kept, recomputed, strict=True):
        assert a.losses == b.losses and a.grad_norms == b.grad_norms
        for (name, _, _, x), (_, _, _, y) in zip(a.gradients + a.weights, b.gradients + b.weights, strict=True):
            assert torch.equal(x, y), name


@pytest.mark.parametrize("layout", [{}, {"tensor": 2, "pipeline": 2}, {"pipeline": 2, "data": 2, "zero": 0}],
                         ids=name_of)
def test_document_masks_and_larger_microbatches(layout: dict[str, object]) -> None:
    run_case(layout, {}, {"document_mask": True}, {"micro": 2})


def everything(config: Config) -> list[object]:
    """All that a reproducible run must agree on, assembled."""
    results = run_layout(config, 5)
    return [results[0].losses, results[0].grad_norms, assemble(r.weights for r in results)]


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"pipeline": 2}], ids=name_of)
def test_reproducible_runs_agree_bit_for_bit(layout: dict[str, object], zero: int) -> None:
    """On any number of data-parallel ranks; without the option the same comparison finds differences."""
    def run(data: int, reproducible: bool) -> list[object]:
        return everything(tiny_config(parallel=layout | {"data": data, "zero": zero, "reproducible": reproducible},
                                      model={"tie_embeddings": True}))

    def equal(a: list[object], b: list[object]) -> bool:
        return a[:2] == b[:2] and all(torch.equal(a[2][name], b[2][name]) for name in a[2])

    alone = run(1, True)
    for data in (2, 4) if "tensor" not in layout and "pipeline" not in layout else (2,):
        assert equal(alone, run(data, True))
    assert not equal(run(1, False), run(2, False))
