"""`octant bench mfu`: what is measured, what is kept and told of it.  No test depends on how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import cli
from engine.bench.mfu import Measured, measure
from engine.bench.mfu_rows import HEAD, Rows, cells, failed_row, identity, markdown, row_of, strong, weak
from engine.bench.stalls import CAUSES
from engine.config import Config
from engine.distributed.mesh import single_mesh
from engine.distributed.topology import Topology
from engine.plan.devices import device, device_of_driver
from engine.plan.job import Planned
from engine.plan.stages import all_stages
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import tiny_config

ROOT = Path(__file__).resolve().parents[2]
MEASURED = Measured((2.0, 1.0, 1.5), {"compute": 1.0, "tensor_comm": 0.5}, 2**30)
LAYOUTS = {"tensor_comm": {"tensor": 2}, "pipeline_bubble": {"pipeline": 2}, "data_comm": {"data": 2}}


def _measured(configs: list[Config]) -> list[dict[str, Any]]:
    return [asdict(measure(config, mesh_for(Topology.of(config)), steps=2, warmup=2)) for config in configs]


def sized(**sections: Any) -> Config:
    size = {"num_layers": 4, "hidden_size": 128, "num_heads": 8, "num_kv_heads": 8, "ffn_hidden_size": 344,
            "vocab_size": 500, "max_seq_len": 128}
    return tiny_config(model=size, data={"seq_len": 128}, batch={"micro": 2, "global": 8},
                       kernels={"linear": "torch", "weight_gradient": "torch"}, **sections)


def test_memory_is_what_the_plan_says() -> None:
    """In one process: between several, gloo copies what it sums up, sooner or later."""
    config = sized()
    measured = measure(config, single_mesh(), steps=1, warmup=1)
    assert measured.memory_bytes == pytest.approx(all_stages(config, on_gpu=False)[0].total, rel=0.03)


def test_a_step_is_taken_apart() -> None:
    """Every layout waits for its own axis and no other."""
    configs = [sized(parallel=parallel) for parallel in LAYOUTS.values()]
    results, others = run_distributed(_measured, 2, configs)
    assert results == others                                   # all ranks know
    for waited, result in zip(LAYOUTS, results, strict=True):
        assert len(result["seconds"]) == 2 and tuple(result["causes"]) == CAUSES
        assert sum(result["causes"].values()) == pytest.approx(sum(result["seconds"]) / 2)
        assert result["causes"]["compute"] > 0 and result["causes"]["optimizer"] > 0
        for cause in LAYOUTS:                                  # the norm's sums go along every axis, after the passes
            assert (result["causes"][cause] > 0) == (cause == waited), (waited, result["causes"])


def row(world: int, batch: int, seconds: float = 1.0, **layout: int) -> dict[str, Any]:
    config = tiny_config(parallel={"data": world} | layout, batch={"micro": 1, "global": batch})
    return row_of(config, "NVIDIA H100 80GB HBM3", 1, 989.0, Measured((seconds,), {"compute": seconds}, 5),
                  Planned(config, device("h100-sxm")))


def test_a_row_says_which_mfu_it_means_and_has_the_plan_beside_it() -> None:
    config = tiny_config(precision={"compute": "bf16"})
    made = row_of(config, "NVIDIA H100 80GB HBM3", 1, 989.0, MEASURED, Planned(config, device("h100-sxm")))
    assert made["step_seconds"] == 1.5 and made["seconds"] == [2.0, 1.0, 1.5]
    assert made["tokens_per_second"] == config.batch.global_ * config.data.seq_len / 1.5
    assert 0 < made["mfu"] < made["mfu_full"] and made["mfu"] == pytest.approx(made["tflops_per_device"] / 989)
    plan = made["predicted"]
    assert sum(plan["breakdown"].values()) == pytest.approx(plan["step_seconds"])
    assert set(plan["breakdown"]) <= set(CAUSES)
    assert row(1, 4)["mfu"] is None                            # of fp32: the peak is that of bf16
    unknown = row_of(config, "NVIDIA Something", 1, None, MEASURED, None)
    assert unknown["mfu"] is None and unknown["predicted"] is None
    assert cells([unknown])[0][HEAD.index("MFU causal")] == "n/a"


def test_efficiency_is_against_the_fewest_devices_of_the_same_kind() -> None:
    one, two, four = row(1, 4), row(2, 8, 1.25), row(4, 8)
    other = row(2, 8, 1.0, tensor=2, data=1)
    rows = [one, two, four, other]
    assert (weak(one, rows), weak(two, rows), strong(two, rows), strong(four, rows)) == (1.0, 0.8, 1.0, 0.625)
    assert weak(four, rows) is None and strong(one, rows) is None and weak(other, rows) is None
    table = cells([*rows, failed_row(tiny_config(), "x", 1, "no memory\nat all")])
    assert {len(each) for each in table} == {len(HEAD)} and any("no memory" in each for each in table)
    assert "| 80.0% |" in markdown(rows, {"command": "c"})


def test_rows_are_kept_and_a_failed_one_is_tried_again(tmp_path: Path) -> None:
    path, config = tmp_path / "new" / "rows.json", tiny_config()
    job = identity(config, "cpu")
    Rows(path).add(failed_row(config, "cpu", 1, "killed"))
    assert Rows(path).measured(job) is None
    Rows(path).add(row_of(config, "cpu", 1, None, MEASURED, None))
    found = Rows(path)
    assert len(found.rows) == 1 and found.measured(job) == found.rows[0]
    assert identity(tiny_config(batch={"micro": 2}), "cpu") != job != identity(config, "another")
    assert identity(config.with_changes(run={"dir": "elsewhere"}, steps=7), "cpu") == job
    assert json.loads(path.read_text())["environment"]["machine"]


def octant(*words: str, processes: int = 0) -> subprocess.CompletedProcess[str]:
    starter = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", "--rdzv-backend=c10d",
               "--rdzv-endpoint=127.0.0.1:0"] if processes else []
    small = ["tiny", "run.device=cpu", "data.seq_len=32", "batch.global=4", "--steps", "1", "--warmup", "1"]
    return subprocess.run([sys.executable, *starter, "-m", "engine", "bench", "mfu", *small, *words], cwd=ROOT,
                          capture_output=True, text=True, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"})


def test_a_sweep_goes_on_under_another_launcher(tmp_path: Path) -> None:
    rows, told, drawn = (tmp_path / name for name in ("rows.json", "rows.md", "rows.svg"))
    done = octant("--processes", "2", "--layout", "tensor=2", "--json", str(rows))
    assert done.returncode == 0, done.stderr
    assert "1 steps to be timed" in done.stdout and "USDT" not in done.stderr
    first = rows.read_text()
    done = octant("--layout", "tensor=2", "--layout", "pipeline=2,micro=1", "--json", str(rows),
                  "--markdown", str(told), "--svg", str(drawn), processes=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("measured already") == 1
    kept = json.loads(rows.read_text())["rows"]
    assert kept[0] == json.loads(first)["rows"][0] and len(kept) == 2
    assert (kept[1]["world"], kept[1]["layout"]["pipeline"], kept[1]["layout"]["micro"]) == (2, 2, 1)
    assert told.read_text().count("\n| 2 |") == 4 and drawn.read_text().startswith("<svg")


@pytest.mark.parametrize(("words", "message"), [
    (["--layout", "tensor=3"], "--layout 'tensor=3': this layout cannot work"),
    (["--layout", "tenser=2"], "did you mean"), (["--steps", "0"], "at least one step"),
    (["--weak-of", "3"], "--weak-of 3: batch.global 16 × 2 processes is no multiple of it"),
    (["--layouts", "nowhere.json"], "nowhere.json holds no layouts"),
    (["--show", "nowhere.json"], "there is no nowhere"),
    (["run.objective=ppo", "batch.global=128", "rollout.max_new_tokens=8", "roles.reward=[{load: x}]"],
     "makes its own texts"),
    (["--json", "configs/tiny.yaml"], "not of this command's making"),
])
def test_wrong_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "mfu", "tiny", "run.device=cpu", "--processes", "2", *words]) == 2
    assert message in capsys.readouterr().err


def test_weak_scaling_takes_its_share_of_the_batch(capsys: pytest.CaptureFixture[str],
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    module = __import__("engine.commands._bench_mfu", fromlist=["x"])
    seen: list[Config] = []
    monkeypatch.setattr(module, "_start_each", lambda args, asked, configs: seen.extend(configs) or 0)
    for world in ("1", "2", "4"):
        assert cli.run(["bench", "mfu", "tiny", "--processes", world, "--weak-of", "4", "run.device=cpu"]) == 0
    assert [config.batch.global_ for config in seen] == [4, 8, 16]


@pytest.mark.parametrize(("name", "row"), [
    ("NVIDIA A100-SXM4-80GB", "a100-80g"), ("NVIDIA A100-SXM4-40GB", "a100-40g"), ("NVIDIA H200", "h200"),
    ("NVIDIA H100 80GB HBM3", "h100-sxm"), ("NVIDIA H100 PCIe", None), ("NVIDIA B200", "b200"),
    ("NVIDIA GB200", None), ("NVIDIA GeForce RTX 4090", "rtx-4090"), ("NVIDIA RTX A1000", None),
    ("AMD EPYC 7763", "cpu"), ("Intel(R) Xeon(R) Processor", "cpu"), ("AMD Instinct MI300X", None),
])
def test_devices_by_what_their_driver_says(name: str, row: str | None) -> None:
    found = device_of_driver(name)
    assert (found and found.name) == row


def test_groups_of_layouts_that_are_done_with_are_closed() -> None:
    assert run_distributed(_released, 2) == [2.0, 2.0]


def _released() -> float:
    """In a worker: a job of its own on the default group, whose meshes come and go."""
    from engine.distributed.collectives import all_reduce
    from engine.distributed.mesh import Job
    job, x = Job("cpu", timeout_seconds=60), torch.ones(())
    for _ in range(3):
        mesh = job.mesh(Topology(pipeline=2))
        job.release()
    mesh = job.mesh(Topology(data=2))
    all_reduce(x, mesh.data)
    job.release()
    return float(x)


