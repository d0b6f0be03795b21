"""A family of Hugging Face models is a row: it is then written and read.  The row is that of docs/extending.md."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import checkpoints_tools.families as families
from checkpoints_tools.families import FAMILIES, Family
from checkpoints_tools.from_hf import convert_from_hf
from checkpoints_tools.to_hf import convert_to_hf
from engine.checkpoint.read import CheckpointReader
from engine.errors import CheckpointError
from tests.kit.checkpoints import model, write_random
from tests.kit.page import run_example

CONFIG = {"qk_norm": True, "mlp_bias": True, "attention_bias": True, "num_kv_heads": 2}


def add(patch: pytest.MonkeyPatch) -> None:
    made = run_example("EXAMPLE = Family", Family=Family, SAME=families.SAME)["EXAMPLE"]
    patch.setitem(FAMILIES, made.name, made)


def test_one_row_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add(monkeypatch)
    reader = write_random(tmp_path / "ours", model(**CONFIG))
    convert_to_hf(reader, tmp_path / "hf", check=False)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["architectures"], written["model_type"], written["attention_bias"], written["hidden_act"]) == \
        (["ExampleForCausalLM"], "example", True, "silu")
    names = load_file(tmp_path / "hf" / "model.safetensors").keys()
    assert {"model.layers.1.self_attn.query_norm.weight", "model.layers.1.mlp.up_proj.bias"} <= names
    convert_from_hf(tmp_path / "hf", tmp_path / "back", check=False)
    back = CheckpointReader(tmp_path / "back")
    assert back.metadata["config"]["model"] == reader.metadata["config"]["model"]
    assert all(torch.equal(back.read(key), reader.read(key)) for key in reader.keys())


def test_without_the_row_nobody_knows_it(tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model(**CONFIG))
    with pytest.MonkeyPatch.context() as patch:
        add(patch)
        convert_to_hf(reader, tmp_path / "hf", check=False)
    with pytest.raises(CheckpointError, match=r"no class of transformers computes this model .*qk_norm: true"):
        convert_to_hf(reader, tmp_path / "again", check=False)
    with pytest.raises(CheckpointError, match=r"ExampleForCausalLM.*Octant converts LlamaForCausalLM"):
        convert_from_hf(tmp_path / "hf", tmp_path / "back", check=False)
    assert not (tmp_path / "again").exists() and not (tmp_path / "back").exists()
