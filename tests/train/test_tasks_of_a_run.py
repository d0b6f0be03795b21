"""Questions asked while a run trains: what `octant eval` says of the checkpoint, and no bit of the training changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine import cli
from engine.config import Config
from engine.errors import RequestError
from engine.generate.tasks import Exam
from tests.generate.test_tasks import RECORDS
from tests.kit.runs import metrics, run_config, train

LAYOUTS: dict[str, dict[str, Any]] = {
    "tensor": {"tensor": 2}, "zb-v": {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2},
    "data and context": {"data": 2, "context": 2, "zero": 3}}


def config_of(folder: Path, name: str, tasks: bool = True, **sections: Any) -> Config:
    (folder / "quiz.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    questions = {"tasks": [str(folder / "quiz.jsonl")], "tasks_every": 2} if tasks else {}
    return run_config(folder, name, steps=4, eval={"every": 3, "batches": 1, **questions}, model={
        "vocab_size": 300, "max_seq_len": 64}, data={"tokenizer": "bytes", "seq_len": 64}, **sections)


def test_they_say_what_eval_says_and_change_no_bit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked, silent = config_of(tmp_path, "asked"), config_of(tmp_path, "silent", tasks=False)
    train(asked)
    train(silent)
    rows = metrics(asked)
    assert [row["loss"] for row in rows] == [row["loss"] for row in metrics(silent)]
    assert [row["grad_norm"] for row in rows] == [row["grad_norm"] for row in metrics(silent)]
    last = {key: x for key, x in rows[-1].items() if key.startswith("tasks/")}
    assert [row["step"] for row in rows if "tasks/quiz/acc" in row] == [2, 4]
    capsys.readouterr()
    assert cli.run(["eval", asked.run.dir, "--tasks", str(tmp_path / "quiz.jsonl"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    names = ("acc", "acc_norm", "mc1", "mc2")
    assert last == pytest.approx({f"tasks/quiz/{key}": told[key] for key in names}, rel=1e-5)
    for name, parallel in LAYOUTS.items():
        cut = config_of(tmp_path, name, parallel=parallel)
        train(cut)
        assert {key: metrics(cut)[-1][key] for key in last} == pytest.approx(last, rel=1e-4), name


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    config = config_of(tmp_path, "x")
    with pytest.raises(RequestError, match=r"tokens, and data\.seq_len is 16"):
        Exam.of(config.with_changes(data={"seq_len": 16}))
    with pytest.raises(RequestError, match="two have the same name"):
        Exam.of(config.with_changes(eval={"tasks": [str(tmp_path / "quiz.jsonl"), "other/quiz.json"]}))
    with pytest.raises(ValueError, match=r"eval\.tasks are texts for"):
        config.with_changes(data={"tokenizer": None})
