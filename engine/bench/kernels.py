"""`octant bench kernels --compile sm_90`: our Triton kernels compiled without a GPU, and what each needs of one.

A kernel that only moves memory runs at the memory's speed if enough of its programs fit on a multiprocessor and none
keeps its numbers in memory for want of registers.  Both can be read from the compiled code.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec

from engine.errors import RequestError
from engine.kernels.triton.ahead import CAPABILITIES, compile_all, interpreting


def run(arguments: Sequence[str]) -> int:
    """Parse the benchmark's own arguments and compile."""
    parser = argparse.ArgumentParser(prog="octant bench kernels", description="Our kernels, compiled without a GPU.")
    parser.add_argument("--compile", required=True, metavar="ARCH,…", help="of " + ", ".join(CAPABILITIES))
    args = parser.parse_args(arguments)
    architectures = args.compile.split(",")
    if unknown := [name for name in architectures if name not in CAPABILITIES]:
        raise RequestError(f"--compile {args.compile}: {unknown[0] or 'nothing'} is none of {', '.join(CAPABILITIES)}")
    return compile_kernels(architectures)


def compile_kernels(architectures: Sequence[str]) -> int:
    """Prints a line for every kernel and architecture; 1, if one does not come out as planned."""
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
