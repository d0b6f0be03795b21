"""How far off predictions are, from the published runs nearest to a job (docs/planning.md)."""

from __future__ import annotations

# (device, devices up to, mean relative error of the published runs of that size)
NEAREST = (("a100-80g", 8, 0.10), ("a100-80g", 10_000, 0.06), ("h100-sxm", 10_000, 0.03), ("b200", 8, 0.05))
ELSEWHERE = 0.20                           # a device that no published run was compared on
LIKE = {"a100-40g": "a100-80g", "h200": "h100-sxm"}
MEMORY = {"a100-80g": 0.035, "h100-sxm": 0.035, "b200": 0.037}
COUNTED = 0.01                             # of this engine's own runs on a CPU, by an allocator's count


def memory_error(device: str) -> float:
    """Of the memory of runs on this device, which others made with another engine; elsewhere of our own."""
    return MEMORY.get(LIKE.get(device, device), COUNTED)


def relative_error(device: str, world: int) -> float:
    """Of the times of runs on this device (the A100 with 40 GB counts as the one with 80), the nearest in size."""
    name = LIKE.get(device, device)
    rows = [(most, error) for of, most, error in NEAREST if of == name]
    return next((error for most, error in rows if world <= most), ELSEWHERE)
