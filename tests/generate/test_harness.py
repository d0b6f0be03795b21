"""lm-evaluation-harness on a model in any layout says what its own path for Hugging Face models says."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from corpus_tools.tokenizers.export import export_hf_tokenizer
from engine import cli
from engine.data.tokenizer import ByteTokenizer
from engine.distributed.topology import Topology
from engine.generate.load import Wanted, inference_config, load_model, open_shared
from engine.model.parameters import spec_of
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.finished_run import make_run, run_config
from tests.kit.hugging_face import build_twin, load_twin, twin_names
from tests.kit.models import whole_model

pytest.importorskip("lm_eval", reason="pip install lm_eval")
transformers = pytest.importorskip("transformers")

LONGEST = 48
PAIRS = [("The cat", " sat"), ("The cat", " flew away at once"), ("", "alone"), ("a " * 40, "far behind"), ("去", "了")]
TEXTS = ["short", "a text that is longer than the model can read at once, so that it comes in windows " * 2]
GOING_ON = [("Once", {"until": ["e"], "max_gen_toks": 12}), ("x" * 60, {"until": ["\n\n"], "max_gen_toks": 8}),
            ("Twice", {"until": ["e"], "max_gen_toks": 12})]

Answers = tuple[list[tuple[float, bool]], list[float], list[str]]


def asked(model: Any) -> Answers:
    """All three questions of the harness."""
    def requests(arguments: list[Any]) -> list[Any]:
        return [SimpleNamespace(args=each) for each in arguments]

    return (model.loglikelihood(requests(PAIRS)), model.loglikelihood_rolling(requests([(text,) for text in TEXTS])),
            model.generate_until(requests(GOING_ON)))


def ours(run: Path, topology: Topology) -> Answers:
    from engine.generate.harness import OctantModel  # needs lm_eval

    mesh = mesh_for(topology)
    reader = open_shared(run, mesh)
    config = inference_config(reader, topology, Wanted(seq_len=LONGEST, micro=3))
    return asked(OctantModel(load_model(reader, config, mesh), ByteTokenizer()))


def theirs(folder: Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    config = run_config(max_seq_len=LONGEST)
    twin = build_twin(config.model, "llama").eval()
    load_twin(twin, twin_names({spec_of(p).name: p.detach() for p in whole_model(config).parameters()}, config.model))
    export_hf_tokenizer(ByteTokenizer(), folder)
    return HFLM(pretrained=twin, tokenizer=transformers.AutoTokenizer.from_pretrained(folder), batch_size=2,
                device="cpu", max_length=LONGEST)


def test_every_layout_says_what_the_harness_says_of_transformers(
        tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    run, peer = make_run(tmp_path / "run", run_config(max_seq_len=LONGEST)), theirs(tmp_path / "hf")
    want = asked(peer)
    for topology in (Topology(), Topology(tensor=2), Topology(pipeline=2)):
        for got in run_distributed(ours, topology.world_size, run, topology):
            assert [x for x, _ in got[0]] == pytest.approx([x for x, _ in want[0]], rel=1e-5)
            assert [greedy for _, greedy in got[0]] == [greedy for _, greedy in want[0]]
            assert got[1] == pytest.approx(want[1], rel=1e-5)
            assert got[2] == want[2]
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tasks").mkdir()
    questions = [{"q": "The cat", "choices": ["sat", "flew away"], "a": 0},
                 {"q": "He", "choices": ["go", "goes"], "a": 1}]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions))
    task = {"task": "octant_quiz", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(
        tmp_path / "q.jsonl")}}, "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "a",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]}
    (tmp_path / "tasks" / "quiz.yaml").write_text(yaml.safe_dump(task))
    command = ["eval", str(run), "--harness", "octant_quiz", "--include", str(tmp_path / "tasks"), "--json"]
    assert cli.run(command) == 0
    said = json.loads(capsys.readouterr().out.strip().splitlines()[-1])["octant_quiz"]
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    found = simple_evaluate(peer, tasks=["octant_quiz"], task_manager=manager, bootstrap_iters=0)
    peers = found["results"]["octant_quiz"]
    assert {key: said[key] for key in ("acc,none", "acc_norm,none")} == {
        key: peers[key] for key in ("acc,none", "acc_norm,none")}
