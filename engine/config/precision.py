"""The section `precision`: in which arithmetic a step is computed."""

from __future__ import annotations

from typing import Literal

from engine.config.fields import Section


class PrecisionConfig(Section):
    """Arithmetic.  Masters, moments and gradient accumulation are always fp32."""

    compute: Literal["fp32", "bf16"] = "bf16"
    # how the matrices of linear layers' products share scales (`engine.kernels.fp8`); te: Transformer Engine's own
    fp8: Literal["off", "tensorwise", "rowwise", "blockwise", "mxfp8", "te"] = "off"
    fp8_skip: tuple[Literal["first", "last"], ...] = ("first", "last")       # layers whose products stay in `compute`
    grad_reduce: Literal["fp32", "bf16"] = "fp32"

    def fp8_layers(self, num_layers: int) -> range:
        """The layers of a model of so many whose products multiply FP8 matrices."""
        if self.fp8 == "off":
            return range(0)
        return range("first" in self.fp8_skip, num_layers - ("last" in self.fp8_skip))
