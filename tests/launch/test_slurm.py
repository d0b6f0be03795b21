"""`launch/train.sh` under a real SLURM: one run of two nodes that meets with everything a cluster does to it.

The last weights and every number on the way are, bit for bit, those of the run that nobody disturbed.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import Config
from engine.metrics.events import read_events
from tests.kit.runs import (
    ROOT,
    assert_equal_tensors,
    metrics,
    run_config,
    saved_steps,
    tensors,
    train,
    trained,
    write_config,
)
from tests.kit.slurm import Cluster, slurm_cluster, why_not

pytestmark = [pytest.mark.skipif(bool(why_not()), reason=f"no SLURM cluster here: {why_not()}"),
              pytest.mark.timeout(900)]
PATIENCE_SECONDS = 180.0


def config_of(folder: Path, name: str, steps: int, **sections: object) -> Config:
    return run_config(folder, name, steps=steps, parallel={"data": 2}, eval={"every": 0}, batch={"global": 32},
                      checkpoint={"every": 5, "keep": 3}, reliability={"watchdog": {"min_seconds": 20}}, **sections)


def submit(cluster: Cluster, config_file: Path, *options: str, nodes: int = 2) -> str:
    """The number of a job that trains on two nodes, of `nodes` that it has."""
    environment = cluster.environment | {"GPUS_PER_NODE": "1", "NODES": "2", "OMP_NUM_THREADS": "1",
                                         "GLOO_SOCKET_IFNAME": "lo"}
    other = Cluster(cluster.folder, environment)
    return other.run("sbatch", "--parsable", f"--nodes={nodes}", "--gpus-per-node=0", f"--chdir={ROOT}",
                     f"--output={cluster.folder}/%j.out", *options, "launch/train.sh", str(config_file),
                     "run.device=cpu")


def wait_for(what: str, condition: Callable[[], object], cluster: Cluster) -> float:
    """Seconds until it was so."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE_SECONDS:
            said = "\n".join(path.read_text()[-4000:] for path in sorted(cluster.folder.glob("*.out")))
            raise AssertionError(f"waited {PATIENCE_SECONDS:g} s for {what}\n{said}")
        time.sleep(0.1)
    return time.monotonic() - began


def starts(config: Config) -> int:
    return sum(event.kind == "start" for event in read_events(Path(config.run.dir)))


def ends(config: Config) -> list[int]:
    """The steps at which the run ended in good order."""
    return [event.step for event in read_events(Path(config.run.dir)) if event.kind == "end"]


def steps_done(config: Config) -> int:
    return len(metrics(config)) if (Path(config.run.dir) / "metrics.jsonl").exists() else 0


def training_again(config: Config, cluster: Cluster, number: int) -> float:
    """Seconds until the run has started so often and got on by some steps."""
    seconds = wait_for(f"start {number}", lambda: starts(config) >= number, cluster)
    first = steps_done(config)
    return seconds + wait_for(f"steps after start {number}", lambda: steps_done(config) >= first + 2, cluster)


def test_a_run_that_everything_happens_to(tmp_path: Path) -> None:
    steps = 120
    whole, config = (config_of(tmp_path, name, steps) for name in ("whole", "run"))
    path, seconds = write_config(config, tmp_path / "run.yaml"), {}
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm_cluster(Path(folder)) as cluster:
        job = submit(cluster, path, nodes=3)
        training_again(config, cluster, 1)

        cluster.run("scancel", "--signal=USR1", "--batch", job)                    # the time limit is near
        seconds["drain"] = wait_for("a drain", lambda: len(ends(config)) == 1, cluster)
        assert saved_steps(config)[-1] == ends(config)[-1]
        seconds["requeued at the limit"] = training_again(config, cluster, 2)

        cluster.run("scontrol", "requeue", job)                                    # by an administrator
        seconds["drain for a requeue"] = wait_for("a drain", lambda: len(ends(config)) == 2, cluster)
        assert saved_steps(config)[-1] == ends(config)[-1]
        seconds["requeued"] = training_again(config, cluster, 3)

        cluster.run("sbatch", "-p", "high", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
        seconds["drain to make room"] = wait_for("a drain", lambda: len(ends(config)) == 3, cluster)
        assert saved_steps(config)[-1] == ends(config)[-1]
        seconds["after preemption"] = training_again(config, cluster, 4)

        cluster.lose("n2")                                                         # the spare one steps in
        seconds["after a lost node"] = training_again(config, cluster, 5)
        assert cluster.states(job) == "RUNNING"

        chained = submit(cluster, path, f"--dependency=afterany:{job}")
        last = submit(cluster, path, f"--dependency=afterany:{chained}")
        cluster.run("scancel", job)                                                # a person has had enough
        wait_for("the job's end", lambda: cluster.states(job) == "CANCELLED", cluster)
        assert saved_steps(config)[-1] == ends(config)[-1] < steps
        said = (cluster.folder / f"{job}.out").read_text()
        assert "Traceback" not in said.partition("n2")[0] and "requeued: the time limit" in said
        wait_for("the chain's second job", lambda: cluster.states(chained) == "COMPLETED", cluster)
        wait_for("the chain's third job", lambda: cluster.states(last) == "COMPLETED", cluster)
        assert "all 120 steps are done" in (cluster.folder / f"{last}.out").read_text()
        assert starts(config) == 6
    print({name: round(value, 1) for name, value in seconds.items()})
    train(whole)
    assert trained(config) == trained(whole)
    assert_equal_tensors(tensors(config, steps), tensors(whole, steps))
    assert seconds["after a lost node"] < 90 and max(value for name, value in seconds.items() if "drain" in name) < 30
