"""What a node says of itself before anything is trained on it, without torch: it is asked again before every attempt.

What must be the same everywhere (GPUs, driver, libraries, code, configuration) is told as it is, or as a hash; what a
node may have more or less of (memory, speed of the disk) as a number, which is compared with the others'.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import subprocess
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from engine.config import load_config
from engine.distributed.environment import node_name
from engine.distributed.host_memory import host_memory
from engine.errors import OctantError

LIBRARIES = ("torch", "nvidia-nccl-cu12", "nvidia-nccl-cu13", "triton", "numpy")
DISK_BYTES, DISK_TRIES = 16 << 20, 3
MOST_TAKEN, RELEASE_SECONDS = 0.05, 20.0   # of a GPU's memory, by others; and how long an attempt before may hold it
# Asked one by one: nvidia-smi refuses a whole question for one field that it does not know.
GPU = ("--query-gpu=name,driver_version,clocks.max.sm,memory.total,memory.used",)
AILMENTS = {"--query-gpu=ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since the last reset",
            "--query-remapped-rows=remapped_rows.pending": "memory rows to be remapped: reset it",
            "--query-remapped-rows=remapped_rows.failure": "memory rows that could not be remapped",
            "--query-gpu=clocks_throttle_reasons.hw_slowdown": "clocks slowed down by heat or power"}
WELL = ("0", "no", "not active", "n/a", "[n/a]", "[not supported]", "")


def about_node(config: str, overrides: Sequence[str] = (), disk: bool = False) -> dict[str, Any]:
    """`node`, `time`, `gpus`, `equal`, `host_memory`, `disk_speed` (with `disk` only) and `problems`."""
    gpus, problems = _gpus()
    run_dir, config_hash = None, "none"
    try:
        loaded = load_config(config, overrides)
        run_dir = Path(loaded.run.dir)
        config_hash = _short(json.dumps(loaded.to_dict(), sort_keys=True).encode())
    except OctantError as error:
        problems.append(str(error).splitlines()[0])
    equal = {"gpu": sorted({f"{name}, {clock} MHz" for name, _, clock, *_ in gpus}),
             "driver": sorted({driver for _, driver, *_ in gpus}), "python": platform.python_version(),
             **{name: found for name in LIBRARIES if (found := _version(name))},
             "code": code_hash(Path()), "config": config_hash}
    room = host_memory()
    told: dict[str, Any] = {"node": node_name(), "time": time.time(), "gpus": len(gpus), "equal": equal,
                            "host_memory": None if room is None else room.available, "problems": problems}
    if disk and run_dir is not None:
        try:
            told["disk_speed"] = disk_speed(run_dir)
        except OSError as error:
            problems.append(f"cannot write in {run_dir}: {error}")
    return told


def code_hash(root: Path) -> str:
    """Of all code that a rank runs, as it lies in the folder that it is started in."""
    found = hashlib.sha256()
    for path in sorted(path for room in ("engine", "kernels") for path in (root / room).rglob("*.py")):
        found.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return found.hexdigest()[:12]


def disk_speed(run_dir: Path) -> float:
    """Bytes per second of a file that is written and synchronised in the run's folder, as shards of checkpoints are.

    The best of some: a disk that is shared is slow now and then, one that is broken always.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / f".preflight-{node_name()}"
    block, best = os.urandom(1 << 20), 0.0
    try:
        for _ in range(DISK_TRIES):
            began = time.perf_counter()
            with path.open("wb", buffering=0) as file:
                for _ in range(DISK_BYTES // len(block)):
                    file.write(block)
                os.fsync(file.fileno())
            best = max(best, DISK_BYTES / (time.perf_counter() - began))
        return best
    finally:
        path.unlink(missing_ok=True)


def _gpus() -> tuple[list[list[str]], list[str]]:
    """Name, driver, highest clock, memory and how much is taken of each GPU; and what ails any of them."""
    deadline = time.monotonic() + RELEASE_SECONDS
    while (found := list(_ask(*GPU))) and (taken := [row for row in found if _share_taken(row) > MOST_TAKEN]):
        if time.monotonic() > deadline:
            most = max(taken, key=_share_taken)
            return found, [f"{most[4]} of {most[3]} MiB of a GPU's memory are taken by others", *_ailments()]
        time.sleep(1)
    return found, list(_ailments() if found else ())


def _ailments() -> Iterator[str]:
    for question, what in AILMENTS.items():
        for index, row in enumerate(_ask(question)):
            if row[0].lower() not in WELL:
                yield f"GPU {index}: {what} ({row[0]})"


def _share_taken(row: Sequence[str]) -> float:
    with contextlib.suppress(ValueError, IndexError, ZeroDivisionError):
        return float(row[4]) / float(row[3])
    return 0.0


def _ask(*question: str) -> Iterator[list[str]]:
    """What nvidia-smi answers, one row per GPU; nothing where it is not there or does not know."""
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        asked = subprocess.run(["nvidia-smi", *question, "--format=csv,noheader,nounits"], capture_output=True,
                               text=True, timeout=30, check=True)
        yield from ([cell.strip() for cell in line.split(",")] for line in asked.stdout.splitlines() if line.strip())


def _version(distribution: str) -> str | None:
    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
