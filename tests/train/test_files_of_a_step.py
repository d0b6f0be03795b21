"""How much of the engine one has to read to know what a training step does."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

from engine.distributed.mesh import single_mesh
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from tests.kit.runs import run_config

ROOT = Path(__file__).resolve().parents[2]

# Each file teaches one thing, so that a step crosses many: the loop and what it hears (8 files), data (2), the model
# (9), its cuts (5), kernels and how they are applied (9), pipeline and context (3), buckets and collectives (5), the
# update (3).  A new one among them is a new thing for everybody to know; a feature that is off should not be there.
MOST_FILES = 45


def test_a_step_crosses_few_files(tmp_path: Path) -> None:
    """Of a run without options, in the thread that steps."""
    config = run_config(tmp_path, "run", eval={"every": 0}, checkpoint={"every": 0})
    trainer = Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)
    crossed: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in ("engine", "kernels"):
            crossed.add(str(path.relative_to(ROOT)))

    try:
        trainer._step()
        sys.setprofile(note)
        trainer._step()
    finally:
        sys.setprofile(None)
        trainer.close()
    assert {"engine/train/loop.py", "engine/optim/adamw.py", "kernels/matmul.py"} <= crossed
    assert len(crossed) <= MOST_FILES, f"{len(crossed)} files: {sorted(crossed)}"
