"""Steps that cannot be taken: skipped by all ranks alike, counted, and the end of a run when there are too many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine.config import Config
from engine.data.indexed import IndexedWriter
from engine.distributed.mesh import single_mesh
from engine.distributed.topology import Topology
from engine.errors import DataError, WorkerError
from engine.optim.gradients import StepSums
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from engine.train.tally import Tally
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import Shards
from tests.kit.runs import metrics, run_config, saved_steps, state_shards, train

NAN = float("nan")


def gives_up(max_skips: int) -> dict[str, Any]:
    """After so many skips in a row, without going back first."""
    return {"max_skips": max_skips, "rewind": None}


def poison(trainer: Trainer, steps: range, rank: int = 0) -> None:
    """One rank's gradients are not a number in these steps."""
    model = trainer.state.model
    accumulate = model.accumulate

    def poisoned(*arguments: Any) -> torch.Tensor | None:
        sums = accumulate(*arguments)
        if trainer.mesh.rank == rank and trainer.state.step + 1 in steps:
            model.finish_reduction()
            for bucket in model.buckets:
                for _, _, view in bucket.boxes(bucket.grad_shard):
                    view.fill_(NAN)
        return sums

    model.accumulate = poisoned                                                        # type: ignore[method-assign]


def run_poisoned(config: Config, steps: range) -> tuple[str, Shards, int]:
    """What the run ended with, what this rank holds then, and the step it is at."""
    mesh = mesh_for(Topology.of(config)) if config.parallel.world_size > 1 else single_mesh()
    trainer = Trainer.start(config, mesh, Corpora.open(config), lambda: False)
    poison(trainer, steps, rank=mesh.world.size - 1)
    try:
        trainer.run()
        ended = ""
    except WorkerError as error:
        ended = str(error)
    finally:
        trainer.close()
    return ended, state_shards(trainer.state), trainer.state.step


def same(a: Shards, b: Shards) -> bool:
    return all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_run_gives_up_after_so_many_skips_in_a_row(tmp_path: Path, log_every: int) -> None:
    """Heard at once where the step is logged, one step later elsewhere; nothing but the samples has been used up."""
    config = run_config(tmp_path, "run", steps=30, reliability=gives_up(3), log={"every": log_every},
                        checkpoint={"every": 2}, eval={"every": 0})
    ended, state, step = run_poisoned(config, range(3, 30))
    assert step == (5 if log_every == 1 else 6)
    assert ended.startswith(f"gave up after step {step}: 3 steps in a row had a gradient that is not finite")
    assert "max_skips: 3" in ended and "lower optim.lr" in ended
    assert same(state, run_poisoned(run_config(tmp_path, "two", steps=2, eval={"every": 0}), range(0))[1])
    assert saved_steps(config) == [2, 4]
    if log_every == 1:
        assert [row["skipped"] for row in metrics(config)] == [0, 0, 1, 2, 3]


def test_fewer_in_a_row_do_not_matter(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=9, reliability=gives_up(3), eval={"every": 0})
    trainer = Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)
    for steps in (range(2, 4), range(5, 7), range(8, 9)):
        poison(trainer, steps)
    assert trainer.run()
    trainer.close()
    assert [row["skipped"] for row in metrics(config)] == [0, 1, 2, 2, 3, 4, 4, 5, 5]


def test_all_ranks_decide_alike(tmp_path: Path) -> None:
    """Gradients go bad on the last rank only: both skip, both give up after the same step, and nobody waits."""
    config = run_config(tmp_path, "run", steps=30, parallel={"data": 2}, reliability=gives_up(2),
                        log={"every": 100}, checkpoint={"every": 0}, eval={"every": 0})
    results = run_distributed(run_poisoned, 2, config, range(4, 30))
    assert [(ended[:20], step) for ended, _, step in results] == [("gave up after step 6", 6)] * 2
    assert saved_steps(config) == []


def test_a_restart_does_not_begin_to_count_anew(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=4, reliability=gives_up(4), eval={"every": 0})
    run_poisoned(config, range(2, 30))
    assert saved_steps(config) == [2, 4]
    longer = Config.model_validate(config.to_dict() | {"steps": 30})
    assert run_poisoned(longer, range(2, 30))[2] == 5


def test_zero_never_gives_up_but_a_run_without_any_update_is_no_success(tmp_path: Path) -> None:
    """However short it is."""
    config = run_config(tmp_path, "run", steps=4, reliability=gives_up(0), eval={"every": 0},
                        checkpoint={"every": 0})
    ended, _, step = run_poisoned(config, range(1, 30))
    assert step == 4 and ended.startswith("gave up after step 4: 4 steps in a row had a gradient")
    assert "no update was ever made" in ended and saved_steps(config) == []
    assert run_poisoned(run_config(tmp_path, "other", steps=4, reliability=gives_up(0)), range(2, 30))[0] == ""


def test_a_request_to_stop_is_heard_among_skipped_steps(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=30, checkpoint={"every": 0}, eval={"every": 0})
    trainer = Trainer.start(config, single_mesh(), Corpora.open(config), lambda: trainer.state.step >= 2)
    poison(trainer, range(1, 30))
    assert not trainer.run()
    trainer.close()
    assert saved_steps(config) == [3]


def write_documents(prefix: Path, lengths: list[int]) -> str:
    with IndexedWriter(prefix, np.uint16) as writer:
        for length in lengths:
            writer.add_document(np.arange(length) % 90)
    return str(prefix)


def documents(folder: Path, name: str, lengths: list[int], **sections: Any) -> Config:
    path = write_documents(folder / f"{name}-corpus", lengths)
    return run_config(folder, name, data={"document_mask": True, "train": [{"path": path}], "valid": []}, **sections)


def one_label_less_step(folder: Path, name: str, **sections: Any) -> Config:
    """Steps of 4 sequences of 16 tokens; of 8 windows 4 hold nothing but documents of one token."""
    return documents(folder, name, [1] * 65 + [64], steps=6, eval={"every": 0}, **sections)


@pytest.mark.parametrize("parallel", [{}, {"data": 2}, {"tensor": 2}, {"pipeline": 2}], ids=str)
def test_a_step_without_a_label_is_skipped(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """No loss, no update, no weight decay; in every layout, even where only some ranks would notice."""
    config = one_label_less_step(tmp_path, "run", parallel=parallel, batch={"micro": 1, "global": 4})
    data = Corpora.open(config).train

    def counts(step: int) -> bool:
        return any(mask is not None and mask.any() for mask in
                   (data.sample(i).loss_mask for i in range(4 * step - 4, 4 * step)))

    train(config)
    rows = metrics(config)
    skipped = [not counts(step) for step in range(1, 7)]
    assert [row["loss"] is None for row in rows] == skipped
    assert [row["skipped"] for row in rows] == np.cumsum(skipped).tolist()


def test_a_corpus_without_a_label_is_refused(tmp_path: Path) -> None:
    for name, limit, expected in (("short", 10, 5), ("long", 3, 3)):
        config = documents(tmp_path, name, [1] * 400, eval={"every": 0}, reliability=gives_up(limit))
        trainer = Trainer.start(config, single_mesh(), Corpora.open(config), lambda: False)
        with pytest.raises(DataError, match=f"gave up after step {expected}: {expected} steps in a row had not one "
                                            "label that counts"):
            trainer.run()
        trainer.close()
        assert all(row["loss"] is None for row in metrics(config))


def sums(loss: float, grad_norm: float = 1.0, flag: float = 0.0) -> StepSums:
    return StepSums(torch.tensor([loss]), torch.tensor(grad_norm), torch.tensor(flag))


def test_a_line_is_the_mean_of_the_steps_whose_loss_is_finite() -> None:
    tally, zero, one = Tally(1, torch.device("cpu")), torch.zeros(()), torch.ones(())
    for loss, divisor, skipped in ((6.0, 2, zero), (NAN, 5, one), (9.0, torch.tensor(4.0), zero)):
        tally.add(sums(loss), divisor, skipped, zero, zero, zero)
    line, verdict = tally.read()
    assert (line.totals, line.divisor) == ([15.0], 6.0)
    assert (verdict.skips_in_a_row, verdict.counts, verdict.stop) == (0, True, False)
    tally.add(sums(NAN, NAN), 5, one, zero, zero, zero)
    line, verdict = tally.read()
    assert line.divisor == 0 and verdict.skips_in_a_row == 1


@pytest.mark.parametrize("read", [lambda tally: tally.late(), lambda tally: tally.read()[1]], ids=["late", "at once"])
def test_a_verdict_is_late_or_at_once(read: Callable[[Tally], Any]) -> None:
    tally, seen = Tally(1, torch.device("cpu")), []
    for flag in (0.0, 1.0, 0.0, 2.0):
        tally.add(sums(1.0, flag=flag), 1, *[torch.zeros(())] * 4)
        seen.append(read(tally).stop)
    assert seen in ([False, False, True, False], [False, True, False, True])
    assert seen[1] == (seen[-1] is True)


def test_large_counts_are_exact() -> None:
    """A line may stand for more labels than fp32 can count."""
    tally = Tally(1, torch.device("cpu"))
    for _ in range(9):
        tally.add(sums(2.0 ** 22), 2 ** 22 + 1, *[torch.zeros(())] * 4)
    assert tally.read()[0].divisor == 9 * (2 ** 22 + 1)
