"""Spikes: a loss or a gradient norm far above what it has lately been.

A mean and a standard deviation would be moved by the very values that they should expose, so the yardstick is robust:

    z = (x − median) / (1.4826 · MAD)        MAD: the median of the distances from the median

which for a normal distribution are ordinary standard deviations (Hampel 1974).  Only what lies above counts: a loss
that falls is no anomaly.  Both numbers are the same on all ranks, which therefore decide alike; they stay on the
device, where the decision to skip must be there before the update and nobody waits for it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from engine.config import SpikeConfig

SPIKES = "spikes"                          # where a checkpoint's metadata keep `SpikeMonitor.state`
NORMAL = 1.4826                            # a normal distribution's standard deviation over its MAD
LEAST = 1e-3                               # of the median: a deviation smaller than this is taken for this


class SpikeMonitor:
    """The latest losses and gradient norms of a run, on its device."""

    def __init__(self, config: SpikeConfig | None, device: torch.device) -> None:
        self.config = config
        self._recent = torch.full((2, config.window if config else 0), math.nan, device=device)
        self._steps = 0
        self._none = torch.zeros((), device=device)

    def z(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """How far the larger of the two stands out; 0 while there is too little to compare with: half a window."""
        if self.config is None:
            return self._none
        values, recent = torch.stack((loss.float(), grad_norm.float())), self._recent
        median = recent.nanmedian(dim=1).values
        spread = NORMAL * (recent - median.unsqueeze(1)).abs().nanmedian(dim=1).values
        z = (values - median) / torch.maximum(spread, LEAST * median.abs())
        enough = recent.isfinite().sum(dim=1) * 2 >= recent.shape[1]
        return torch.where(enough, z, 0.0).nan_to_num(0.0).amax()

    def remember(self, loss: Tensor, grad_norm: Tensor, skipped: Tensor) -> None:
        """Takes a step in; not one that changed nothing."""
        if self.config is None:
            return
        values = torch.stack((loss.float(), grad_norm.float()))
        self._recent[:, self._steps % self.config.window] = torch.where(skipped.bool(), math.nan, values)
        self._steps += 1

    def state(self) -> dict[str, Any]:
        """What the next decisions depend on, as JSON.  Waits for the device."""
        return {"steps": self._steps, "recent": [[x if math.isfinite(x) else None for x in row]
                                                 for row in self._recent.tolist()]}

    def restore(self, state: dict[str, Any]) -> None:
        """Takes over what `state` returned; of a window of another size nothing.

        Raises:
            ValueError: `state` is nothing that `state` returns.
        """
        try:
            steps, rows = int(state["steps"]), [[math.nan if x is None else float(x) for x in row]
                                                for row in state["recent"]]
            loss, norm = rows
        except (KeyError, TypeError, OverflowError) as error:
            raise ValueError(f"what it says of spikes cannot be read ({error})") from None
        if len(loss) == len(norm) == self._recent.shape[1]:
            self._recent.copy_(torch.tensor(rows))
            self._steps = steps
