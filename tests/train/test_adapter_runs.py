"""Runs that train an adapter: what they save, what they go on from, and the model that comes of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.adapted import AdaptedReader, open_model
from engine.checkpoint.resume import open_checkpoint
from engine.config import AdapterConfig, Config, load_config
from engine.distributed.boxes import Box
from engine.distributed.mesh import single_mesh
from engine.distributed.pieces import Piece
from engine.distributed.topology import Topology
from engine.errors import CheckpointError, ConfigError
from engine.generate.load import inference_config, load_model
from engine.model.adapter import attach_adapters
from engine.model.flops import count_adapter, count_parameters
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from engine.train.corpora import Corpora
from engine.train.introduction import introduction
from tests.kit.reference import global_batch
from tests.kit.runs import LAYOUTS, ROOT, metrics, run_config, saved_steps, train, trained

MODEL = {"num_heads": 8, "num_kv_heads": 4}
ADAPTER = {"rank": 3, "alpha": 5, "targets": ["q_proj", "v_proj", "up_proj", "o_proj", "down_proj", "lm_head"]}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained base in `base`."""
    place = tmp_path_factory.mktemp("adapters")
    train(run_config(place, "base", steps=3, model=MODEL))
    return place


def adapter_run(place: Path, name: str, base: str = "base", **sections: Any) -> Config:
    sections = {"adapter": ADAPTER, "model": MODEL} | sections
    sections["checkpoint"] = {"load": str(place / base)} | sections.get("checkpoint", {})
    return run_config(place, name, **sections)


@pytest.mark.parametrize("layout", ["single", "tensor × pipeline", "zero 3", "zb-v × zero 2"])
def test_a_resumed_run_is_the_same_run(place: Path, layout: str) -> None:
    def run(name: str) -> Config:
        return adapter_run(place, f"{name} {layout}", parallel=LAYOUTS[layout], precision={"compute": "bf16"},
                           adapter=ADAPTER | {"dropout": 0.1})

    want = train(run("whole"))
    train(run("interrupted"), crash_after=3)
    assert saved_steps(run("interrupted")) == [2]
    got = train(run("interrupted"))
    for mine, theirs in zip(got, want, strict=True):
        assert all(torch.equal(a[3], b[3]) for a, b in zip(mine, theirs, strict=True))
    assert trained(run("interrupted")) == trained(run("whole"))


@pytest.fixture(scope="module")
def finished(place: Path) -> Config:
    """An adapter trained for long enough to matter."""
    config = adapter_run(place, "finished", steps=12, optim={"lr": 0.05}, parallel={"tensor": 2})
    train(config)
    losses = [row["valid_loss"] for row in metrics(config) if "valid_loss" in row]
    assert losses[-1] < losses[0] - 0.05
    return config


def test_checkpoints_hold_the_adapter_alone_and_name_what_lies_under_it(place: Path, finished: Config) -> None:
    reader = open_checkpoint(Path(finished.run.dir))
    masters = [key for key in reader.keys() if key.startswith("model.")]
    assert masters and all(".lora_" in key for key in masters)
    assert len(reader.keys()) == 3 * len(masters)
    elements = sum(torch.Size(reader.global_shape(key)).numel() for key in masters)
    assert elements == count_adapter(finished.model, finished.adapter)
    base = open_checkpoint(place / "base")
    assert reader.metadata["base"] == {"path": str(base.path.resolve()), "content": base.content}


def logits_of(model: Transformer, config: Config) -> Tensor:
    batch = global_batch(config, 5)
    with torch.no_grad():
        logits: Tensor = model(batch.tokens_SB, batch)
    return logits


def with_adapter(config: Config) -> Transformer:
    """The plain model with an adapter beside its weights, from the two checkpoints."""
    adapter, base = open_checkpoint(Path(config.run.dir)), open_checkpoint(Path(str(config.checkpoint.load)))
    model = Transformer(config.model)
    assert config.adapter is not None
    attach_adapters(model, config.adapter)
    for parameter in model.parameters():
        key = f"model.{spec_of(parameter).name}"
        parameter.data.copy_((adapter if key in adapter else base).read(key))
    return model


def test_what_is_read_as_one_model_computes_what_was_trained(finished: Config) -> None:
    want = logits_of(with_adapter(finished), finished)
    reader = open_model(Path(finished.run.dir))
    assert isinstance(reader, AdaptedReader)
    config = inference_config(reader, Topology())
    merged = load_model(reader, config, single_mesh()).chunks[0]
    got, bare = logits_of(merged, finished), Transformer(finished.model)
    for parameter in bare.parameters():
        parameter.data.copy_(reader.base.read(f"model.{spec_of(parameter).name}"))
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert (logits_of(bare, finished) - want).abs().max() > 1e-2 * want.abs().max()


def test_any_box_and_any_range_of_a_weight_is_the_same_sum(finished: Config) -> None:
    reader = open_model(Path(finished.run.dir))
    for key in reader.keys():
        whole = reader.read(key)
        box = Box(tuple(n // 3 for n in whole.shape), tuple(n - n // 3 - n // 4 for n in whole.shape))
        assert torch.allclose(reader.read(key, box), whole[box.slices], atol=1e-6)
        a_range = torch.zeros(whole.numel() // 2, dtype=torch.bfloat16)
        reader.load_into([Piece(key, tuple(whole.shape), Box.whole(tuple(whole.shape)), a_range, 3)], convert=True)
        assert torch.equal(a_range, whole.flatten()[3 : 3 + len(a_range)].bfloat16())


def test_an_adapted_model_may_lie_under_another_adapter(place: Path, finished: Config) -> None:
    adapter = {"rank": 2, "targets": ["k_proj", "v_proj"]}
    config = adapter_run(place, "second", base="finished", steps=2, adapter=adapter)
    train(config)
    reader = open_model(Path(config.run.dir))
    assert isinstance(reader, AdaptedReader) and isinstance(reader.base, AdaptedReader)
    first = open_model(Path(finished.run.dir))
    key = "model.layers.1.mlp.linear_fc2.weight"
    assert torch.equal(reader.read(key), first.read(key))


def test_another_model_under_the_adapter_is_refused(place: Path, finished: Config) -> None:
    run = {"dir": str(place / "other"), "device": "cpu", "seed": 3}
    train(run_config(place, "other", steps=3, model=MODEL, run=run))
    shutil.copytree(place / "finished", place / "copied")
    with pytest.raises(AssertionError, match="is not the model that the adapter was trained on"):
        train(adapter_run(place, "copied", base="other", steps=14, parallel={"tensor": 2}))
    with pytest.raises(CheckpointError, match="is not the model that the adapter was trained on"):
        open_model(place / "copied", base=place / "other")
    shutil.copytree(place / "base", place / "moved")
    assert open_model(place / "copied", base=place / "moved").step == 12


@pytest.mark.parametrize(("sections", "message"), [
    ({"adapter": ADAPTER | {"alpha": 7}}, "adapter.alpha: 5.0 in the checkpoint, 7.0 now"),
    ({"adapter": None}, "holds an adapter, and this run trains the whole model"),
])
def test_another_adapter_does_not_go_on(place: Path, finished: Config, sections: dict[str, Any], message: str) -> None:
    config = Config.model_validate(finished.to_dict() | sections | {"steps": 20})
    with pytest.raises(AssertionError, match=message):
        train(config)


def test_an_adapter_on_nothing_is_refused(place: Path) -> None:
    with pytest.raises(AssertionError, match=r"checkpoint\.load says which"):
        train(run_config(place, "nothing", model=MODEL, adapter=ADAPTER))


COUNTS = [({"rank": 8, "targets": ["q_proj", "v_proj"]}, 4_194_304),
          ({"rank": 8, "targets": ["all-linear", "lm_head"]}, 20_277_248),
          ({"rank": 16, "targets": ["all-linear", "lm_head"]}, 40_554_496)]


@pytest.mark.parametrize(("adapter", "count"), COUNTS)
def test_how_much_of_a_7b_model_trains(adapter: dict[str, Any], count: int) -> None:
    config = load_config(ROOT / "configs" / "llama-7b.yaml", []).model
    with torch.device("meta"):
        model = Transformer(config)
    attach_adapters(model, AdapterConfig.model_validate(adapter))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    assert count_adapter(config, AdapterConfig.model_validate(adapter)) == count
    assert count_parameters(config).total == 6_738_415_616


def test_the_start_says_how_much_trains(place: Path, finished: Config) -> None:
    lines = introduction(finished, Corpora.open(finished))
    total, count = count_parameters(finished.model).total, count_adapter(finished.model, finished.adapter)
    assert any(f"{count:,} of {total:,} train" in line for line in lines)


@pytest.mark.parametrize(("sections", "message"), [
    ({"adapter": {"targets": ["q_poj"]}}, "did you mean `q_proj`"),
    ({"adapter": {"targets": []}}, "must be all-linear or a list"),
    ({"adapter": {"targets": ["lm_head"]}, "model": {"tie_embeddings": True}}, "leave lm_head out"),
    ({"adapter": {"targets": ["lm_head"]}, "parallel": {"pipeline": 2}}, "nothing to train"),
    ({"adapter": {"rank": 0}}, "greater than or equal to 1"),
])
def test_impossible_adapters_are_refused(place: Path, sections: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, ValueError), match=message):
        run_config(place, "impossible", **sections)
