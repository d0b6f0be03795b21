"""The state of a run as a value: what is saved, loaded, and enough to make the next step bit-identical.

It is a table of roles (`engine.train.role`), of which most runs have one, and a position.  Tensors are pieces of global
tensors (`engine.distributed.pieces`): fp32 masters and the optimizer's moments of every role that is trained.  The
compute weights follow from the masters, learning rate and random streams from the step, the order of data from
`consumed_samples`; so besides the tensors a run is a handful of numbers.

In a checkpoint the first role's tensors bear plain names (`model.…`, `optimizer.exp_avg.…`), so the checkpoint of any
run is one of its first role's model, to be evaluated, converted and loaded as such.  The others' begin with
`roles.NAME.`, and the number of their updates is a tensor too, because the rank that writes the metadata may hold
nothing of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from engine.checkpoint.adapted import BASE, Base
from engine.checkpoint.read import CheckpointReader
from engine.config import Config
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece
from engine.model.adapter import SCORE
from engine.optim.optimizer import Optimizer
from engine.parallel.parallelize import ParallelModel
from engine.train.role import RoleState


@dataclass
class TrainState:
    """Models, optimizers and position.

    Attributes:
        roles: the first is the run's own model.
        step: steps done.
        consumed_samples: samples they took.
        end_ids: `CheckpointReader.end_ids` of where the weights came from.
        base: the model under the first role's adapter; None: it has no adapter.
        updates: of the first role, where that may not live on this rank; None: its optimizer is here, and says it.
    """

    roles: tuple[RoleState, ...]
    step: int = 0
    consumed_samples: int = 0
    end_ids: tuple[int, ...] = ()
    base: Base | None = None
    updates: int | None = None

    @property
    def model(self) -> ParallelModel:
        """Of the first role, which lives on every rank of a run that has one."""
        model = self.roles[0].model
        assert model is not None
        return model

    @property
    def optimizer(self) -> Optimizer:
        """As `model`."""
        optimizer = self.roles[0].optimizer
        assert optimizer is not None
        return optimizer

    def model_pieces(self) -> list[Piece]:
        """This rank's part of the first role's fp32 weights; the tensors are the live ones."""
        return self.roles[0].masters()

    def pieces(self) -> list[Piece]:
        """This rank's part of everything that is a tensor; the tensors are the live ones."""
        first, *others = self.roles
        return [*first.masters(), *first.moments(),
                *(piece for state in others if state.role.trainable for piece in _pieces_of(state))]

    def metadata(self, config: Config, data_fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """What is saved beside the tensors."""
        below = {} if self.base is None else {BASE: self.base.metadata()}
        return {"config": config.to_dict(), "data": dict(data_fingerprint), "end_ids": self.end_ids,
                "state": {"step": self.step, "consumed_samples": self.consumed_samples,
                          "optimizer_step": self.num_updates}, **below}

    @property
    def num_updates(self) -> int:
        """Updates of the first role so far."""
        return self.optimizer.num_steps() if self.updates is None else self.updates

    def load(self, reader: CheckpointReader) -> None:
        """Takes over everything from a checkpoint, whatever layout wrote it."""
        reader.load_into(self.pieces())
        self.end_ids = reader.end_ids
        numbers = reader.metadata["state"]
        self.step, self.consumed_samples = numbers["step"], numbers["consumed_samples"]
        first, *others = self.roles
        if first.optimizer is not None:
            first.optimizer.set_num_steps(numbers["optimizer_step"])
        self.updates = None if self.updates is None else numbers["optimizer_step"]
        for state in others:
            if state.optimizer is not None:
                state.optimizer.set_num_steps(state.optimizer.num_steps())
        for state in self.roles:
            state.publish()

    def load_weights(self, reader: CheckpointReader) -> None:
        """Takes over the first role's weights only; they may be stored in another dtype.

        An adapter, and a score where the checkpoint has none, stay as they are: they are new.
        """
        self.load_base(reader)
        new_score = f"model.{SCORE}" not in reader
        reader.load_into([piece for piece in self.model_pieces() if piece.key not in self.model.adapter_keys
                          and not (new_score and piece.key == f"model.{SCORE}")], convert=True)
        self.end_ids = reader.end_ids
        self.roles[0].publish()

    def load_base(self, reader: CheckpointReader) -> None:
        """Takes over what lies under the first role's adapter; nothing where it has none."""
        frozen = self.model.frozen_pieces()
        reader.load_into(frozen, convert=True)
        self.base = Base.of(reader) if self.model.config.adapter is not None else None


def _pieces_of(state: RoleState) -> list[Piece]:
    """Of a role that is not the first; the count is that of its first bucket, which stands for all."""
    prefix = f"roles.{state.role.name}."
    if state.optimizer is None:
        return []
    counts: list[torch.Tensor] = state.optimizer.steps[:1]
    return [*state.masters(prefix), *state.moments(prefix),
            *(Piece(f"{prefix}optimizer.step", (), Box.whole(()), count) for count in counts)]
