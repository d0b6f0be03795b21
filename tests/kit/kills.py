"""Kills a process that saves, at random moments, and looks at what is left.  `python -m tests.kit.kills --kills
1000`

One run directory is killed again and again.  Each life resumes from the newest checkpoint that verifies, checks every
element, and saves step after step, telling the parent of each commit: the acknowledgement.  It fails if a life cannot
resume, resumes before the last acknowledged step, or finds values that are not the step's.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from engine.checkpoint.resume import find_latest
from engine.checkpoint.write import CheckpointWriter, no_point
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece

CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(["engine.checkpoint.resume", "engine.checkpoint.write"])
ROWS, COLUMNS, TENSORS = 240, 256, 6           # rows: divisible by 1 to 6 ranks


def state_of(step: int, rank: int, world_size: int) -> list[Piece]:
    """The state that is right at a step: rows cut over the ranks, and one tensor that all hold."""
    shape, height = (ROWS, COLUMNS), ROWS // world_size
    box = Box((rank * height, 0), (height, COLUMNS))
    pieces = [Piece(f"w{i}", shape, box, torch.full(box.size, float(step * TENSORS + i))) for i in range(TENSORS)]
    return [*pieces, Piece("shared", (COLUMNS,), Box.whole((COLUMNS,)), torch.full((COLUMNS,), float(step)))]


def live(directory: str, rank: int, world_size: int, asynchronous: bool, die_at: tuple[str, int] | None,
         last_step: int, pipe: Any) -> None:
    """One life: resume, check, save on and on; tells `("resumed", step)` and `("committed", step)`."""
    torch.set_num_threads(1)
    group = None
    if world_size > 1:
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        dist.init_process_group("gloo", init_method=f"file://{directory}/store-{os.getppid()}-{last_step}",
                                rank=rank, world_size=world_size)
        group = dist.group.WORLD
    reader, skipped = find_latest(Path(directory) / "checkpoints", group)
    step = 0 if reader is None else reader.step
    if reader is not None:
        pieces = state_of(0, rank, world_size)
        reader.load_into(pieces)
        for loaded, right in zip(pieces, state_of(step, rank, world_size), strict=True):
            assert torch.equal(loaded.tensor, right.tensor), f"step {step}: {loaded.key}"
    pipe.send(("resumed", step, [str(s) for s in skipped]))
    writer = CheckpointWriter(Path(directory) / "checkpoints", 2, asynchronous, group, threads=2,
                              on_point=_suicide(die_at) if die_at else no_point)
    for next_step in _steps(step, last_step):
        writer.save(next_step, state_of(next_step, rank, world_size), {"step": next_step})
        for report in writer.poll():
            assert report.error is None, report.error
            pipe.send(("committed", report.step))
    for report in writer.wait():
        pipe.send(("committed", report.step))


def _steps(start: int, stop: int) -> list[int]:
    """Every third step is saved twice: replacing a checkpoint must be as safe as adding one."""
    return [step for step in range(start + 1, stop + 1) for _ in range(2 if step % 3 == 0 else 1)]


def _suicide(die_at: tuple[str, int]) -> Callable[[str], None]:
    seen = Counter[str]()

    def on_point(name: str) -> None:
        seen[name] += 1
        if (name, seen[name]) == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
    return on_point


@dataclass
class Run:
    """A run directory and what has been acknowledged in it."""

    directory: Path
    acknowledged: int = 0
    lives: int = 0
    kills: int = 0
    resumed_at: list[int] = field(default_factory=list)

    def life(self, world_size: int = 1, asynchronous: bool = False, kill_after: float | None = None,
             die_at: tuple[str, int] | None = None, steps: int = 1000) -> None:
        """One life, ended from outside after `kill_after` seconds from its resumption, or by itself at a point."""
        self.lives += 1
        last_step = self.acknowledged + steps + self.lives      # also a name that no life has used
        pipes, processes = [], []
        for rank in range(world_size):
            here, there = CONTEXT.Pipe(duplex=False)
            process = CONTEXT.Process(target=live, daemon=True, args=(
                str(self.directory), rank, world_size, asynchronous, die_at, last_step, there))
            process.start()
            there.close()
            pipes.append(here)
            processes.append(process)
        messages = [self._first_message(pipe, process) for pipe, process in zip(pipes, processes, strict=True)]
        self.resumed_at.append(messages[0][1])
        if kill_after is not None:
            time.sleep(kill_after)
        if kill_after is not None or (die_at and world_size > 1):
            if die_at:
                processes[-1].join(30)
            for process in random.sample(processes, len(processes)):
                process.kill()
        for process in processes:
            process.join(60)
            noticed = world_size > 1 and process.exitcode == 1      # a peer's death, before its own
            assert noticed or process.exitcode in (0, -signal.SIGKILL), f"a life ended with {process.exitcode}"
            self.kills += process.exitcode == -signal.SIGKILL
        while pipes[0].poll():
            try:
                messages.append(pipes[0].recv())
            except EOFError:
                break
        self.acknowledged = max([self.acknowledged, *(m[1] for m in messages if m[0] == "committed")])

    def _first_message(self, pipe: Any, process: Any) -> Any:
        assert pipe.poll(60), "a life did not resume within a minute"
        try:
            message = pipe.recv()
        except EOFError:
            raise AssertionError(f"a life could not resume (exit code {process.exitcode})") from None
        assert message[0] == "resumed" and not message[2], message
        assert message[1] >= self.acknowledged, f"step {self.acknowledged} was acknowledged, resumed at {message[1]}"
        return message


def random_kills(directory: Path, kills: int, seed: int, worlds: tuple[int, ...] = (1,)) -> Run:
    """Kills a run `kills` times (all ranks of a life count once), synchronous and asynchronous lives mixed."""
    dice, run = random.Random(seed), Run(directory)
    for _ in range(kills):
        run.life(dice.choice(worlds), dice.random() < 0.5, kill_after=dice.random() ** 2 * 0.12)
    run.life(steps=2)
    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1])
    args = parser.parse_args()
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        run = random_kills(Path(folder), args.kills, args.seed, tuple(args.worlds))
    progressed = sum(b > a for a, b in zip(run.resumed_at, run.resumed_at[1:], strict=False))
    json.dump({"lives": run.lives, "killed_processes": run.kills, "acknowledged_steps": run.acknowledged,
               "lives_that_committed": progressed, "unresumable": 0, "lost": 0,
               "seconds": round(time.monotonic() - start)}, sys.stdout)
    print()


if __name__ == "__main__":
    main()
