"""The search: every layout it proposes is valid and fits, and none that it left out would have been faster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from engine.config import load_config, resolve_layout
from engine.errors import RequestError
from engine.plan.devices import device
from engine.plan.search import SHOWN, at_half_the_memory, layouts, search, words
from engine.plan.stages import all_stages
from engine.plan.step import step_time
from tests.kit.layouts import tiny_config

ROOT = Path(__file__).resolve().parents[2]
A100 = device("a100-80g")


def test_it_beats_the_shipped_layout_of_65b() -> None:
    config = resolve_layout(load_config(ROOT / "configs" / "llama-65b.yaml"), 2048)
    found = search(config, 2048, A100)
    assert len(found.best) == SHOWN and found.tried > 1000
    assert found.best[0].time.seconds <= step_time(config, A100).seconds
    for job in found.best:
        resolve_layout(job.config, 2048)
        assert job.fits and job.world == 2048


def test_nothing_that_was_left_out_is_faster() -> None:
    """All layouts of a small job, each timed and weighed in full."""
    config = tiny_config(precision={"compute": "bf16"})
    small = replace(A100, memory=1.5 * 2**30)
    found = search(config, 4, small)
    fits = [layout for layout in layouts(config, 4, small)
            if max(stage.needed for stage in all_stages(layout)) <= small.memory]
    best = min(step_time(layout, small).seconds for layout in fits)
    assert found.best[0].time.seconds == pytest.approx(best, rel=0.05)
    assert len({words(layout) for layout in layouts(config, 4, small)}) == found.tried


def test_every_layout_uses_all_devices_and_divides() -> None:
    config = tiny_config()
    seen = list(layouts(config, 8, A100))
    assert seen and all(layout.parallel.world_size == 8 for layout in seen)
    assert {layout.parallel.schedule for layout in seen} == {"1f1b", "interleaved", "zb-h1", "zb-v"}
    assert all(config.model.num_heads % layout.parallel.tensor == 0 for layout in seen)
    assert all(layout.parallel.pipeline == 1 for layout in seen if layout.parallel.zero > 1)


def test_with_less_memory_it_takes_another_or_none() -> None:
    config = load_config(ROOT / "configs" / "llama-7b.yaml", ["batch.global=32"])
    whole, half = search(config, 8, A100).best[0], at_half_the_memory(config, 8, A100)
    assert half is not None and half.time.seconds >= whole.time.seconds
    assert half.fullest.needed <= A100.memory / 2
    assert at_half_the_memory(config, 1, A100) is None
    with pytest.raises(RequestError, match=r"nothing fits 1 × a100-80g: of \d+ layouts the smallest needs [\d.]+ GiB "
                                           r"of 79.1 GiB for weights, gradients .* \(2 would do, with ZeRO 3\)"):
        search(config, 1, A100)
    assert search(config, 2, A100).best


def test_seven_billion_with_adapters_fit_24_gb() -> None:
    config = load_config(ROOT / "configs" / "llama-7b.yaml", ["batch.global=16", "adapter.rank=16"])
    card = device("rtx-4090")
    best, smaller = search(config, 1, card).best[0], search(config, 1, replace(card, memory=16 * 2**30)).best[0]
    assert best.fits and best.config.parallel.recompute == "none"              # no logits are kept
    assert smaller.fits and smaller.config.parallel.recompute != "none" and smaller.time.seconds > best.time.seconds
