"""What every optimizer is: moments laid out like the buckets' shards, a count of updates, and a step.

A bucket's shard is one flat fp32 vector, and so is each of its moments; checkpoints and resharding see them as pieces
of tensors called `optimizer.NAME.…`, whichever optimizer made them.  A step reads nothing on the host: what gradients
are divided by, and whether the step is to change nothing, are scalars on the device.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name

import torch
from torch import Tensor

from engine.config import OptimConfig
from engine.config.optimizers import OPTIMIZERS
from engine.distributed.pieces import Piece
from engine.kernels.table import Operations
from engine.parallel.data.buckets import Bucket

Now = Callable[[Tensor], Tensor]


def as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class Optimizer(ABC):
    """Moments of every bucket's shard, and the update.

    Attributes:
        moments: by name, and by the number of the bucket that they are of; a bucket need not have all.
        steps: updates made, an fp32 scalar for each bucket.
    """

    moments: Mapping[str, Mapping[int, Tensor]]

    def __init__(self, buckets: Sequence[Bucket], config: OptimConfig, operations: Operations) -> None:
        self.buckets, self.config, self.operations = buckets, config, operations
        self.steps = [torch.zeros((), dtype=torch.float32, device=bucket.master.device) for bucket in buckets]

    @abstractmethod
    def step(self, lr: float, grad_divisor: Tensor, found_inf: Tensor) -> None:
        """Updates masters from the gradient shards.

        Args:
            lr: learning rate of this step.
            grad_divisor: fp32 scalar; gradients are divided by it.
            found_inf: fp32 scalar; 1 makes this step change nothing.
        """

    def pieces(self, prefix: str, now: Now = as_it_is) -> list[Piece]:
        """This rank's part of what it keeps of the weights, called `prefix.NAME.…`; the tensors are the live ones.

        Args:
            now: from a tensor of `state` to where its values are at the moment.
        """
        return [piece for name, of_bucket in self.moments.items() for i, moment in of_bucket.items()
                for piece in self.buckets[i].pieces(f"{prefix}.{name}", now(moment))]

    def state(self) -> list[Tensor]:
        """All tensors of `pieces`, padding included."""
        return [moment for of_bucket in self.moments.values() for moment in of_bucket.values()]

    def num_steps(self) -> int:
        """Updates made so far; skipped ones do not count."""
        return int(self.steps[0].item()) if self.steps else 0

    def set_num_steps(self, num_steps: int) -> None:
        """Takes over the count of a checkpoint."""
        for step in self.steps:
            step.fill_(num_steps)

    def decay_of(self, bucket: Bucket) -> float:
        """The weight decay that a bucket has."""
        return self.config.weight_decay if bucket.kind.decay else 0.0


def make_optimizer(buckets: Sequence[Bucket], config: OptimConfig, operations: Operations) -> Optimizer:
    """The one that `optim.name` names."""
    made: Optimizer = resolve_name(OPTIMIZERS[config.name].made_by)(buckets, config, operations)
    return made
