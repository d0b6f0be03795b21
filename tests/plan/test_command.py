"""`octant plan` as users call it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine import cli

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
                 "3  30 to 39             1.89 GiB   3.77 GiB  361.93 MiB  6.01 GiB",
                 "7  70 to 79, output     1.95 GiB", "activations of at most 8 microbatches"):
        assert line in out, line
    assert max(map(len, out.partition("next:")[0].splitlines())) <= 100
    assert "--gpus N" not in out
    assert cli.run(["plan", CONFIG, "parallel.data=auto"]) == 0
    assert "one copy of the model; --gpus N plans for more" in capsys.readouterr().out


@pytest.mark.parametrize(("arguments", "message"), [
    (["--explain-rank", "2048"], "there is no rank 2048"),
    (["--explain-rank", "0", "--gpus", "100"], "does not make world size 100"),
    (["--explain-rank", "0", "--gpus", "0"], "does not make world size 0"),
    (["--schedule-svg", "/dev/null/x.svg"], "cannot write /dev/null/x.svg"),
    (["parallel.tenser=2", "--explain-rank", "0"], "did you mean `tensor`?"),
])
def test_wrong_requests(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", CONFIG, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_picture_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['torch'] = None\n")
    done = subprocess.run([sys.executable, "-m", "engine", "plan", CONFIG, "--schedule-svg", "s.svg"], cwd=tmp_path,
                          capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s.svg").is_file()
