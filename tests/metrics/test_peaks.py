"""Device names as drivers print them, and names that only look alike."""

from __future__ import annotations

import pytest

from engine.metrics.peaks import peak_tflops


@pytest.mark.parametrize(("device", "peak"), [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100-PCIE-40GB", 312), ("nvidia a100 80gb pcie", 312),
    ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
    ("NVIDIA H200 NVL", 835), ("NVIDIA H20", 148), ("NVIDIA B200", 2250), ("NVIDIA GB200", 2500),
    ("NVIDIA B300 SXM6 AC", 2250), ("NVIDIA GB300", 2500), ("NVIDIA L40S", 362), ("NVIDIA RTX A6000", 155),
    ("NVIDIA GeForce RTX 4090", 165), ("NVIDIA GeForce RTX 5090", 210), ("AMD Instinct MI300X OAM", 1307),
    ("AMD Instinct MI355X", 2500),
])
def test_known_devices(device: str, peak: float) -> None:
    assert peak_tflops(device) == peak


@pytest.mark.parametrize("device", [
    "NVIDIA RTX A1000", "NVIDIA L40", "NVIDIA GH200 480GB", "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
    "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "AMD Instinct MI300A", "Tesla V100-SXM2-32GB",
    "AMD EPYC 7763 64-Core Processor", "cpu", "",
])
def test_others_are_unknown_and_not_guessed(device: str) -> None:
    assert peak_tflops(device) is None


def test_only_bf16_is_tabulated() -> None:
    assert peak_tflops("NVIDIA A100-SXM4-80GB", "fp32") is None
