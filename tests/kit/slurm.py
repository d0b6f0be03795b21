"""A SLURM cluster of three nodes on this machine: one controller, three daemons, all on the loopback interface.

It starts in seconds, needs root and the packages slurm-wlm and munge, and no systemd, control groups or accounts.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
NODES = ("n1", "n2", "n3")

CONFIG = """ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdTimeout=10
KillWait=30
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
MpiDefault=none
NodeName=n[1-3] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs=1 State=UNKNOWN
PartitionName=low Nodes=n[1-3] Default=YES PriorityTier=1 GraceTime=30 MaxTime=INFINITE State=UP
PartitionName=high Nodes=n[1-3] PriorityTier=10 PreemptMode=off MaxTime=INFINITE State=UP
"""


def why_not() -> str:
    """Why there can be no cluster here; empty where there can."""
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    return f"{', '.join(missing)} not installed (packages slurm-wlm, munge)" if missing else \
        "" if os.geteuid() == 0 else "SLURM's daemons need root"


@dataclass
class Cluster:
    """A running one; commands find it through `environment`."""

    folder: Path
    environment: dict[str, str]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
        return done.stdout.strip()

    def states(self, job: str) -> str:
        """`RUNNING`, `PENDING`, `COMPLETED` …"""
        shown = self.run("scontrol", "show", "job", job)
        return shown.partition("JobState=")[2].split()[0]

    def lose(self, node: str) -> None:
        """Its daemon and everything that runs on it are gone at once."""
        os.kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)
        on_it = [pid for pid in _processes() if f"SLURMD_NODENAME={node}" in _environment(pid)]
        parents = {_parent(pid) for pid in on_it}
        for pid in (*on_it, *(pid for pid in parents if "slurmstepd" in _command(pid))):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def rank(self, number: int) -> int:
        """The process that trains as this rank."""
        [pid] = [pid for pid in _processes() if f"SLURM_PROCID={number}\n" in _environment(pid) + "\n"
                 and f"SLURM_CONF={self.folder}/" in _environment(pid) and "engine\0train" in _command(pid)]
        return pid

    def end(self) -> None:
        with suppress(AssertionError):
            self.run("scancel", "--user=root")
            time.sleep(1)
        for name in ("slurmctld", *NODES, "munge"):
            with suppress(OSError, ValueError):
                os.kill(int((self.folder / f"{name}.pid").read_text()), signal.SIGTERM)
        for pid in [pid for pid in _processes() if f"SLURM_CONF={self.folder}/" in _environment(pid)]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Starts one with everything it writes in `folder`, whose path must be short, and ends it."""
    for name in ("state", *NODES):
        (folder / name).mkdir(parents=True)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(1024))
    key.chmod(0o400)
    port, *ports = _free_ports(1 + len(NODES))
    (folder / "slurm.conf").write_text(CONFIG.format(folder=folder, host=socket.gethostname().partition(".")[0],
                                                     port=port, first=ports[0], last=ports[-1]))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")} | {
        "SLURM_CONF": str(folder / "slurm.conf")}
    cluster = Cluster(folder, environment)
    try:
        cluster.run("munged", f"--socket={folder}/munge.socket", f"--key-file={key}", f"--pid-file={folder}/munge.pid",
                    f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed", "--num-threads=2", "--force")
        cluster.run("slurmctld", "-f", environment["SLURM_CONF"])
        for node in NODES:
            cluster.run("slurmd", "-f", environment["SLURM_CONF"], "-N", node)
        _await_idle(cluster, NODES)
        yield cluster
    finally:
        cluster.end()


def _await_idle(cluster: Cluster, nodes: Sequence[str]) -> None:
    for _ in range(300):
        with suppress(AssertionError):
            if cluster.run("sinfo", "-h", "-N", "-p", "low", "-t", "idle", "-o", "%N").split() == list(nodes):
                return
        time.sleep(0.1)
    raise AssertionError((cluster.folder / "slurmctld.log").read_text())


def _free_ports(count: int) -> range:
    for first in range(17_000, 19_000, 10):
        with suppress(OSError):
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
            return range(first, first + count)
    raise AssertionError("no free ports")


def _processes() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and int(name) != os.getpid()]


def _environment(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes().replace(b"\0", b"\n").decode(errors="replace")
    return ""


def _command(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    return 0
