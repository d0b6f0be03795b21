"""`octant doctor`: what this machine offers, what is used of it, and why the rest is not.

The text is meant to be pasted into an issue, so it holds versions and sizes and no names of hosts, users or folders.
Packages that take seconds to import are looked up by their metadata only; the accelerators' packages are probed for
the one symbol that would be called, since a module of that name may be there without it (the PyPI package `apex` is
unrelated to NVIDIA's, the bare `transformer-engine` raises on import).
"""

from __future__ import annotations

import argparse
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.distributed as dist

from engine import __version__
from engine.distributed.environment import available_cores, launch_environment
from engine.kernels.operation import Place, Unavailable, installed, short_name
from engine.kernels.table import describe_options
from engine.metrics.peaks import peak_tflops

GIB = 1 << 30
CORE = ("torch", "numpy", "sentencepiece", "safetensors", "rich", "PyYAML", "pydantic", "jinja2")


@dataclass(frozen=True)
class Extra:
    """An optional package: the distribution, what it is used for, and how to get it."""

    distribution: str
    purpose: str
    install: str


@dataclass(frozen=True)
class Accelerator:
    """A package with GPU kernels: the symbol that tells whether it is the right one, and what is used instead."""

    name: str
    module: str
    symbol: str
    instead: str


EXTRAS = (
    Extra("transformers", "compare exported models' logits", "pip install 'octant[hf]'"),
    Extra("tokenizers", "Hugging Face tokenizers", "pip install 'octant[hf]'"),
    Extra("megatron-core", "its checkpoints", "pip install 'octant[megatron]'"),
    Extra("pyarrow", ".parquet corpora", "pip install 'octant[data]'"),
    Extra("zstandard", ".zst corpora", "pip install 'octant[data]'"),
    Extra("gigatoken", "corpora encoded faster, same ids", "pip install 'octant[fast]'"),
    Extra("rensa", "near-duplicate removal", "pip install 'octant[data]'"),
    Extra("fsspec", "corpora at an address", "pip install 'octant[data]'"),
    Extra("huggingface_hub", "models by their name on the Hub", "pip install 'octant[hf]'"),
    Extra("shtab", "octant completion", "pip install 'octant[completion]'"),
    Extra("tensorboard", "log.tensorboard", "pip install 'octant[viz]'"),
    Extra("wandb", "log.wandb", "pip install 'octant[viz]'"),
)
ACCELERATORS = (
    Accelerator("transformer-engine", "transformer_engine.pytorch", "Linear", "matrix products run in torch"),
    Accelerator("apex (NVIDIA's)", "amp_C", "multi_tensor_adam", "the optimizer runs in torch"),
    Accelerator("triton", "triton", "jit", "our fused kernels are not used"),
)


KERNELS_HELP = "kernels.OPERATION=NAME chooses another"


def run(args: argparse.Namespace) -> int:
    """Print the report."""
    print(doctor_report())
    return 0


def doctor_report(operations: bool = True) -> str:
    """The whole text, without a trailing newline.

    Args:
        operations: with what a run would compute with here; a run says itself what it does compute with.
    """
    sections = {"Environment": _environment(), "Devices": _devices(), "Core packages": _core(),
                "Optional packages": _extras(), "Accelerators": _accelerators()}
    if operations:
        sections |= {f"Operations in {short_name(dtype)} ({KERNELS_HELP})": _operations(dtype)
                     for dtype in (torch.bfloat16, torch.float32)}
    sections["What next"] = _next_steps()
    return "\n\n".join("\n".join([title, "-" * len(title), *lines]) for title, lines in sections.items())


def _row(name: str, text: str) -> str:
    return f"{name:<20} {text}"


def _environment() -> Iterator[str]:
    yield _row("octant", __version__)
    yield _row("python", f"{platform.python_version()} ({platform.python_implementation()})")
    yield _row("system", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield _row("cores", f"{available_cores()} usable of {os.cpu_count()}; torch uses {torch.get_num_threads()} threads")
    yield _row("memory", f"{memory_bytes() / GIB:.1f} GiB usable")
    launched = launch_environment()
    yield _row("launcher", "none: local processes are started as the layout needs them" if launched is None else
               f"{launched.launcher}: rank {launched.rank} of {launched.world_size}")


def _devices() -> Iterator[str]:
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}" if torch.version.hip \
        else "CPU only"
    yield _row("torch build", build)
    backends = {"gloo": dist.is_gloo_available, "nccl": dist.is_nccl_available, "mpi": dist.is_mpi_available}
    available = [name for name, probe in backends.items() if dist.is_available() and probe()]
    yield _row("process groups", ", ".join(available) or "none: this torch has no torch.distributed")
    if not torch.cuda.is_available():
        reason = "this torch is built without CUDA" if build == "CPU only" else "torch sees none (driver, permissions?)"
        yield _row("gpu", f"none: {reason}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        peak = peak_tflops(device.name)
        yield _row(f"gpu {index}", f"{device.name}, {device.total_memory / GIB:.0f} GiB, capability {device.major}."
                   f"{device.minor}, bf16 peak {f'{peak:.0f} TFLOP/s' if peak else 'not known: MFU n/a'}")


def _core() -> Iterator[str]:
    for name in CORE:
        yield _row(name, _version(name) or "MISSING: pip install octant")


def _extras() -> Iterator[str]:
    for extra in EXTRAS:
        found = _version(extra.distribution)
        state = f"{found}, used for: " if found else f"not installed ({extra.install}), needed for: "
        yield _row(extra.distribution, state + extra.purpose)


def _accelerators() -> Iterator[str]:
    for accelerator in ACCELERATORS:
        state = probe(accelerator.module, accelerator.symbol)
        yield _row(accelerator.name, f"{state}; this version does not call it: {accelerator.instead}")


def probe(module: str, symbol: str) -> str:
    """Whether `module` is there and has `symbol`, in words; never raises, whatever the package does on import."""
    try:
        installed(module, symbol)
    except Unavailable as reason:
        return str(reason)
    return "works"


def _operations(dtype: torch.dtype) -> Iterator[str]:
    """Who computes each operation in a run with this `precision.compute`, who else could, and why the rest cannot."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return describe_options(Place(device, dtype))


def memory_bytes() -> int:
    """Memory that this process may use: the machine's, or its control group's where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit_file = Path("/sys/fs/cgroup/memory.max")
    limit = limit_file.read_text().strip() if limit_file.is_file() else "max"
    return min(physical, int(limit)) if limit.isdigit() else physical


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _next_steps() -> Iterator[str]:
    if _version("transformers") is None:
        yield "pip install 'octant[hf]'     so that exported models are compared with transformers"
    if torch.cuda.is_available():
        yield "octant train llama3.2-1b     on the GPUs seen above, once its corpus is prepared"
    yield "octant demo                  the whole path on the CPU, in about two minutes"
