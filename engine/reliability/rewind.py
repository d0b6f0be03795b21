"""Going back: to an earlier checkpoint, leaving out the data in which things went wrong (PaLM, section 5.1).

PaLM's loss spiked some twenty times.  Each time the run was started again from a checkpoint about 100 steps before the
spike, and 200 to 500 batches were left out, those before and during it among them; the spike did not come again.

    checkpoint c        the newest at least `rewind.steps` before the anomaly, or the oldest there is
    left out            `rewind.skip_batches` global batches, from where c has got to in the data, or, if c is older,
                        from `rewind.steps` before the anomaly; at least up to the anomaly

What has been left out is remembered in the run's folder (`rewinds.json`), as ranges of the stream that are added to
`data.skip` at every start from then on.  So the command that starts the run stays the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from engine.config import Config, RewindConfig
from engine.data.skipping import Ranges, merge_ranges, stream_index
from engine.errors import RequestError
from engine.writing import write_whole

REWINDS_FILE = "rewinds.json"


@dataclass(frozen=True)
class Rewind:
    """One going back.

    Attributes:
        from_step: where the run was.
        to_step: the checkpoint it goes on from; 0: the beginning.
        skip: range of the stream of samples that is left out from now on.
        why: for people.
        time: ISO 8601.
    """

    from_step: int
    to_step: int
    skip: tuple[int, int]
    why: str
    time: str


def remembered(run_dir: Path) -> list[Rewind]:
    """The rewinds of a run, oldest first.

    Raises:
        RequestError: the file that holds them cannot be read.
    """
    path = run_dir / REWINDS_FILE
    try:
        return [_parsed(entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise RequestError(f"{path}, which says what data the run leaves out, cannot be read ({error}): put it back "
                           "from a copy, or remove it and set data.skip as the newest checkpoint's configuration has "
                           "it") from None


def remember(run_dir: Path, rewind: Rewind) -> None:
    """Adds one.

    Raises:
        OSError: it cannot be written.
    """
    entries = [asdict(each) for each in (*remembered(run_dir), rewind)]
    write_whole(run_dir / REWINDS_FILE, json.dumps(entries, indent=1) + "\n")


def with_rewinds(config: Config) -> Config:
    """The configuration with what its run's folder remembers, unless it begins another line of training.

    Raises:
        RequestError: see `remembered`.
    """
    run_dir, resume = Path(config.run.dir), config.checkpoint.resume
    own = resume == "auto" or run_dir.resolve() in Path(resume).resolve().parents
    ranges = [rewind.skip for rewind in remembered(run_dir)] if own else []
    if not ranges:
        return config
    return config.with_changes(data={"skip": merge_ranges([*config.data.skip, *ranges])})


def choose(anomaly: int, at: int, saved: Sequence[int], config: RewindConfig,
           before: Sequence[Rewind]) -> tuple[int, int, int] | None:
    """Where to go back to, and the first and last step (counted in batches from 0) of the data to leave out.

    Args:
        anomaly: the first bad step.
        at: the step the run is at.
        saved: the steps of its checkpoints.
        before: earlier rewinds; those that went back as far or less count as tries from the same place.

    Returns:
        None where there have been too many tries, or there is no checkpoint to go back to that far.
    """
    target = max(0, anomaly - 1 - config.steps)
    good = [step for step in sorted(saved) if step < anomaly]
    to_step = max((step for step in good if step <= target), default=good[0] if good else 0)
    if saved and not good:
        return None
    if sum(rewind.to_step >= to_step for rewind in before) >= config.tries:
        return None
    first = max(to_step, target)
    return to_step, first, max(first + config.skip_batches, at)


def stream_range(skip: Ranges, first: int, stop: int) -> tuple[int, int]:
    """Where the samples [first, stop) of a run lie in the stream, as one range."""
    return stream_index(skip, first), stream_index(skip, stop - 1) + 1


def make(config: Config, from_step: int, to_step: int, batches: tuple[int, int], why: str) -> Rewind:
    """The rewind that leaves out the global batches [a, b); `config` is complete (`with_rewinds`)."""
    first, stop = map(config.ramp.samples, batches)
    skip = stream_range(merge_ranges(config.data.skip), first, stop)
    return Rewind(from_step, to_step, skip, why, datetime.now().astimezone().isoformat(timespec="seconds"))


def _parsed(entry: Mapping[str, Any]) -> Rewind:
    first, stop = entry["skip"]
    rewind = Rewind(int(entry["from_step"]), int(entry["to_step"]), (int(first), int(stop)), str(entry["why"]),
                    str(entry["time"]))
    if not 0 <= rewind.skip[0] < rewind.skip[1]:
        raise ValueError(f"{list(rewind.skip)} is no range of samples")
    return rewind
