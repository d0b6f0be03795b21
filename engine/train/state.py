"""The state of a run as a value: what is saved, loaded, and enough to make the next step bit-identical.

Tensors are pieces of global tensors (`engine.checkpoint.pieces`): fp32 masters and AdamW's two moments.  The compute
weights follow from the masters, learning rate and random streams from the step, the order of data from
`consumed_samples`; so besides the tensors a run is a handful of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engine.checkpoint.pieces import Piece
from engine.checkpoint.read import CheckpointReader
from engine.config import Config
from engine.optim.adamw import AdamW
from engine.parallel.parallelize import ParallelModel


@dataclass
class TrainState:
    """Model, optimizer and position.

    Attributes:
        step: steps done.
        consumed_samples: samples they took.
    """

    model: ParallelModel
    optimizer: AdamW
    step: int = 0
    consumed_samples: int = 0

    def model_pieces(self) -> list[Piece]:
        """This rank's part of the fp32 weights; the tensors are the live ones."""
        return self._pieces("model", [bucket.master for bucket in self.model.buckets])

    def pieces(self) -> list[Piece]:
        """This rank's part of everything that is a tensor; the tensors are the live ones."""
        return [*self.model_pieces(), *self._pieces("optimizer.exp_avg", self.optimizer.exp_avg),
                *self._pieces("optimizer.exp_avg_sq", self.optimizer.exp_avg_sq)]

    def _pieces(self, prefix: str, vectors: Sequence[Tensor]) -> list[Piece]:
        return [Piece(f"{prefix}.{spec.name}", spec.shape, box, view)
                for bucket, vector in zip(self.model.buckets, vectors, strict=True)
                for spec, box, view in bucket.boxes(vector) if box.num_elements]

    def metadata(self, config: Config, data_fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved beside the tensors."""
        return {"config": config.to_dict(), "data": dict(data_fingerprint),
                "state": {"step": self.step, "consumed_samples": self.consumed_samples,
                          "optimizer_step": self.optimizer.num_steps()}}

    def load(self, reader: CheckpointReader) -> None:
        """Takes over everything from a checkpoint, whatever layout wrote it."""
        reader.load_into(self.pieces())
        numbers = reader.metadata["state"]
        self.step, self.consumed_samples = numbers["step"], numbers["consumed_samples"]
        self.optimizer.set_num_steps(numbers["optimizer_step"])
        self.model.publish()

    def load_weights(self, reader: CheckpointReader) -> None:
        """Takes over the weights only; they may be stored in another dtype."""
        reader.load_into(self.model_pieces(), convert=True)
        self.model.publish()
