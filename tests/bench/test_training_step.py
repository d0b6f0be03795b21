"""The benchmark of a training step runs: ours, transformers', and a layout in processes of its own."""

from __future__ import annotations

import pytest

from benchmarks.training_step import CPU, SIZES, TORCH_PRODUCTS, running_layout
from engine.bench import step
from engine.bench.step import octant_step, transformers_step
from engine.distributed.mesh import single_mesh
from engine.errors import RequestError


def test_steps_of_one_process_run() -> None:
    pytest.importorskip("transformers")
    config = SIZES["tiny"].config()
    octant_step(config, single_mesh())()
    octant_step(config.with_changes(kernels=TORCH_PRODUCTS), single_mesh())()
    transformers_step(config, CPU)()
    transformers_step(config, CPU, fused=False)()


def test_a_layout_runs_and_reports_its_seconds() -> None:
    with running_layout(SIZES["tiny"].config(tensor=2), threads=1) as step:
        assert 0 < step() < 100


SMALLEST = ["--model", "tiny", "--layers", "1", "--seq-len", "16", "--microbatches", "1", "--repeats", "1"]


def test_the_step_in_parts_names_every_operation(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    assert step.run(SMALLEST) == 0
    out = capsys.readouterr().out
    assert {line.split()[0] for line in out.splitlines() if "×" in line and line.startswith("  ")} == {
        "transformers", "octant"}
    rows = {line[:26].strip(): line[26:].split() for line in out.partition("by operation")[2].splitlines()[1:]}
    assert rows.keys() - {step.OTHER} == set(step.OWNERS.values())
    assert sum(float(row[1].rstrip("%")) for row in rows.values()) == pytest.approx(100, abs=1)


def test_an_absent_peer_and_impossible_numbers_are_said(monkeypatch: pytest.MonkeyPatch,
                                                        capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("engine.bench.step.find_spec", lambda name: None)
    step.run(SMALLEST)
    assert "transformers: not installed here" in capsys.readouterr().out
    with pytest.raises(RequestError, match="at least 1"):
        step.run(["--micro", "0"])
    with pytest.raises(RequestError, match="did you mean `tiny`"):
        step.run(["--model", "tinny"])
