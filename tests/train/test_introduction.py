"""What is said before anything starts: the numbers of the job, in 80 columns."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from engine.config import load_config, resolve_layout
from engine.train.corpora import Corpora
from engine.train.introduction import introduction, short
from tests.kit.runs import ROOT, run_config, write_config, write_corpus


def test_the_numbers_of_a_job(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=50, parallel={"data": 2}, run={"dir": "runs/x"},
                        data={"train": [{"path": write_corpus(tmp_path / "text")}], "valid": []})
    assert introduction(config, Corpora.open(config)) == [
        "runs/x: a model of 47.5 k parameters",
        "50 steps of 64 tokens, 3.20 k tokens in all",
        "2 processes: tensor 1 × pipeline 1 × context 1 × data 2, 1f1b, ZeRO 1",
        "a step: 4 sequences of 16 tokens, 1 at a time",
        "corpus text: 3.00 k tokens, 100.0% of the samples, 1.07 epochs"]


def test_a_large_job_fits_into_80_columns(tmp_path: Path) -> None:
    config = resolve_layout(load_config(ROOT / "configs" / "llama-65b.yaml"), 2048)
    small = run_config(tmp_path, "run")
    lines = introduction(config, Corpora.open(small))
    assert max(map(len, lines)) <= 80
    assert lines[:2] == ["runs/llama-65b: a model of 65.3 B parameters",
                         "333,786 steps of 4.19 M tokens, 1.40 T tokens in all"]


def test_fewer_held_out_windows_than_asked_for_are_said(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", eval={"every": 1, "batches": 100})
    assert introduction(config, Corpora.open(config))[-1] == \
        "evaluation: all 187 held-out windows (eval.batches asks for 400)"


def test_nothing_of_it_imports_torch(tmp_path: Path) -> None:
    """Nor does the rest of what a launcher does before it starts ranks."""
    path = write_config(run_config(tmp_path, "run"), tmp_path / "run.yaml")
    code = ("import sys, engine.commands.train as train\nfrom engine.config import load_config, resolve_layout\n"
            f"config = resolve_layout(load_config({str(path)!r}), 1)\n"
            "train._introduce(config, train._refuse_early(config))\nassert 'torch' not in sys.modules")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("corpus train: 3.00 k tokens")


def test_three_digits() -> None:
    numbers = (7, 512, 999.6, 1234, 47_520, 9.996e6, 6.5e10, 1.4e12)
    assert [short(number) for number in numbers] == ["7", "512", "1.00 k", "1.23 k", "47.5 k", "10.0 M", "65.0 B",
                                                     "1.40 T"]
