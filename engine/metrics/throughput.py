"""Tokens per second, TFLOP/s per device, and model FLOPs utilisation.

    tokens_per_second  = tokens of the whole job / seconds
    tflops_per_device  = tokens_per_second · FLOPs per token / devices / 10¹²
    mfu                = tflops_per_device / peak TFLOP/s of the device

The FLOPs are the model's (`engine.model.flops`), not those the hardware happened to execute: recomputation, padding of
the vocabulary and bubbles all lower the MFU.  Example: LLaMA-65B at 2,048 tokens, 380 tokens/s on each A100 (peak 312
TFLOP/s) is 48.5 % with causal attention counted, 49.5 % with full.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Throughput:
    """Speed of one step; the field names are those of `metrics.jsonl`.

    Attributes:
        tokens_per_second: of the whole job.
        tflops_per_device: model TFLOP/s on each device.
        mfu: fraction of the peak between 0 and 1; None where the peak isn't known.
    """

    tokens_per_second: float
    tflops_per_device: float
    mfu: float | None

    def record(self) -> dict[str, float | None]:
        """The fields as a part of a metrics record."""
        return asdict(self)


def throughput(tokens: float, seconds: float, flops_per_token: float, num_devices: int,
               peak: float | None) -> Throughput:
    """Speed from the work done and the time it took.

    Args:
        tokens: tokens trained on by the whole job in `seconds`.
        seconds: wall-clock time.
        flops_per_token: from `engine.model.flops.flops_per_token`.
        num_devices: devices (or processes, on CPU) that shared the work.
        peak: TFLOP/s of one device, from `peak_tflops`; None gives `mfu=None`.
    """
    tokens_per_second = tokens / seconds
    tflops_per_device = tokens_per_second * flops_per_token / num_devices / 1e12
    return Throughput(tokens_per_second, tflops_per_device, None if peak is None else tflops_per_device / peak)
