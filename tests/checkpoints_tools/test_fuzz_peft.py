"""Whatever an adapter's folder holds, it is read as PEFT and safetensors read it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import strategies as st

from checkpoints_tools.peft import CONFIG, WEIGHTS, convert_from_peft, convert_to_peft
from engine.checkpoint.read import CheckpointReader
from engine.config import AdapterConfig
from tests.checkpoints_tools.test_fuzz_hf import as_json, with_bent_header
from tests.checkpoints_tools.test_peft import write_adapter
from tests.kit.checkpoints import model, write_random
from tests.kit.fuzz import WEIRD, Reader, bent, damaged, fuzz, hostile
from tests.kit.hf_folders import tensors


def test_damaged_adapters(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    config, good = model(), tmp_path / "good"
    base = write_random(tmp_path / "base", config)
    convert_to_peft(write_adapter(tmp_path / "adapter", base, config, AdapterConfig(rank=2)), good)
    about, weights = json.loads((good / CONFIG).read_text()), (good / WEIGHTS).read_bytes()

    def read(folder: Path) -> None:
        """What is accepted has the numbers of the file, and the scale that PEFT would multiply with."""
        adapter = convert_from_peft(folder, base, folder / "out")
        said, found = json.loads((folder / CONFIG).read_bytes()), tensors(folder)
        root = said["r"] ** (0.5 if said.get("use_rslora") else 1.0)
        assert adapter.scale == pytest.approx(said["lora_alpha"] / root), said
        out = CheckpointReader(folder / "out")
        theirs = found["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].float()
        assert torch.equal(out.read("model.layers.0.self_attention.linear_qkv.lora_a")[0], theirs)
        named = sum(value.numel() for name, value in found.items() if ".lora_" in name)
        assert sum(out.read(key).numel() for key in out.keys()) == named

    keys = sorted({*about, "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"})
    other = st.builds(lambda key, value: about | {key: value}, st.sampled_from(keys), WEIRD)
    settings = st.one_of(bent(about).map(as_json), other.map(as_json), damaged((good / CONFIG).read_bytes()), hostile())
    files = st.one_of(
        st.fixed_dictionaries({CONFIG: settings}),
        st.fixed_dictionaries({WEIGHTS: st.one_of(with_bent_header(weights), damaged(weights), hostile())}))
    fuzz(Reader("adapter", read, good), files, request)
