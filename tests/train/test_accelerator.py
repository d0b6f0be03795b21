"""On a make-believe accelerator: nothing on the wrong device, and nothing that the host waits for in a steady step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from engine.data.indexed import IndexedWriter
from tests.align.test_sft import write_chats
from tests.kit.programs import output_of
from tests.kit.runs import LAYOUTS, write_corpus

SMALL = {"hidden_size": 16, "num_heads": 2, "num_kv_heads": 2, "ffn_hidden_size": 32}
NEW_TOKENS = 3                           # as many as the program asks for


def told(cases: list[dict[str, Any]]) -> list[Any]:
    """What the program says of each case: what the host read, or what went wrong."""
    said = output_of("-m", "tests.kit.accelerator", json.dumps(cases))
    return [json.loads(line) for line in said.splitlines() if line.startswith(('"', "{"))]


def case(parallel: dict[str, Any], **more: Any) -> dict[str, Any]:
    """As few layers and microbatches as the layout takes."""
    stages = parallel.get("pipeline", 1)
    layers = max(2, stages * parallel.get("virtual_stages", 1))
    return {"parallel": parallel, "model": SMALL | {"num_layers": layers},
            "batch": {"global": parallel.get("data", 1) * max(2, stages)}} | more


def require(cases: list[dict[str, Any]], found: list[Any], expected: Any) -> None:
    assert len(found) == len(cases)
    wrong = [f"{case}: {what}" for case, what in zip(cases, found, strict=True) if what != expected]
    assert not wrong, "\n".join(wrong)


def test_a_run_waits_only_where_it_may(tmp_path: Path) -> None:
    """The first and the last rank of every kind of layout, with and without documents; and a step that does wait.

    Nothing is read in a step, and an evaluation once.  A save may wait; it copies to the host what is on the device.
    """
    with IndexedWriter(tmp_path / "documents", np.uint16) as writer:
        for length in range(2, 60):
            writer.add_document(np.arange(length))
    documents = [{"path": str(tmp_path / "documents")}]
    masked = {"data": {"document_mask": True, "train": documents, "valid": documents}}
    names = ("single", "interleaved", "zero 2", "zero 3", "context", "tensor × pipeline", "tensor × zero 1",
             "zb-v × zero 2")
    layouts: list[dict[str, Any]] = [
        *(LAYOUTS[name] for name in names), {"recompute": "full"}, {"recompute": "selective"},
        {"data": 4, "zero_shard": 2}, {"data": 2, "reproducible": True}, {"pipeline": 2, "schedule": "zb-h1"}]
    cases = [case(parallel, last=last) for parallel in layouts
             for last in ((False, True) if "pipeline" in parallel else (False,))]
    cases += [case(parallel, **masked) for parallel in ({"data": 2}, {"context": 2})]
    cases += [case({}, precision={"compute": "bf16"})]
    *found, read = told([*cases, case({}, read=True)])
    require(cases, found, {"evaluation": ["[2]"]})
    assert "DataDependentOutputException" in read and "num_steps" in read


def test_fine_tuning_waits_only_where_it_may(tmp_path: Path) -> None:
    """Several conversations in a sequence, with and without pretraining data; each in a sequence of its own."""
    chats, text = str(write_chats(tmp_path / "chats.jsonl")), write_corpus(tmp_path / "text")
    data = {"tokenizer": "bytes", "template": "plain", "seq_len": 64, "train": [{"path": chats}],
            "valid": [{"path": chats}]}
    with_text = [{"path": chats}, {"path": text, "kind": "pretrain"}]
    layouts: list[dict[str, Any]] = [{}, {"tensor": 2, "pipeline": 2}, {"context": 2, "data": 2, "zero": 3}]
    cases = [case(parallel) | {"run": {"objective": "sft"}, "data": data} for parallel in layouts]
    cases += [cases[0] | {"data": data | {"pack": False}},
              cases[0] | {"data": data | {"train": with_text}, "sft": {"ptx_weight": 0.5}}]
    model, saves = {"vocab_size": 257, "max_seq_len": 64}, {"every": 0, "resume": "never", "keep_best": False}
    cases = [each | {"model": each["model"] | model, "checkpoint": saves} for each in cases]
    *sums, with_ptx = told(cases)
    require(cases[:-1], sums, {"evaluation": ["[2]"]})
    assert with_ptx == {"evaluation": ["[6]"]}


def test_a_model_in_use_waits_only_where_it_may() -> None:
    """`octant eval` reads its sums once, generation the ids that it has chosen; on the first and the last rank."""
    names = ("single", "tensor", "pipeline", "zero 0", "tensor × pipeline")
    cases = [case(LAYOUTS[name] | {"zero": 0}, last=last, use=True) for name in names
             for last in ((False, True) if "pipeline" in name else (False,))]
    cases += [case({"zero": 0}, precision={"compute": "bf16"}, use=True)]
    found = told(cases)
    for piped in (True, False):                # each of two stages has a text to work on
        those = [i for i, each in enumerate(cases) if (each["parallel"].get("pipeline", 1) > 1) == piped]
        reads = ["[2, 1]"] * 2 * NEW_TOKENS if piped else ["[2, 2]"] * NEW_TOKENS
        require([cases[i] for i in those], [found[i] for i in those], {"evaluation": ["[2]"], "generation": reads})
