"""What DPO's reference says of every answer: log-probabilities, computed once before training or in every step.

The reference is the model that a run begins with (`checkpoint.load`), and it never changes; so what it says is a
constant of the data.  *Cached*, it is computed by the run's own layout and kernels before the first step, a number per
answer, and kept in `reference` of the run's folder.  A file begins with a line of JSON that says which model, which
texts and which hash of the numbers; what does not fit is made anew, and nothing is there before it is whole.

*Live*, an adapter is switched off for a forward pass more in every step: nothing to wait for at the start, a third more
work in each step, and no second model in memory either way.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from engine.align.preference import log_probabilities
from engine.checkpoint.adapted import open_model
from engine.config import Config
from engine.data.chat.comparisons import ComparisonSource
from engine.data.training_data import TrainingData
from engine.distributed.agree import Group, rank_in, share_bytes
from engine.errors import ConfigError
from engine.model.adapter import Adapter
from engine.model.context import Batch, Batches
from engine.model.fields import REFERENCE
from engine.parallel.parallelize import ParallelModel
from engine.train.corpora import Corpora
from engine.train.each_sample import each_sample
from engine.train.state import TrainState
from engine.writing import write_whole

FOLDER, VERSION = "reference", 1                     # the version is raised when the same texts give other numbers
Numbers = npt.NDArray[np.float32]


def with_reference(state: TrainState, config: Config, corpora: Corpora, group: Group,
                   say: Callable[[str], None]) -> Corpora:
    """The corpora, with what the reference says of each answer; every rank must call this, before weights are loaded.

    Where it has to be computed, the run's model is the reference afterwards.

    Raises:
        ConfigError: nothing says which model is the reference.
        CheckpointError: it is not there, or cannot be used.
    """
    if config.run.objective != "dpo" or config.dpo.reference == "live":
        return corpora
    if config.checkpoint.load is None:
        raise ConfigError("dpo compares with the model that the run begins with: checkpoint.load says which")
    reader = open_model(Path(config.checkpoint.load), group)
    loaded = False
    known: dict[str, Numbers] = {}
    for source in corpora.comparisons:
        about = {"version": VERSION, "model": reader.content, "texts": source.content(), "seq_len": source.fit.seq_len,
                 "shape": [source.num_windows, source.answers], "compute": config.precision.compute}
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        path = Path(config.run.dir) / FOLDER / f"{source.name}-{key[:16]}.bin"
        numbers = _kept(path, about, group)
        if numbers is None:
            if not loaded:
                state.model.initialise(config.run.seed, frozen=False)
                state.load_weights(reader)
                loaded = True
            say(f"{source.name}: what the reference says of {source.num_windows:,} pairs is computed once")
            numbers = _compute(state.model, source)
            if rank_in(group) == 0:
                _keep(path, about, numbers)
        known[source.path] = numbers
    return replace(corpora, train=_informed(corpora.train, known),
                   valid=None if corpora.valid is None else _informed(corpora.valid, known))


def _informed(data: TrainingData, known: dict[str, Numbers]) -> TrainingData:
    return data.with_sources([replace(source, reference=known[source.path])
                              if isinstance(source, ComparisonSource) else source for source in data.sources])


def _kept(path: Path, about: dict[str, Any], group: Group) -> Numbers | None:
    """The numbers in a file, on every rank; None where it is not there or is not what was written."""
    data = path.read_bytes() if rank_in(group) == 0 and path.is_file() else b""
    head, _, body = share_bytes(data, group).partition(b"\n")
    try:
        found = json.loads(head)
    except ValueError:
        return None
    rows, answers = about["shape"]
    if found != about | {"sha256": hashlib.sha256(body).hexdigest()} or len(body) != rows * answers * 4:
        return None
    return np.frombuffer(body, np.float32).reshape(rows, answers)


def _keep(path: Path, about: dict[str, Any], numbers: Numbers) -> None:
    body = numbers.tobytes()
    head = json.dumps(about | {"sha256": hashlib.sha256(body).hexdigest()}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, head + b"\n" + body)


def _compute(model: ParallelModel, source: ComparisonSource) -> Numbers:
    """log π of every answer, on every rank."""
    return each_sample(model, lambda index: source.window(index, 0), source.num_windows, log_probabilities,
                       model.objective, source.answers)


@contextmanager
def without_adapter(model: ParallelModel) -> Iterator[None]:
    """The model as it lies under its adapter."""
    adapters = [module for chunk in model.chunks.values() for module in chunk.modules() if isinstance(module, Adapter)]
    try:
        for adapter in adapters:
            adapter.active = False
        yield
    finally:
        for adapter in adapters:
            adapter.active = True


class WithReference(Batches):
    """Microbatches with what the reference says of them, where this rank has heard it."""

    def __init__(self, batches: Batches, numbers: Tensor | None) -> None:
        super().__init__(batches)
        self._of, self._numbers = batches, numbers

    def __getitem__(self, index: int) -> Batch:                # type: ignore[override]     # no slices
        batch = super().__getitem__(index)
        if self._numbers is None:
            return batch
        return replace(batch, extra={**batch.extra, REFERENCE: self._numbers[index, 0]})

    def shape(self, index: int) -> tuple[int, int]:
        return self._of.shape(index)


def passes(model: ParallelModel) -> int:
    """How often a step goes through its microbatches."""
    return 2 if _is_live(model) else 1


def informed(model: ParallelModel, batches: Batches) -> Batches:
    """The microbatches of a step or an evaluation, with what the reference says where that is computed live."""
    if not _is_live(model):
        return batches
    with without_adapter(model):
        return WithReference(batches, model.evaluate(batches, log_probabilities))


def _is_live(model: ParallelModel) -> bool:
    return model.config.run.objective == "dpo" and model.config.dpo.reference == "live"
