"""Casts to FP8 beside numbers worked out by hand and a cast block by block; products beside fp64 and proven bounds."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from engine.kernels.fp8 import (
    E4M3,
    E5M2,
    FP8_PRODUCT,
    RECIPES,
    Block,
    Recipe,
    Scaled,
    amax_of,
    emulated,
    narrow,
    native_scales,
    require_products,
    scaled_mm,
    scales_of,
    widened,
)
from engine.kernels.operation import Place, Unavailable
from tests.kit.compare import random

CPU = torch.device("cpu")
BLOCKS = sorted({block for recipe in RECIPES.values() for block in (recipe.block, recipe.weight_block)}, key=str)


def cast(x: Tensor, block: Block, dtype: torch.dtype = E4M3) -> Scaled:
    return narrow(x, scales_of(amax_of(x, block), dtype), block, dtype)


@pytest.mark.parametrize(("dtype", "amax", "scale"), [
    (E4M3, 448.0, 1.0), (E4M3, 448.5, 2.0), (E4M3, 1.0, 2.0**-8), (E4M3, 1.75, 2.0**-8), (E4M3, 1.76, 2.0**-7),
    (E4M3, 0.0, 1.0), (E4M3, 3.0e38, 2.0**120), (E4M3, 1e-36, 2.0**-126), (E5M2, 57344.0, 1.0), (E5M2, 1.0, 2.0**-15)])
def test_a_scale_is_the_smallest_power_of_two_that_fits(dtype: torch.dtype, amax: float, scale: float) -> None:
    assert scales_of(torch.tensor([[amax]]), dtype).item() == scale


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_what_is_not_finite_stays_so(bad: float) -> None:
    x = torch.ones(2, 4)
    x[1, 2] = bad
    assert widened(cast(x, (None, None))).isnan().all()
    assert widened(cast(x, (1, None)))[0].isfinite().all() and widened(cast(x, (1, None)))[1].isnan().all()


def test_numbers_by_hand() -> None:
    """Scale 2⁻⁷: 2 is 256 of 448; steps there are 32, so 1.6 = 204.8 becomes 208, and 0.001 = 0.128 becomes 0.125."""
    x = torch.tensor([[2.0, 1.6, -1.6, 0.001, 0.0]])
    assert cast(x, (None, None)).scales.item() == 2**-7
    assert widened(cast(x, (None, None))).tolist() == [[2.0, 1.625, -1.625, 0.125 / 128, 0.0]]
    # E5M2, scale 2⁻¹⁴: 2 is 32,768; two bits: 1.6 = 26,214 lies between 24,576 and 28,672
    assert widened(cast(x, (None, None), E5M2)).tolist()[0][:3] == [2.0, 1.5, -1.5]


@pytest.mark.parametrize("shape", [(3, 5), (256, 384), (130, 33)], ids=str)
@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_a_cast_is_torchs_of_each_block_alone(block: Block, dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = random(*shape, seed=1).exp() * random(*shape, seed=2)
    for wide in (torch.float64, torch.float32, torch.bfloat16):
        whole = x.to(wide)
        got = cast(whole, block, dtype)
        rows, columns = (size if part is None else part for size, part in zip(shape, block, strict=True))
        assert got.scales.shape == (math.ceil(shape[0] / rows), math.ceil(shape[1] / columns))
        for i, j in ((i, j) for i in range(got.scales.shape[0]) for j in range(got.scales.shape[1])):
            where = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            part = whole[where].float()
            scale = 2.0 ** math.ceil(math.log2(part.abs().max().item() / torch.finfo(dtype).max))
            assert got.scales[i, j] == scale
            assert torch.equal(got.values[where].float(), (part / scale).to(dtype).float())
        assert torch.equal(widened(got.mT), widened(got).T)


def worst(x: Tensor, got: Scaled) -> Tensor:
    """How far rounding to the nearest may be off: half a step, relative, or absolute below the smallest normal."""
    step = 2.0 ** -(4 if got.values.dtype == E4M3 else 3)
    smallest = 2.0 ** (-10 if got.values.dtype == E4M3 else -17)
    ones = Scaled(torch.ones_like(got.values, dtype=torch.float32), got.scales, got.block)
    return torch.maximum(x.abs() * step, widened(ones).double() * smallest)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_product_is_as_good_as_its_formats(recipe: Recipe) -> None:
    """|âb̂ − ab| ≤ Σ |a|·δb + δa·|b| + δa·δb, from half a step of each factor; the mean is far better."""
    x, y = random(64, 384, seed=3), random(96, 384, seed=4)
    for dtype in (E4M3, recipe.gradients):
        a, b = cast(x, recipe.block, dtype), cast(y, recipe.weight_block)
        da, db = worst(x, a), worst(y, b)
        error = (emulated(a, b, torch.float32).double() - x @ y.T).abs()
        assert (error <= (x.abs() @ db.T + da @ y.abs().T + da @ db.T) * (1 + 1e-5)).all()
        typical = error.norm() / (x @ y.T).norm()
        assert 0.01 < typical < (0.05 if dtype == E4M3 else 0.09)


def test_finer_scales_keep_small_numbers_beside_large_ones() -> None:
    """One outlier of 2¹⁷: what shares its scale is below the smallest number, the rest is as good as ever."""
    x, y = random(256, 512, seed=5), random(64, 512, seed=6)
    x[3, 7] = 2.0**17
    others = torch.arange(256) != 3
    errors = {name: (emulated(cast(x, recipe.block), cast(y, recipe.weight_block), torch.float32).double()
                     - x @ y.T)[others].norm().item() / (x @ y.T)[others].norm().item()
              for name, recipe in RECIPES.items()}
    assert errors["tensorwise"] > 2 * errors["rowwise"] and errors["rowwise"] < 0.05
    lost = {name: (widened(cast(x[3:4], recipe.block)) == 0).float().mean().item() for name, recipe in RECIPES.items()}
    assert lost["mxfp8"] < lost["blockwise"] < lost["rowwise"]


@pytest.mark.parametrize("name", ["tensorwise", "rowwise"])
@pytest.mark.parametrize("tokens", [48, 33])
def test_torchs_product_is_the_emulation(name: str, tokens: int) -> None:
    """On a CPU torch has these two."""
    recipe = RECIPES[name]
    x, y = random(tokens, 64, seed=7), random(32, 64, seed=8)
    a, b = cast(x, recipe.block, recipe.gradients), cast(y, recipe.weight_block)
    torch.testing.assert_close(scaled_mm(a, b, torch.float32), emulated(a, b, torch.float32), rtol=1e-5, atol=1e-4)
    over_tokens = cast(x.T, recipe.block, recipe.gradients), cast(random(tokens, 48, seed=9).T, recipe.block)
    torch.testing.assert_close(scaled_mm(*over_tokens, torch.float32), emulated(*over_tokens, torch.float32),
                               rtol=1e-5, atol=1e-4)
    require_products(scaled_mm, recipe, CPU)
    with pytest.raises(AssertionError):
        require_products(lambda a, b, dtype: scaled_mm(a, b, dtype) * 1.1, recipe, CPU)


@pytest.mark.parametrize("name", RECIPES)
def test_a_gpus_product_is_the_emulation(name: str, device: torch.device) -> None:
    """Also of sizes that fill no block; the probe has compared larger ones."""
    try:
        product = FP8_PRODUCT.implementations[0].find(Place(device, torch.bfloat16, fp8=name))
    except Unavailable as reason:
        pytest.skip(f"this device has no products of FP8 matrices by {name} ({reason})")
    recipe = RECIPES[name]
    x, y = random(144, 336, seed=7).to(device), random(208, 336, seed=8).to(device)
    a, b = cast(x, recipe.block, recipe.gradients), cast(y, recipe.weight_block)
    torch.testing.assert_close(product(a, b, torch.float32), emulated(a, b, torch.float32), rtol=1e-3, atol=1e-2)


def test_scales_lie_as_torchs_product_reads_them() -> None:
    x = random(256, 640, seed=10) * torch.arange(1, 257).view(-1, 1)
    tensorwise, rowwise = native_scales(cast(x, (None, None))), native_scales(cast(x, (1, None)))
    assert tensorwise.shape == () and rowwise.shape == (256, 1) and rowwise.T.is_contiguous()
    down = native_scales(cast(x, (1, 128)))
    assert down.shape == (256, 5) and down.stride() == (1, 256)
    along = native_scales(cast(x, (128, 128)))
    assert along.shape == (2, 5) and along.stride() == (8, 1)
    mx = cast(x, (1, 32))
    tiles = native_scales(mx).float()
    assert tiles.numel() == 256 * 20
    for row, column in ((0, 0), (1, 0), (31, 3), (32, 0), (127, 2), (128, 0), (200, 17)):
        tile = (row // 128) * 5 + column // 4
        assert tiles[tile * 512 + (row % 32) * 16 + (row % 128 // 32) * 4 + column % 4] == mx.scales[row, column]
    ragged = native_scales(cast(x[:100, :96], (1, 32)))
    assert ragged.numel() == 128 * 4 and ragged.dtype == torch.float8_e8m0fnu


@pytest.mark.parametrize(("fp8", "capability", "reason"), [
    ("tensorwise", (8, 0), "for compute capability 8.9 and newer, and this GPU has 8.0"),
    ("blockwise", (10, 0), "for compute capability 9.0, and this GPU has 10.0"),
    ("mxfp8", (9, 0), "for compute capability 10.0 and newer, and this GPU has 9.0"),
    ("off", (8, 0), "compute capability 8.9")])
def test_a_gpu_without_such_products_says_so(monkeypatch: pytest.MonkeyPatch, fp8: str, capability: tuple[int, int],
                                             reason: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with pytest.raises(Unavailable, match=reason):
        FP8_PRODUCT.implementations[0].find(Place(torch.device("cuda"), torch.bfloat16, fp8=fp8))
