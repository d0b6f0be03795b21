"""`octant plan` as users call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cli
from engine.plan.devices import device_named_in

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "llama-65b.yaml")


def test_a_rank_in_words_and_the_schedule_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "new" / "schedule.svg"
    assert cli.run(["plan", CONFIG, "parallel.data=4", "--explain-rank", "3", "--schedule-svg", str(picture)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("1f1b: 8 stages, 512 microbatches — bubble 1.35%, T = 1,557")
    assert f"drawn in {picture}\nrank 3 of 256: " in out
    assert out.endswith(f"\n\nnext: octant plan {CONFIG} parallel.data=4 --explain-rank 255\n")
    assert picture.read_text().startswith("<svg")


@pytest.mark.parametrize(("arguments", "head"), [
    ([], "rank 0 of 2,048:"), (["parallel.data=auto"], "rank 0 of 64:"),
    (["parallel.data=auto", "--gpus", "128"], "rank 0 of 128:"),
])
def test_the_size_of_the_job(arguments: list[str], head: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", CONFIG, "batch.global=64", *arguments, "--explain-rank", "0"]) == 0
    out = capsys.readouterr().out
    same = " ".join([CONFIG, "batch.global=64", *arguments])
    assert out.startswith(head) and out.endswith(f"next: octant plan {same} --schedule-svg schedule.svg\n")


def test_alone_it_prints_the_summary(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", CONFIG]) == 0
    out = capsys.readouterr().out
    for line in ("65,285,660,672 parameters, 65,022,197,760 of them in matrix products",
                 "2,048 processes: tensor 8 × pipeline 8 × context 1 × data 32, sequence parallelism",
                 "schedule 1f1b: 9.9% of a step's time is its bubble", "ZeRO 1, recompute none, bf16",
                 "2,048 sequences × 2,048 tokens = 4,194,304 tokens",
                 "64 microbatches of 1 sequence for each copy of the model",
                 "333,786 steps: 1.4T tokens, 21.4 for each parameter",
                 "3  30 to 39             1.89 GiB   3.77 GiB  361.93 MiB     3.08 GiB",
                 "7  70 to 79, output     1.95 GiB",
                 "On 2,048 × a100-80g\n  fits: 12.8", " a step, ± 6%; ", "tokens a second, MFU 4",
                 " days for 333,786 steps", "of a step: compute "):
        assert line in out, line
    assert max(map(len, out.partition("next:")[0].splitlines())) <= 110
    assert "--gpus N" not in out
    assert cli.run(["plan", CONFIG, "parallel.data=auto"]) == 0
    assert "so this is for 64 processes; --gpus N plans for more" in capsys.readouterr().out


def test_one_object_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", CONFIG, "--gpu", "h100-sxm", "--json"]) == 0
    job = json.loads(capsys.readouterr().out)
    assert (job["world"], job["gpu"], job["fits"], len(job["memory"])) == (2048, "h100-sxm", True, 8)
    for stage in job["memory"]:
        parts = ("parameters", "gradients", "optimizer", "activations", "workspace")
        assert stage["total"] == pytest.approx(sum(stage[part] for part in parts), abs=5)
    assert set(job["breakdown"]) == {"compute", "recompute", "tensor_comm", "pipeline_comm", "pipeline_bubble",
                                     "data_comm", "optimizer"}
    assert sum(job["breakdown"].values()) == pytest.approx(job["step_seconds"], rel=1e-6)
    assert 0 < job["mfu"] < job["mfu_full"] < 1 and job["days"] > 0 and 0 < job["bubble"] < 0.2
    assert job["tokens_per_second"] == pytest.approx(2048 * 2048 / job["step_seconds"])


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_fit_what_they_name(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert device_named_in(str(path)) is not None
    assert cli.run(["plan", str(path)]) == 0
    assert "\n  fits: " in capsys.readouterr().out


def test_a_table_of_how_it_scales(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", CONFIG, "--gpus", "512,1024,2048", "--tokens", "1T"]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split()[:2] == ["devices", "layout"] and len(rows) == 3
    efficiency = [float(row.split()[-3].rstrip("%")) for row in rows]
    assert efficiency[0] == 100 > efficiency[1] > efficiency[2] > 50
    assert cli.run(["plan", CONFIG, "--gpus", "512,1024", "--json"]) == 0
    assert [job["world"] for job in json.loads(capsys.readouterr().out)] == [512, 1024]


def test_a_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "plan.svg"
    small = ["batch.global=32", "--gpus", "8", "--search"]
    assert cli.run(["plan", str(ROOT / "configs" / "llama-7b.yaml"), *small, "--svg", str(picture)]) == 0
    out = capsys.readouterr().out
    for words in ("layouts, the fastest that fit 79.10 GiB", "  1  ", "The second is ", "Faster, but too large:",
                  "With half the memory: "):
        assert words in out, words
    drawn = picture.read_text()
    assert drawn.startswith("<svg") and "activations: " in drawn and "data comm: " in drawn
    assert cli.run(["plan", str(ROOT / "configs" / "llama-7b.yaml"), *small, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    seconds = [job["step_seconds"] for job in found["candidates"]]
    assert seconds == sorted(seconds) and all(job["fits"] for job in found["candidates"])
    assert all("needs" in each["why"] for each in found["excluded"])


@pytest.mark.parametrize(("arguments", "message"), [
    (["--gpus", "8 or 16"], "--gpus 8 or 16: give a number, or several"),
    (["--tokens", "many"], "--tokens many: "),
    (["--gpus", "2047", "--search"], "the nearest numbers of devices that do are 1,024 and 2,048"),
    (["--gpus", "1", "--search"], "nothing fits 1 × a100-80g: of "),
    (["--gpu", "h200-sxm"], "no figures for a device 'h200-sxm'; the nearest is h"),
    (["--explain-rank", "2048"], "there is no rank 2048"),
    (["--explain-rank", "0", "--gpus", "100"], "does not make world size 100"),
    (["--explain-rank", "0", "--gpus", "0"], "does not make world size 0"),
    (["--schedule-svg", "/dev/null/x.svg"], "cannot write /dev/null/x.svg"),
    (["parallel.tenser=2", "--explain-rank", "0"], "did you mean `tensor`?"),
])
def test_wrong_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", CONFIG, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--schedule-svg", "s.svg"], ["--json"], []])
def test_it_needs_no_torch(arguments: list[str], tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = subprocess.run([sys.executable, "-m", "engine", "plan", CONFIG, *arguments], cwd=tmp_path,
                          capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.svg").is_file() == ("s.svg" in arguments)
