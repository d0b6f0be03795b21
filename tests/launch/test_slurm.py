"""`launch/train.sh` under a real SLURM: runs of two nodes that meet with everything a cluster does to them.

The last weights and every number on the way are, bit for bit, those of the run that nobody disturbed.  `-s` prints how
long each recovery took.
"""

from __future__ import annotations

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from engine.config import Config
from engine.metrics.events import read_events
from tests.kit.distributed import run_distributed
from tests.kit.runs import (
    ROOT,
    assert_equal_tensors,
    metrics,
    run_config,
    saved_steps,
    tensors,
    train_here,
    trained,
    write_config,
)
from tests.kit.slurm import Cluster, slurm_cluster, why_not

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=f"no SLURM cluster here: {why_not()}"),
              pytest.mark.timeout(900)]
PATIENCE_SECONDS, WATCHDOG_SECONDS = 180.0, 10.0
STEPS = 100
# What a recovery may take, from the fault to training; on a machine with other work in proportion.
NODE_LOST_SECONDS, KILLED_SECONDS, FROZEN_SECONDS = 60.0, 15.0, WATCHDOG_SECONDS + 15.0


@dataclass
class Run:
    """A run on the cluster, and what was seen of it."""

    cluster: Cluster
    config: Config
    path: Path
    seconds: dict[str, float] = field(default_factory=dict)
    heard: dict[Path, int] = field(default_factory=dict)

    def submit(self, *options: str, nodes: int = 2, **environment: str) -> str:
        """The number of a job that trains on two nodes, of `nodes` that it has."""
        other = Cluster(self.cluster.folder, self.cluster.environment | {
            "GPUS_PER_NODE": "1", "NODES": "2", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"} | environment)
        return other.run("sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=0", f"--chdir={ROOT}",
                         f"--output={self.cluster.folder}/%j.out", *options, "launch/train.sh", str(self.path),
                         "run.device=cpu")

    def wait_for(self, what: str, condition: Callable[[], object]) -> None:
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > PATIENCE_SECONDS:
                said = "\n".join(path.read_text()[-4000:] for path in self._logs())
                raise AssertionError(f"waited {PATIENCE_SECONDS:g} s for {what}\n{said}")
            time.sleep(0.1)

    @property
    def starts(self) -> int:
        return sum(event.kind == "start" for event in read_events(Path(self.config.run.dir)))

    @property
    def ends(self) -> list[int]:
        """The steps at which the run ended in good order."""
        return [event.step for event in read_events(Path(self.config.run.dir)) if event.kind == "end"]

    @property
    def steps_done(self) -> int:
        return len(metrics(self.config)) if (Path(self.config.run.dir) / "metrics.jsonl").exists() else 0

    @contextmanager
    def back_after(self, what: str, most: float | None = None) -> Iterator[None]:
        """What is done within it makes the run start once more; waits until it trains again."""
        starts, began = self.starts, time.monotonic()
        yield
        self.wait_for(f"a start after {what}", lambda: self.starts == starts + 1)
        first = self.steps_done
        self.wait_for(f"a step after {what}", lambda: self.steps_done > first)
        self.seconds[what] = seconds = time.monotonic() - began
        self.wait_for(f"steps after {what}", lambda: self.steps_done > first + 2)
        assert most is None or seconds < most * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1)), self.seconds

    @contextmanager
    def saved_after(self, what: str) -> Iterator[None]:
        """What is done within it makes the run save and end in good order, without a word of a programmer's."""
        self.new_words()
        ends, began, at = len(self.ends), time.monotonic(), self.steps_done
        yield
        self.wait_for(f"a drain for {what}", lambda: len(self.ends) == ends + 1)
        self.seconds[f"drain for {what}"] = time.monotonic() - began
        assert saved_steps(self.config)[-1] == self.ends[-1] >= at

    def new_words(self) -> str:
        """What all logs of jobs and ranks hold that this has not returned before."""
        found = []
        for path in self._logs():
            with path.open() as file:
                file.seek(self.heard.get(path, 0))
                found.append(file.read())
                self.heard[path] = file.tell()
        return "\n".join(found)

    def drained_quietly(self) -> None:
        """After a drain, when the next start is there: so everything of the last one has been written."""
        words = self.new_words()
        assert "saved" in words and "Traceback" not in words and "Error" not in words, words

    def _logs(self) -> list[Path]:
        return sorted([*self.cluster.folder.glob("*.out"), *(Path(self.config.run.dir) / "logs").glob("*.log")])


def config_in(folder: Path, name: str) -> Config:
    return run_config(folder, name, steps=STEPS, parallel={"data": 2}, eval={"every": 0}, batch={"global": 32},
                      checkpoint={"every": 5, "keep": 3}, reliability={"watchdog": {"min_seconds": WATCHDOG_SECONDS}})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run to whom nothing happened."""
    config = config_in(tmp_path_factory.mktemp("undisturbed"), "run")
    run_distributed(train_here, 2, config, None, None, timeout_seconds=600)
    return config


@pytest.fixture
def run(tmp_path: Path, undisturbed: Config) -> Iterator[Run]:
    """A run on a new cluster; in the end it must have the numbers of the one to whom nothing happened."""
    config = config_in(tmp_path, "run")
    with tempfile.TemporaryDirectory(prefix="slurm-") as place, slurm_cluster(Path(place)) as cluster:
        run = Run(cluster, config, write_config(config, tmp_path / "run.yaml"))
        yield run
        run.wait_for("the end", lambda: run.ends and run.ends[-1] == STEPS)
    print({what: round(seconds, 1) for what, seconds in run.seconds.items()})
    assert trained(config) == trained(undisturbed)
    assert_equal_tensors(tensors(config, STEPS), tensors(undisturbed, STEPS))


def test_what_a_cluster_does(run: Run) -> None:
    """Time limit, requeue, preemption, a lost node, a person; then the next jobs of the chain."""
    cluster = run.cluster
    with run.back_after("submission"):
        job = run.submit(nodes=3)
    for what, ask in {
            "the time limit": ("scancel", "--signal=USR1", "--batch", job),
            "a requeue": ("scontrol", "requeue", job),
            "preemption": ("sbatch", "-p", "high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap",
                           "sleep 1")}.items():
        with run.back_after(what), run.saved_after(what):
            cluster.run(*ask)
        run.drained_quietly()
    with run.back_after("a lost node", NODE_LOST_SECONDS):                         # the spare one steps in
        cluster.lose("n2")
    assert cluster.states(job) == "RUNNING"

    chained = run.submit(f"--dependency=afterany:{job}")
    last = run.submit(f"--dependency=afterany:{chained}")
    with run.back_after("scancel, by the chain's second job"), run.saved_after("scancel"):
        cluster.run("scancel", job)                                                # a person has had enough
    run.drained_quietly()
    assert cluster.states(job) == "CANCELLED" and run.ends[-1] < STEPS
    assert "requeued: the time limit" in (cluster.folder / f"{job}.out").read_text()
    run.wait_for("the chain's second job", lambda: cluster.states(chained) == "COMPLETED")
    run.wait_for("the chain's third job", lambda: cluster.states(last) == "COMPLETED")
    assert f"all {STEPS} steps are done" in (cluster.folder / f"{last}.out").read_text()
    assert run.starts == 6 and max(took for what, took in run.seconds.items() if "drain" in what) < 30


def test_what_befalls_a_rank(run: Run) -> None:
    """Killed, and frozen: back in the same job."""
    with run.back_after("submission"):
        job = run.submit()
    with run.back_after("a killed rank", KILLED_SECONDS):
        os.kill(run.cluster.rank(1), signal.SIGKILL)
    with run.back_after("a frozen rank", FROZEN_SECONDS):
        os.kill(run.cluster.rank(1), signal.SIGSTOP)
    assert "rank 1 cannot even report: frozen, or the machine is gone (cause: hardware)" in run.new_words()
    assert run.cluster.states(job) == "RUNNING"
