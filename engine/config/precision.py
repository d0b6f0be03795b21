"""The section `precision`: in which arithmetic a step is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from engine.config.fields import NonNegative, Positive, Section


class LossScaleConfig(Section):
    """What fp16's gradients are multiplied with: see `engine.optim.loss_scale`."""

    initial: Positive = 65536.0
    window: NonNegative = 1000                               # steps without overflow before it doubles; 0: never
    smallest: Positive = 1.0


class PrecisionConfig(Section):
    """Arithmetic.  Moments and gradient accumulation are always fp32."""

    compute: Literal["fp32", "bf16", "fp16"] = "bf16"
    masters: Literal["fp32", "off"] = "fp32"       # off: weights are bf16 alone, and updates are rounded by chance
    loss_scale: LossScaleConfig = LossScaleConfig()          # of compute: fp16
    # how the matrices of linear layers' products share scales (`engine.kernels.fp8`); te: Transformer Engine's own
    fp8: Literal["off", "tensorwise", "rowwise", "blockwise", "mxfp8", "te"] = "off"
    fp8_skip: tuple[Literal["first", "last"], ...] = ("first", "last")       # layers whose products stay in `compute`
    grad_reduce: Literal["fp32", "bf16"] = "fp32"

    @model_validator(mode="after")
    def _masters_of_bf16(self) -> PrecisionConfig:
        if self.masters == "off" and self.compute == "fp16":
            raise ValueError("masters off rounds updates to bf16 by chance: set compute to bf16, or masters to fp32")
        if self.masters == "off" and self.compute == "fp32":
            raise ValueError("masters off leaves bf16 weights without fp32 ones, and with compute fp32 there are no "
                             "others: set compute to bf16, or masters to fp32")
        return self

    def fp8_layers(self, num_layers: int) -> range:
        """The layers of a model of so many whose products multiply FP8 matrices."""
        if self.fp8 == "off":
            return range(0)
        return range("first" in self.fp8_skip, num_layers - ("last" in self.fp8_skip))
