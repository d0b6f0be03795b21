"""Adafactor of torch, and with momentum of transformers, on the matrices that Hugging Face's models have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from engine.config import Config
from engine.model.parameters import spec_of
from tests.kit.muon import matrices


class Adafactor(torch.optim.Optimizer):
    """Of parameters by name: each of their parts is copied to the library's optimizer and back."""

    def __init__(self, named: Mapping[str, nn.Parameter], config: Config) -> None:
        super().__init__([{"params": [*named.values()], "lr": 0.0}], {})
        self.named, self.config, decays = named, config, config.optim.weight_decay
        self.parts = {name: [nn.Parameter(self._plain(name, part).clone()) for part in self._parts(name, p.detach())]
                      for name, p in named.items()}
        groups = [{"params": [part for name, p in named.items() for part in self.parts[name]
                              if spec_of(p).decay == decay], "weight_decay": decay * decays} for decay in (True, False)]
        if config.optim.momentum:
            from transformers.optimization import Adafactor as WithMomentum

            for group in groups:
                group["weight_decay"] = 0.0
            self.inner: Any = WithMomentum(groups, lr=0.0, beta1=config.optim.momentum, relative_step=False)
        else:
            self.inner = torch.optim.Adafactor(groups, eps=(1e-15, 1e-3))

    def _parts(self, name: str, whole: Tensor) -> list[Tensor]:
        """Views."""
        if ".linear_" not in name:
            return [whole]
        return matrices(name, whole, self.config)

    def _plain(self, name: str, part: Tensor) -> Tensor:
        return part.flatten(0, -2) if spec_of(self.named[name]).decay else part.flatten()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.inner.param_groups:
            group["lr"] = self.param_groups[0]["lr"]
        for name, p in self.named.items():
            for part, of in zip(self.parts[name], self._parts(name, p.grad), strict=True):
                part.grad = self._plain(name, of).clone()
        if self.config.optim.momentum:                    # its decay is scaled with the weights; ours is AdamW's
            before = {part: part.clone() for parts in self.parts.values() for part in parts}
        self.inner.step()
        for name, p in self.named.items():
            for part, of in zip(self.parts[name], self._parts(name, p.data), strict=True):
                if self.config.optim.momentum and spec_of(p).decay:
                    part.sub_(self.param_groups[0]["lr"] * self.config.optim.weight_decay * before[part])
                of.copy_(part.view(of.shape))
