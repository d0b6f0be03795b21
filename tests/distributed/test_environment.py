"""Who am I: torchrun's variables, SLURM's, or neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.config import ParallelConfig
from engine.distributed.environment import child_environment, first_host, gpu_generation, launch_environment, tune_gpu
from engine.errors import RequestError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
SLURM = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[1-2]",
         "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0"}


def test_torchrun() -> None:
    found = launch_environment(TORCHRUN)
    assert found is not None
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("torchrun", 5, 8, 1)
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 29500)


def test_torchrun_inside_a_slurm_step_is_torchrun() -> None:
    found = launch_environment(SLURM | TORCHRUN)
    assert found is not None and found.launcher == "torchrun"


def test_slurm_with_a_task_per_device() -> None:
    found = launch_environment(SLURM)
    assert found is not None
    assert (found.launcher, found.rank, found.world_size, found.local_rank) == ("slurm", 3, 4, 1)
    assert found.master_addr == "n1"
    other_rank = launch_environment(SLURM | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0"})
    assert other_rank is not None and other_rank.master_port == found.master_port
    for change in ({"SLURM_JOB_ID": "78"}, {"SLURM_STEP_ID": "1"}, {"SLURM_RESTART_COUNT": "1"}):
        other = launch_environment(SLURM | change)
        assert other is not None and other.master_port != found.master_port


def test_what_the_batch_script_sets_wins() -> None:
    found = launch_environment(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "1234"})
    assert found is not None and (found.master_addr, found.master_port) == ("head", 1234)


@pytest.mark.parametrize("environ", [
    {}, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, SLURM | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_started_plainly(environ: dict[str, str]) -> None:
    assert launch_environment(environ) is None


@pytest.mark.parametrize(("change", "name"), [({"RANK": "x"}, "RANK"), ({"MASTER_PORT": ""}, "MASTER_PORT")])
def test_rubbish_is_named(change: dict[str, str], name: str) -> None:
    with pytest.raises(RequestError, match=name):
        launch_environment(TORCHRUN | change)


@pytest.mark.parametrize(("nodes", "host"), [
    ("n1", "n1"), ("n1,n2", "n1"), ("gpu[007-009,12],login", "gpu007"), ("a[3,5]-ib", "a3-ib"), ("r1-n[10]", "r1-n10")])
def test_first_host(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_no_host_at_all() -> None:
    with pytest.raises(RequestError, match="MASTER_ADDR"):
        first_host("")


def test_a_world_of_another_size_is_refused() -> None:
    environ = TORCHRUN | {"RANK": "0", "WORLD_SIZE": "1"}
    assert launch_environment(environ | {"OCTANT_WORLD_SIZE": "1"}) == launch_environment(environ)
    with pytest.raises(RequestError, match="torchrun started 1 processes, the batch script asked for 2,048"):
        launch_environment(environ | {"OCTANT_WORLD_SIZE": "2048"})


def test_a_child_reads_what_its_parent_wrote() -> None:
    environ = child_environment(2, 4, Path("/tmp/meeting/store"), Path("runs/x"), {"PATH": "/bin"})
    found = launch_environment(environ)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.init_method) == (2, 4, 2, "file:///tmp/meeting/store")
    assert found.logs == Path("runs/x")
    assert found.master_addr == "127.0.0.1" and environ["GLOO_SOCKET_IFNAME"].startswith("lo")
    assert environ["NCCL_SOCKET_IFNAME"].startswith("lo")
    assert environ["PATH"] == "/bin" and int(environ["OMP_NUM_THREADS"]) >= 1
    assert child_environment(0, 1, Path("store"), Path(), {"OMP_NUM_THREADS": "3"})["OMP_NUM_THREADS"] == "3"


def test_a_step_with_gpus_by_task_gives_each_process_its_own() -> None:
    for change in ({"SLURM_GPUS_PER_TASK": "1"}, {"SLURM_TRES_PER_TASK": "cpu=8,gres/gpu=1"},
                   {"SLURM_GPU_BIND": "single:1"}):
        found = launch_environment(SLURM | change)
        assert found is not None and found.own_device
    for environ in (SLURM, SLURM | {"SLURM_GPUS_ON_NODE": "1", "CUDA_VISIBLE_DEVICES": "0"},
                    TORCHRUN | {"SLURM_GPUS_PER_TASK": "1"}):
        found = launch_environment(environ)
        assert found is not None and not found.own_device


@pytest.mark.parametrize(("parallel", "expected"), [
    ({}, {}), ({"tensor": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}), ({"tensor": 2, "zero": 3}, {}),
    ({"context": 2}, {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}),
    ({"reproducible": True}, {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"})])
def test_cuda_is_set_up_for_the_layout(parallel: dict[str, Any], expected: dict[str, str]) -> None:
    environ: dict[str, str] = {}
    tune_gpu(ParallelConfig(**parallel), environ)
    assert environ == {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"} | expected
    chosen = dict.fromkeys(environ, "the user's")
    tune_gpu(ParallelConfig(**parallel), chosen)
    assert set(chosen.values()) == {"the user's"}


@pytest.mark.parametrize(("generation", "set_to"), [(7, None), (8, "1"), (9, "1"), (10, None), (12, None), (None, "1")])
def test_one_connection_where_the_gpu_wants_it(generation: int | None, set_to: str | None) -> None:
    environ: dict[str, str] = {}
    tune_gpu(ParallelConfig(tensor=2), environ, lambda: generation)
    assert environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == set_to


@pytest.mark.parametrize(("failing", "expected"), [(None, 9), ("nvmlInit_v2", None),
                                                   ("nvmlDeviceGetCudaComputeCapability", None)])
def test_what_the_driver_says_of_the_gpu(failing: str | None, expected: int | None,
                                         monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(name: str) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            for argument in arguments if name.endswith("Capability") else ():
                if hasattr(argument, "_obj"):
                    argument._obj.value = 9
            return int(name == failing)
        return call

    library = SimpleNamespace(**{name: answer(name) for name in (
        "nvmlInit_v2", "nvmlDeviceGetHandleByIndex_v2", "nvmlDeviceGetCudaComputeCapability")})
    monkeypatch.setattr("ctypes.CDLL", lambda name: library)
    assert gpu_generation() == expected
