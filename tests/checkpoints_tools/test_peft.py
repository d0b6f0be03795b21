"""Adapters in PEFT's format and back, beside PEFT itself where it is installed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoints_tools.check import octant_logits
from checkpoints_tools.peft import convert_from_peft, convert_to_peft
from checkpoints_tools.source import Source
from checkpoints_tools.to_hf import convert_to_hf
from engine import cli
from engine.checkpoint.adapted import BASE, AdaptedReader, Base, open_model
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import write_checkpoint
from engine.config import AdapterConfig, ModelConfig
from engine.distributed.boxes import Box
from engine.errors import CheckpointError
from engine.model.adapter import attach_adapters
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from tests.kit.checkpoints import KINDS, model, random_block, write_random

TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(3))
ADAPTERS: dict[str, dict[str, Any]] = {
    "attention": {"rank": 3, "alpha": 7, "targets": ["q_proj", "v_proj"]},
    "all": {"rank": 4, "alpha": 4, "targets": ["all-linear", "lm_head"]},
    "some": {"rank": 2, "alpha": 1, "targets": ["k_proj", "o_proj", "up_proj", "down_proj"]},
}


def write_adapter(path: Path, base: CheckpointReader, config: ModelConfig, adapter: AdapterConfig) -> CheckpointReader:
    """A checkpoint with an adapter of random numbers on top of `base`, as a run would save it."""
    with torch.device("meta"):
        whole = Transformer(config)
    attach_adapters(whole, adapter)
    shapes = {spec_of(p).name: tuple(p.shape) for p in whole.parameters() if p.requires_grad}
    entries = [Entry(f"model.{name}", shape, Box.whole(shape), torch.float32) for name, shape in shapes.items()]
    metadata = {"config": {"model": config.model_dump(mode="json"), "adapter": adapter.model_dump(mode="json")},
                BASE: Base.of(base).metadata()}
    write_checkpoint(path, 7, metadata, [entries], random_block)
    return CheckpointReader(path)


def ours(reader: CheckpointReader) -> Tensor:
    source = Source.of(reader)
    return octant_logits(source.config, lambda name: reader.read(f"model.{name}").float(), TOKENS)


@pytest.fixture
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[CheckpointReader, CheckpointReader]:
    kind, adapter = request.param
    config = model(**KINDS[kind])
    base = write_random(tmp_path / "base", config)
    return base, write_adapter(tmp_path / "adapter", base, config, AdapterConfig.model_validate(ADAPTERS[adapter]))


CASES = [("grouped", "all"), ("llama", "attention"), ("biased", "some"), ("odd vocabulary", "all")]
every_case = pytest.mark.parametrize("made", CASES, indirect=True, ids=str)


@every_case
def test_there_and_back_is_the_same_bits(made: tuple[CheckpointReader, CheckpointReader], tmp_path: Path) -> None:
    base, adapter = made
    convert_to_peft(adapter, tmp_path / "peft")
    convert_from_peft(tmp_path / "peft", base, tmp_path / "back")
    back = CheckpointReader(tmp_path / "back")
    assert sorted(back.keys()) == sorted(adapter.keys()) and back.metadata[BASE] == adapter.metadata[BASE]
    assert all(torch.equal(back.read(key), adapter.read(key)) for key in adapter.keys())
    assert torch.equal(ours(open_model(tmp_path / "back")), ours(open_model(tmp_path / "adapter")))


@every_case
def test_merged_it_is_a_model_of_transformers(made: tuple[CheckpointReader, CheckpointReader], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    checked = convert_to_hf(open_model(tmp_path / "adapter"), tmp_path / "merged")
    assert checked is not None and "random tokens" in checked.what and checked.largest_difference <= checked.allowed


@every_case
def test_peft_reads_ours_with_the_same_logits(made: tuple[CheckpointReader, CheckpointReader], tmp_path: Path) -> None:
    peft, _ = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base, adapter = made
    convert_to_hf(base, tmp_path / "hf", check=False)
    convert_to_peft(adapter, tmp_path / "peft", str(tmp_path / "hf"))
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft").float().eval()
    want = ours(open_model(tmp_path / "adapter"))
    with torch.no_grad():
        got = theirs(TOKENS).logits
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (got - ours(base)).abs().max() > 1e-2 * want.abs().max()


@pytest.mark.parametrize("settings", [
    {"target_modules": "all-linear", "r": 4, "lora_alpha": 6}, {"target_modules": ["q_proj", "down_proj"], "r": 2},
    {"target_modules": ["v_proj", "lm_head"], "r": 3, "use_rslora": True}], ids=str)
def test_ours_reads_what_peft_saved(settings: dict[str, Any], tmp_path: Path) -> None:
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    base = write_random(tmp_path / "base", model(num_kv_heads=2))
    convert_to_hf(base, tmp_path / "hf", check=False)
    below = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").float()
    theirs = peft.get_peft_model(below, peft.LoraConfig(task_type="CAUSAL_LM", **settings)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.3, generator=generator)
    theirs.save_pretrained(tmp_path / "peft")
    convert_from_peft(tmp_path / "peft", base, tmp_path / "ours")
    reader = open_model(tmp_path / "ours")
    assert isinstance(reader, AdaptedReader)
    with torch.no_grad():
        want = theirs(TOKENS).logits
    assert (ours(reader) - want).abs().max() < 1e-5 * want.abs().max()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder of PEFT's, and `base` beside it."""
    config = model()
    base = write_random(tmp_path / "base", config)
    convert_to_peft(write_adapter(tmp_path / "adapter", base, config, AdapterConfig(rank=2)), tmp_path / "peft")
    return tmp_path / "peft"


@pytest.mark.parametrize(("changes", "message"), [
    ({"peft_type": "IA3"}, "Octant's adapters are LORA"), ({"use_dora": True}, "use_dora is True"),
    ({"bias": "all"}, "leave biases alone"), ({"r": 3}, r"of another shape: .* instead of \[3, 48\]"),
    ({"r": "2"}, "not a whole number"), ({"lora_alpha": float("nan")}, "not a number above 0"),
    ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"), ({"lora_dropout": 3}, "dropout: Input should be less"),
])
def test_what_ours_has_no_place_for_is_refused(saved: Path, changes: dict[str, Any], message: str) -> None:
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        convert_from_peft(saved, CheckpointReader(saved.parent / "base"), saved.parent / "out")
    assert not (saved.parent / "out").exists()


def test_a_head_that_is_another_than_the_models_is_refused(saved: Path) -> None:
    base = CheckpointReader(saved.parent / "base")
    tensors = load_file(saved / "adapter_model.safetensors")
    head = base.read("model.output_layer.weight")
    save_file(tensors | {"base_model.model.lm_head.weight": head}, saved / "adapter_model.safetensors")
    convert_from_peft(saved, base, saved.parent / "same")
    save_file(tensors | {"base_model.model.lm_head.weight": head + 1}, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=r"another lm_head\.weight"):
        convert_from_peft(saved, base, saved.parent / "out")


@pytest.mark.parametrize(("name", "message"), [
    ("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight", "1 tensors missing"),
    (None, "1 tensors unknown to Octant: more"),
])
def test_an_adapter_that_is_not_whole_is_refused(saved: Path, name: str | None, message: str) -> None:
    tensors = load_file(saved / "adapter_model.safetensors")
    if name is None:
        tensors["more"] = torch.ones(1)
    else:
        del tensors[name]
    save_file(tensors, saved / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert_from_peft(saved, CheckpointReader(saved.parent / "base"), saved.parent / "out")


def test_the_commands(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = saved.parent
    assert cli.run(["convert", "from-peft", str(saved), str(place / "ours"), "--base", str(place / "base")]) == 0
    assert cli.run(["convert", "to-peft", str(place / "ours"), str(place / "again")]) == 0
    assert "rank 2, alpha 4, on" in capsys.readouterr().out
    one, other = (load_file(folder / "adapter_model.safetensors") for folder in (saved, place / "again"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert cli.run(["convert", "to-peft", str(place / "base"), str(place / "no")]) == 2
    assert "holds a whole model and no adapter" in capsys.readouterr().err
