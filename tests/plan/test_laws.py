"""The law of scaling: the paper's own numbers, and constants found again from runs that follow others."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import cli
from engine.errors import RequestError
from engine.model.flops import count_parameters
from engine.plan.laws import HOFFMANN, Law, Trained, fit
from tests.kit.layouts import tiny_config

OTHER = Law(irreducible=1.2, a=120.0, b=900.0, alpha=0.27, beta=0.35)
SIZES, LENGTHS = (1e7, 4e7, 2e8, 1e9), (4e8, 3e9, 2e10)


def runs_of(law: Law) -> list[Trained]:
    return [Trained(f"{n:.0e}-{d:.0e}", n, d, law.loss(n, d)) for n in SIZES for d in LENGTHS]


def test_the_numbers_of_the_paper() -> None:
    parameters, tokens = HOFFMANN.best(1e21)
    assert parameters == pytest.approx(1.824e9, rel=1e-3) and tokens == pytest.approx(91.4e9, rel=1e-3)
    assert HOFFMANN.loss(65.2e9, 1.4e12) == pytest.approx(1.9387, abs=5e-5)
    least = HOFFMANN.loss(parameters, tokens)
    assert all(HOFFMANN.loss(parameters * factor, tokens / factor) > least for factor in (0.9, 1.1))


@pytest.mark.parametrize("law", [HOFFMANN, OTHER], ids=["hoffmann", "other"])
def test_a_fit_finds_what_runs_follow(law: Law) -> None:
    found = fit(runs_of(law))
    assert (found.alpha, found.beta) == pytest.approx((law.alpha, law.beta), abs=2e-3)
    assert found.irreducible == pytest.approx(law.irreducible, abs=5e-3)
    assert found.best(1e21)[0] == pytest.approx(law.best(1e21)[0], rel=0.02)


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(RequestError, match=r"need 6 runs or more, of 3 or more sizes .* these are 3 runs of 1 and 3"):
        fit(runs_of(OTHER)[:3])
    with pytest.raises(RequestError, match="the loss has to fall"):
        fit([Trained("", run.parameters, run.tokens, 10 - run.loss) for run in runs_of(OTHER)])


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--budget", "1e21"]) == 0
    assert "1e+21 operations: 1.82B parameters on 91.4B tokens (50.1 for each), loss 2.329" in capsys.readouterr().out
    folders = []
    for hidden in (32, 64, 128):
        for tokens in (10_000, 100_000, 1_000_000):
            folder = tmp_path / f"{hidden}-{tokens}"
            folder.mkdir()
            config = tiny_config(model={"hidden_size": hidden, "ffn_hidden_size": 4 * hidden})
            (folder / "config.yaml").write_text(config.dump())
            loss = OTHER.loss(count_parameters(config.model).total, tokens)
            rows = [{"step": step, "loss": 2 * loss, "tokens": tokens // 2 * step} for step in (1, 2)]
            rows[1]["valid_loss"] = loss
            (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            folders.append(str(folder))
    picture = tmp_path / "laws.svg"
    assert cli.run(["plan", "--budget", "1e15", "--json", "--svg", str(picture), "--runs", *folders]) == 0
    told = json.loads(capsys.readouterr().out)
    assert len(told["runs"]) == 9 and told["law"]["alpha"] == pytest.approx(OTHER.alpha, abs=5e-3)
    assert all(run["predicted"] == pytest.approx(run["loss"], rel=1e-3) for run in told["runs"])
    assert picture.read_text().startswith("<svg")


@pytest.mark.parametrize(("words", "message"), [
    (["--budget", "much"], "--budget much: give floating-point operations"),
    (["tiny", "--budget", "1e21"], "give either a configuration"), ([], "give either a configuration"),
])
def test_wrong_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", *words]) == 2
    assert message in capsys.readouterr().err
