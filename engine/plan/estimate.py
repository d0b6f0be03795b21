"""Sizes of a job from its configuration alone, without torch: for what is said at once, before anything is imported.

Exact is what `engine.plan.explain` reads off the objects themselves; these are means over all ranks without padding,
and of activations what no rank can do without.
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


def least_activation_bytes(config: Config) -> int:
    """What a rank of `config` (resolved) holds at once in a step beside its state: a bound from below, for training.

    At the end of one microbatch's forward pass the inputs of its layers are there, though all else be recomputed; and
    while a layer is computed, what its first feed-forward product gives.  Most kernels and schedules need far more.
    """
    parallel, model = config.parallel, config.model
    width = 4 if config.precision.compute == "fp32" else 2
    tokens = config.batch.micro * config.data.seq_len // parallel.context
    inputs = tokens * model.hidden_size * (model.num_layers // parallel.pipeline)
    if config.adapter is not None:                   # layers in front of the first that is trained need not keep theirs
        inputs = 0
    return width * (inputs // (parallel.tensor if parallel.sequence else 1)
                    + tokens * model.ffn_hidden_size // parallel.tensor)


def gib(num_bytes: float) -> str:
    """`5.1 GiB`, `310 MiB`."""
    return f"{num_bytes / 2**30:,.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:,.1f} MiB"
