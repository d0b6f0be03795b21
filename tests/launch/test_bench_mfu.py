"""`launch/bench_mfu.sh`: a sweep over numbers of nodes, with stand-ins for SLURM and under a real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kit.slurm import Cluster, slurm_cluster, why_not

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_SECONDS = 600.0
JOB = ["tiny", "run.device=cpu", "data.seq_len=32", "batch.global=12", "batch.micro=1"]

STAND_INS = {
    # srun: says what it was asked for, and does as FAKE_DOES says
    "srun": """
import json, os, sys
log = os.environ["FAKE_LOG"]
number = len(open(log).readlines()) if os.path.exists(log) else 0
environment = {name: os.environ.get(name) for name in ("MASTER_ADDR", "MASTER_PORT", "OCTANT_WORLD_SIZE")}
open(log, "a").write(json.dumps([sys.argv[1:], environment]) + "\\n")
if os.environ["FAKE_DOES"] == "wait":
    import time
    time.sleep(60)
does = os.environ["FAKE_DOES"].split(",")
if does[number % len(does)] != "0":
    sys.exit(int(does[number % len(does)]))
path = sys.argv[sys.argv.index("--json") + 1]
open(path, "a").write("row\\n")
""",
    "scontrol": """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("gpu1\\ngpu2\\ngpu3")
elif sys.argv[1] == "requeue":
    open(os.environ["FAKE_LOG"] + ".requeued", "w").write(sys.argv[2])
else:
    print(f"NodeName={sys.argv[3]} NodeAddr=10.0.0.{sys.argv[3][-1]}")
""",
    "python": """
import os, sys
print("python", *sys.argv[1:])
""",
}


def started(folder: Path, *words: str, does: str = "0", **environment: str) -> subprocess.Popen[str]:
    """The script as SLURM runs it on three nodes of two GPUs, with stand-ins before everything else in the path."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        path = folder / "bin" / name
        path.write_text(f"#!{sys.executable}\n{text}")
        path.chmod(0o755)
    (folder / "no-environment.sh").touch()
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu[1-3]", "SLURM_SUBMIT_DIR": str(ROOT), "GPUS_PER_NODE": "2"}
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return subprocess.Popen(
        ["bash", str(ROOT / "launch" / "bench_mfu.sh"), *words], text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, env=plain | slurm | {
            "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "ENVIRONMENT": str(folder / "no-environment.sh"), "OUTPUT": str(folder / "out"),
            "FAKE_LOG": str(folder / "srun.jsonl"), "FAKE_DOES": does} | environment)


def told(folder: Path) -> list[tuple[list[str], dict[str, str]]]:
    path = folder / "srun.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def test_what_is_started_where(tmp_path: Path) -> None:
    job = started(tmp_path, "c.yaml", "batch.global=24", LAYOUTS="tensor=2 micro=1; tensor=1", STEPS="7")
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 0, said
    steps = told(tmp_path)
    one, two, three = (("--nodes=1", "--nodelist=gpu1", "--ntasks=2"),
                       ("--nodes=2", "--nodelist=gpu1,gpu2", "--ntasks=4"),
                       ("--nodes=3", "--nodelist=gpu1,gpu2,gpu3", "--ntasks=6"))
    assert [(words[0], words[1], words[2]) for words, _ in steps] == [one, two, three, one, two]
    assert [its["OCTANT_WORLD_SIZE"] for _, its in steps] == ["2", "4", "6", "2", "4"]
    assert {its["MASTER_ADDR"] for _, its in steps} == {"10.0.0.1"}
    assert len({its["MASTER_PORT"] for _, its in steps}) == 5
    for number, (words, _) in enumerate(steps):
        command = words[words.index("bench"):]
        assert command[:4] == ["bench", "mfu", "c.yaml", "batch.global=24"]
        assert command[command.index("--steps") + 1] == "7" and command.count("--layout") == 2
        assert ("--weak-of" in command) == (number < 3)
        assert number >= 3 or command[command.index("--weak-of") + 1] == "6"
    assert said.splitlines()[-1].startswith("python -m engine bench mfu --show ")


def test_a_step_that_fails_costs_its_row_and_the_exit_code(tmp_path: Path) -> None:
    job = started(tmp_path, "c.yaml", does="0,1", NODE_COUNTS="1 3", SCALING="strong")
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 1 and "strong scaling on 3 nodes could not be measured" in said and "--show" in said
    job = started(tmp_path, "c.yaml", NODE_COUNTS="1 4")
    assert "NODE_COUNTS has 4, the job has 3 nodes" in job.communicate(timeout=60)[0] and job.returncode == 2


def test_it_comes_back_when_its_time_is_up(tmp_path: Path) -> None:
    job = started(tmp_path, "c.yaml", does="wait")
    while not told(tmp_path):
        time.sleep(0.05)
    job.send_signal(10)
    assert job.wait(timeout=30) == 0
    assert (tmp_path / "srun.jsonl.requeued").read_text() == "7"


@pytest.mark.skipif(bool(why_not()), reason=f"no SLURM cluster here: {why_not()}")
@pytest.mark.timeout(900)
def test_one_two_and_three_nodes_of_a_real_cluster(tmp_path: Path) -> None:
    """Cut off after its first row, submitted again: weak and strong scaling on 1, 2 and 3 nodes, each row once."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm_cluster(Path(folder)) as running:
        options = {"GPUS_PER_NODE": "1", "NODE_COUNTS": "1 2 3", "OUTPUT": str(tmp_path / "out"), "STEPS": "1",
                   "WARMUP": "1", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        cluster = Cluster(running.folder, running.environment | options)
        job = submit(cluster)
        wait_for("the first row", lambda: rows(tmp_path), cluster)
        cluster.run("scancel", job)
        wait_for("the job's end", lambda: cluster.states(job) == "CANCELLED", cluster)
        first = rows(tmp_path)
        assert 0 < len(first) < 5
        again = submit(cluster)
        wait_for("the sweep", lambda: cluster.states(again) in ("COMPLETED", "FAILED"), cluster)
        said = (cluster.folder / f"{again}.out").read_text()
        assert cluster.states(again) == "COMPLETED", said[-4000:]
    found = rows(tmp_path)
    assert found[: len(first)] == first and said.count("measured already") >= len(first)
    assert sorted((row["world"], row["nodes"], row["global_batch"]) for row in found) == [
        (1, 1, 4), (1, 1, 12), (2, 2, 8), (2, 2, 12), (3, 3, 12)]                # weak and strong meet at the most
    table = (tmp_path / "out" / "mfu.md").read_text()
    assert " | 100.0% | " in table and table.count("\n| 3 | 3 | 12 |") == 1
    [widest] = [line.split(" | ") for line in table.splitlines() if line.startswith("| 3 | 3 | 12 |")]
    assert widest[11].endswith("%") and widest[12].endswith("%")                 # its weak and its strong efficiency
    assert (tmp_path / "out" / "mfu.svg").read_text().startswith("<svg")


def submit(cluster: Cluster) -> str:
    return cluster.run("sbatch", "--parsable", "--nodes=3", "--gpus-per-node=0", f"--chdir={ROOT}",
                       f"--output={cluster.folder}/%j.out", "launch/bench_mfu.sh", *JOB)


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    path = tmp_path / "out" / "mfu.json"
    return json.loads(path.read_text())["rows"] if path.exists() else []


def wait_for(what: str, condition: Callable[[], object], cluster: Cluster) -> None:
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE_SECONDS:
            said = "\n".join(path.read_text()[-4000:] for path in sorted(cluster.folder.glob("*.out")))
            raise AssertionError(f"waited {PATIENCE_SECONDS:g} s for {what}\n{said}")
        time.sleep(0.2)
