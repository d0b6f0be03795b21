"""Preflight: what a node says of itself, who is named and why, and what nodes do together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from engine.launching import node as node_module
from engine.launching.node import about_node, code_hash, disk_speed
from engine.launching.preflight import STAGES, judge, judge_together, main, neighbours, read_lines
from tests.kit.runs import ROOT, run_config, write_config

# Eight GPUs; what a test wants otherwise stands in SMI, question by question.
NVIDIA_SMI = """
import json, os, sys
question = sys.argv[1]
other = json.loads(os.environ.get("SMI", "{}"))
rows = ["NVIDIA H100 80GB HBM3, 580.65.06, 1980, 81559, 4"] * 8 if "name" in question else ["0"] * 8
if "hw_slowdown" in question:
    rows = ["Not Active"] * 8
if question in other:
    rows = other[question]
if rows is None:
    sys.exit("Field is not a valid field to query.")
print("\\n".join(rows))
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A stand-in for nvidia-smi is found first."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(f"#!{sys.executable}\n{NVIDIA_SMI}")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tool.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURMD_NODENAME", "gpu007")
    monkeypatch.setattr(node_module, "RELEASE_SECONDS", 0.0)
    return monkeypatch


@pytest.fixture
def config(tmp_path: Path) -> str:
    return str(write_config(run_config(tmp_path, "run"), tmp_path / "run.yaml"))


def test_what_a_well_node_says(smi: pytest.MonkeyPatch, config: str, tmp_path: Path) -> None:
    told = about_node(config, disk=True)
    assert (told["node"], told["gpus"], told["problems"]) == ("gpu007", 8, [])
    assert told["equal"]["gpu"] == ["NVIDIA H100 80GB HBM3, 1980 MHz"] and told["equal"]["driver"] == ["580.65.06"]
    assert told["equal"]["torch"] and abs(told["time"] - time.time()) < 60 and told["disk_speed"] > 0
    assert not list((tmp_path / "run").glob(".preflight*"))
    again = about_node(config)
    assert again["equal"] == told["equal"] and "disk_speed" not in again
    assert about_node(config, ["optim.lr=1e-5"])["equal"]["config"] != told["equal"]["config"]


@pytest.mark.parametrize(("question", "rows", "problem"), [
    ("--query-gpu=ecc.errors.uncorrected.volatile.total", ["0", "3", *["[N/A]"] * 6],
     "GPU 1: uncorrected memory errors since the last reset (3)"),
    ("--query-remapped-rows=remapped_rows.pending", [*["No"] * 7, "Yes"],
     "GPU 7: memory rows to be remapped: reset it (Yes)"),
    ("--query-gpu=clocks_throttle_reasons.hw_slowdown", ["Active", *["Not Active"] * 7],
     "GPU 0: clocks slowed down by heat or power (Active)"),
    ("--query-gpu=name,driver_version,clocks.max.sm,memory.total,memory.used",
     ["H100, 580, 1980, 81559, 4", "H100, 580, 1980, 81559, 60000"],
     "60000 of 81559 MiB of a GPU's memory are taken by others"),
    ("--query-gpu=clocks_throttle_reasons.hw_slowdown", None, None)])
def test_what_ails_a_gpu(smi: pytest.MonkeyPatch, config: str, question: str, rows: list[str] | None,
                         problem: str | None) -> None:
    """A question that this nvidia-smi does not know is no ailment."""
    smi.setenv("SMI", json.dumps({question: rows}))
    assert about_node(config)["problems"] == ([] if problem is None else [problem])


def test_a_node_without_nvidia_smi_or_with_a_disk_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                                   config: str) -> None:
    monkeypatch.setenv("PATH", "")
    assert about_node(config)["gpus"] == 0
    (tmp_path / "file").touch()
    assert "cannot write in" in about_node(config, [f"run.dir={tmp_path}/file/run"], disk=True)["problems"][0]
    assert "no such file" in about_node(str(tmp_path / "gone.yaml"))["problems"][0].lower()


def test_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_module, "DISK_BYTES", 2 << 20)
    assert 0 < disk_speed(tmp_path / "new") < 1e12


@pytest.mark.parametrize("place", ["engine/errors.py", "engine/parallel/tensor/layers.py", "kernels/triton/rope.py"])
def test_nodes_with_other_code_differ(place: str, tmp_path: Path) -> None:
    """However deep in the tree."""
    path, found = tmp_path / place, []
    path.parent.mkdir(parents=True)
    for text in ("a = 1\n", "a = 2\n", "a = 1\n"):
        path.write_text(text)
        found.append(code_hash(tmp_path))
    assert found[0] == found[2] != found[1]


def told(node: str, **other: Any) -> dict[str, Any]:
    return {"node": node, "time": 101.0, "gpus": 8, "problems": [], "host_memory": 900e9, "disk_speed": 900e6,
            "equal": {"driver": ["580"], "code": "c", "config": "x"}} | other


@pytest.mark.parametrize(("other", "why"), [
    ({"gpus": 7}, "has 7 GPUs of 8"), ({"problems": ["GPU 1: bad", "b"]}, "GPU 1: bad; b"),
    ({"time": 40.0}, "its clock is 60 s behind"), ({"time": 172.5}, "its clock is 70 s ahead"),
    ({"equal": {"driver": ["570"], "code": "c", "config": "x"}}, "driver is 570, most nodes have 580"),
    ({"equal": {"driver": ["580"], "code": "c", "config": "y", "torch": "2"}},
     "config is y, most nodes have x; torch is 2, most nodes have none"),
    ({"host_memory": 20e9}, "has 20.0 GB of host memory free, the median is 900.0"),
    ({"disk_speed": 30e6}, "has 30.0 MB/s to the disk, the median is 900.0"),
    ({"disk_speed": 300e6, "host_memory": 300e9, "time": 106.0}, "")])
@pytest.mark.parametrize("place", [0, 2])
def test_the_odd_one_is_named(other: dict[str, Any], why: str, place: int) -> None:
    """Wherever it stands: also the first is held against what most are like."""
    nodes = ["n1", "n2", "n3", "n4"]
    all_told = [told(node, **(other if index == place else {})) for index, node in enumerate(nodes)]
    expected = dict.fromkeys(nodes, "") | {nodes[place]: why}
    assert judge(all_told, nodes, 8, 100.0, 102.0) == expected
    assert judge(all_told, [*nodes, "n5"], 8, 100.0, 102.0) == expected | {"n5": "does not answer"}


def test_degrees_are_compared_of_nodes_with_gpus_only() -> None:
    """Others may be shared, and slow for a moment."""
    slow = [told(f"n{index}", gpus=0, disk_speed=30e6 if index == 1 else 900e6) for index in range(3)]
    assert not any(judge(slow, ["n0", "n1", "n2"], 0, 100.0, 102.0).values())


def test_nobody_says_anything() -> None:
    assert judge([], ["n1"], 0, 0.0, 1.0) == {"n1": "does not answer"}


# ------------------------------------------------------------------ together

NODES = [f"n{i}" for i in range(6)]


def lines(stage_of: dict[str, str] | None = None, speed: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Two ranks on each node that come as far as is said, and a speed of 10 but for those that are named."""
    found = []
    speeds = dict.fromkeys(NODES, 10.0) | (speed or {})
    for index, node in enumerate(NODES):
        for stage in STAGES:
            pairs = [pair for pair in neighbours(stage, len(NODES)) if index in pair] \
                if stage in ("even", "odd", "ring") else {"computed": [(index,)], "all": [range(6)]}.get(stage, [])
            line: dict[str, Any] = {"node": node, "stage": stage}
            if pairs:
                line["speed"] = min(speeds[NODES[each]] for each in pairs[0])
            found += [line] * 2
            if (stage_of or {}).get(node) == stage:
                break
    return found


def test_all_is_well_together() -> None:
    assert judge_together(lines(), NODES, 2) == dict.fromkeys(NODES, "")


@pytest.mark.parametrize("bad", NODES)
def test_a_slow_node_is_told_from_its_neighbours(bad: str) -> None:
    """At the ends, which have one neighbour in one round only, as well."""
    found = judge_together(lines(speed={bad: 2.0}), NODES, 2)
    assert [node for node in NODES if found[node]] == [bad]
    assert found[bad].startswith("only 2.0 TFLOP/s")
    only_link = [line | {"speed": 10.0} if line["stage"] == "computed" else line for line in lines(speed={bad: 2.0})]
    found = judge_together(only_link, NODES, 2)
    assert [node for node in NODES if found[node]] == [bad]
    assert "2.00 GB/s with its neighbours; the median is 10.00" in found[bad]
    assert not any(judge_together(only_link, NODES, 2, compared=False).values())


def test_one_that_hangs_takes_its_neighbour_along_and_nobody_else() -> None:
    stopped = {"n2": "computed", "n3": "computed", "n1": "even", "n4": "even"}
    found = judge_together(lines(stopped), NODES, 2)
    assert {node: why for node, why in found.items() if why} == {
        "n2": STAGES["even"], "n3": STAGES["even"]}


def test_one_rank_of_a_node_is_enough() -> None:
    some = lines()
    some.remove({"node": "n4", "stage": "computed", "speed": 10.0})
    assert judge_together(some, NODES, 2) == dict.fromkeys(NODES, "") | {"n4": STAGES["computed"]}


def test_a_first_node_that_nobody_reaches() -> None:
    found = judge_together(lines(dict.fromkeys(NODES[1:], "started")), NODES, 2)
    assert found == dict.fromkeys(NODES, "") | {"n0": "nobody reaches it"}
    assert judge_together([], NODES, 2) == dict.fromkeys(NODES, STAGES["started"])


def test_a_wrong_sum() -> None:
    wrong = [*lines(), {"node": "n3", "stage": "all", "wrong": "an all-reduce has a wrong sum"}]
    assert judge_together(wrong, NODES, 2) == dict.fromkeys(NODES, "") | {"n3": "an all-reduce has a wrong sum"}


@pytest.mark.parametrize("nodes", [2, 3, 4, 7, 256])
def test_every_node_has_two_neighbours(nodes: int) -> None:
    rounds = [neighbours(stage, nodes) for stage in ("even", "odd", "ring")]
    assert all(len({node for pair in pairs for node in pair}) == 2 * len(pairs) for pairs in rounds)
    edges = sorted(tuple(sorted(pair)) for pairs in rounds for pair in pairs)
    assert edges == sorted({tuple(sorted((node, (node + 1) % nodes))) for node in range(nodes)})


def test_three_processes_on_three_nodes() -> None:
    """Real ones: all stages, with their speeds."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = [subprocess.Popen(
        [sys.executable, "-m", "engine.launching.preflight", "together", "0"], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL, cwd=ROOT, env=os.environ | {
            "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "3", "SLURM_LOCALID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "1(x3)", "SLURMD_NODENAME": NODES[rank], "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}) for rank in range(3)]
    told = read_lines("".join(process.communicate(timeout=120)[0] for process in started).splitlines())
    assert judge_together(told, NODES[:3], 1, compared=False) == dict.fromkeys(NODES[:3], "")
    assert sorted(line["stage"] for line in told if line.get("speed")) == sorted(
        ["computed"] * 3 + ["even"] * 2 + ["odd"] * 2 + ["ring"] * 2 + ["all"] * 3)


def test_the_judges_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", ["slurmstepd: noise\n", json.dumps(told("n1", time=time.time())), "{}", "[1]"])
    assert main(["judge", "8", str(time.time()), "n1,n2"]) == 0
    assert capsys.readouterr().out == "fit n1\nbad n2 does not answer\n"
    monkeypatch.setattr(sys, "stdin", [json.dumps(line) for line in lines()])
    assert main(["agree", "8", "2", ",".join(NODES)]) == 0
    out, err = capsys.readouterr()
    assert out == "".join(f"fit {node}\n" for node in NODES)
    assert err == ("preflight: at least 10.0 TFLOP/s in a matrix product (median 10.00), 10.00 GB/s with its "
                   "neighbours (median 10.00), 10.00 GB/s over all nodes (median 10.00)\n")
