"""What memory is left, read from made-up kernels."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from engine.distributed.host_memory import Room, host_memory

MEMINFO = "MemTotal:       16000000 kB\nMemFree:         1000000 kB\nMemAvailable:    8000000 kB\n"
MACHINE = Room(8_000_000 * 1024, "on this machine")
GIB = 2**30


def made_up(root: Path, files: Mapping[str, str]) -> Room | None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return host_memory(root)


def group(folder: str, limit: str, used: int, idle: int, version: int = 2) -> dict[str, str]:
    names = ("memory.max", "memory.current", "inactive_file") if version == 2 else \
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    return {f"{folder}/{names[0]}": limit + "\n", f"{folder}/{names[1]}": f"{used}\n",
            f"{folder}/memory.stat": f"anon 7\n{names[2]} {idle}\nslab 3\n"}


@pytest.mark.parametrize(("files", "want"), [
    ({}, None),
    ({"proc/meminfo": MEMINFO}, MACHINE),
    ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/\n", **group("sys/fs/cgroup", "max", 5, 0)}, MACHINE),
    ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "0::/job/step\n",
      **group("sys/fs/cgroup/job", str(4 * GIB), 3 * GIB, GIB // 2), **group("sys/fs/cgroup/job/step", "max", 5, 0)},
     Room(GIB * 3 // 2, "within the limit of 4.0 GiB that this job runs under")),
    ({"proc/meminfo": MEMINFO, "proc/self/cgroup": "4:cpu:/x\\n3:memory:/docker/1\n2:memory:/docker/1\n",
      **group("sys/fs/cgroup/memory/docker/1", str(2 * GIB), GIB, 0, 1),
      **group("sys/fs/cgroup/memory", str(2**63 - 4096), 9 * GIB, 0, 1)},
     Room(GIB, "within the limit of 2.0 GiB that this job runs under")),
    ({"proc/self/cgroup": "0::/a\n", **group("sys/fs/cgroup/a", str(GIB), 2 * GIB, 0)},
     Room(0, "within the limit of 1.0 GiB that this job runs under")),
], ids=["nothing", "machine", "no limit", "version 2, above", "version 1", "used up"])
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], want: Room | None) -> None:
    assert made_up(tmp_path, files) == want


def test_this_machine_tells() -> None:
    room = host_memory()
    assert room is not None and room.available > 2**20
