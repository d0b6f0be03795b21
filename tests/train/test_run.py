"""What a run writes into its folder, and what stops it.  One process, through the command line."""

from __future__ import annotations

import json
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from engine import cli
from engine.config import Config, load_config
from engine.config.phases import OF_CORPORA
from engine.data.indexed import IndexedWriter
from engine.distributed.mesh import single_mesh
from engine.metrics.goodput import CAUSES, PREFIX
from engine.metrics.sinks import JsonlSink
from engine.model.context import Batch
from engine.model.flops import flops_per_token
from engine.model.objective import NEXT_TOKEN
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from engine.optim.schedule import learning_rate
from engine.train.batches import Loader
from engine.train.corpora import Corpora
from engine.train.run_folder import locked
from tests.kit.runs import (
    assert_equal_tensors,
    contents,
    metrics,
    octant_train,
    run_config,
    saved_steps,
    start,
    tensors,
    train,
    train_here,
    trained,
    write_corpus,
)

KEYS = {"step", "loss", "grad_norm", "lr", "tokens", "consumed_samples", "step_seconds", "tokens_per_second",
        "tflops_per_device", "mfu", "memory_bytes", "skipped",
        *(f"timing_s/{phase}" for phase in (*OF_CORPORA.in_step, *OF_CORPORA.besides)),
        "time", "goodput", *(PREFIX + cause for cause in CAUSES), "own_seconds", "waiting_seconds", "slowest_seconds",
        "slowest_rank"}


def test_everything_a_run_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run")
    assert octant_train(config) == 0
    folder = Path(config.run.dir)
    assert {path.name for path in folder.iterdir()} == {".lock", "checkpoints", "config.yaml", "doctor.txt",
                                                        "events.jsonl", "metrics.jsonl", "DONE"}
    assert load_config(folder / "config.yaml") == config
    assert "torch" in (folder / "doctor.txt").read_text()
    assert saved_steps(config) == [2, 4, 5]
    rows = metrics(config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    for row in rows:
        assert row.keys() == KEYS | ({"valid_loss"} if row["step"] == 3 else set())
        assert row["consumed_samples"] == 4 * row["step"] and row["tokens"] == 64 * row["step"]
        assert row["lr"] == learning_rate(row["step"], 5, config.optim)
        assert (row["mfu"], row["skipped"]) == (None, 0)
        assert 0 < row["loss"] < 6 and row["grad_norm"] > 0 and row["memory_bytes"] > 50e6
        assert 0 < sum(row[f"timing_s/{phase}"] for phase in OF_CORPORA.in_step) <= row["step_seconds"]
        assert row["tokens_per_second"] == pytest.approx(64 / row["step_seconds"])
        assert row["tflops_per_device"] == pytest.approx(
            row["tokens_per_second"] * flops_per_token(config.model, config.data.seq_len) / 1e12)
    assert [row["step"] for row in rows if row["timing_s/evaluate"] > 0] == [3]
    assert rows[-1]["loss"] < rows[0]["loss"]
    printed = capsys.readouterr()
    assert printed.err == "" and printed.out.splitlines()[-1].startswith("next: octant report")
    assert sum(line.startswith("step") and "  loss " in line for line in printed.out.splitlines()) == 5


def test_its_config_runs_it_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run")
    octant_train(config)
    before = trained(config)
    capsys.readouterr()
    assert cli.run(["train", str(Path(config.run.dir) / "config.yaml")]) == 0
    assert "nothing to do: step 5 of 5 is done; raise `steps`" in capsys.readouterr().out
    assert (trained(config), saved_steps(config)) == (before, [2, 4, 5])
    again = tmp_path / "again"
    assert cli.run(["train", str(Path(config.run.dir) / "config.yaml"), f"run.dir={again}"]) == 0
    assert [json.loads(line)["loss"] for line in (again / "metrics.jsonl").read_text().splitlines()] == \
        [row[1] for row in before]


def test_a_moved_run_does_not_begin_anew_where_it_was(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record names the old folder, where nothing is left that could be gone on with."""
    config, moved = run_config(tmp_path, "run"), tmp_path / "moved"
    octant_train(config)
    Path(config.run.dir).rename(moved)
    capsys.readouterr()
    assert cli.run(["train", str(moved / "config.yaml")]) == 2
    assert f"to go on here, add run.dir={moved}" in capsys.readouterr().err
    assert not Path(config.run.dir).exists()
    assert cli.run(["train", str(moved / "config.yaml"), f"run.dir={moved}", "steps=6"]) == 0
    assert saved_steps(run_config(tmp_path, "moved")) == [2, 4, 5, 6]


@torch.no_grad()
def trained_model(config: Config, step: int) -> Transformer:
    """Of one process, with the weights of a checkpoint."""
    model = Transformer(config.model)
    weights = tensors(config, step, "model.")
    for parameter in model.parameters():
        parameter.copy_(weights["model." + spec_of(parameter).name])
    return model


def test_the_validation_loss_is_that_of_the_held_out_samples(tmp_path: Path) -> None:
    config = run_config(tmp_path, "run", steps=2, eval={"every": 2, "batches": 3})
    octant_train(config)
    model = trained_model(config, 2)
    with torch.no_grad():
        valid, losses = Corpora.open(config).valid, []
        assert valid is not None
        for first in (0, 4, 8):
            for batch in Loader(valid.sample, config, single_mesh(), NEXT_TOKEN).step(first).microbatches:
                assert batch.labels_SB is not None
                losses.append(F.cross_entropy(model(batch.tokens_SB, batch).flatten(0, 1), batch.labels_SB.flatten()))
    assert metrics(config)[-1]["valid_loss"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-5)


@pytest.mark.parametrize("parallel", [{}, {"data": 2}], ids=str)
def test_an_evaluation_takes_each_window_once(tmp_path: Path, parallel: dict[str, Any]) -> None:
    """7 windows, of which a global batch takes 4: as many batches as the data fill, and the last is smaller."""
    write_corpus(tmp_path / "held", num_tokens=7 * 16 + 5, seed=9)
    sections: dict[str, Any] = {"parallel": parallel, "data": {"valid": [{"path": str(tmp_path / "held")}],
                                                               "train": [{"path": str(tmp_path / "train")}]}}
    small = run_config(tmp_path, "all", steps=1, eval={"every": 1, "batches": 2}, **sections)
    many = run_config(tmp_path, "more", steps=1, eval={"every": 1, "batches": 20}, **sections)
    train(small)
    train(many)
    valid = Corpora.open(many).valid
    assert valid is not None and valid.num_samples == 7
    assert metrics(many)[-1]["valid_loss"] == metrics(small)[-1]["valid_loss"]
    one = run_config(tmp_path, "one", steps=1, batch={"micro": 1, "global": 4}, eval={"every": 0})
    train(one)
    model = trained_model(one, 1)
    with torch.no_grad():
        rows = torch.from_numpy(np.stack([valid.sample(i).tokens for i in range(7)], axis=1))
        logits = model(rows[:-1], Batch(rows[:-1], torch.arange(16).unsqueeze(1)))
        want = F.cross_entropy(logits.flatten(0, 1), rows[1:].flatten()).item()
    assert metrics(many)[-1]["valid_loss"] == pytest.approx(want, rel=1e-5)


def test_held_out_data_without_a_label_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "ones", np.uint16) as writer:
        for token in range(90):
            writer.add_document(np.array([token]))
    config = run_config(tmp_path, "run", data={"document_mask": True, "train": [{"path": str(tmp_path / "train")}],
                                               "valid": [{"path": str(tmp_path / "ones")}]})
    assert octant_train(config) == 2
    assert capsys.readouterr().err.startswith("octant train: ones: not one label counts in the 4 windows of an eval")
    assert octant_train(config, "eval.every=0") == 0


def test_a_finished_run_goes_on_when_steps_is_raised(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run", steps=3)
    octant_train(config)
    capsys.readouterr()
    assert octant_train(config, "steps=6") == 0
    printed = capsys.readouterr().out
    assert "changed since the checkpoint: steps: 3 in the checkpoint, 6 now" in printed
    assert "resumed from" in printed and "(step 3, 12 samples consumed)" in printed
    rows = metrics(config)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["lr"] for row in rows] == [learning_rate(step, 3 if step <= 3 else 6, config.optim)
                                           for step in range(1, 7)]
    assert load_config(Path(config.run.dir) / "config.yaml").steps == 6


def test_fewer_lines_sum_up_the_steps_between_them(tmp_path: Path) -> None:
    """The first step, every third and the last; an evaluation between them has a line of its own."""
    whole = run_config(tmp_path, "whole", steps=8, eval={"every": 4, "batches": 1})
    sparse = run_config(tmp_path, "sparse", steps=8, eval={"every": 4, "batches": 1}, log={"every": 3})
    octant_train(whole)
    octant_train(sparse)
    every, some = ({row["step"]: row for row in metrics(config)} for config in (whole, sparse))
    assert list(some) == [1, 3, 4, 6, 8]
    assert some[4] == {"step": 4, "valid_loss": every[4]["valid_loss"]}
    for step, before in ((1, 0), (3, 1), (6, 3), (8, 6)):
        assert some[step].keys() == every[step].keys()
        assert all(some[step][key] == every[step][key] for key in ("grad_norm", "lr", "tokens"))
        losses = [every[each]["loss"] for each in range(before + 1, step + 1)]
        assert some[step]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-12)
    assert_equal_tensors(tensors(sparse, 8), tensors(whole, 8))


def test_a_loss_summed_up_over_a_restart_is_the_same(tmp_path: Path) -> None:
    """Stopped and saved between two lines: what the next line sums up is part of the state."""
    whole = run_config(tmp_path, "whole", steps=7, log={"every": 3})
    config = run_config(tmp_path, "run", steps=7, log={"every": 3})
    octant_train(whole)
    train_here(config, stop_at=4)
    assert saved_steps(config)[-1] == 5
    octant_train(config)
    assert trained(config) == trained(whole) and [row["step"] for row in metrics(config)] == [1, 3, 6, 7]


def test_one_run_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run", steps=2)
    folder = Path(config.run.dir)
    with locked(folder) as exclusive:
        assert exclusive
        for overrides in ([], ["parallel.data=2"]):                          # refused by the launcher as well
            assert octant_train(config, *overrides) == 2
            holder = f"process {os.getpid()} on "
            assert capsys.readouterr().err.startswith(f"octant train: run.dir {folder} is in use: {holder}")
        assert contents(folder) == {}
    assert octant_train(config) == 0


def test_a_folder_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    for overrides in ([], ["parallel.data=2"]):
        assert octant_train(run_config(tmp_path, "run"), f"run.dir={tmp_path}/file/run", *overrides) == 2
        assert capsys.readouterr().err == (f"octant train: run.dir {tmp_path}/file/run cannot be written (Not a "
                                           "directory): make room, or choose another\n")


def test_a_full_disk_at_the_start_is_one_sentence(tmp_path: Path) -> None:
    """Stood in for by a limit on the size of files; what was there stays as it was."""
    config = run_config(tmp_path, "run", steps=2)
    octant_train(config)
    folder, path = Path(config.run.dir), tmp_path / "run.yaml"
    for name, before in (("run", contents(folder)), ("new", {})):
        process = start("train", path, f"run.dir={tmp_path / name}", "steps=3",
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)))
        error = process.communicate(timeout=120)[1]
        assert process.returncode == 2
        assert error == (f"octant train: run.dir {tmp_path / name} cannot be written (File too large): make room, or "
                         "choose another\n")
        assert contents(tmp_path / name) == before


def test_a_job_that_cannot_fit_is_refused_before_anything_is_built(tmp_path: Path,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    config = run_config(tmp_path, "run")
    assert octant_train(config, "model.num_layers=80", "model.hidden_size=65536", "model.num_heads=512",
                        "model.num_kv_heads=512", "model.head_dim=128", "model.ffn_hidden_size=262144") == 2
    printed = capsys.readouterr()
    assert printed.err.startswith("octant train: this job does not fit: this process would hold ")
    assert "on this machine" in printed.err or "within the limit of" in printed.err
    assert "No change of the layout on as many processes is enough" in printed.err and printed.err.count("\n") == 1


def test_saves_that_fail(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the way that is a warning; at the end it is a failure."""
    config = run_config(tmp_path, "run", steps=5)
    folder = Path(config.run.dir)
    folder.mkdir()
    (folder / "checkpoints").write_text("in the way")
    assert octant_train(config) == 1
    printed = capsys.readouterr()
    assert [line for line in printed.out.splitlines() if "not saved" in line and line.startswith("warning: step 2 ")]
    assert printed.err.startswith("octant train: step 5, the last one, was not saved: ")
    assert "checkpoints" in printed.err and printed.err.count("\n") == 1
    assert len(metrics(config)) == 5
    (folder / "checkpoints").unlink()
    assert octant_train(config) == 0 and saved_steps(config) == [2, 4, 5]


def test_a_full_disk_under_the_metrics_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                            capsys: pytest.CaptureFixture[str]) -> None:
    config, log = run_config(tmp_path, "run", steps=4), JsonlSink.log

    def fail_once(self: JsonlSink, record: dict[str, Any]) -> None:
        if record["step"] == 2:
            raise OSError(28, "No space left on device")
        log(self, record)

    monkeypatch.setattr(JsonlSink, "log", fail_once)
    assert octant_train(config) == 0
    assert "warning: metrics of step 2 could not be written: [Errno 28] No space left on device" in \
        capsys.readouterr().out
    assert [row["step"] for row in metrics(config)] == [1, 3, 4]


@pytest.mark.parametrize(("number", "log_every"), [(signal.SIGTERM, 7), (signal.SIGINT, 1)])
def test_a_signal_saves_and_stops(tmp_path: Path, number: signal.Signals, log_every: int,
                                  capfd: pytest.CaptureFixture[str]) -> None:
    """Also between two logged steps; then the same command goes on, to the same end."""
    whole = run_config(tmp_path, "whole", steps=60, log={"every": log_every}, checkpoint={"every": 0})
    config = run_config(tmp_path, "run", steps=60, log={"every": log_every}, checkpoint={"every": 0})
    octant_train(whole)
    signal.signal(signal.SIGINT, signal.default_int_handler)

    def ask() -> None:
        while not (Path(config.run.dir) / "metrics.jsonl").exists() or len(metrics(config)) < 2:
            time.sleep(0.002)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    assert octant_train(config) == 3
    asking.join()
    printed = capfd.readouterr()
    assert "stopped on request at a saved step; the same command goes on from there" in printed.out
    assert printed.err == "stopping after this step and saving; Ctrl-C again ends at once\n" * (number == signal.SIGINT)
    [step] = saved_steps(config)
    assert 2 <= step < 60
    assert octant_train(config) == 0
    assert trained(config) == trained(whole)
    assert_equal_tensors(tensors(config, 60), tensors(whole, 60))
