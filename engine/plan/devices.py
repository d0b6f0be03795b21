"""Devices: what the data sheets promise, and what of it is reached.

Peaks are dense, with accumulation in fp32, as in `engine.metrics.peaks`.  Bandwidths are bytes a second: of memory, of
a device's links inside a node in one direction, and of its share of the network.  Sources, by name of the part:

    a100-40g, a100-80g   NVIDIA A100 data sheet (2021): 312 TFLOP/s, 1,555 and 2,039 GB/s, NVLink 600 GB/s both ways;
                         DGX A100: one HDR InfiniBand port of 200 Gb/s for each GPU
    h100-sxm, h200       NVIDIA H100 and H200 data sheets: 989 (FP8 1,979) TFLOP/s, 3.35 and 4.8 TB/s, NVLink 900 GB/s;
                         DGX H100: 400 Gb/s for each GPU
    b200                 NVIDIA DGX B200 data sheet: 2,250 (FP8 4,500) TFLOP/s, 8 TB/s, NVLink 1.8 TB/s, 400 Gb/s
    rtx-4090             NVIDIA Ada whitepaper: 165 (FP8 330) TFLOP/s, 1,008 GB/s; PCIe 4 × 16, 32 GB/s
    cpu                  none: figures of a core of a recent server, not of yours; the host is the device, so that
                         what starting a kernel takes is in what a kernel takes

What is reached are a few numbers for each device, `Reached`: shares of the peaks that the largest products and streams
attain, the size at which half of that is lost, what a kernel costs however small, and the latency of a message.  They
are fitted to published runs; docs/planning.md says to which, and how far off the others are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

from engine.errors import RequestError

GB, TFLOP, GBIT = 1e9, 1e12, 1e9 / 8


@dataclass(frozen=True)
class Reached:
    """How much of a device's promise is kept.

    Attributes:
        product: share of the peak that a large matrix product reaches; `product_fp8` of the one for FP8, its casts
            included.  Both are those of long runs: an H100 lowers its clock under such a load.
        half_depth: inner dimension of a product that halves its rate.
        attention: share of the peak that fused attention reaches, forward; backward is four fifths of it.
        stream: share of the memory's bandwidth that elementwise kernels reach.
        kernel: seconds that a kernel costs besides: its launch, and the time until all of it is busy.
        dispatch, dispatch_collective: seconds of the host until it has started a kernel, or a collective; where a
            layer's kernels are shorter than that together, the host sets the pace.
        link, network: shares of the links' and the network's bandwidth that collectives reach.
        latency, far: seconds of a step of a collective inside a node, and between nodes.
    """

    product: float = 0.80
    product_fp8: float = 0.55
    half_depth: float = 100.0
    attention: float = 0.60
    stream: float = 0.80
    kernel: float = 5e-6
    dispatch: float = 21e-6
    dispatch_collective: float = 160e-6
    link: float = 0.80
    network: float = 0.80
    latency: float = 4e-6
    far: float = 12e-6


@dataclass(frozen=True)
class Device:
    """A row of the table.

    Attributes:
        memory: bytes; what the driver shows, a little less than the name says.
        peaks: operations a second by precision: `fp32`, `bf16`, `fp8`.
        bandwidth: of its memory.
        link: to the others of its node, one direction.
        network: its share of the node's network.
        per_node: devices of a node.
        overlaps: communication runs beside computation, and not on the same cores.
        sharing: ranks to a core, where they are more than the cores; figures are then those of a rank among them.
        off_by: of figures that were measured: by how much they miss their own measurements, on average.
    """

    name: str
    memory: float
    peaks: dict[str, float]
    bandwidth: float
    link: float
    network: float
    per_node: int = 8
    reached: Reached = field(default=Reached())
    overlaps: bool = True
    sharing: float = 1.0
    off_by: float | None = None


def _gpu(name: str, gib: float, bf16: float, fp8: float, fp32: float, bandwidth: float, link: float, gbit: float,
         /, **reached: float) -> Device:
    peaks = {"fp32": fp32 * TFLOP, "bf16": bf16 * TFLOP} | ({"fp8": fp8 * TFLOP} if fp8 else {})
    return Device(name, gib * 2**30, peaks, bandwidth * GB, link * GB, gbit * GBIT, reached=Reached(**reached))


# Fitted to the runs that docs/planning.md names, by the device they ran on; the rest of these numbers are the defaults.
A100 = {"product": 0.81, "half_depth": 50.0, "attention": 0.55, "stream": 0.87, "kernel": 12e-6, "link": 0.93,
        "network": 0.95, "latency": 10e-6, "far": 32e-6, "dispatch": 22e-6,
        "dispatch_collective": 46e-6}
H100 = {"product": 0.64, "product_fp8": 0.51, "half_depth": 120.0, "attention": 0.42, "stream": 0.89, "kernel": 8e-6,
        "link": 0.92, "network": 0.95, "far": 20e-6, "dispatch": 12e-6, "dispatch_collective": 80e-6}
B200 = {"product": 0.42, "product_fp8": 0.34, "half_depth": 110.0, "attention": 0.42, "stream": 0.70, "kernel": 12e-6,
        "link": 0.51, "dispatch": 12e-6, "dispatch_collective": 80e-6}

DEVICES = MappingProxyType({device.name: device for device in (
    _gpu("a100-40g", 39.4, 312, 0, 19.5, 1555, 300, 200, **A100),
    _gpu("a100-80g", 79.1, 312, 0, 19.5, 2039, 300, 200, **A100),
    _gpu("h100-sxm", 79.1, 989, 1979, 67, 3350, 450, 400, **H100),
    _gpu("h200", 139.8, 989, 1979, 67, 4800, 450, 400, **H100),
    _gpu("b200", 178.3, 2250, 4500, 80, 8000, 900, 400, **B200),
    _gpu("rtx-4090", 23.5, 165, 330, 82.6, 1008, 32, 100),
    replace(_gpu("cpu", 16, 0.1, 0, 0.05, 10, 2, 10, kernel=4e-5, dispatch=0.0, dispatch_collective=0.0,
                 latency=1e-4, far=1e-4), per_node=64, overlaps=False),
)})

DRIVERS = MappingProxyType({"a100": "a100-80g", "h100": "h100-sxm", "h200": "h200", "b200": "b200", "4090": "rtx-4090"})


def device(name: str) -> Device:
    """The row of a name.

    Raises:
        RequestError: there is none.
    """
    if name.lower() in DEVICES:
        return DEVICES[name.lower()]
    near = get_close_matches(name.lower(), DEVICES, n=1, cutoff=0.4)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise RequestError(f"no figures for a device {name!r}{hint} (there are {', '.join(DEVICES)})")


def device_of_driver(name: str) -> Device | None:
    """The row of the device that its driver calls `NVIDIA A100-SXM4-80GB`, or whose host is a CPU; None: there is none.

    Parts that share a row's name and have less silicon or slower links are no row (`engine.metrics.peaks`).
    """
    words = set(re.findall(r"[a-z0-9]+", name.lower()))
    if not words & {"nvidia", "instinct", "radeon"}:
        return DEVICES["cpu"]
    if words & {"pcie", "nvl", "mig", "laptop", "d"} and "4090" not in words:
        return None
    row = next((row for word, row in DRIVERS.items() if word in words), None)
    return DEVICES["a100-40g"] if row == "a100-80g" and "40gb" in words else None if row is None else DEVICES[row]


def device_named_in(path: str) -> str | None:
    """The device that the comments at the head of a configuration name: `# … on 2,048 × a100-80g`.

    A preset, or a file that cannot be read, names none.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    head = takewhile(lambda line: line.startswith("#"), text.splitlines())
    words = re.findall(r"[a-z0-9]+(?:-[a-z0-9]+)*", " ".join(head).lower())
    return next((word for word in words if word in DEVICES), None)
