"""A bit that flips in one rank's memory: never saved, named, and recovered from without a person."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.checkpoint.folder import committed_steps
from engine.checkpoint.metadata import COMPARED
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import set_aside_uncompared
from engine.checkpoint.write import save
from engine.metrics.events import read_events
from tests.kit.kills import state_of
from tests.kit.runs import assert_equal_tensors, launch, run_config, tensors, train, trained


def test_a_flipped_bit_is_named_and_the_run_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """In step 5, on rank 2 of 3, which the save of step 6 finds; the supervisor goes on from step 4."""
    flip = {"kind": "bit_flip", "rank": 2, "step": 5, "phase": "load"}
    config, whole = (run_config(tmp_path, name, steps=8, parallel={"data": 3, "zero": 0}, eval={"every": 0},
                                batch={"global": 6}, reliability={"inject": faults})
                     for name, faults in (("run", [flip]), ("whole", None)))
    job = launch(config)
    output, _ = job.communicate(timeout=300)
    assert job.returncode == 0, output
    assert "step 6: copies that must be equal differ:\n  final_layernorm.weight: ranks [0, 1] ≠ [2]" in output
    assert "going on from step 4 (failure 1 of at most 3" in output
    train(whole)
    assert trained(config) == trained(whole)
    assert_equal_tensors(tensors(config, 8), tensors(whole, 8))
    [event] = [event for event in read_events(Path(config.run.dir)) if event.kind == "replicas"]
    assert event.step == 6 and "ranks [0, 1] ≠ [2]" in event.detail["what"]
    for path in committed_steps(Path(config.run.dir) / "checkpoints").values():
        assert CheckpointReader(path).metadata[COMPARED] is True


def test_what_another_version_saved_since_the_last_comparison_is_set_aside(tmp_path: Path) -> None:
    def saved(step: int, **about: Any) -> Path:
        return save(tmp_path, step, state_of(step, 0, 1), about, keep=None)

    saved(1), saved(2)
    assert not set_aside_uncompared(tmp_path), "none is better than the others"
    saved(3, **{COMPARED: True}), saved(4), saved(5)
    assert [path.name for path in set_aside_uncompared(tmp_path)] == ["step-00000005.corrupt", "step-00000004.corrupt"]
    assert list(committed_steps(tmp_path)) == [1, 2, 3]
