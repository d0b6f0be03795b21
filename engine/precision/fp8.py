"""Linear layers whose three products multiply FP8 matrices (`engine.kernels.fp8` has the formats and recipes).

*The layout changes no number.*  A scale belongs to a block of the whole tensor.  Where the ranks of an axis divide what
shares a scale, the largest value is one over all of them: along the tensor axis for features that a layer cuts and for
tokens with sequence parallelism, along the context axis for tokens.  These are all-reduces of one number, or of one for
each row.  Blocks of 128 or 32 are never divided (`engine.config.layout` sees to it).

*One scale for a tensor* (tensorwise) serves all three products: x is cast once forward, where its scale is kept, and
dy once backward, and what sequence parallelism gathers is what was cast: half the bytes.  Finer scales belong to a
direction: what shares one in dy·W does not in dyᵀ·x, so each product casts for itself.  x is gathered once for each of
its two products, each time as that casts it, with the scales; dy is gathered once for both, so it travels wide.

*Weights* are cast once for each version of them, which is once a step: `Bucket.start_publish` and whoever else writes
to a parameter raise its version.  One cast does for both products where blocks are square, else there is one for each.
Where parameters are gathered around each use (ZeRO 3) every rank casts its shard of them, and the casts are what is
gathered (`engine.precision.shards`).  That wants few scales: under `mxfp8`, and where weights are not trained, weights
travel as they are, and a layer casts them at each use.

The gradients of biases, the sums over ranks and what sums up weight gradients stay wide.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from engine.config import Config
from engine.distributed.collectives import all_reduce
from engine.distributed.mesh import Axis, Mesh
from engine.errors import ConfigError
from engine.kernels.blocks import Block, cast_bytes
from engine.kernels.fp8 import E4M3, RECIPES, Recipe, Scaled, amax_of, narrow, scales_of
from engine.kernels.operation import torch_operator
from engine.kernels.table import Operations
from engine.model.spec import ParamSpec
from engine.precision.gemms import Gemms, GemmsFactory, Operand, PlainGemms, plain_gemms

# The dimensions of a layer's three matrices: tokens, output and input features.
TOKENS, OUT, IN = "tokens", "out", "in"


class Fp8Gemms:
    """The products of one layer.

    Attributes:
        recomputed: the backward pass needs what the forward pass multiplied with again.
        gathered: W and Wᵀ as they were cast and gathered, there around their use; None: the layer casts.
    """

    def __init__(self, recipe: Recipe, spec: ParamSpec, mesh: Mesh, *, sequence: bool, keep: bool,
                 operations: Operations) -> None:
        """`sequence`: tokens outside the layers are divided; `keep`: casts of weights may be kept."""
        self.recipe = recipe
        self.recomputed = False
        self.gathered: tuple[Scaled, Scaled] | None = None
        self._product, self._keep = operations.fp8_product, keep
        self._shaped = torch_operator("aten", "_unsafe_view")      # no view to autograd: others may add in place
        column = spec.rule.kind != "row"
        # who divides a dimension between the entrance of a column-parallel layer and the exit of a row-parallel one
        self._axes = {TOKENS: (mesh.context,), OUT: (mesh.tensor,) if column else (),
                      IN: () if column else (mesh.tensor,)}
        # and before it is gathered: the input of a column-parallel layer, the gradient of a row-parallel one's output
        own = (mesh.tensor,) if sequence else ()
        self._travels = sequence and column and mesh.tensor.size > 1
        self._own_axes = {False: (mesh.context, *(own if column else (mesh.tensor,))),
                          True: (mesh.context, *((mesh.tensor,) if column else own))}
        self._kept: tuple[int, Scaled, Scaled] | None = None

    # ------------------------------------------------------------------ casts

    def operand(self, x: Tensor, *, gradient: bool = False, scales: Tensor | None = None) -> Operand:
        if self.recipe.block != (None, None):
            return x if gradient or not self._travels else self._before_it_travels(x, again=scales is not None)
        dtype = self.recipe.gradients if gradient else E4M3
        if scales is None:
            scales = scales_of(_over(amax_of(x.flatten(0, -2), self.recipe.block), self._own_axes[gradient]), dtype)
        return narrow(x, scales, self.recipe.block, dtype)

    def _before_it_travels(self, x: Tensor, *, again: bool) -> Operand:
        """x as a factor of the forward product, or `again`, of the weight gradient: each is gathered for itself."""
        block = self.recipe.block[::-1] if again else self.recipe.block
        flat = x.flatten(0, -2)
        if flat.shape[0] % (block[0] or 1):                                # a block of tokens that ranks divide
            return x
        amax = _over(amax_of(flat, block), self._own_axes[False] if block[0] is None else [])
        cast = narrow(flat, scales_of(amax, E4M3), block, E4M3)
        return Scaled(cast.values.view(x.shape), cast.scales, block)

    def _cast(self, x: Tensor, dims: tuple[str, str], block: Block, dtype: torch.dtype) -> Scaled:
        """x [m, k] whose dimensions are these two, as the operand of a sum over the second."""
        axes = [axis for dim, part in zip(dims, block, strict=True) if part is None for axis in self._axes[dim]]
        return narrow(x, scales_of(_over(amax_of(x, block), axes), dtype), block, dtype)

    def _factor(self, x: Operand, dims: tuple[str, str], dtype: torch.dtype) -> Scaled:
        """An activation or gradient; `dims[1]` is summed over."""
        flat = x.flatten(0, -2) if isinstance(x, Tensor) else Scaled(x.values.flatten(0, -2), x.scales, x.block)
        flat = flat if dims[0] == TOKENS else flat.mT
        return self._cast(flat, dims, self.recipe.block, dtype) if isinstance(flat, Tensor) else flat

    def cast_weight(self, weight: Tensor) -> tuple[Scaled, Scaled]:
        """[n, k] → W and Wᵀ, each for a sum over its second dimension."""
        block = self.recipe.weight_block
        forward = self._cast(weight, (OUT, IN), block, E4M3)
        square = block[0] == block[1]
        return forward, forward.mT if square else self._cast(weight.mT, (IN, OUT), block, E4M3)

    def _weight(self, weight: Tensor) -> tuple[Scaled, Scaled]:
        if self.gathered is not None:
            return self.gathered
        if not self._keep:
            return self.cast_weight(weight)
        if self._kept is None or self._kept[0] != weight._version:
            self._kept = (weight._version, *self.cast_weight(weight))
        return self._kept[1:]

    def kept_bytes(self, weight: Tensor) -> int:
        """What casts of the layer's weight take between steps."""
        return cast_bytes(self.recipe.weight_block, *weight.flatten(0, -2).shape) if self._keep else 0

    def divided(self, block: Block) -> bool:
        """Whether tensor ranks have parts of what shares a scale in such blocks of the weight."""
        return any(part is None and self._axes[dim] for dim, part in zip((OUT, IN), block, strict=True))

    # ------------------------------------------------------------------ products

    def forward(self, x: Operand, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = self._product(self._factor(x, (TOKENS, IN), E4M3), self._weight(weight)[0], weight.dtype)
        return self._shaped(out if bias is None else out.add_(bias), _shape(x, weight.shape[0]))

    def input_gradient(self, grad_out: Operand, weight: Tensor) -> Tensor:
        dy = self._factor(grad_out, (TOKENS, OUT), self.recipe.gradients)
        return self._shaped(self._product(dy, self._weight(weight)[1], weight.dtype), _shape(grad_out, weight.shape[1]))

    def weight_gradient(self, out: Tensor, grad_out: Operand, x: Operand, *, accumulate: bool) -> None:
        dy, x = self._factor(grad_out, (OUT, TOKENS), self.recipe.gradients), self._factor(x, (IN, TOKENS), E4M3)
        product = self._product(dy, x, torch.promote_types(out.dtype, torch.float32))
        out.add_(product) if accumulate else out.copy_(product)


def _shape(x: Operand, features: int) -> list[int]:
    return [*(x if isinstance(x, Tensor) else x.values).shape[:-1], features]


def _over(amax: Tensor, axes: list[Axis] | tuple[Axis, ...]) -> Tensor:
    """The largest over the ranks of the axes."""
    for axis in axes:
        all_reduce(amax, axis, op=dist.ReduceOp.MAX)
    return amax


def gemms_of(config: Config, mesh: Mesh, sequence: bool, operations: Operations) -> GemmsFactory:
    """The products that `config.precision` asks for.

    Raises:
        ConfigError: this rank's GPU has no products of such matrices, and nobody asked for their emulation.
    """
    precision = config.precision
    if precision.fp8 == "off":
        return plain_gemms(operations)
    found = next((row for row in operations.chosen if row.operation == "fp8_product"), None)
    if mesh.device.type == "cuda" and found is not None and found.implementation == "emulated" \
            and config.kernels.fp8_product != "emulated":
        reasons = "; ".join(reason for _, reason in found.passed_over)
        raise ConfigError(f"precision.fp8: {precision.fp8} is not for this GPU ({reasons}): take another of "
                          f"{', '.join(RECIPES)}, or off; kernels.fp8_product: emulated computes the same, slowly")
    layers = {f"layers.{index}" for index in precision.fp8_layers(config.model.num_layers)}

    def make(spec: ParamSpec) -> Gemms:
        if ".".join(spec.name.split(".")[:2]) not in layers:
            return PlainGemms(operations)
        return Fp8Gemms(RECIPES[precision.fp8], spec, mesh, sequence=sequence, keep=config.parallel.zero < 3,
                        operations=operations)

    return make
