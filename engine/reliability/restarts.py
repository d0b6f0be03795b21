"""Whether a job's run goes on: asked by the batch scripts (`launch/common.sh`) before an attempt and after it.

    python -m engine.reliability.restarts before WORLD_SIZE CONFIG [key=value …]
    python -m engine.reliability.restarts after STATUS SINCE CONFIG [key=value …]
    python -m engine.reliability.restarts nodes FIT PER_NODE CONFIG [key=value …]

The first prints the run's folder, then what there is to say; the last on how many nodes to train, when only so many
are fit.  The answer of the first two is the exit code: 0, start it (again); 2, the request is wrong; 3, a person asked
it to stop, by a file; 4, it gave up; 10, all steps are done; 11, it saved and stopped because of a signal.

A job that fails is started again, for months; but one that fails at the same place again and again would burn a
cluster.  So restarts are bounded *without progress*: `restarts.json` in the run's folder counts failures since the
newest checkpoint was another one.  Ends that were asked for do not count.  When there were too many, nothing starts any
more, in whatever job, until a person removes the file.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.checkpoint.folder import CHECKPOINTS, committed_steps
from engine.config import Config, load_config, resolve_layout
from engine.errors import ConfigError, OctantError
from engine.launching.local import LOST_PEER
from engine.metrics.events import append_event
from engine.reliability.wishes import DONE_FILE, STOP_FILE
from engine.writing import write_whole

GO_ON, WRONG, STOPPED, GAVE_UP, DONE, DRAINED = 0, 2, 3, 4, 10, 11
RESTARTS_FILE = "restarts.json"


def before(config: Config, world_size: int) -> tuple[int, str]:
    """Whether an attempt may begin, and what to say.

    Raises:
        ConfigError: it cannot work on so many processes.
    """
    config, run_dir = resolve_layout(config, world_size), Path(config.run.dir)
    if is_done(config):
        return DONE, f"{run_dir}: all {config.steps} steps are done"
    if (run_dir / STOP_FILE).exists():
        return STOPPED, f"{run_dir / STOP_FILE} is there, so nothing is trained: remove it to go on"
    failures, _ = _budget(run_dir)
    if failures > config.reliability.max_restarts_without_progress:
        return GAVE_UP, _gave_up(run_dir, failures)
    return GO_ON, ""


def after(config: Config, status: int, since: float) -> tuple[int, str]:
    """Whether to start again what ended with `status`, begun at the time `since`; counts a failure."""
    run_dir = Path(config.run.dir)
    if is_done(config):
        return DONE, f"{run_dir}: all {config.steps} steps are done"
    if status in (0, STOPPED):
        return STOPPED if (run_dir / STOP_FILE).exists() else DRAINED, f"{run_dir}: saved and stopped on request"
    first = first_cause(run_dir, since)
    said = f"status {status}" if first is None else f"rank {first['rank']} failed first: {first['message']}"
    if first is not None and first["exit_code"] == WRONG:
        return WRONG, said
    step = max(committed_steps(run_dir / CHECKPOINTS), default=0)
    with contextlib.suppress(OSError):
        append_event(run_dir, "failed", step, {"status": status, "what": said})
    failures, at = _budget(run_dir)
    failures = failures + 1 if step == at else 1
    with contextlib.suppress(OSError):                       # a full disk must not end it
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / RESTARTS_FILE, json.dumps({"without_progress": failures, "step": step}) + "\n")
    most = config.reliability.max_restarts_without_progress
    if failures > most:
        return GAVE_UP, f"{said}\n{_gave_up(run_dir, failures)}"
    return GO_ON, f"{said}\ngoing on from step {step} (failure {failures} of at most {most} without another checkpoint)"


def nodes_to_use(config: Config, fit: int, per_node: int) -> int:
    """How many of these nodes make a layout, which where `parallel.data` is `auto` has as many replicas as fit on them
    and the same global batch; 0, if none do.
    """
    for count in range(fit, 0, -1):
        with contextlib.suppress(ConfigError):
            resolve_layout(config, count * per_node)
            return count
    return 0


def is_done(config: Config) -> bool:
    """Whether the run's folder says so, of as many steps as are asked for now."""
    try:
        return int((Path(config.run.dir) / DONE_FILE).read_text(encoding="utf-8")) >= config.steps
    except (OSError, ValueError):
        return False


def first_cause(run_dir: Path, since: float) -> dict[str, Any] | None:
    """What the rank wrote down that failed first and for a reason of its own; None: nobody did."""
    found = []
    for path in (run_dir / "logs").glob("rank-*.error.json"):
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            entry = json.loads(path.read_text(encoding="utf-8"))
            if entry["time"] >= since:
                echo = entry["exit_code"] == 1 and LOST_PEER.search(entry["message"]) is not None
                found.append((echo, float(entry["time"]), entry | {"rank": int(path.name[5:10])}))
    return min(found, key=lambda each: each[:2])[2] if found else None


def _budget(run_dir: Path) -> tuple[int, int]:
    """Failures without progress, and the step of the newest checkpoint then."""
    try:
        entry = json.loads((run_dir / RESTARTS_FILE).read_text(encoding="utf-8"))
        return int(entry["without_progress"]), int(entry["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0, -1


def _gave_up(run_dir: Path, failures: int) -> str:
    return (f"gave up: {failures} failures without another checkpoint (reliability.max_restarts_without_progress). "
            f"Look at {run_dir}/logs and events.jsonl; remove {run_dir / RESTARTS_FILE} to try again")


def main(arguments: Sequence[str]) -> int:
    """See the top of this file."""
    when, *rest = arguments
    try:
        if when == "before":
            config = load_config(rest[1], rest[2:])
            code, text = before(config, int(rest[0]))
            text = f"{config.run.dir}\n{text}"
        elif when == "after":
            code, text = after(load_config(rest[2], rest[3:]), int(rest[0]), float(rest[1]))
        else:
            code, text = GO_ON, str(nodes_to_use(load_config(rest[2], rest[3:]), int(rest[0]), int(rest[1])))
    except OctantError as error:
        code, text = error.exit_code, f"\n{error}" if when == "before" else str(error)
    if text:
        print(text)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
