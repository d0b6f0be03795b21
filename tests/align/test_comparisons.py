"""Runs on comparisons from file to checkpoint: reward models, DPO with both kinds of reference, ORPO."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from corpus_tools.conversations.start import open_corpora
from engine import cli
from engine.checkpoint.adapted import open_model
from engine.config import Config, ModelConfig
from engine.data.chat.comparisons import ComparisonSource
from engine.errors import ConfigError, DataError
from engine.model.context import Batch
from engine.model.fields import END, MARGIN
from engine.model.parameters import initial_values, spec_of
from engine.model.transformer import Transformer
from engine.report.runs import read_metrics
from tests.align.test_sft import chat_config, write_chats
from tests.kit.distributed import run_distributed
from tests.kit.runs import ROOT, metrics, saved_steps, train_here

SEQ_LEN = 64


def write_pairs(path: Path, number: int = 40, seed: int = 0, answers: int = 2, margins: bool = True) -> Path:
    """The letters of the question sorted are better than unsorted, and those better than none of them."""
    draw = random.Random(seed)
    lines = []
    for index in range(number):
        asked = "".join(draw.sample("abcdefgh", 5))
        right = "".join(sorted(asked))
        if answers == 2:
            record: dict[str, Any] = {"prompt": asked, "chosen": right, "rejected": asked + "?"}
            if margins and index % 2:
                record["margin"] = 0.5
        else:
            said = [right, asked, "xx", "yy"][: answers - index % 2]
            record = {"prompt": asked, "responses": said, "ranks": [*range(1, len(said) + 1)]}
        lines.append(json.dumps(record))
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files of comparisons, and a base that was fine-tuned in `base`."""
    place = tmp_path_factory.mktemp("comparisons")
    for name, seed, answers in (("pairs", 0, 2), ("held", 1, 2), ("ranked", 2, 4)):
        write_pairs(place / f"{name}.jsonl", seed=seed, answers=answers)
    write_chats(place / "train.jsonl")
    run(chat_config(place, "base", steps=2))
    return place


def run(config: Config, stop_at: int | None = None, crash_after: int | None = None) -> list[Any]:
    open_corpora(config, say=lambda line: None)
    return run_distributed(train_here, config.parallel.world_size, config, stop_at, crash_after)


def comparison_config(place: Path, name: str, objective: str, steps: int = 4, files: str = "pairs",
                      **sections: dict[str, Any]) -> Config:
    data = {"train": [{"path": str(place / f"{files}.jsonl")}],
            "valid": [{"path": str(place / ("held.jsonl" if files == "pairs" else "ranked.jsonl"))}]}
    model = {"vocab_size": 257, "max_seq_len": SEQ_LEN} | ({"head": "score"} if objective == "reward" else {})
    defaults: dict[str, dict[str, Any]] = {
        "run": {"dir": str(place / name), "device": "cpu", "objective": objective},
        "data": {"tokenizer": "bytes", "template": "plain", "seq_len": SEQ_LEN, **data}, "model": model,
        "checkpoint": {"every": 2, "keep": 0, "load": str(place / "base")}}
    return chat_config(place, name, steps, **{section: defaults.get(section, {}) | sections.get(section, {})
                                              for section in defaults.keys() | sections.keys()})


def source_of(config: Config) -> ComparisonSource:
    source = open_corpora(config, say=lambda line: None).train.sources[0]
    assert isinstance(source, ComparisonSource)
    return source


def test_a_sample_is_a_row_for_each_answer(place: Path) -> None:
    source = source_of(comparison_config(place, "rows", "reward"))
    records = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    for window in range(source.num_windows):
        first = source.window(window, 0)
        [second] = first.rest
        record = records[source.records[window]]
        for row, key in ((first, "chosen"), (second, "rejected")):
            [end] = row.extra[END].nonzero()[0]
            text = bytes(row.tokens[row.tokens < 256].tolist()).decode()
            assert text == record["prompt"] + record[key] and row.tokens[end] == 256        # the end of the text
            learned = row.tokens[1:][row.loss_mask]
            assert bytes(learned[learned < 256].tolist()).decode() == record[key]
            assert row.extra[MARGIN] == record.get("margin", 0.0)


def test_prompts_with_fewer_answers_have_rows_of_padding(place: Path) -> None:
    config = comparison_config(place, "rows", "reward", files="ranked", reward={"loss": "kwise"})
    source = source_of(config)
    samples = [source.window(window, 0) for window in range(source.num_windows)]
    counts = [sum(bool(row.extra[END].any()) for row in (sample, *sample.rest)) for sample in samples]
    assert sorted(set(counts)) == [3, 4]
    with pytest.raises(DataError, match=r"4 ranked answers, and reward.answers is 3"):
        source_of(config.with_changes(reward={"answers": 3}))


@pytest.mark.parametrize(("changes", "message"), [
    ({"seq_len": 4}, "prompt longer than the context"), ({"seq_len": 9, "too_long": "stop"}, "set data.too_long to"),
])
def test_what_does_not_fit_is_refused_by_name(place: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"pairs.jsonl, line \d+: .*{message}"):
        source_of(comparison_config(place, "long", "dpo", data=changes))


def test_what_does_not_fit_is_cut_or_left_out_and_counted(place: Path) -> None:
    cut = source_of(comparison_config(place, "long", "reward", data={"seq_len": 9}))
    assert cut.num_cut == cut.num_windows == 40 and cut.window(0, 0).extra[END].nonzero()[0] == [8]
    with pytest.raises(DataError, match="none of its 40 comparisons fits"):
        source_of(comparison_config(place, "long", "dpo", data={"seq_len": 4, "on_error": "skip"}))


def test_files_of_the_wrong_kind_are_refused(place: Path) -> None:
    with pytest.raises(DataError, match="it has one answer, and pairs are needed here"):
        source_of(comparison_config(place, "wrong", "dpo", data={"train": [{"path": str(place / "train.jsonl")}]}))


DPO_LAYOUTS: dict[str, dict[str, Any]] = {"single": {}, "tensor × pipeline": {"tensor": 2, "pipeline": 2},
                                          "data × context": {"data": 2, "context": 2, "zero": 3}}


@pytest.mark.parametrize("layout", DPO_LAYOUTS)
def test_dpo_begins_even_and_is_the_same_in_every_layout(place: Path, layout: str) -> None:
    """The reference is what the run begins with, so its first loss is log 2, and no reward is other than 0."""
    single, config = (comparison_config(place, f"dpo {name}", "dpo", steps=6, parallel=DPO_LAYOUTS[name],
                                        optim={"lr": 0.01}, eval={"every": 6, "batches": 2})
                      for name in ("single", layout))
    if not (place / "dpo single" / "metrics.jsonl").exists():
        run(single)
    if layout != "single":
        run(config)
    first, last = metrics(config)[0], metrics(config)[-1]
    assert first["loss"] == pytest.approx(0.693147, abs=2e-6) and first["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert last["loss"] < 0.6 and last["rewards/accuracies"] > 0.9 and last["valid_loss"] < 0.65
    for mine, theirs in zip(metrics(config), metrics(single), strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_live_reference_is_the_cached_one(place: Path) -> None:
    """Bit for bit: the same kernels, once with the adapter switched off, once before it is there."""
    adapter = {"rank": 4, "targets": ["all-linear"]}
    cached, live = (comparison_config(place, f"adapter {kind}", "dpo", adapter=adapter, dpo={"reference": kind},
                                      parallel={"tensor": 2, "data": 2}, optim={"lr": 0.05})
                    for kind in ("cached", "live"))
    run(cached)
    run(live)
    assert (place / "adapter cached" / "reference").exists() and not (place / "adapter live" / "reference").exists()
    names = ("loss", "rewards/chosen", "rewards/margins", "grad_norm", "valid_loss")
    values = [[tuple(row.get(name) for name in names) for row in metrics(config)] for config in (cached, live)]
    assert values[0] == values[1] and values[0][-1][0] < 0.69


def test_a_resumed_run_uses_what_was_kept_and_only_that(place: Path) -> None:
    def config(name: str) -> Config:
        return comparison_config(place, name, "dpo", optim={"lr": 0.01})

    run(config("whole"))
    run(config("interrupted"), crash_after=3)
    [file] = (place / "interrupted" / "reference").glob("pairs*")
    before = file.stat().st_mtime_ns
    run(config("interrupted"))
    assert file.stat().st_mtime_ns == before and saved_steps(config("interrupted")) == [2, 4]
    rows = [[row["loss"] for row in metrics(config(name))] for name in ("whole", "interrupted")]
    assert rows[0] == rows[1]
    data = bytearray(file.read_bytes())
    data[-3] ^= 1                                                     # a bit of the last number
    file.write_bytes(data)
    run(Config.model_validate(config("interrupted").to_dict() | {"steps": 6}))
    assert file.read_bytes() != bytes(data)
    kept = (place / "whole" / "reference" / file.name).read_bytes()
    assert file.read_bytes() == kept


def test_dpo_without_a_model_to_begin_with_is_refused(place: Path) -> None:
    with pytest.raises(AssertionError, match="compares with the model that the run begins with"):
        run(comparison_config(place, "nothing", "dpo", checkpoint={"load": None}))
    with pytest.raises((ConfigError, ValueError), match="without its adapter"):
        comparison_config(place, "nothing", "dpo", dpo={"reference": "live"})


@pytest.mark.parametrize(("files", "keys"), [("pairs", {}), ("ranked", {"loss": "kwise", "center": 0.01})])
def test_a_reward_model_learns_the_order(place: Path, files: str, keys: dict[str, Any]) -> None:
    config = comparison_config(place, f"reward {files}", "reward", steps=30, files=files, reward=keys,
                               optim={"lr": 0.01}, eval={"every": 30, "batches": 4}, checkpoint={"every": 0},
                               parallel={"pipeline": 2, "tensor": 2})
    run(config)
    last = metrics(config)[-1]
    assert last["valid_accuracy"] >= 0.95 and last["valid_margin"] > 0.5
    assert open_model(place / f"reward {files}").metadata["config"]["model"]["head"] == "score"


def test_orpo_learns_the_order(place: Path) -> None:
    config = comparison_config(place, "orpo", "orpo", steps=12, optim={"lr": 0.01}, orpo={"lambda": 1.0},
                               parallel={"data": 2}, checkpoint={"every": 0})
    run(config)
    first, last = metrics(config)[0], metrics(config)[-1]
    assert last["loss"] < first["loss"] and last["loss/odds_ratio"] < first["loss/odds_ratio"] - 0.02


def test_a_reward_model_takes_the_base_and_a_new_score(place: Path) -> None:
    config = comparison_config(place, "fresh", "reward", steps=1, optim={"lr": 1e-9, "weight_decay": 0.0})
    run(config)
    base, reader = open_model(place / "base"), open_model(place / "fresh")
    key = "model.layers.2.mlp.linear_fc2.weight"
    assert torch.allclose(reader.read(key), base.read(key), atol=1e-7)
    model = Transformer(config.model)
    assert model.score is not None
    spec = spec_of(model.score.weight)
    assert torch.allclose(reader.read("model.score.weight"), initial_values(spec, config.run.seed), atol=1e-7)
    assert spec.init_std == pytest.approx((config.model.hidden_size + 1) ** -0.5)


@pytest.fixture(scope="module")
def trained_scorer(place: Path) -> Path:
    """A reward model in a run's folder, with an adapter."""
    run(comparison_config(place, "scorer", "reward", steps=5, optim={"lr": 0.05}, eval={"every": 4, "batches": 4},
                          adapter={"rank": 4}, parallel={"tensor": 2}, checkpoint={"every": 0}))
    return place / "scorer"


def scored(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli.run(["score", *words, "--json", "--device", "cpu"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith("{")]


def test_scores_are_those_of_the_plain_model(place: Path, trained_scorer: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    *rows, last = scored(capsys, str(trained_scorer), "--data", str(place / "held.jsonl"), "--batch-size", "3")
    reader = open_model(trained_scorer)
    model = Transformer(ModelConfig.model_validate(reader.metadata["config"]["model"]))
    for parameter in model.parameters():
        parameter.data.copy_(reader.read(f"model.{spec_of(parameter).name}"))
    records = [json.loads(line) for line in (place / "held.jsonl").read_text().splitlines()]
    for row, record in zip(rows, records, strict=True):
        for key in ("chosen", "rejected"):
            tokens = torch.tensor([*(record["prompt"] + record[key]).encode(), 256]).unsqueeze(1)
            with torch.no_grad():
                want = model(tokens, Batch(tokens, torch.arange(len(tokens)).unsqueeze(1)))[-1, 0]
            assert row[key] == pytest.approx(want.item(), abs=1e-5)
        assert row["margin"] == pytest.approx(row["chosen"] - row["rejected"])
    accuracy = sum(row["margin"] > 0 for row in rows) / len(rows)
    assert last["summary"]["accuracy"] == accuracy and last["summary"]["pairs"] == 40


def test_the_scale_of_scores_lies_in_the_checkpoint(place: Path, trained_scorer: Path,
                                                    capsys: pytest.CaptureFixture[str]) -> None:
    """They are evaluated once more at the end, so that it is of the very weights."""
    *rows, _ = scored(capsys, str(trained_scorer), "--data", str(place / "held.jsonl"))
    first = rows[:16]                                                    # as many as an evaluation has samples
    normal = torch.tensor([row["normalised"] for row in first])
    assert abs(normal.mean()) < 1e-3 and abs(normal.std(correction=0) - 1) < 1e-3
    raw = [row[key] for row in first for key in ("chosen", "rejected")]
    scale = open_model(trained_scorer).metadata["score_scale"]
    assert scale["mean"] == pytest.approx(sum(raw) / len(raw), abs=1e-4)


def test_conversations_and_ranks_are_scored_too(place: Path, trained_scorer: Path,
                                                capsys: pytest.CaptureFixture[str]) -> None:
    *rows, _ = scored(capsys, str(trained_scorer), "--data", str(place / "ranked.jsonl"))
    assert {len(row["scores"]) for row in rows} == {3, 4}
    *rows, last = scored(capsys, str(trained_scorer), "--data", str(place / "train.jsonl"))
    assert len(rows) == 60 and "score" in rows[0] and "accuracy" not in last["summary"]


def test_a_language_model_gives_no_scores(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["score", str(place / "base"), "--data", str(place / "held.jsonl"), "--device", "cpu"]) == 2
    assert "gives no scores" in capsys.readouterr().err


def generated(capsys: pytest.CaptureFixture[str], *words: str) -> list[dict[str, Any]]:
    capsys.readouterr()
    assert cli.run(["generate", *words, "--json", "--device", "cpu", "--max-new-tokens", "6", "--seed", "3"]) == 0
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_the_best_of_more_is_better(place: Path, trained_scorer: Path, tmp_path: Path,
                                    capsys: pytest.CaptureFixture[str]) -> None:
    """Its scores are those of `octant score`, its winners a file for SFT, all its answers one for a reward model."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("hbdca\ngfeab\ncadbe\n")
    words = (str(place / "base"), "--chat", "--prompt-file", str(prompts), "--reward-model", str(trained_scorer))
    few, many = (generated(capsys, *words, "--best-of", str(number)) for number in (2, 12))
    assert sum(row["score"] for row in many) > sum(row["score"] for row in few)
    for row in many:
        assert row["score"] == max(row["scores"]) and len(row["scores"]) == 12
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]
    winners = tmp_path / "winners.jsonl"
    winners.write_text("\n".join(json.dumps(row) for row in many if row["messages"][1]["content"].strip()))
    *rows, _ = scored(capsys, str(trained_scorer), "--data", str(winners))
    kept = [row["score"] for row in many if row["messages"][1]["content"].strip()]
    assert [row["score"] for row in rows] == pytest.approx(kept, abs=1e-4)
    every = generated(capsys, *words, "--best-of", "4", "--keep-all", "--batch-size", "5")
    assert all(row["scores"] == sorted(row["scores"], reverse=True) and len(row["responses"]) == 4 for row in every)


def test_best_of_in_a_layout_chooses_the_same(place: Path, trained_scorer: Path) -> None:
    words = ["generate", str(place / "base"), "--prompt", "hbdca", "--best-of", "4", "--reward-model",
             str(trained_scorer), "--json", "--device", "cpu", "--max-new-tokens", "6"]
    rows = []
    for layout in ([], ["--tensor", "2"], ["--pipeline", "2"]):
        done = subprocess.run([sys.executable, "-m", "engine", *words, *layout], cwd=ROOT, capture_output=True,
                              text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        rows.append(json.loads(done.stdout))
    for row in rows[1:]:
        assert row["completion"] == rows[0]["completion"]
        assert row["scores"] == pytest.approx(rows[0]["scores"], abs=1e-5)


@pytest.mark.parametrize(("words", "message"), [
    (["--best-of", "4"], "--best-of N, above 1, and --reward-model CHECKPOINT go together"),
    (["--best-of", "4", "--reward-model", "x", "--temperature", "0"], "would be the same"),
    (["--best-of", "2", "--reward-model", "BASE"], "gives no scores"),
])
def test_impossible_choices_are_refused(place: Path, words: list[str], message: str,
                                        capsys: pytest.CaptureFixture[str]) -> None:
    base = str(place / "base")
    words = [base if word == "BASE" else word for word in words]
    assert cli.run(["generate", base, "--prompt", "a", "--device", "cpu", "--max-new-tokens", "4", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("objective", ["reward", "dpo", "orpo"])
def test_stopped_in_the_middle_it_goes_on_in_any_layout(place: Path, objective: str) -> None:
    """Bit for bit in the same layout, within fp32's noise in another."""
    def config(name: str, **layout: Any) -> Config:
        return comparison_config(place, f"{objective} {name}", objective, steps=5, parallel=layout,
                                 batch={"global": 4, "micro": 2}, optim={"lr": 1e-3, "eps": 1e-2})

    run(config("whole"))
    for name, layout in (("same", {}), ("tensor", {"tensor": 2}), ("pipeline, sharded", {"pipeline": 2, "data": 2,
                                                                                         "zero": 3})):
        run(config(name), stop_at=3)
        run(config(name, **layout))
        records = (read_metrics(Path(config(each).run.dir) / "metrics.jsonl") for each in (name, "whole"))
        got, want = ([(row["step"], row["loss"], row["grad_norm"]) for row in rows] for rows in records)
        if not layout:
            assert got == want
        for ours, theirs in zip(got, want, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4)
