"""Peak resident memory and time of `octant convert`, on models with random weights.

    python benchmarks/conversion.py [--presets qwen2.5-0.5b tinyllama-1.1b] [--directory D] [--output F.md]

Every conversion is a process of its own, and its peak is what the kernel counted for it (`ru_maxrss`).  A process that
only refuses a wrong request shows what Python and torch take by themselves; what is above that is the conversion's.
Files go through the page cache, which is not the process's memory.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import yaml

from checkpoints_tools.names import PREFIX, parameter_shapes
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import spread, write_checkpoint
from engine.config import Config, load_config
from engine.distributed.boxes import Box

NUM_FILES = 4
COLUMNS = ("model", "fp32", "largest parameter", "convert", "checked by", "peak", "above the imports",
           "÷ largest parameter", "time")


@dataclass(frozen=True)
class Measured:
    """One process: peak bytes, seconds, exit code, and what it says it compared."""

    peak_bytes: int
    seconds: float
    code: int
    check: str


def write_model(folder: Path, config: Config) -> None:
    """A checkpoint with random fp32 weights, one block at a time."""
    entries = [Entry(PREFIX + name, shape, Box.whole(shape), torch.float32)
               for name, shape in parameter_shapes(config.model).items()]
    generator = torch.Generator().manual_seed(0)
    write_checkpoint(folder, 1, {"config": {"model": config.model.model_dump(mode="json")}}, spread(entries, NUM_FILES),
                     lambda entry: torch.empty(entry.box.size).normal_(0.0, 0.02, generator=generator))


def measure(*arguments: str) -> Measured:
    """Runs `octant convert` with these arguments."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "engine", "convert", *arguments], stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode not in (0, 2):
        raise SystemExit(f"octant convert {' '.join(arguments)}: exit code {process.returncode}\n{output}")
    check = "none" if "not checked" in output else "logits" if "checked: logits" in output else "every tensor"
    return Measured(usage.ru_maxrss * 1024, time.monotonic() - start, process.returncode, check)


def rows(preset: str, folder: Path, empty_bytes: int) -> list[str]:
    """The table's rows for one model."""
    settings = folder / f"{preset}.yaml"
    settings.write_text(yaml.safe_dump({"model": {"preset": preset}, "steps": 1}))
    config = load_config(settings)
    sizes = [4 * prod(shape) for shape in parameter_shapes(config.model).values()]
    ours, hf, theirs = (str(folder / f"{preset}-{kind}") for kind in ("ours", "hf", "megatron"))
    write_model(Path(ours), config)
    actions = (
        ("to-hf", ours, hf, "--skip-check"),
        ("to-hf", ours, hf + "-bf16", "--dtype", "bf16", "--skip-check"),
        ("from-hf", hf, ours + "-2", "--skip-check"),
        ("to-megatron", ours, theirs),
        ("from-megatron", theirs, ours + "-3", "--config", str(settings)),
        ("to-hf", ours, hf + "-checked"))
    lines = []
    for action, *arguments in actions:
        measured = measure(action, *arguments)
        if measured.code:
            raise SystemExit(f"octant convert {action} {' '.join(arguments)} was refused")
        above = measured.peak_bytes - empty_bytes
        name = action + (" --dtype bf16" if "bf16" in arguments else "")
        cells = (preset, f"{sum(sizes) / 1e9:.2f} GB", f"{max(sizes) / 1e9:.2f} GB", name, measured.check,
                 f"{measured.peak_bytes / 1e9:.2f} GB", f"{above / 1e9:.2f} GB", f"{above / max(sizes):.1f}",
                 f"{measured.seconds:.0f} s")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["qwen2.5-0.5b", "tinyllama-1.1b"])
    parser.add_argument("--directory", help="for the files, about ten times the fp32 model (default: a temporary one)")
    parser.add_argument("--output", help="also write the table here")
    args = parser.parse_args()
    empty = measure("from-hf", "/nonexistent", "/nonexistent-out")
    lines = [f"`python benchmarks/conversion.py --presets {' '.join(args.presets)}`, {os.cpu_count()} cores, "
             f"Python {platform.python_version()}, torch {torch.__version__}; imports alone: "
             f"{empty.peak_bytes / 1e9:.2f} GB.", "",
             f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        for preset in args.presets:
            lines += rows(preset, Path(folder), empty.peak_bytes)
    print("\n".join(lines))
    if args.output:
        Path(args.output).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
