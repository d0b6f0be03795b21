"""FP8: matrices in eight bits with scales beside them, and products of two such matrices.

A format of eight bits has few exponents (Micikevicius et al. 2022): E4M3 reaches from 2⁻⁹ to 448 with a relative step
of 2⁻⁴ at most, E5M2 from 2⁻¹⁶ to 57,344 with 2⁻³.  So numbers are divided by a *scale* before they are rounded, chosen
from the largest among them (amax), and a product is multiplied with both its scales again.  Recipes differ in who
shares a scale.  A product a·bᵀ sums over the second dimension of both, [m, k] and [n, k]:

    recipe       activations, gradients      weights       formats               source
    tensorwise   all of the tensor           the same      E4M3, gradients E5M2  Micikevicius et al. 2022
    rowwise      a row of the product: 1×k   the same      E4M3                  PyTorch's torchao, float8
    blockwise    1×128                       128×128       E4M3                  DeepSeek-V3 (2024), section 3.3.2
    mxfp8        1×32                        the same      E4M3, scales E8M0     OCP MX 1.0; Mishra et al. 2025

Gradients spread over more binades than E4M3 has, which a scale for each row or block makes up for.

*Scales are powers of two*, rounded up so that nothing saturates: the smallest s with amax ≤ s · (largest number of the
format).  Floating-point numbers lose nothing by that but the lowest part of a binade, dividing and multiplying is exact
in any width, and E8M0, which is an exponent, needs nothing else.  They come from the tensor itself (*current* scaling):
there is no history, so no state, and a run resumed is the run itself.

Where the device multiplies FP8 matrices, `scaled-mm` calls it; its sums are fp32.  `emulated` widens both matrices,
exactly, and multiplies in fp32: the same numbers but for the order of the sum, at no gain in speed.  It is what runs on
a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.kernels.blocks import WEIGHT_BLOCKS, Block
from engine.kernels.operation import Implementation, Operation, Place, Unavailable, anywhere

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST_EXPONENT = -126                       # of a scale, so that its reciprocal is a number too


@dataclass(frozen=True)
class Recipe:
    """See the module docstring.

    Attributes:
        block, weight_block: of an activation or gradient, and of a weight, as operands: the sum is over the second
            dimension.
        gradients: their format; all else is E4M3.
        capability: compute capabilities of GPUs, from and to, whose tensor cores have such products.
    """

    block: Block
    weight_block: Block
    gradients: torch.dtype
    capability: tuple[tuple[int, int], tuple[int, int]]


ANY = (99, 0)
RECIPES = {
    "tensorwise": Recipe((None, None), WEIGHT_BLOCKS["tensorwise"], E5M2, ((8, 9), ANY)),
    "rowwise": Recipe((1, None), WEIGHT_BLOCKS["rowwise"], E4M3, ((9, 0), ANY)),
    "blockwise": Recipe((1, 128), WEIGHT_BLOCKS["blockwise"], E4M3, ((9, 0), (9, 0))),
    "mxfp8": Recipe((1, 32), WEIGHT_BLOCKS["mxfp8"], E4M3, ((10, 0), ANY)),
}


class Scaled(NamedTuple):
    """`values` times `scales`, block by block.

    Attributes:
        values: [m, k], or [..., k] of which the scales see [m, k]; FP8.
        scales: [blocks of rows, blocks of columns], fp32.
        block: the shape of a block.
    """

    values: Tensor
    scales: Tensor
    block: Block

    @property
    def mT(self) -> Scaled:
        """The transposed matrix, a view."""
        return Scaled(self.values.mT, self.scales.mT, (self.block[1], self.block[0]))


def _tiles(x: Tensor, block: Block) -> Tensor:
    """[m, k] → [blocks of rows, rows of one, blocks of columns, columns of one], zeros where the last are not full."""
    rows, columns = (size if part is None else part for size, part in zip(x.shape, block, strict=True))
    below, beside = -x.shape[0] % rows, -x.shape[1] % columns
    if below or beside:
        x = F.pad(x, (0, beside, 0, below))
    return x.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))


def _untiled(tiles: Tensor, shape: torch.Size) -> Tensor:
    return tiles.flatten(2, 3).flatten(0, 1)[: shape[0], : shape[1]]


def amax_of(x: Tensor, block: Block) -> Tensor:
    """The largest absolute value in each block of x [m, k]: [blocks of rows, blocks of columns], fp32."""
    return _tiles(x, block).abs().amax((1, 3)).float()


def scales_of(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The smallest powers of two by which numbers up to `amax` fit into `dtype`; NaN where they are not finite."""
    mantissa, exponent = torch.frexp(amax / torch.finfo(dtype).max)         # mantissa in [0.5, 1)
    exponent = torch.where(mantissa == 0.5, exponent - 1, exponent).clamp_min(SMALLEST_EXPONENT)
    return torch.where(amax < float("inf"), torch.ldexp(torch.ones_like(amax), exponent), float("nan"))


def narrow(x: Tensor, scales: Tensor, block: Block, dtype: torch.dtype) -> Scaled:
    """x [m, k] in FP8, by scales that `scales_of` made."""
    if block == (None, None):                                               # of any number of dimensions
        return Scaled((x * scales.reciprocal().to(x.dtype).view(())).to(dtype), scales, block)
    divided = _tiles(x, block) * scales.reciprocal().to(x.dtype)[:, None, :, None]
    return Scaled(_untiled(divided.to(dtype), x.shape), scales, block)


def widened(x: Scaled) -> Tensor:
    """What it stands for, fp32."""
    return _untiled(_tiles(x.values.float(), x.block) * x.scales[:, None, :, None], x.values.shape)


def emulated(a: Scaled, b: Scaled, out_dtype: torch.dtype) -> Tensor:
    """a·bᵀ: [m, k], [n, k] → [m, n], multiplied and summed up in fp32."""
    return (widened(a) @ widened(b).T).to(out_dtype)


def native_scales(x: Scaled) -> Tensor:
    """The scales of an operand [m, k], laid out as torch's product finds out from them what they are."""
    rows, columns = x.block
    if columns is None:                                                     # one number, or a contiguous [m, 1]
        return x.scales.view(()) if rows is None else x.scales.contiguous()
    if columns == 32:                                                       # tiles of 128×4, as tensor cores read them
        parts = F.pad(x.scales, (0, -x.scales.shape[1] % 4, 0, -x.scales.shape[0] % 128), value=1.0)
        tiles = parts.unflatten(1, (-1, 4)).unflatten(0, (-1, 4, 32)).permute(0, 3, 2, 1, 4)
        return tiles.contiguous().to(torch.float8_e8m0fnu).flatten()
    if rows == 1:                                                           # down the rows first
        return x.scales.mT.contiguous().mT
    return F.pad(x.scales, (0, -x.scales.shape[1] % 4))[:, : x.scales.shape[1]]      # a row at a multiple of 16 bytes


def scaled_mm(a: Scaled, b: Scaled, out_dtype: torch.dtype) -> Tensor:
    """As `emulated`, by torch's product of FP8 matrices, which wants the second one transposed."""
    scale_a, scale_b = native_scales(a), native_scales(b)
    short = -a.values.shape[1] % 16                                         # of a sum over tokens, which may be any
    x, y = (torch.cat([each, each.new_zeros(len(each), short)], 1) if short else each.contiguous()
            for each in (a.values, b.values))
    return torch._scaled_mm(x, y.T, scale_a, scale_b if scale_b.ndim < 2 else scale_b.T, out_dtype=out_dtype)


def _scaled_mm(place: Place) -> Any:
    """torch's product, tried out."""
    place.require(device="cuda")
    recipe = RECIPES["tensorwise" if place.fp8 == "off" else place.fp8]
    if not torch.cuda.is_available():
        raise Unavailable("no GPU")
    (low, high), here = recipe.capability, torch.cuda.get_device_capability(place.device)
    if not low <= here <= high:
        raise Unavailable(f"for compute capability {low[0]}.{low[1]}" + ("" if high == low else " and newer")
                          + f", and this GPU has {here[0]}.{here[1]}")
    try:
        require_products(scaled_mm, recipe, place.device)
    except Exception as error:
        raise Unavailable(f"torch {torch.__version__} fails: " + str(error).partition("\n")[0]) from None
    return scaled_mm


def require_products(function: Callable[[Scaled, Scaled, torch.dtype], Tensor], recipe: Recipe,
                     device: torch.device) -> None:
    """
    Raises:
        AssertionError: `function` makes something else than the emulation of what a recipe asks for.
    """
    x = torch.linspace(-3, 3, 256 * 640, device=device).view(256, 640).sin()
    for block, dtype, out_dtype in ((recipe.weight_block, E4M3, torch.bfloat16), (recipe.block, E4M3, torch.float32)):
        a = narrow(x, scales_of(amax_of(x, recipe.block), recipe.gradients), recipe.block, recipe.gradients)
        b = narrow(x, scales_of(amax_of(x, block), dtype), block, dtype)
        torch.testing.assert_close(function(a, b, out_dtype), emulated(a, b, out_dtype), rtol=2e-2, atol=2e-2)


FP8_PRODUCT = Operation("fp8_product", "products of FP8 matrices", (
    Implementation("scaled-mm", _scaled_mm), Implementation("emulated", anywhere(emulated))))
