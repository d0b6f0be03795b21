"""`octant bench kernels`: every implementation of every operation beside its reference: how exact, how fast.

*Error.*  The norm of the difference to the same computation in fp64 on the same (rounded) inputs, over the norm of
that: of the worst output or gradient.  What matters is how it compares with the reference's in the same dtype.

*Time.*  Forward and backward together, the implementations taking turns, the reference first.

*Share.*  What an operation must cost at least, over what it took: the bytes that go in and come out at the speed at
which this device copies, or its products at the speed at which this device multiplies; both are measured here, first.
90 % leaves nothing to gain; 20 % says that something is moved several times.

With `--compile sm_90` nothing is measured: our Triton kernels are compiled, without a GPU, and what each needs of one
is printed.  A kernel that only moves memory runs at the memory's speed if enough of its programs fit on a
multiprocessor and none keeps its numbers in memory for want of registers: both can be read from the compiled code.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from engine.bench.harness import Case, Comparison, add_options, alternating, publish
from engine.bench.workloads import Workload, workloads
from engine.config.fields import nearest
from engine.config.load import preset_fields, preset_names
from engine.config.model import ModelConfig
from engine.errors import RequestError
from engine.kernels.operation import Operation, Place, Unavailable, short_name
from engine.kernels.table import TABLE
from engine.kernels.triton.ahead import CAPABILITIES, compile_all, interpreting

CPU = torch.device("cpu")
COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}        # far more than caches hold
PRODUCT = {"cuda": 8192, "cpu": 1024}                   # rows and columns of the product that says what products reach
TOKENS = {"cuda": 8192, "cpu": 256}
EXACT_TOKENS = 128                                      # of which the error is measured: fp64 is slow
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass(frozen=True)
class Ceiling:
    """What this device reaches: bytes copied (read and written) and FLOPs of products, per second."""

    bytes_per_second: float
    flops_per_second: float

    def seconds(self, work: Workload, tokens: int, itemsize: int) -> float:
        """The least that the work takes."""
        return (work.elements(tokens) * itemsize / self.bytes_per_second + work.flops(tokens) / self.flops_per_second)


def run(arguments: Sequence[str]) -> int:
    """Parse the benchmark's own arguments, and measure or compile."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser = argparse.ArgumentParser(prog="octant bench kernels",
                                     description="Every implementation of every operation beside its reference.")
    parser.add_argument("--model", default="llama3.2-1b", metavar="PRESET",
                        help="whose dimensions (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=TOKENS[device.type], metavar="N", help="of a microbatch, one "
                        "sequence (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if device.type == "cuda" else "fp32",
                        help="of weights and activations (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="OPERATION", choices=[operation.name for operation in TABLE])
    parser.add_argument("--compile", metavar="ARCH,…", help="compile our kernels without a GPU instead, for some of "
                        + ", ".join(CAPABILITIES))
    add_options(parser, repeats=5)
    args = parser.parse_args(arguments)
    if args.compile is not None:
        return compile_kernels(args.compile.split(","))
    if args.tokens < 1 or args.repeats < 1:
        raise RequestError(f"--tokens {args.tokens}, --repeats {args.repeats}: both have to be at least 1")
    if args.model not in preset_names():
        raise RequestError(f"--model {args.model}: " + nearest(args.model, preset_names()))
    works = workloads(ModelConfig.model_validate(preset_fields(args.model)))
    place = Place(device, DTYPES[args.dtype])
    ceiling = measured_ceiling(place, args.repeats)
    print(f"this device copies {ceiling.bytes_per_second / 1e9:,.0f} GB/s and multiplies "
          f"{ceiling.flops_per_second / 1e12:,.3g} TFLOP/s in {args.dtype}", flush=True)
    results = []
    for number, operation in enumerate(chosen := [each for each in TABLE if each.name in (args.only or works)], 1):
        print(f"{number} of {len(chosen)}: {operation.name}", file=sys.stderr, flush=True)
        results.append(beside_reference(operation, works[operation.name], place, args.tokens, ceiling, args.repeats))
    publish(results, args)
    return 0


def beside_reference(operation: Operation, work: Workload, place: Place, tokens: int, ceiling: Ceiling,
                     repeats: int) -> Comparison:
    """Errors and times of all implementations that are available at this place; the reference is the baseline."""
    few = min(tokens, EXACT_TOKENS)
    rounded = [x.to(place.dtype) for x in work.inputs(partial(_normal, dtype=torch.float64), few)]
    exact = work.prepared(operation.reference.find(Place(CPU, torch.float64)), [x.double() for x in rounded])()
    least = ceiling.seconds(work, tokens, 4 if operation.name == "adamw" else place.dtype.itemsize)
    cases, errors = [], {}
    for entry in reversed(operation.implementations):
        try:
            function = entry.find(place)
        except Unavailable:
            continue
        errors[entry.name] = error(work.prepared(function, [x.clone().to(place.device) for x in rounded])(), exact)
        inputs = work.inputs(partial(_normal, dtype=place.dtype, device=place.device), tokens)
        cases.append(Case(entry.name, _done(work.prepared(function, inputs))))
    kind = "products" if work.flops(tokens) else "memory"
    result = alternating(*cases, repeats=repeats, synchronize=_synchronize(place.device),
                         title=f"{operation.name}: {operation.purpose}, {tokens:,} tokens in {short_name(place.dtype)}")
    return replace(result, facts={
        each.name: {"error": f"{errors[each.name]:.1e}", f"share of {kind}": f"{least / each.median_seconds:.0%}"}
        for each in result.measurements}, figures={
            "operation": operation.name, "dtype": short_name(place.dtype), "flops": work.flops(tokens),
            "reached": asdict(ceiling) | {"product": PRODUCT[place.device.type]}})


def error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """The worst tensor's norm of the difference, over the norm of what it should be."""
    return max(((mine.double().cpu() - its).norm() / its.norm()).item() for mine, its in zip(got, exact, strict=True))


def measured_ceiling(place: Place, repeats: int) -> Ceiling:
    """Copies, and products of square matrices, in the place's dtype; medians."""
    size, nbytes = PRODUCT[place.device.type], COPIED_BYTES[place.device.type]
    source = torch.ones(nbytes, dtype=torch.uint8, device=place.device)
    target = torch.empty_like(source)
    a, b = (_normal(size, size, dtype=place.dtype, device=place.device) for _ in range(2))
    out = torch.empty_like(a)
    copies, products = alternating(
        Case("copy", lambda: _nothing(target.copy_(source)), 2 * nbytes),
        Case("products", lambda: _nothing(torch.mm(a, b, out=out)), 2 * size ** 3),
        repeats=repeats, synchronize=_synchronize(place.device)).measurements
    return Ceiling(copies.rate, products.rate)


def _normal(*shape: int, dtype: torch.dtype, device: torch.device = CPU) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(device).manual_seed(sum(shape)), device=device,
                       dtype=torch.float64 if dtype == torch.float64 else torch.float32).to(dtype)


def _done(work: Callable[[], Any]) -> Callable[[], None]:
    return lambda: _nothing(work())


def _nothing(result: object) -> None:
    """A case that returned something would be taken to have measured itself."""


def _synchronize(device: torch.device) -> Callable[[], None] | None:
    return torch.cuda.synchronize if device.type == "cuda" else None


def compile_kernels(architectures: Sequence[str]) -> int:
    """Prints a line for every kernel and architecture; 1, if one does not come out as planned."""
    if unknown := [name for name in architectures if name not in CAPABILITIES]:
        raise RequestError(f"--compile {','.join(architectures)}: {unknown[0] or 'nothing'} is none of "
                           + ", ".join(CAPABILITIES))
    if find_spec("triton") is None:
        raise RequestError("--compile needs Triton: pip install triton")
    if interpreting():
        raise RequestError("TRITON_INTERPRET=1 has Triton interpret kernels instead of compiling them: unset it")
    print(f"{'kernel':<28} {'for':<18} {'':<7} registers  spills  shared bytes  16-byte loads")
    good = True
    for each in compile_all(architectures):
        remark = "" if each.as_planned else f"   not as planned: no spills, at most {each.max_registers} registers"
        print(f"{each.kernel:<28} {each.note:<18} {each.architecture:<7} {each.registers:>9} {each.spilled:>7} "
              f"{each.shared_bytes:>13} {each.wide_loads:>14}{remark}", flush=True)
        good = good and each.as_planned
    return 0 if good else 1
