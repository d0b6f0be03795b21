"""`octant bench NAME [options]`: a table of benchmarks, each with options of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType

from engine.bench import kernels, matmul, step
from engine.errors import RequestError

BENCHMARKS: Mapping[str, Callable[[Sequence[str]], int]] = MappingProxyType({
    "matmul": matmul.run,
    "kernels": kernels.run,
    "step": step.run,
})
# Those that take a job's processes.
DISTRIBUTED: Mapping[str, str] = MappingProxyType({"mfu": "_bench_mfu", "network": "_bench_network"})


def run(args: argparse.Namespace) -> int:
    """Hand the remaining arguments to the benchmark that was named."""
    if args.action in DISTRIBUTED:
        return int(import_module(f"engine.commands.{DISTRIBUTED[args.action]}").run(args))
    if args.action not in BENCHMARKS:
        raise RequestError(f"there is no benchmark {args.action!r}; there are: {', '.join(BENCHMARKS)}")
    return BENCHMARKS[args.action](args.rest)
