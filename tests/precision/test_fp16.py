"""fp16 with a scaled loss: as near to fp32 as fp16 is, in layouts, over steps that overflow, and through a resume."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from engine.config import Config
from engine.config.precision import LossScaleConfig
from engine.optim.loss_scale import LossScale
from tests.kit.layouts import assemble, tiny_config
from tests.kit.runs import metrics, run_config, train, trained

FP16 = {"compute": "fp16"}
CUT: dict[str, Any] = {"tensor": 2, "data": 2, "zero": 2}


def run(folder: Path, name: str, steps: int, precision: dict[str, Any], **parallel: Any) -> Config:
    return run_config(folder, name, steps=steps, precision=precision, parallel=parallel, optim={"decay": "constant"})


def test_it_learns_what_fp32_learns(tmp_path: Path) -> None:
    runs = {"fp32": run(tmp_path, "fp32", 5, {"compute": "fp32"}), "fp16": run(tmp_path, "fp16", 5, FP16),
            "cut": run(tmp_path, "cut", 5, FP16, **CUT)}
    weights = {name: assemble(train(config)) for name, config in runs.items()}
    exact = metrics(runs["fp32"])
    for name in ("fp16", "cut"):
        for own, wanted in zip(metrics(runs[name]), exact, strict=True):
            assert own["loss"] == pytest.approx(wanted["loss"], rel=1e-3)
            assert own["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=5e-3)
            assert own["skipped"] == 0 and own["loss_scale"] == 65536 and "loss_scale" not in wanted
        for key, value in weights["fp32"].items():
            if key.startswith("model."):
                assert (weights[name][key] - value).norm() <= 5e-3 * value.norm(), key
    assert [row["loss"] for row in metrics(runs["fp16"])] != [row["loss"] for row in exact]


@pytest.mark.parametrize("cut", [{}, CUT], ids=["alone", "tensor, data, zero 2"])
def test_overflow_skips_and_lowers_and_good_steps_raise_bit_for_bit_through_a_resume(tmp_path: Path,
                                                                                    cut: dict[str, Any]) -> None:
    precision = FP16 | {"loss_scale": {"initial": 2.0**36, "window": 2}}

    def seen(config: Config) -> list[tuple[Any, ...]]:
        return [(*numbers, row["loss_scale"]) for numbers, row in zip(trained(config), metrics(config), strict=True)]

    whole = run(tmp_path, "whole", 24, precision, **cut)
    end = train(whole)
    scales = [row["loss_scale"] for row in metrics(whole)]
    skipped = [row["skipped"] for row in metrics(whole)]
    first = skipped.index(next(b for a, b in pairwise(skipped) if a == b))        # the last of those at the start
    assert first >= 11 and scales[: first + 1] == [2.0 ** (35 - i) for i in range(first + 1)]     # beyond max_skips
    assert max(scales[first:]) > scales[first] and skipped[-1] > skipped[first]                   # up, and down again
    steps = first + 2                                    # after one good step of the two that would double it
    half = run(tmp_path, f"resumed at {steps}", steps, precision, **cut)
    train(half)
    going_on = run(tmp_path, f"resumed at {steps}", 24, precision, **cut)
    again = train(going_on)
    assert seen(going_on) == seen(whole)
    both = assemble(again), assemble(end)
    assert both[0].keys() == both[1].keys() and all(torch.equal(x, both[1][key]) for key, x in both[0].items())


def test_no_smaller_than_the_smallest() -> None:
    scale = LossScale(LossScaleConfig(initial=4.0, window=0, smallest=3.0), torch.device("cpu"))
    inf, one = torch.tensor(float("inf")), torch.ones(())
    assert [bool(scale.update(norm)) for norm in (inf, inf, one, one)] == [True, False, False, False]
    assert scale.state() == [3.0, 2.0]
    with pytest.raises(ValueError, match="not a scale and a number of steps"):
        scale.restore([1.0])


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"precision.fp8: tensorwise goes with precision.compute: bf16"):
        tiny_config(precision=FP16 | {"fp8": "tensorwise"})
