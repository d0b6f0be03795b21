"""Sizes of a job from its configuration alone, without torch: for what is said at once, before anything is imported.

Exact is what `engine.plan.explain` reads off the objects themselves; these are means over all ranks without padding.
"""

from __future__ import annotations

from engine.config import Config
from engine.model.flops import count_parameters


def mean_state_bytes(config: Config) -> float:
    """Weights, gradients, fp32 masters and moments of a rank, on average over the ranks of `config` (resolved).

    From ZeRO level 1 on a rank updates its shard only, from 2 on it keeps the gradients of that only, from 3 on the
    weights too.
    """
    parallel = config.parallel
    mine = count_parameters(config.model).total / (parallel.tensor * parallel.pipeline)
    shard = mine / (parallel.zero_shard or parallel.data_size * parallel.context)

    def held(sharded_from: int) -> float:
        return shard if parallel.zero >= sharded_from else mine

    fp32 = config.precision.compute == "fp32"
    weights = (4 if fp32 else 2) * held(3)
    gradients = 4 * held(2) + (4 * held(1) if parallel.reproducible and parallel.zero < 2 else 0)
    return weights + gradients + (0 if fp32 else 4) * held(1) + 8 * held(1)          # masters, two moments


def gib(num_bytes: float) -> str:
    """`5.1 GiB`, `310 MiB`."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
