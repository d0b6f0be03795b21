"""What failures cost: by hand, by a simulation of the same job, and as the command says it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from engine import cli
from engine.plan.goodput import LLAMA_3, Failures, Times, best_interval, shares, young

MONTE_CARLO = [Times(11_135, 300, 30), Times(11_135, 60, 2), Times(2_000, 120, 60), Times(40_000, 900, 10)]


def test_by_hand() -> None:
    """Llama 3's: 54 × 86,400 / 419 = 11,135 s.  M e^(300/M) (e^(1830/M) − 1) = 11,135 × 1.02731 × 0.17862 = 2,043 s."""
    times = Times(LLAMA_3.mean_seconds(16_384), restart=300, save=30)
    assert times.failure == pytest.approx(11_135, rel=1e-4)
    assert LLAMA_3.mean_seconds(2_048) == pytest.approx(8 * times.failure)
    found = shares(times, 1_800)
    assert found.training == pytest.approx(1_800 / 2_043, rel=2e-4)
    assert found.saving == pytest.approx(30 / 2_043, rel=2e-4)
    assert found.restarting == pytest.approx(1 - math.exp(-300 / 11_135), rel=1e-4)
    assert sum(vars(found).values()) == pytest.approx(1)


@pytest.mark.parametrize("times", MONTE_CARLO, ids=str)
def test_the_best_interval(times: Times) -> None:
    """No other is better; Young's is its first order, and Daly's third order lies within a hundredth."""
    best = best_interval(times)
    assert all(shares(times, best).training >= shares(times, best * factor).training for factor in (0.5, 0.99, 1.01, 2))
    small = times.save / (2 * times.failure)
    daly = young(times) * (1 + math.sqrt(small) / 3 + small / 9) - times.save
    assert best == pytest.approx(daly, rel=0.01)
    assert best < young(times) < 1.3 * best + times.save


def simulated(times: Times, interval: float, seed: int, failures: int = 40_000) -> tuple[float, float]:
    """Shares of training and of restarting of a job that meets with so many failures, event by event."""
    random = np.random.default_rng(seed)
    total = worth = restarting = since_start = 0.0
    written: list[float] = []                                # of this start: when its saves count
    for gap in random.exponential(times.failure, failures):
        total += gap
        spent = min(gap, times.restart)
        restarting += spent
        left = gap - spent
        if spent < times.restart:
            continue
        saves = int(left // (interval + times.save))
        written = [n for n in (saves - 1, saves) if n > 0 and n * (interval + times.save) + times.write <= left]
        since_start = max(written, default=0) * interval
        worth += since_start
    return worth / total, restarting / total


@pytest.mark.parametrize(("times", "write"), [(times, 0.0) for times in MONTE_CARLO] + [(MONTE_CARLO[0], 200.0)],
                         ids=str)
def test_a_simulation_agrees(times: Times, write: float) -> None:
    times = Times(times.failure, times.restart, times.save, write)
    for interval in (best_interval(times), 2 * best_interval(times)):
        training, restarting = simulated(times, interval, seed=1)
        assert shares(times, interval).training == pytest.approx(training, abs=0.006)
        assert shares(times, interval).restarting == pytest.approx(restarting, abs=0.003)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["goodput", "--gpus", "16384", "--restart-seconds", "300", "--save-seconds", "30",
                    "--step-seconds", "10"]) == 0
    said = capsys.readouterr().out
    assert "419 in 54 days on 16,384 GPUs (Llama 3, arXiv:2407.21783, section 3.3.4): on 16,384 one in 3.09 h" in said
    assert "save every      13.3 min, 80 steps (Young's first order: 13.6 min)" in said
    assert cli.run(["goodput", "--gpus", "2048", "--failures", "10", "--days", "5", "--on", "1024", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["times"]["failure"] == Failures(10, 5, 1024).mean_seconds(2048) == 21_600
    assert record["goodput"] == pytest.approx(record["intervals"]["best"]) == record["shares"]["training"]


@pytest.mark.parametrize("wrong", [["--gpus", "0"], ["--gpus", "8", "--save-seconds", "0"],
                                   ["--gpus", "8", "--restart-seconds", "-1"], ["--gpus", "8", "--days", "nan"]])
def test_numbers_out_of_their_range(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["goodput", *wrong]) == 2
    assert f"{wrong[-2]} {wrong[-1]}: a number" in capsys.readouterr().err
