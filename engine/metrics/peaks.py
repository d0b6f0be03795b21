"""The peak speed of a device, by the name its driver gives.

Model FLOPs utilisation (MFU) is the speed reached over the speed on the data sheet, so the table below is the
denominator: *dense* BF16 with FP32 accumulation.  Data sheets like to print twice as much "with sparsity"; no training
run has that sparsity.

One product name covers parts of different speed ("H100" is 989 as SXM, 756 on PCIe), so the longest matching name wins.
A name has to match as a word: `A100` is not in `RTX A1000`, `B200` is not in `GB200`.  Parts sold under another part's
name with less of its silicon (a MIG slice, a laptop's chip, the `D` cards) are unknown.  An unknown device has no MFU:
a guessed peak would make a wrong number look measured.
"""

from __future__ import annotations

import re
from types import MappingProxyType

DENSE_BF16_TFLOPS = MappingProxyType({
    "A100": 312.0,
    "H100": 989.0,          # "NVIDIA H100 80GB HBM3" is the SXM part; the others carry their form in the name
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H20": 148.0,
    "B200": 2250.0,
    "B300": 2250.0,
    "GB200": 2500.0,
    "GB300": 2500.0,
    "L40S": 362.0,
    "A6000": 155.0,
    "4090": 165.0,
    "5090": 210.0,
    "MI300X": 1307.0,
    "MI355X": 2500.0,
})

_LESS_SILICON = re.compile(r"\b(mig|laptop|max-q|[45]090 d)\b", re.IGNORECASE)


def peak_tflops(device_name: str, dtype: str = "bf16") -> float | None:
    """Dense peak of one device in TFLOP/s, or None where it isn't known.

    Args:
        device_name: as `torch.cuda.get_device_name()` prints it, for example `NVIDIA A100-SXM4-80GB`.
        dtype: the arithmetic of the run's matrix products; only `bf16` peaks are tabulated.
    """
    if dtype != "bf16" or _LESS_SILICON.search(device_name):
        return None
    for name in sorted(DENSE_BF16_TFLOPS, key=len, reverse=True):
        if re.search(rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])", device_name, re.IGNORECASE):
            return DENSE_BF16_TFLOPS[name]
    return None
