"""Compiling all kernels for a GPU that is not there, and reading what came out.

Triton needs no device to compile.  The cubin says how many registers a thread takes, how much memory a program shares
and how much a thread spills, which are what decides whether a memory-bound kernel runs at the memory's speed; the two
tools that read it come with Triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from engine.kernels.triton.launch import Ahead

MODULES = ("rms_norm", "rope", "swiglu", "vocabulary", "adamw")
CAPABILITIES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}       # A100, H100, B200


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on one architecture.

    Attributes:
        registers: per thread.
        spilled: instructions that put registers into memory or get them back.
        shared_bytes: per program.
        wide_loads: instructions that load 16 bytes a thread.
    """

    kernel: str
    note: str
    architecture: str
    registers: int
    spilled: int
    shared_bytes: int
    wide_loads: int
    max_registers: int

    @property
    def as_planned(self) -> bool:
        return self.spilled == 0 and self.registers <= self.max_registers


def kernels() -> Iterator[tuple[str, Ahead]]:
    """All there are, with the name of their module."""
    for module in MODULES:
        for each in import_module(f"engine.kernels.triton.{module}").ahead():
            yield module, each


def interpreting() -> bool:
    """Whether Triton has been told (TRITON_INTERPRET=1) to interpret kernels, and so compiles none."""
    import triton

    return bool(triton.knobs.runtime.interpret)


def compile_all(architectures: Sequence[str]) -> Iterator[Compiled]:
    """Every kernel for every architecture of `CAPABILITIES` that is named."""
    for module, each in kernels():
        for architecture in architectures:
            yield _compile(f"{module}.{each.kernel.__name__}", each, architecture)


def _compile(name: str, each: Ahead, architecture: str) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    arguments = [argument for argument in each.kernel.arg_names if argument not in each.constants]
    signature = dict(zip(arguments, each.types, strict=True)) | dict.fromkeys(each.constants, "constexpr")
    aligned = {(each.kernel.arg_names.index(argument),): [["tt.divisibility", 16]]
               for argument, kind in zip(arguments, each.types, strict=True)
               if kind[0] == "*" or argument in each.aligned}
    source = ASTSource(fn=each.kernel, signature=signature, constexprs=dict(each.constants), attrs=aligned)
    target = GPUTarget("cuda", CAPABILITIES[architecture], 32)
    compiled = triton.compile(source, target=target, options={"num_warps": each.num_warps})
    usage, code = _tool("cuobjdump", compiled.asm["cubin"], "--dump-resource-usage"), \
        _tool("nvdisasm", compiled.asm["cubin"], "-c")
    registers = re.search(r"REG:(\d+)", usage)
    assert registers is not None, usage
    return Compiled(name, each.note, architecture, int(registers[1]), len(re.findall(r"\b(?:LDL|STL)\b", code)),
                    compiled.metadata.shared, len(re.findall(r"\bLDG\.E\.128", code)), each.max_registers)


def _tool(name: str, cubin: bytes, option: str) -> str:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
        return subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
