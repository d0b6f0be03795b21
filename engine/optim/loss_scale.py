"""Dynamic loss scaling, for fp16 (Micikevicius et al. 2018, section 3.2).

fp16 has no numbers between 0 and 6e-8, where many gradients are, and none above 65,504.  So what is differentiated is
the loss times S, and the gradients, once they are added up in fp32, count divided by S.  S is as large as it can be:

    a gradient that is not finite     S / 2, and the step changes nothing; not below `smallest`
    `window` steps without one        S · 2

What decides is the gradient's norm, which all ranks have alike.  S and the number of good steps lie on the device, are
read by the host where a line is logged or the run is saved, and are part of its state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from engine.config import Config
from engine.config.precision import LossScaleConfig
from engine.optim.gradients import StepSums

LOSS_SCALE = "loss_scale"                  # where a checkpoint's metadata and a line of metrics keep it


class LossScale:
    """S, fp32 on the device, and the steps since it changed."""

    def __init__(self, config: LossScaleConfig, device: torch.device) -> None:
        self.config = config
        self.value = torch.full((), config.initial, dtype=torch.float32, device=device)
        self._good = torch.zeros((), dtype=torch.float32, device=device)

    @staticmethod
    def of(config: Config, device: torch.device) -> LossScale | None:
        """That of a run; None: its arithmetic needs none."""
        return LossScale(config.precision.loss_scale, device) if config.precision.compute == "fp16" else None

    def unscaled(self, sums: StepSums) -> StepSums:
        """With the norm of the gradients as they are without S."""
        return replace(sums, grad_norm=sums.grad_norm / self.value)

    def update(self, grad_norm: Tensor) -> Tensor:
        """What the step's norm does to S; whether a smaller one may make it finite, a bool on the device."""
        finite, smallest = grad_norm.isfinite(), self.config.smallest
        lowered = ~finite & (self.value > smallest)
        good = torch.where(finite, self._good + 1, 0.0)
        grown = (good >= self.config.window) if self.config.window else torch.zeros_like(finite)
        halved = (self.value / 2).clamp(min=smallest)
        self.value.copy_(torch.where(lowered, halved, torch.where(grown, self.value * 2, self.value)))
        self._good.copy_(torch.where(grown, 0.0, good))
        return lowered

    def state(self) -> list[float]:
        """What a checkpoint must hold.  Waits for the device."""
        return [self.value.item(), self._good.item()]

    def restore(self, state: Sequence[float]) -> None:
        """Takes over what `state` returned.

        Raises:
            ValueError: it is something else.
        """
        if len(state) != 2 or not state[0] > 0:
            raise ValueError(f"{LOSS_SCALE} holds {list(state)}, not a scale and a number of steps")
        self.value.fill_(state[0])
        self._good.fill_(state[1])
