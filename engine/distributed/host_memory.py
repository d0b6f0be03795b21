"""How much memory this process may still take, as the kernel tells: the machine's, and that of its control group.

A container or a batch system gives a job less than the machine has, by a limit on a control group or on one of those
above it; who takes more is killed without a word.  What a group has left is its limit less what it uses, where pages of
files that were not used for a while do not count: the kernel gives them up before it kills.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

KILO = 1024
UNLIMITED = 2**60                          # version 1 writes a huge number where there is no limit


@dataclass(frozen=True)
class Room:
    """Memory that may still be taken.

    Attributes:
        available: bytes.
        where: whose memory it is, for people.
    """

    available: int
    where: str


def host_memory(root: Path = Path("/")) -> Room | None:
    """What the tightest limit leaves; None where the system does not tell (`root`: for tests)."""
    rooms = [*_machine(root), *_groups(root)]
    return min(rooms, key=lambda room: room.available, default=None)


def _machine(root: Path) -> Iterator[Room]:
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield Room(int(line.split()[1]) * KILO, "on this machine")


def _groups(root: Path) -> Iterator[Room]:
    """Every group that this process is in and that has a limit: its own and those above it."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        own = base / path.strip("/")
        for folder in (own, *own.parents):
            if folder == base or base in folder.parents:
                yield from _group(folder, *names)


def _group(folder: Path, limit_name: str, used_name: str, idle_name: str) -> Iterator[Room]:
    limit, used = _number(folder / limit_name), _number(folder / used_name)
    if limit is None or used is None or limit >= UNLIMITED:
        return
    stat = dict(line.split(" ", 1) for line in _lines(folder / "memory.stat") if " " in line)
    idle = int(stat.get(idle_name, 0))
    yield Room(max(0, limit - used + idle), f"within the limit of {limit / 2**30:.1f} GiB that this job runs under")


def _number(path: Path) -> int | None:
    """None where there is no such file, or no limit (`max`)."""
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        return []
