"""Multiple choice by log-probability, compared with the log-likelihoods of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from engine import cli
from engine.data.tokenizer import ByteTokenizer
from engine.distributed.topology import Topology
from engine.errors import DataError
from engine.generate.load import Wanted, inference_config, load_model, open_shared
from engine.generate.tasks import Question, log_probs_of, questions_of, read_questions, row_of
from engine.model.parameters import spec_of
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.finished_run import make_run, run_config
from tests.kit.hugging_face import build_twin, load_twin, twin_names
from tests.kit.models import whole_model

BYTES = ByteTokenizer()
RECORDS = [{"question": "Is it?", "choices": ["yes", "no"], "answer": 1},
           {"question": "哪个？", "A": "一", "B": "二", "C": "三", "answer": "C"},
           {"context": "The cat", "choices": [" sat", " flew away at once"], "answer": 0},
           {"sentence_good": "He goes.", "sentence_bad": "He go."},
           {"question": "True?", "mc1_targets": {"choices": ["a", "bb"], "labels": [0, 1]},
            "mc2_targets": {"choices": ["a", "bb", "c"], "labels": [1, 1, 0]}}]


def all_questions() -> list[Question]:
    return [question for record in RECORDS for question in questions_of(record)]


def expected() -> list[list[float]]:
    config = run_config(max_seq_len=64)
    twin = build_twin(config.model, "llama").eval()
    load_twin(twin, twin_names({spec_of(p).name: p.detach() for p in whole_model(config).parameters()}, config.model))
    found = []
    for question in all_questions():
        before = BYTES.encode(question.context) or [BYTES.eod_id]
        found.append([])
        for answer in question.answers:
            ids = torch.tensor([[*before, *BYTES.encode(answer)]])
            with torch.no_grad():
                log_p = twin(ids).logits[0, :-1].log_softmax(-1)
            found[-1].append(log_p.gather(1, ids[0, 1:, None])[len(before) - 1:].sum().item())
    return found


def measured(run: Path, topology: Topology) -> list[float]:
    mesh = mesh_for(topology)
    reader = open_shared(run, mesh)
    rows = [row_of(q.context, answer, BYTES, False) for q in all_questions() for answer in q.answers]
    config = inference_config(reader, topology, Wanted(seq_len=max(len(row.tokens) for row in rows) - 1, micro=3))
    return log_probs_of(load_model(reader, config, mesh), rows)


def test_log_probabilities_are_those_of_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, want = make_run(tmp_path / "run", run_config(max_seq_len=64)), expected()
    flat = [x for row in want for x in row]
    for topology in (Topology(), Topology(tensor=2), Topology(pipeline=2)):
        for got in run_distributed(measured, topology.world_size, run, topology):
            assert got == pytest.approx(flat, rel=1e-5)
    file = tmp_path / "tasks.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in RECORDS), encoding="utf-8")
    assert cli.run(["eval", str(run), "--tasks", str(file), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    picked = [max(range(len(row)), key=row.__getitem__) for row in want]
    right = [1, 2, 0, 0]
    assert told["acc"] == sum(a == b for a, b in zip(picked, right, strict=False)) / 4
    assert told["mc1"] == float(picked[4] == 1)
    shares = [math.exp(x) for x in want[5]]
    assert told["mc2"] == pytest.approx(sum(shares[:2]) / sum(shares), rel=1e-4)


def test_how_answers_are_counted() -> None:
    question = Question("x", ("ab", "a long answer"), (True, False))
    assert question.numbers([-2.0, -3.0]) == {"acc": 1.0, "acc_norm": 0.0}


def test_what_is_no_question_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ('{"question": "x"}', "{", "[]", "", '{"question": "x", "choices": ["a"], "answer": 3}', "[3]"):
        (tmp_path / "t.jsonl").write_text(text)
        with pytest.raises(DataError):
            read_questions(str(tmp_path / "t.jsonl"))
    assert cli.run(["eval", str(tmp_path)]) == 2 and "--tasks FILE" in capsys.readouterr().err
