"""Where a run starts from: its own newest checkpoint, another one, only another one's weights, or nothing.

    resume: auto     the newest checkpoint of run.dir that verifies; where there is none, as `never`
    resume: never    step 0, with new weights
    resume: PATH     that checkpoint (of a run's folder: its newest, which must be whole), with everything in it
    load: PATH       where `resume` finds nothing: step 0, with the weights of that checkpoint

With an adapter, `load` is the model under it.  Checkpoints of the run do not hold that one, so it is read at every
start, and must be the same one each time.

So the same command can be given again and again: `load` is for the first time, `auto` for all others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from engine.checkpoint.adapted import Base, open_model
from engine.checkpoint.compatibility import Difference, require_compatible
from engine.checkpoint.folder import CHECKPOINTS
from engine.checkpoint.local import LocalCopies
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import find_latest, open_checkpoint
from engine.config import Config
from engine.data.skipping import require_same_past
from engine.distributed.agree import Group, rank_in
from engine.distributed.pieces import Piece
from engine.errors import CheckpointError, ConfigError
from engine.metrics.events import append_event
from engine.reading import shown
from engine.train.corpora import Corpora
from engine.train.run_folder import begin_another_line, writing
from engine.train.state import TrainState


class Kept(Protocol):
    """Something with numbers of its own that a run goes on with."""

    def state(self) -> Any:
        """What a checkpoint must hold, as JSON."""
        ...

    def restore(self, state: Any) -> None:
        """Takes over what `state` returned, or raises ValueError."""
        ...


def take_over(state: TrainState, kept: Mapping[str, Kept], config: Config, corpora: Corpora, group: Group) -> list[str]:
    """Loads what `checkpoint.resume` and `checkpoint.load` ask for, or makes new weights; every rank must call this.

    Returns:
        What a person should know of it.

    Raises:
        CheckpointError: a checkpoint was asked for, or is there, and none can be used.
        ConfigError: there is an adapter, and nothing under it.
        DataError: `data.skip` changed among the samples already consumed.
    """
    asked = config.checkpoint
    reader, notes = find_start(config, group, state.pieces())
    differing: list[Difference] = []
    if reader is not None:
        differing = _resume(state, config, corpora, reader, group)
        notes += about_resume(differing, reader, state)
        _restore(kept, reader)
    else:
        if config.adapter is not None and asked.load is None:
            raise ConfigError("an adapter is trained on top of a model: checkpoint.load says which")
        state.model.initialise(config.run.seed, frozen=False)
        if asked.load is not None:
            notes += _load_weights(state, config, corpora, open_model(Path(asked.load), group))
    notes += leave_other_line(config, state, reader, group)
    note_changes(config, state.step, differing, group)
    return notes


def copies_of(config: Config, group: Group) -> LocalCopies | None:
    """What is kept on the nodes' own disks, where that is asked for; every rank must call this."""
    folder = config.checkpoint.local
    return None if folder is None else LocalCopies(Path(folder), Path(config.run.dir), group)


def find_start(config: Config, group: Group, pieces: Sequence[Piece]) -> tuple[CheckpointReader | None, list[str]]:
    """The checkpoint that `checkpoint.resume` asks for, if there is one, and what a person should know of it.

    Args:
        pieces: what this rank is about to read of it.

    Raises:
        CheckpointError: one was asked for, or is there, and none can be used.
    """
    asked = config.checkpoint.resume
    if asked == "auto":
        copies, said = copies_of(config, group), list[str]()

        def nearer(shared: CheckpointReader) -> CheckpointReader | None:
            assert copies is not None
            found, why = copies.open(shared, pieces)
            said.extend([f"copies on the nodes are not used ({why}): reading {shared.path}"] if found is None else [])
            return found

        reader, skipped = find_latest(Path(config.run.dir) / CHECKPOINTS, group,
                                      nearer=None if copies is None else nearer)
        return reader, [*said, *(f"checkpoint of {entry}" for entry in skipped)]
    return None if asked == "never" else open_checkpoint(Path(asked), group=group), []


def leave_other_line(config: Config, state: TrainState, reader: CheckpointReader | None, group: Group) -> list[str]:
    """Puts aside what the run's folder holds of steps that this run does not go on from; what there is to say of it."""
    run_dir = Path(config.run.dir)
    if config.checkpoint.resume == "auto" or rank_in(group) != 0:
        return []
    own = reader is not None and reader.path.resolve().parent == (run_dir / CHECKPOINTS).resolve()
    earlier = begin_another_line(run_dir, state.step if own else None)
    return [] if earlier is None else [f"what {run_dir} held of an earlier run is in {earlier} now"]


def about_resume(differing: Sequence[Difference], reader: CheckpointReader, state: TrainState) -> list[str]:
    """What a person should know of a run that goes on from a checkpoint."""
    return [*(f"changed since the checkpoint: {difference}" for difference in differing),
            f"resumed from {reader.path} (step {state.step}, {state.consumed_samples} samples consumed)"]


def note_changes(config: Config, step: int, differing: Sequence[Difference], group: Group) -> None:
    """What a run does otherwise from this step on, as a line of its `events.jsonl`."""
    if differing and rank_in(group) == 0:
        with writing(Path(config.run.dir)):
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            append_event(Path(config.run.dir), "changed", step, {each.key: [each.saved, each.current]
                                                                 for each in differing})


def _resume(state: TrainState, config: Config, corpora: Corpora, reader: CheckpointReader,
            group: Group) -> list[Difference]:
    if "state" not in reader.metadata:
        raise CheckpointError(f"{reader.path} holds weights only: start a run from it with checkpoint.load")
    below = Base.saved(reader.metadata)
    if (below is None) != (config.adapter is None):
        there, here = ("a whole model", "this run trains an adapter") if below is None else \
            ("an adapter", "this run trains the whole model")
        raise CheckpointError(f"{reader.path} holds {there}, and {here}: begin another run from it with "
                              "checkpoint.load and another run.dir")
    differing = require_compatible(reader.metadata, state.metadata(config, corpora.fingerprint()), reader.path)
    require_same_windows(reader, config)
    saved_skip = reader.metadata.get("data", {}).get("skip")
    if saved_skip is not None:
        consumed = reader.metadata["state"]["consumed_samples"]
        require_same_past(saved_skip, corpora.train.skip, consumed, f"{reader.path}: ")
    if below is not None:
        state.load_base(below.open(None if config.checkpoint.load is None else Path(config.checkpoint.load), group))
    state.load(reader)
    return differing


def _restore(kept: Mapping[str, Kept], reader: CheckpointReader) -> None:
    try:
        for key in kept.keys() & reader.metadata.keys():
            kept[key].restore(reader.metadata[key])
    except ValueError as error:
        raise CheckpointError(f"{reader.path}: {error}") from None


def require_same_windows(reader: CheckpointReader, config: Config) -> None:
    """Samples are numbered in windows of `seq_len`: with another one the position in the data means something else."""
    before = reader.metadata.get("config", {}).get("data", {}).get("seq_len", config.data.seq_len)
    if before != config.data.seq_len:
        raise CheckpointError(
            f"{reader.path} was trained with data.seq_len {shown(before)}, now it is {config.data.seq_len}. Samples "
            f"are windows of that length, so the data would begin anew in another order and `tokens` would be wrong: "
            f"go on with {shown(before)}, or begin another run with these weights (checkpoint.load, another run.dir)")


def _load_weights(state: TrainState, config: Config, corpora: Corpora, reader: CheckpointReader) -> list[str]:
    current = state.metadata(config, corpora.fingerprint())
    differing = require_compatible(reader.metadata, current, reader.path, weights_only=True)
    state.load_weights(reader)
    model = [difference for difference in differing if difference.key.startswith("model.")]
    return [*(f"changed since the checkpoint: {difference}" for difference in model), f"weights from {reader.path}"]
