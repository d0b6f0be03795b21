"""How far off predictions are, from the validation runs nearest to a job (docs/planning.md).

Time: published runs on the same device, of a similar number of them.  Memory: two errors that add up.  What Octant's
layers hold is off by as much as in those of its own runs, counted by torch's allocator on a CPU, that resemble the job
most; what a device's libraries add, by as much as in those runs of others on it.  Runs resemble each other by the axes
that divide them, ZeRO, recomputation, and size; the error is the mean of the nearest three.
"""

from __future__ import annotations

from math import log2

from engine.config import Config

GIB = 2**30
# (device, devices up to, mean relative error of the published runs of that size)
NEAREST = (("a100-80g", 8, 0.055), ("a100-80g", 10_000, 0.065), ("h100-sxm", 10_000, 0.03), ("b200", 8, 0.05))
ELSEWHERE = 0.20                           # a device that no published run was compared on
LIKE = {"a100-40g": "a100-80g", "h200": "h100-sxm"}
NUM_NEAREST = 3
SIZE = 0.25                                # weight of a factor of two in size against another axis

# Runs by what divides them: t, p, c (tensor, pipeline, context), a digit for ZeRO, s or f for what is recomputed.
# Octant's own on a CPU (tests/plan/test_stages.py), and the relative error of the peak.
OWN = (("", 0.0006), ("s", 0.0110), ("f", 0.0006), ("t", 0.0187), ("p", 0.0042), ("0", 0.0004), ("1", 0.0008),
       ("2", 0.0007), ("3", 0.0005), ("c1", 0.0007), ("t1", 0.0019))
# Others' by device and GiB at the peak (benchmarks/planning.py, "memory"), the mean of each such group.
OTHERS = {
    "a100-80g": ((0.7, "t1", 0.030), (0.7, "tp1", 0.015), (0.8, "tpc", 0.005), (1.2, "pc", 0.002), (1.5, "t", 0.013),
                 (1.1, "tc", 0.002), (1.8, "tp", 0.004), (2.4, "f", 0.006), (2.5, "1", 0.002), (2.5, "p", 0.002),
                 (56.0, "p1", 0.002)),
    "h100-sxm": ((1.0, "t1", 0.019), (0.8, "tp1", 0.008), (0.9, "tpc", 0.002), (1.1, "t", 0.012), (1.1, "tc", 0.003),
                 (1.5, "tp", 0.018), (2.4, "f", 0.005), (2.5, "1", 0.003), (2.5, "p", 0.002), (56.0, "p1", 0.001)),
    "b200": ((1.0, "t1", 0.024), (0.7, "tp1", 0.008), (0.9, "tpc", 0.043), (1.4, "t", 0.015), (1.1, "tc", 0.024),
             (1.5, "tp", 0.022), (2.4, "f", 0.005), (2.6, "1", 0.003), (2.5, "p", 0.004), (28.3, "t", 0.001),
             (60.7, "t1", 0.001), (87.0, "p1", 0.003), (112.0, "tc1", 0.001), (140.0, "c1", 0.001))}


def memory_error(config: Config, device: str, num_bytes: float) -> float:
    """Of the fullest stage's `num_bytes`; on a device without runs of others, by those on all of them."""
    job = _kind(config)
    own = _mean_of_nearest([(_differ(kind, job), error) for kind, error in OWN])
    if device == "cpu":
        return own
    size = log2(max(num_bytes, 1.0) / GIB)
    rows = OTHERS.get(LIKE.get(device, device), sum(OTHERS.values(), ()))
    return own + _mean_of_nearest([(_differ(kind, job) + SIZE * abs(log2(gib) - size), error)
                                   for gib, kind, error in rows])


def relative_error(device: str, world: int) -> float:
    """Of the times of runs on this device (the A100 with 40 GB counts as the one with 80), the nearest in size."""
    name = LIKE.get(device, device)
    rows = [(most, error) for of, most, error in NEAREST if of == name]
    return next((error for most, error in rows if world <= most), ELSEWHERE)


def _kind(config: Config) -> set[str]:
    parallel = config.parallel
    axes = {axis[0] for axis in ("tensor", "pipeline", "context") if getattr(parallel, axis) > 1}
    divides = parallel.data_size * parallel.context > 1
    recomputes = {parallel.recompute[0]} - {"n"}
    return axes | recomputes | ({str(parallel.zero)} if divides else set())


def _differ(kind: str, job: set[str]) -> int:
    return len(set(kind) ^ job)


def _mean_of_nearest(rows: list[tuple[float, float]]) -> float:
    nearest = sorted(rows)[:NUM_NEAREST]
    return sum(error for _, error in nearest) / len(nearest)
