"""Short runs of the real trainer: in the test pool's processes, in this process, and through the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from corpus_tools.conversations.start import open_corpora
from engine import cli
from engine.checkpoint.resume import open_checkpoint
from engine.config import Config
from engine.data.indexed import IndexedWriter
from engine.distributed.topology import Topology
from engine.train.loop import Trainer
from engine.train.state import TrainState
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import TINY, Shards, tiny_config

ROOT = Path(__file__).resolve().parents[2]
VOCAB_SIZE = TINY["model"]["vocab_size"]                                     # type: ignore[index]

# All are layouts of the same run: whatever they do, the numbers must be the same.
LAYOUTS: dict[str, dict[str, Any]] = {
    "single": {},
    "tensor": {"tensor": 2},
    "pipeline": {"pipeline": 2},
    "interleaved": {"pipeline": 2, "schedule": "interleaved", "virtual_stages": 2},
    "zero 0": {"data": 2, "zero": 0},
    "zero 1": {"data": 2, "zero": 1},
    "zero 2": {"data": 2, "zero": 2},
    "zero 3": {"data": 2, "zero": 3},
    "context": {"context": 2},
    "tensor × pipeline": {"tensor": 2, "pipeline": 2},
    "tensor × zero 1": {"tensor": 2, "data": 2, "zero": 1},
    "zb-v × zero 2": {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2, "data": 2, "zero": 2},
}


def write_corpus(prefix: Path, num_tokens: int = 3000, seed: int = 0) -> str:
    """Tokens that a model can learn something from: each follows its predecessor by a small random step."""
    steps = np.random.default_rng(seed).integers(0, 4, num_tokens)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add_document(np.cumsum(steps) % VOCAB_SIZE)
    return str(prefix)


def run_config(folder: Path, name: str, steps: int = 5, **sections: dict[str, Any]) -> Config:
    """`TINY` on the corpus of `folder`, which is written the first time; the run's folder is `folder/name`."""
    for corpus in ("train", "valid"):
        if not (folder / f"{corpus}.idx").exists():
            write_corpus(folder / corpus, seed=len(corpus))
    defaults: dict[str, dict[str, Any]] = {
        "run": {"dir": str(folder / name), "device": "cpu"},
        "data": {"train": [{"path": str(folder / "train")}], "valid": [{"path": str(folder / "valid")}]},
        "batch": {"global": 4}, "checkpoint": {"every": 2, "keep": 0}, "eval": {"every": 3, "batches": 1}}
    config = tiny_config(**{section: defaults.get(section, {}) | sections.get(section, {})
                            for section in defaults.keys() | sections.keys()})
    return Config.model_validate(config.to_dict() | {"steps": steps})


class Crash(Exception):
    """Stands for a process that is gone: nothing more is saved."""


def train(config: Config, stop_at: int | None = None, crash_after: int | None = None) -> list[Shards]:
    """A run on the pool's processes; what each rank holds at the end.

    Args:
        stop_at: one rank is asked to stop during this step.
        crash_after: all ranks are gone after this step; what was being saved then is committed.
    """
    return run_distributed(train_here, config.parallel.world_size, config, stop_at, crash_after)


def train_here(config: Config, stop_at: int | None = None, crash_after: int | None = None) -> Shards:
    """One rank of `train`."""
    mesh = mesh_for(Topology.of(config))
    trainer: Trainer

    def stop_requested() -> bool:
        if crash_after is not None and trainer.state.step >= crash_after:
            trainer.writer.wait()
            raise Crash
        return mesh.rank == mesh.world.size - 1 and stop_at is not None and trainer.state.step + 1 >= stop_at

    trainer = Trainer.start(config, mesh, open_corpora(config, say=lambda line: None), stop_requested)
    try:
        finished = trainer.run()
        assert finished == (trainer.state.step == config.steps)
    except Crash:
        pass
    finally:
        trainer.close()
    return state_shards(trainer.state)


def state_shards(state: TrainState) -> Shards:
    """Copies of everything a rank holds, as `tests.kit.layouts.assemble` takes it."""
    return [(piece.key, piece.global_shape, box, values.clone()) for piece in state.pieces()
            for box, values in piece.parts()]


def metrics(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


def trained(config: Config) -> list[tuple[Any, ...]]:
    """The part of the metrics that depends on arithmetic only: it must not change by a bit."""
    keys = ("step", "loss", "grad_norm", "lr", "tokens", "consumed_samples", "skipped", "valid_loss")
    return [tuple(row[key] for key in keys if key in row) for row in metrics(config)]


def saved_steps(config: Config) -> list[int]:
    return sorted(int(path.name[5:]) for path in (Path(config.run.dir) / "checkpoints").glob("step-????????"))


def write_config(config: Config, path: Path) -> Path:
    path.write_text(yaml.safe_dump(config.to_dict()))
    return path


def start(*arguments: object, module: bool = True, **options: Any) -> subprocess.Popen[str]:
    """`python -m engine ARGUMENTS`, or `python ARGUMENTS`, as a shell starts it: in a process group of its own."""
    command = [sys.executable, *(["-m", "engine"] if module else []), *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, start_new_session=True,
                            **options)


def launch(config: Config, **environment: str) -> subprocess.Popen[str]:
    """`launch/train.sh` on this machine, which starts a run again until it is done."""
    folder = Path(config.run.dir)
    path = write_config(config, folder.with_name(folder.name + ".yaml"))
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")
                 and not name.startswith("SLURM_")}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "train.sh"), str(path)], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True, env=inherited | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1", "GPUS_PER_NODE": str(config.parallel.world_size)} | environment)


def await_true(condition: Callable[[], object], what: str, process: subprocess.Popen[str] | None = None) -> None:
    """Waits until `condition` holds; fails when `process` ends before that, or after three minutes."""
    deadline = time.monotonic() + 180
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended ({process.returncode}) before {what}: {process.communicate()}")
        assert time.monotonic() < deadline, f"waited three minutes for {what}"
        time.sleep(0.005)


def children_of(pid: int) -> list[int]:
    """Process ids of the direct children, oldest first."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def end(process: subprocess.Popen[str]) -> None:
    """For clean-up: ends a process and its children (torchrun's are in sessions of their own)."""
    if process.poll() is None:
        for pid in (*children_of(process.pid), process.pid):
            os.kill(pid, signal.SIGKILL)
    process.communicate()


def octant_train(config: Config, *overrides: str) -> int:
    """The exit code of the command, in this process."""
    folder = Path(config.run.dir)
    path = write_config(config, folder.with_name(folder.name + ".yaml"))
    return cli.run(["train", str(path), *overrides])


def tensors(config: Config, step: int, prefix: str = "") -> dict[str, torch.Tensor]:
    """What a checkpoint of the run holds."""
    reader = open_checkpoint(Path(config.run.dir) / "checkpoints" / f"step-{step:08d}")
    return {key: reader.read(key) for key in reader.keys() if key.startswith(prefix)}


def assert_equal_tensors(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert got.keys() == want.keys() and got
    assert not [key for key in want if not torch.equal(got[key], want[key])]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}
