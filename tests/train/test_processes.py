"""Real jobs of several processes, as users start them: killed, stopped, unheard, under torchrun, and their mistakes."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine.config import Config
from engine.data.indexed import IndexedWriter
from tests.kit.runs import (
    VOCAB_SIZE,
    await_true,
    children_of,
    end,
    is_running,
    metrics,
    run_config,
    saved_steps,
    start,
    train,
    trained,
    write_config,
)

STEPS = 40


@pytest.fixture
def running() -> Iterator[list[subprocess.Popen[str]]]:
    """Jobs to end after the test, whatever happens."""
    jobs: list[subprocess.Popen[str]] = []
    yield jobs
    for job in jobs:
        end(job)


def job_config(folder: Path, name: str, layout: dict[str, Any], **checkpoint: Any) -> Config:
    return run_config(folder, name, steps=STEPS, parallel=layout, eval={"every": 7, "batches": 1},
                      checkpoint={"every": 3, "keep": 2} | checkpoint)


def start_train(running: list[subprocess.Popen[str]], config: Config, *overrides: str, **options: Any,
                ) -> subprocess.Popen[str]:
    path = write_config(config, Path(config.run.dir).with_suffix(".yaml"))
    running.append(start("train", path, *overrides, **options))
    return running[-1]


def steps_done(config: Config) -> int:
    path = Path(config.run.dir) / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def finish(job: subprocess.Popen[str], code: int) -> tuple[str, str]:
    """Its output, once it has ended with `code`."""
    printed = job.communicate(timeout=120)
    assert job.returncode == code, printed
    return printed


def test_a_killed_rank_costs_the_steps_since_the_last_checkpoint(tmp_path: Path,
                                                                 running: list[subprocess.Popen[str]]) -> None:
    layout = {"data": 2, "zero": 1}
    whole, config = (job_config(tmp_path, name, layout) for name in ("whole", "killed"))
    job = start_train(running, config)
    await_true(lambda: steps_done(config) >= 5 and saved_steps(config), "five steps and a checkpoint", job)
    second = start_train(running, config)
    _, error = finish(second, 2)
    assert f"octant train: run.dir {config.run.dir} is in use: process " in error and error.count("\n") == 1
    ranks = children_of(job.pid)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    _, error = finish(job, 1)
    log = Path(config.run.dir) / "logs" / "rank-00001.log"
    assert error == f"octant train: rank 1 was ended by SIGKILL; out of memory? (its log: {log})\n"
    assert not any(is_running(rank) for rank in ranks)

    output, error = finish(start_train(running, config), 0)
    assert error == "" and "resumed from" in output
    train(whole)
    assert trained(config) == trained(whole)
    assert saved_steps(config) == [39, 40]


def test_ctrl_c_then_torchrun_goes_on_and_nobody_listens(tmp_path: Path, running: list[subprocess.Popen[str]]) -> None:
    """The first start prints into a closed pipe; the second is real torchrun."""
    layout = {"pipeline": 2}
    whole, config = (job_config(tmp_path, name, layout) for name in ("whole", "stopped"))
    job = start_train(running, config, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert job.stdout is not None
    for _ in range(3):
        assert job.stdout.readline()
    job.stdout.close()                                                        # `octant train … | head -3`
    job.stdout = None
    await_true(lambda: steps_done(config) >= 8, "steps that nobody reads of", job)
    os.killpg(job.pid, signal.SIGINT)                                         # Ctrl-C: to the terminal's whole group
    _, error = finish(job, 3)
    assert error == "stopping after this step and saving; Ctrl-C again ends at once\n"
    assert 8 <= steps_done(config) == saved_steps(config)[-1] < STEPS
    for rank in range(2):
        assert "Traceback" not in (Path(config.run.dir) / "logs" / f"rank-{rank:05d}.log").read_text()

    path = write_config(config, tmp_path / "torchrun.yaml")
    running.append(start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "engine",
                         "train", path, module=False))
    output, _ = finish(running[-1], 0)
    assert "resumed from" in output and "2 processes: tensor 1 × pipeline 2" in output
    train(whole)
    assert trained(config) == trained(whole)


def test_ranks_end_with_a_killed_parent(tmp_path: Path, running: list[subprocess.Popen[str]]) -> None:
    config = job_config(tmp_path, "orphans", {"data": 2})
    job = start_train(running, config, "steps=100000")
    await_true(lambda: steps_done(config) >= 1, "a step", job)
    ranks = children_of(job.pid)
    job.kill()
    job.wait()
    await_true(lambda: not any(is_running(rank) for rank in ranks), "the end of the ranks")
    assert metrics(config)[0]["step"] == 1


def test_a_token_outside_the_vocabulary_seen_in_training_only(tmp_path: Path,
                                                              running: list[subprocess.Popen[str]]) -> None:
    """By one of two data ranks, while the other waits for it; then every checkpoint turns out to be damaged."""
    config = job_config(tmp_path, "run", {"data": 2})
    tokens = np.arange(3000) % VOCAB_SIZE
    tokens[1000] = VOCAB_SIZE                                                 # a foreign corpus: no side file tells
    with IndexedWriter(tmp_path / "train", np.uint16) as writer:
        writer.add_document(tokens)
    _, error = finish(start_train(running, config, "steps=100"), 2)
    assert error.startswith(f"octant train: {tmp_path}/train.bin: token 1000 is 97, outside the model's vocabulary")
    assert error.count("\n") == 1 and "Traceback" not in error
    assert steps_done(config) >= 3
    for path in (Path(config.run.dir) / "checkpoints").glob("*/rank-00001.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    damaged = saved_steps(config)
    _, error = finish(start_train(running, config), 2)
    assert error.startswith(f"octant train: {config.run.dir}/checkpoints holds {len(damaged)} checkpoints and none is")
    assert error.count("octant train: ") == 1 and "Traceback" not in error
    assert saved_steps(config) == damaged, "nothing is set aside where nothing else could be used"
