"""`octant bench matmul`: what this device reaches in plain matrix products, in fp32 and in bf16.

Training is mostly matrix products, so no run goes faster than they do: this is the ceiling under the data sheet's peak.
It also answers which `precision.compute` is the fast one here: bf16 wins on every GPU of the last years, and loses on
processors without instructions for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch

from engine.bench.harness import Case, Comparison, add_options, alternating, publish
from engine.errors import RequestError
from engine.metrics.peaks import peak_tflops

PRODUCTS_PER_RUN = 8            # launched together, so that the launch itself doesn't count


def run(arguments: Sequence[str]) -> int:
    """Parse the benchmark's own arguments and measure."""
    parser = argparse.ArgumentParser(prog="octant bench matmul", description="Matrix products in fp32 and bf16.")
    parser.add_argument("--size", type=int, nargs="+", metavar="N", help="products of N × N matrices (default: 8192 on "
                        "a GPU, 1024 on a CPU)")
    add_options(parser)
    args = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = args.size or [8192 if device.type == "cuda" else 1024]
    if min(sizes) < 1 or args.repeats < 1:
        raise RequestError(f"--size {min(sizes)}, --repeats {args.repeats}: both have to be at least 1")
    results = [compare_dtypes(size, device, args.repeats) for size in sizes]
    publish(results, args)
    print(_against_data_sheet(results, device))
    return 0


def compare_dtypes(size: int, device: torch.device, repeats: int) -> Comparison:
    """TFLOP/s of `size` × `size` products in fp32 (the baseline) and bf16."""
    teraflop = PRODUCTS_PER_RUN * 2 * size ** 3 / 1e12
    cases = (Case(name, _products(size, dtype, device), teraflop)
             for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)))
    return alternating(*cases, repeats=repeats, title=f"{size} × {size} matrix products on {device.type}",
                       unit="TFLOP", synchronize=torch.cuda.synchronize if device.type == "cuda" else None)


def _products(size: int, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    generator = torch.Generator(device).manual_seed(0)      # random numbers: a GPU multiplies zeros faster
    a, b = (torch.randn(size, size, generator=generator, device=device).to(dtype) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)

    def work() -> None:
        for _ in range(PRODUCTS_PER_RUN):
            torch.mm(a, b, out=out)

    return work


def _against_data_sheet(results: Sequence[Comparison], device: torch.device) -> str:
    best = max(measurement.rate for result in results for measurement in result.measurements
               if measurement.name == "bf16")
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    if peak is None:
        return f"bf16 reaches {best:.3g} TFLOP/s; the data sheet's peak of this device isn't known: MFU n/a"
    return f"bf16 reaches {best:.0f} of the data sheet's {peak:.0f} TFLOP/s: {100 * best / peak:.0f} %"
