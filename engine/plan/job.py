"""A job on so many of a device: its memory, its time, and what of that is told to programs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from engine.config import Config
from engine.plan.devices import Device
from engine.plan.error import memory_error, relative_error
from engine.plan.stages import StageMemory, all_stages
from engine.plan.step import StepTime, step_time

DAY = 86_400


def layout_of(config: Config) -> dict[str, Any]:
    """The keys of `parallel` and `batch` that make it, as a configuration has them."""
    values = config.to_dict()
    keys = ("tensor", "pipeline", "context", "data", "sequence", "schedule", "virtual_stages", "zero", "recompute")
    return {key: values["parallel"][key] for key in keys} | {"micro": config.batch.micro}


@dataclass(frozen=True)
class Planned:
    """The resolved `config` on `device`."""

    config: Config
    device: Device

    @property
    def world(self) -> int:
        return self.config.parallel.world_size

    @cached_property
    def stages(self) -> list[StageMemory]:
        return all_stages(self.config, on_gpu=self.device.name != "cpu")

    @property
    def fullest(self) -> StageMemory:
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def fits(self) -> bool:
        return self.fullest.needed <= self.device.memory

    @cached_property
    def time(self) -> StepTime:
        return step_time(self.config, self.device)

    @property
    def days(self) -> float:
        """Of the whole run, without evaluations, saves and failures."""
        return self.config.steps * self.time.seconds / DAY

    @property
    def error(self) -> float:
        """What predictions of runs like this one were off by, on average; of a calibrated device, of its own runs."""
        known = self.device.off_by
        return relative_error(self.device.name, self.world) if known is None else known

    @property
    def memory_error(self) -> float:
        """What predictions of the memory of runs like this one were off by."""
        return memory_error(self.config, self.device.name, self.fullest.total)

    def record(self) -> dict[str, Any]:
        """The object of `octant plan --json`."""
        name, size = self.fullest.largest
        return {
            "world": self.world, "gpu": self.device.name, "layout": layout_of(self.config),
            "memory": [{"parameters": round(it.state.weights), "gradients": round(it.state.gradients),
                        "optimizer": round(it.state.optimizer), "activations": round(it.activations),
                        "workspace": round(it.workspace), "total": round(it.total)} for it in self.stages],
            "fits": self.fits, "needed_bytes": round(self.fullest.needed), "device_bytes": round(self.device.memory),
            "needed_error": self.memory_error, "largest_term": {"name": name, "bytes": round(size)},
            "step_seconds": self.time.seconds, "step_seconds_error": self.error, "mfu": self.time.mfu,
            "mfu_full": self.time.mfu_full, "bubble": self.time.bubble,
            "tokens_per_second": self.time.tokens_per_second, "days": self.days, "breakdown": self.time.breakdown}
