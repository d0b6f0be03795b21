"""The batch scripts with stand-ins for SLURM and torchrun: what they start, what they forward, when they requeue."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# As srun does: one process per node, each signal to every process of the step, the worst status at the end.
SRUN = """
import json, os, signal, subprocess, sys
log = os.environ["FAKE_LOG"]
open(log + "/srun.json", "w").write(json.dumps(sys.argv[1:]))
command = sys.argv[1:]
while command[0].startswith("-"):
    command.pop(0)
nodes = []
for name in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(name, lambda number, frame: [os.killpg(node.pid, number) for node in nodes])
for node in range(2):
    nodes.append(subprocess.Popen(command, env=os.environ | {"SLURM_NODEID": str(node)}, start_new_session=True))
sys.exit(max(node.wait() for node in nodes))
"""
# A torchrun that ends with FAKE_STATUS, or, told to `wait`, when a signal arrives: like torchrun with a failure.
TORCHRUN = """
import json, os, signal, sys
seen = {"argv": sys.argv[1:], "env": dict(os.environ)}
path = os.environ["FAKE_LOG"] + "/torchrun" + os.environ["SLURM_NODEID"] + ".json"
signals = [signal.SIGUSR1, signal.SIGTERM]
signal.pthread_sigmask(signal.SIG_BLOCK, signals)
open(path + ".part", "w").write(json.dumps(seen))
os.rename(path + ".part", path)
if os.environ["FAKE_STATUS"] == "wait":
    sys.exit(128 + signal.sigwait(signals))
sys.exit(int(os.environ["FAKE_STATUS"]))
"""
SCONTROL = """
import os, sys
if sys.argv[1:3] == ["show", "hostnames"]:
    print("gpu007\\ngpu008")
else:
    open(os.environ["FAKE_LOG"] + "/requeued", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


@dataclass
class Cluster:
    """A folder that looks like the repository, and one that records what the stand-ins saw."""

    submit_dir: Path
    log: Path
    environment: dict[str, str]

    def start(self, status: int | str, *overrides: str, restarts: int = 0) -> subprocess.Popen[str]:
        environment = self.environment | {"FAKE_STATUS": str(status), "SLURM_RESTART_COUNT": str(restarts)}
        return subprocess.Popen(["bash", str(ROOT / "launch" / "pretrain_65b.sh"), *overrides], env=environment,
                                text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=self.log)

    def torchrun(self, node: int) -> tuple[list[str], dict[str, str]]:
        """Arguments and environment of the torchrun on `node`, as soon as it runs."""
        path = self.log / f"torchrun{node}.json"
        for _ in range(600):
            if path.exists():
                seen = json.loads(path.read_text())
                return seen["argv"], seen["env"]
            time.sleep(0.05)
        raise AssertionError(f"no torchrun on node {node}")

    @property
    def requeued(self) -> str:
        path = self.log / "requeued"
        return path.read_text() if path.exists() else ""


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    submit_dir, log, commands = (tmp_path / name for name in ("submit", "log", "bin"))
    for folder in (submit_dir, log, commands):
        folder.mkdir()
    for name in ("engine", "configs", "launch"):
        (submit_dir / name).symlink_to(ROOT / name)
    for name, text in {"srun": SRUN, "torchrun": TORCHRUN, "scontrol": SCONTROL}.items():
        (commands / name).write_text(f"#!{sys.executable}\n{text}")
        (commands / name).chmod(0o755)
    (commands / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (commands / "python").chmod(0o755)
    environment = {"PATH": f"{commands}:{os.environ['PATH']}", "FAKE_LOG": str(log),
                   "SLURM_SUBMIT_DIR": str(submit_dir), "SLURM_JOB_ID": "4711", "SLURM_JOB_NUM_NODES": "256",
                   "SLURM_JOB_NODELIST": "gpu[007-262]"}
    return Cluster(submit_dir, log, environment)


def test_command_lines(cluster: Cluster) -> None:
    job = cluster.start(0, "optim.lr=1e-4", "run.name=a b")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 0, output
    assert json.loads((cluster.log / "srun.json").read_text()) == [
        "--ntasks-per-node=1", "--kill-on-bad-exit=1", "bash", str(ROOT / "launch" / "node.sh"), "llama-65b",
        "optim.lr=1e-4", "run.name=a b"]
    for node in range(2):
        argv, environment = cluster.torchrun(node)
        assert argv[argv.index("-m"):] == ["-m", "engine", "train", "llama-65b", "optim.lr=1e-4", "run.name=a b"]
        options = dict(re.fullmatch("--([a-z-]+)=(.*)", option).groups()  # type: ignore[union-attr]
                       for option in argv[:argv.index("-m")])
        assert (options["nnodes"], options["nproc-per-node"], options["rdzv-id"]) == ("256", "8", "4711-0")
        assert options["rdzv-conf"].startswith(f"is_host={int(node == 0)},")
        assert options["rdzv-endpoint"] == f"gpu007:{20000 + 4711 * 31 % 10000}"
        assert "SIGUSR1" in options["signals-to-handle"]
        assert environment["OCTANT_WORLD_SIZE"] == "2048"
        assert environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] == "1"
    assert cluster.requeued == ""


def test_options_are_torchruns() -> None:
    text = (ROOT / "launch" / "node.sh").read_text()
    known = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--help"], capture_output=True, text=True,
                           check=True).stdout
    options = set(re.findall(r"(--[a-z-]+)=", text)) - {"--ntasks-per-node"}
    assert options >= {"--rdzv-conf", "--shutdown-timeout"}
    assert {option for option in options if option not in known} == set()


def test_each_restart_has_its_own_rendezvous(cluster: Cluster) -> None:
    endpoints = set()
    for restarts in (0, 1, 2):
        cluster.start(0, restarts=restarts).communicate(timeout=60)
        argv, _ = cluster.torchrun(0)
        endpoints.update(option for option in argv if option.startswith(("--rdzv-endpoint", "--rdzv-id")))
        (cluster.log / "torchrun0.json").unlink()
    assert len(endpoints) == 6


@pytest.mark.parametrize(("signals", "requeued", "code"), [
    ([signal.SIGUSR1], True, 0), ([signal.SIGTERM], False, 143), ([signal.SIGUSR1, signal.SIGTERM], False, 143)])
def test_signals(cluster: Cluster, signals: list[signal.Signals], requeued: bool, code: int) -> None:
    job = cluster.start("wait")
    cluster.torchrun(0), cluster.torchrun(1)
    for number in signals:
        job.send_signal(number)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == code, output
    assert cluster.requeued == ("requeue 4711\n" if requeued else ""), output


@pytest.mark.parametrize(("restarts", "requeued"), [(0, True), (19, True), (20, False)])
def test_failures_requeue_so_many_times(cluster: Cluster, restarts: int, requeued: bool) -> None:
    job = cluster.start(1, restarts=restarts)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 1, output
    assert bool(cluster.requeued) == requeued, output


def test_a_configuration_that_cannot_work_starts_nothing(cluster: Cluster) -> None:
    job = cluster.start(0, "parallel.tensor=3")
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 2
    assert "model.num_heads(64) is not divisible by parallel.tensor(3)" in output
    assert not (cluster.log / "srun.json").exists()
    assert cluster.requeued == ""


def test_the_header_asks_for_what_the_scripts_rely_on() -> None:
    header = set(re.findall(r"^#SBATCH --(\S+)$", (ROOT / "launch" / "pretrain_65b.sh").read_text(), re.MULTILINE))
    assert {"nodes=256", "ntasks-per-node=1", "gpus-per-node=8", "signal=B:USR1@600", "requeue"} <= header


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    scripts = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "launch").glob("*.sh"))
    found = subprocess.run(["shellcheck", "-x", *scripts], cwd=ROOT, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout
