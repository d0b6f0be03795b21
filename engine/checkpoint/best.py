"""The best weights so far, by the loss of held-out data: `best/` in the run's folder, apart from its checkpoints.

Fine-tuning soon learns its few conversations by heart, and the last step is seldom the best.  Whenever an evaluation is
better than all before it, the weights are saved; only the newest, which is the best, is kept.  What they are for is
`generate`, `eval`, `convert` and `checkpoint.load`; a run goes on from its own checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.folder import BEST
from engine.checkpoint.resume import find_latest
from engine.checkpoint.write import CheckpointWriter, SaveReport
from engine.config import Config
from engine.distributed.agree import Group
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError

VALID_LOSS = "valid_loss"


def keeps_best(config: Config) -> bool:
    """Whether a run does so: `checkpoint.keep_best`, or where that is null whether it fine-tunes."""
    wanted = config.checkpoint.keep_best
    return config.run.objective != "pretrain" if wanted is None else wanted


class BestWeights:
    """Every rank of `group` makes one, and offers at the same steps the same losses.

    Attributes:
        loss: the lowest so far, also of the runs that this one goes on from.
    """

    def __init__(self, run_dir: Path, group: Group) -> None:
        self._writer = CheckpointWriter(run_dir / BEST, 1, False, group)
        self.loss = _loss_of(run_dir / BEST, group)

    def offer(self, step: int, loss: float, weights: Sequence[Piece], metadata: Mapping[str, Any]) -> list[SaveReport]:
        """Saves the weights where `loss` is the lowest so far.

        Args:
            metadata: as of a checkpoint of this step.

        Returns:
            How the save went, if there was one.
        """
        if not loss < self.loss:                                  # a loss that is no number is never the best
            return []
        self.loss = loss
        about = {key: value for key, value in metadata.items() if key != "state"}
        self._writer.save(step, weights, about | {VALID_LOSS: loss})
        return self._writer.wait()


def _loss_of(directory: Path, group: Group) -> float:
    """Of the weights that are there; those that are damaged are as good as none."""
    try:
        reader, _ = find_latest(directory, group)
    except CheckpointError:
        return math.inf
    return math.inf if reader is None else float(reader.metadata.get(VALID_LOSS, math.inf))
