"""Who am I among the processes of this job?  The only place that reads the launcher's environment variables.

Two launchers are understood.  torchrun sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.  `srun` with one
task per device sets SLURM_PROCID, SLURM_STEP_NUM_TASKS and SLURM_LOCALID; the rendezvous address is then the first
host of the step's node list, and the port follows from job and restart, so that a requeued job never meets its
predecessor's sockets.  Started plainly there is neither, and the caller launches local processes itself, each with
the variables of `child_environment`: torchrun's, but for a file (OCTANT_STORE) in which the ranks meet, so that nothing
listens on the network, and the folder whose `logs/` takes their output (OCTANT_LOGS).

A batch script or an interactive shell inside an allocation has SLURM variables too, but no step of several tasks: that
counts as started plainly.
"""

from __future__ import annotations

import ctypes
import os
import re
import socket
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engine.config import ParallelConfig
from engine.errors import RequestError

FIRST_PORT, NUM_PORTS = 20_000, 10_000                       # below the ports that the kernel hands out itself


@dataclass(frozen=True)
class LaunchEnvironment:
    """This process's place in the job, as its launcher says.

    Attributes:
        store: the file in which the ranks meet; None: at `master_addr` and `master_port`.
        logs: the folder whose `logs/` takes this rank's output (OCTANT_LOGS); None: the launcher's business.
        local_world_size: ranks on this host, as far as the launcher says.
        own_device: each process sees its own GPU only (`srun --gpus-per-task=1`).
    """

    launcher: Literal["torchrun", "slurm", "octant"]
    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int
    store: str | None = None
    logs: Path | None = None
    local_world_size: int = 1
    own_device: bool = False

    @property
    def ranks_on_host(self) -> range:
        """This host's ranks; launchers number them one behind the other."""
        first = self.rank - self.local_rank
        return range(first, min(first + self.local_world_size, self.world_size))

    @property
    def init_method(self) -> str:
        """Where the ranks meet, as `torch.distributed.init_process_group` wants it."""
        if self.store is not None:
            return f"file://{self.store}"
        # torchrun keeps a store of its own that its workers join; torch finds it through the environment
        return "env://" if self.launcher == "torchrun" else f"tcp://{self.master_addr}:{self.master_port}"

    def expect(self, world_size: int) -> LaunchEnvironment:
        """The same, unless the job came up with fewer or more processes than its batch script asked for.

        Raises:
            RequestError: it did.  torchrun, for one, starts a world of one, and calls it a success, on a node whose
                clock is behind.
        """
        if self.world_size != world_size:
            raise RequestError(
                f"{self.launcher} started {self.world_size:,} processes, the batch script asked for {world_size:,} "
                "(nodes × GPUS_PER_NODE): a node that did not join, a wrong --nproc-per-node, or a wrong clock")
        return self


def launch_environment(environ: Mapping[str, str] = os.environ) -> LaunchEnvironment | None:
    """What the launcher says, or None for a process that was started plainly.

    Raises:
        RequestError: a variable is missing or is not a number, or there are not as many processes as the batch script
            asked for (OCTANT_WORLD_SIZE).
    """
    launched = _launched(environ)
    if launched is None or launched.launcher == "octant" or "OCTANT_WORLD_SIZE" not in environ:
        return launched
    return launched.expect(_number(environ, "OCTANT_WORLD_SIZE"))


def _launched(environ: Mapping[str, str]) -> LaunchEnvironment | None:
    if "OCTANT_STORE" in environ:
        return LaunchEnvironment("octant", _number(environ, "RANK"), _number(environ, "WORLD_SIZE"),
                                 _number(environ, "LOCAL_RANK"), "127.0.0.1", 0, environ["OCTANT_STORE"],
                                 Path(environ["OCTANT_LOGS"]), _number(environ, "LOCAL_WORLD_SIZE", "1"))
    logs = Path(environ["OCTANT_LOGS"]) if "OCTANT_LOGS" in environ else None
    if "RANK" in environ and "WORLD_SIZE" in environ:
        return LaunchEnvironment(
            "torchrun", _number(environ, "RANK"), _number(environ, "WORLD_SIZE"), _number(environ, "LOCAL_RANK", "0"),
            environ.get("MASTER_ADDR", "127.0.0.1"), _number(environ, "MASTER_PORT"), logs=logs,
            local_world_size=_number(environ, "LOCAL_WORLD_SIZE", "1"))
    if "SLURM_PROCID" in environ and _number(environ, "SLURM_STEP_NUM_TASKS", "1") > 1:
        return LaunchEnvironment(
            "slurm", _number(environ, "SLURM_PROCID"), _number(environ, "SLURM_STEP_NUM_TASKS"),
            _number(environ, "SLURM_LOCALID"), environ.get("MASTER_ADDR") or first_host(_slurm_nodes(environ)),
            _number(environ, "MASTER_PORT", str(_slurm_port(environ))), logs=logs,
            local_world_size=int((re.match(r"\d+", environ.get("SLURM_STEP_TASKS_PER_NODE", "")) or ["1"])[0]),
            own_device=_slurm_binds_gpus(environ))
    return None


def child_environment(rank: int, world_size: int, store: Path, logs: Path,
                      environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of one local process: meeting in `store`, on the loopback interface, a fair share of the cores."""
    threads = max(1, available_cores() // world_size)
    return {"OMP_NUM_THREADS": str(threads)} | dict(environ) | {
        "RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world_size),
        "OCTANT_STORE": str(store), "OCTANT_LOGS": str(logs),
        "GLOO_SOCKET_IFNAME": _loopback_interface(), "NCCL_SOCKET_IFNAME": _loopback_interface()}


def gpu_generation() -> int | None:
    """The major number of the compute capability of this machine's first GPU; None where nobody tells.

    Asked of the driver's library (NVML): torch would start CUDA, which then has read its settings already.
    """
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    gpu, major, minor = ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(gpu)) \
        or nvml.nvmlDeviceGetCudaComputeCapability(gpu, ctypes.byref(major), ctypes.byref(minor))
    return None if failed else major.value


def tune_gpu(parallel: ParallelConfig, environ: MutableMapping[str, str] = os.environ,
             generation: Callable[[], int | None] = gpu_generation) -> None:
    """Sets what this layout wants of CUDA; to be called before torch starts it.  What the user has set stays.

    With one connection kernels start in program order, so a tensor- or context-parallel collective overlaps as written;
    but a message that waits for its peer then blocks what comes behind, so ZeRO 3, which gathers ahead, keeps several.
    That is so on compute capability 8.x and 9.x (A100, H100); from 10.x on kernels that communicate are not held up.
    Segments that grow instead of fragmenting are what buffers that come and go at every microbatch (ZeRO 2 and 3) need.
    """
    wanted = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    if parallel.tensor * parallel.context > 1 and parallel.zero < 3 and generation() in (8, 9, None):
        wanted["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    if parallel.reproducible:
        wanted["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"           # cuBLAS then adds up in one order
    for name, value in wanted.items():
        environ.setdefault(name, value)


def node_name(environ: Mapping[str, str] = os.environ) -> str:
    """What the scheduler calls this machine, else what it calls itself."""
    return environ.get("SLURMD_NODENAME") or socket.gethostname()


def injected_faults(environ: Mapping[str, str] = os.environ) -> str | None:
    """What OCTANT_INJECT holds: faults in YAML, as `reliability.inject` takes them."""
    return environ.get("OCTANT_INJECT") or None


def _loopback_interface() -> str:
    """`lo` on Linux, `lo0` on BSD and macOS."""
    return next(name for _, name in socket.if_nameindex() if name.startswith("lo"))


def available_cores() -> int:
    """Cores this process may run on: a container or a scheduler may grant fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_host(node_list: str) -> str:
    """The first host of SLURM's notation: `gpu[007-009,12],login` -> `gpu007`.

    Raises:
        RequestError: the list is empty or malformed.
    """
    match = re.match(r"([^,\[\]]+)(?:\[(\d+)[^\]]*\])?([^,\[\]]*)", node_list)
    if match is None:
        raise RequestError(f"cannot read a host from SLURM's node list {node_list!r}; set MASTER_ADDR")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + suffix


def _slurm_binds_gpus(environ: Mapping[str, str]) -> bool:
    """Whether the step asked for GPUs by task, or had each task bound to its own."""
    return "SLURM_GPUS_PER_TASK" in environ or "gpu" in environ.get("SLURM_TRES_PER_TASK", "") \
        or environ.get("SLURM_GPU_BIND", "").startswith(("single", "per_task", "map_gpu", "mask_gpu"))


def _slurm_nodes(environ: Mapping[str, str]) -> str:
    return environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")


def _slurm_port(environ: Mapping[str, str]) -> int:
    """Differs between jobs, between the steps of a job and between its restarts; the same for all ranks."""
    job, step, restart = (_number(environ, name, "0") for name in
                          ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return FIRST_PORT + (job * 31 + step * 7 + restart) % NUM_PORTS


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environ.get(name, default)
    if text is None or not text.lstrip("-").isdigit():
        raise RequestError(f"the launcher's variable {name} should be a number, it is {text!r}")
    return int(text)
