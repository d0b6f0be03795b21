"""`octant rehearse`: ranks of jobs that are not there, and faults put into the code that it must name.

In processes of their own, because the make-believe accelerator is registered with torch for good.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import load_config, resolve_layout
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.model import mlp
from engine.plan.rehearsal import positions, rehearsal_of, rehearse
from tests.kit.programs import output_of

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs" / "llama-65b.yaml")
SMALL = ["model.num_layers=4", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=4",
         "model.ffn_hidden_size=128", "model.vocab_size=256"]


def told(program: str, *cases: list[str]) -> list[tuple[int, Any]]:
    """What `octant rehearse … --json` says of each case, with its exit code, after `program` has run."""
    text = f"""
import contextlib, io, json, sys
import torch
from engine import cli
{program}
for words in {cases!r}:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = cli.run(["rehearse", *words, "--device", "pretend", "--json"])
    print(json.dumps([code, json.loads(out.getvalue())]))
"""
    said = output_of("-c", text, lacking="has not what fake tensors")
    return [tuple(json.loads(line)) for line in said.splitlines()]


def test_every_position_of_a_large_job_and_every_objective() -> None:
    """The 65B job's layout with a small model, rank by rank; fine-tuning, comparisons and adapters."""
    records = ["run.objective=dpo", "dpo.reference=live", "adapter.rank=2", "adapter.dropout=0.1"]
    several, *others = told("", [CONFIG, *SMALL, "parallel.tensor=2", "parallel.pipeline=4", "data.seq_len=32",
                                 "batch.global=16", "--all-stages", "--world", "8"],
                            ["tiny", "run.objective=sft", "parallel.tensor=2", "--rank", "1", "--world", "2"],
                            ["tiny", *records, "batch.global=2"],
                            ["tiny", "parallel.zero=3", "--world", "64", "batch.global=128", "--rank", "63"])
    code, ranks = several
    assert code == 0 and len(ranks) == 8
    assert {(it["coordinates"]["pipeline"], it["coordinates"]["tensor"]) for it in ranks} == {
        (stage, tensor) for stage in range(4) for tensor in range(2)}
    assert not any(it["faults"] for it in ranks) and all(it["step_seconds"] is None for it in ranks)
    assert ranks[0]["peak_bytes"] > ranks[-3]["peak_bytes"] > 0                # more microbatches are in flight there
    assert [code for code, _ in others] == [0, 0, 0], others
    assert others[2][1]["rank"] == 63 and others[2][1]["phases"].keys() >= {"forward_backward", "update"}


FAULTY = """
from pathlib import Path
from engine.model import mlp
text, plain, run = Path(mlp.__file__).read_text(), mlp.Activation.forward, cli.run
faults = iter({faults!r})
def with_a_fault(words):
    changed = dict(vars(mlp))
    line = "        return self._activate(x if"
    exec(compile(text.replace(line, "        " + next(faults) + chr(10) + line), mlp.__file__, "exec"), changed)
    mlp.Activation.forward = changed["Activation"].forward
    return run(words)
cli.run = with_a_fault
"""


def test_a_fault_is_named() -> None:
    """A line put into a layer: a value read back, a number that is copied, a tensor on the wrong device."""
    faults = {"x.sum().item()": "the host reads a value back from the device, and waits for it: ",
              "x = x * torch.tensor(2.0, device=x.device)": "2.0 is copied to the device, and the host waits for it",
              "x = x + torch.ones(x.shape)": "tensors of different devices meet: "}
    lines = inspect.getsource(mlp).splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.startswith("        return self._activate(x if"))
    program = FAULTY.format(faults=["import torch; " + fault for fault in faults])
    for (code, it), said in zip(told(program, *[["tiny"]] * 3), faults.values(), strict=True):
        assert code == 1
        [fault] = it["faults"]
        assert said in fault and f": engine/model/mlp.py:{number}, in forward: " in fault


def test_on_a_real_device_a_rank_computes_without_its_peers() -> None:
    config = resolve_layout(load_config("tiny", ["parallel.tensor=2", "parallel.pipeline=2", "parallel.data=1"]), 4)
    it = rehearse(config, 3, torch.device("cpu"))
    assert it.step_seconds is not None and it.step_seconds > 0 and not it.faults
    assert 0 < it.phases["forward_backward"] < it.step_seconds


def test_a_rehearsal_is_the_job_with_a_short_step() -> None:
    config = load_config(CONFIG)
    config = resolve_layout(config, 2048)
    short = rehearsal_of(config)
    assert (short.num_microbatches, config.num_microbatches) == (9, 64)
    assert short.parallel == config.parallel.model_copy(update={"check_replicas_every": 0})
    assert len(positions(Topology.of(config))) == 64
    with pytest.raises(RequestError, match="there is no rank 2048: the job has 2,048 processes, ranks 0 to 2047"):
        rehearse(config, 2048, torch.device("cpu"))
