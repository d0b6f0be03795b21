"""A trainer whose samples are made up, for those who want to see steps and not to learn: rehearsals and benchmarks.

It is `engine.train.loop.Trainer` itself, with new weights and random tokens, on a job without what lies outside of a
step: no corpora, no checkpoints, no lines of metrics, so that in a steady step the host reads nothing back.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from engine.checkpoint.write import CheckpointWriter
from engine.config import Config
from engine.config.objectives import OBJECTIVES, PROMPTS
from engine.data.sample import Sample
from engine.data.sources import Source
from engine.data.tokenizer_identity import TokenizerInfo
from engine.data.training_data import TrainingData
from engine.distributed.mesh import Mesh
from engine.errors import RequestError
from engine.metrics.phases import Phases
from engine.model.fields import END, PTX
from engine.model.objective import Objective
from engine.optim.loss_scale import LossScale
from engine.optim.schedule import LearningRates
from engine.reliability.spikes import SpikeMonitor
from engine.reliability.wishes import Wishes
from engine.train.batches import Loader, noisy
from engine.train.corpora import Corpora
from engine.train.journal import Journal
from engine.train.loop import Trainer
from engine.train.objectives import objective_of
from engine.train.profile import StepProfiler
from engine.train.reference import passes
from engine.train.role import Role, RoleState
from engine.train.running import Tools
from engine.train.state import TrainState
from engine.train.tally import Tally

FIRST_STEP = 5                             # the first and the last are logged, these are neither


@dataclass(frozen=True)
class MadeUp(Source):
    """Random tokens, in samples of the shapes and with the fields that the objective's have."""

    config: Config
    objective: Objective

    @property
    def num_tokens(self) -> int:
        return self.num_windows * self.config.data.seq_len

    @property
    def made_by(self) -> TokenizerInfo | None:
        return None

    def window(self, window: int, number: int) -> Sample:
        """Several documents where they are kept apart; comparisons with all their answers."""
        data, rows = self.config.data, self.objective.rows_per_sample
        length, documents = data.seq_len, None
        if data.document_mask or (self.config.records is not None and rows == 1 and data.pack):
            documents = np.arange(length, dtype=np.int32) * 2 // length
        mask = None if documents is None and self.config.records is None else np.ones(length, bool)
        extra = {each: np.ones(() if each.sequence_dim is None else length, bool if each in (END, PTX) else np.float32)
                 for each in self.objective.fields}
        ids = np.random.default_rng(number).integers(self.config.model.vocab_size, size=length + 1, dtype=np.int64)
        row = Sample(ids, mask, documents, number, window, extra)
        return replace(row, rest=(row,) * (rows - 1))

    def fingerprint(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        """Nothing is open."""


def steps_only(config: Config, steps: int) -> Config:
    """The job of the resolved `config` without what lies outside of its steps, so many of which are to be taken.

    Raises:
        RequestError: it makes its own texts.
    """
    if OBJECTIVES[config.run.objective].records == PROMPTS:
        raise RequestError(f"run.objective {config.run.objective} makes its own texts, which takes more than a step: "
                           "look at the update of its model alone with run.objective=sft")
    longer = config.model_copy(update={"steps": max(config.steps, FIRST_STEP + steps + 1), "tokens": None})
    return longer.with_changes(
        batch={"ramp": []}, log={"every": 10**9}, eval={"every": 0},
        checkpoint={"every": 0, "keep_every": 0, "load": None},
        reliability={"inject": None, "max_skips": 0, "spike": None}, profile={"steps": None},
        parallel={"check_replicas_every": 0})


def made_up_trainer(config: Config, mesh: Mesh, folder: Path, *, ahead: bool = False) -> Trainer:
    """As `Trainer.start`, with made-up samples and new weights, and nobody who listens; it stands at `FIRST_STEP`.

    Args:
        config: of `steps_only`.
        folder: for what a run would write; nothing is.
        ahead: the next step's samples are made in the background.
    """
    objective = objective_of(config)
    state = TrainState((RoleState.on(mesh, Role.of(config, objective), config),))
    state.model.initialise(config.run.seed)
    source = MadeUp("made up", "", 2**31, Fraction(1), None, config=config, objective=objective)
    data = TrainingData([source], config.data.seq_len, config.run.seed, shuffle=False)
    samples = noisy(data.sample, config.run.seed) if config.adapter and config.adapter.dropout else data.sample
    loader = Loader(samples, config, mesh, objective, uses=len(state.model.chunks) * passes(state.model), ahead=ahead)
    tools = Tools(CheckpointWriter(folder, None, False, mesh.world.group), Journal(),
                  StepProfiler(config.profile, folder, mesh.device, mesh.rank, lambda line: None), Wishes(folder))
    trainer = Trainer(config=config, mesh=mesh, corpora=Corpora(data, None, None), state=state, tools=tools,
                      phases=Phases(mesh.device), loader=loader, stop_requested=lambda: False,
                      tally=Tally(len(objective.sums), mesh.device), spikes=SpikeMonitor(None, mesh.device),
                      loss_scale=LossScale.of(config, mesh.device),
                      learning_rates=LearningRates.of(config))
    trainer.state.step = FIRST_STEP
    trainer.verdict = trainer.tally.late()
    return trainer


def take_step(trainer: Trainer) -> None:
    """One step, and nothing after it."""
    with trainer.phases.step(trainer.state.step + 1):
        trainer._step()
