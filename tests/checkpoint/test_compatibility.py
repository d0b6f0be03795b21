"""Which differences between a checkpoint and a run are refused, noted, or nobody's business."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.compatibility import HARMLESS, STRETCHABLE, differences, require_compatible
from engine.config import ModelConfig
from engine.errors import CheckpointError

SAVED: dict[str, Any] = {
    "config": {"run": {"dir": "runs/a", "seed": 1}, "steps": 100, "optim": {"lr": 3e-4},
               "model": {"num_layers": 4, "vocab_size": 512, "rope_theta": 1e4, "rope_scaling": None,
                         "max_seq_len": 64},
               "parallel": {"tensor": 2}, "data": {"tokenizer": "a/tok.model", "train": [{"path": "x", "weight": 1.0}]},
               "checkpoint": {"every": 5}, "log": {"every": 1}},
    "data": {"tokenizer": "3f2a", "end_of_document": 2, "train": ["x: 100 tokens"]}}

PLACE = Path("run/checkpoints/step-00000002")


def changed(**values: Any) -> dict[str, Any]:
    """The metadata with `section__key=value` changed."""
    config = {section: dict(keys) if isinstance(keys, dict) else keys for section, keys in SAVED["config"].items()}
    data = dict(SAVED["data"])
    for name, value in values.items():
        section, _, key = name.partition("__")
        if section == "fingerprint":
            data[key] = value
        elif key:
            config[section][key] = value
        else:
            config[section] = value
    return {"config": config, "data": data}


@pytest.mark.parametrize(("change", "key"), (
    ({"model__num_layers": 5}, "model.num_layers"), ({"model__vocab_size": 513}, "model.vocab_size"),
    ({"model__rope_theta": 5e5}, "model.rope_theta"),
    ({"model__rope_scaling": {"factor": 8.0}}, "model.rope_scaling"),
    ({"fingerprint__tokenizer": "77aa"}, "data fingerprint, tokenizer"),
    ({"fingerprint__end_of_document": 3}, "data fingerprint, end_of_document"),
    ({"model__qkv_bias": True}, "model.qkv_bias: False in the checkpoint, True now"),        # not there: the default
    ({"model__head": "score"}, "model.head: 'language_model' in the checkpoint, 'score' now")))
def test_another_meaning_is_refused(change: dict[str, Any], key: str) -> None:
    with pytest.raises(CheckpointError, match=key) as caught:
        require_compatible(SAVED, changed(**change, optim__lr=1e-3), PLACE)
    assert "optim.lr" not in str(caught.value)


@pytest.mark.parametrize(("change", "key"), (
    ({"parallel__tensor": 4}, "parallel.tensor"), ({"steps": 200}, "steps"), ({"optim__lr": 1e-3}, "optim.lr"),
    ({"model__max_seq_len": 128}, "model.max_seq_len"), ({"run__seed": 2}, "run.seed"),
    ({"data__train": [{"path": "y", "weight": 1.0}]}, "data.train"),
    ({"fingerprint__train": ["x: 200 tokens"]}, "data fingerprint, train")))
def test_other_differences_are_noted(change: dict[str, Any], key: str) -> None:
    [difference] = require_compatible(SAVED, changed(**change), PLACE)
    assert difference.key == key and str(difference).startswith(f"{key}: ")


@pytest.mark.parametrize("change", ({}, {"run__dir": "elsewhere"}, {"checkpoint__every": 9}, {"log__every": 9},
                                    {"data__tokenizer": "moved/tok.model"}))
def test_what_is_nobodys_business(change: dict[str, Any]) -> None:
    assert differences(SAVED, changed(**change)) == []


def test_tokenizer_by_path_without_fingerprints() -> None:
    bare = {"config": SAVED["config"]}
    other = {"config": changed(data__tokenizer="b.model")["config"]}
    assert [str(d) for d in differences(bare, other)] == [
        "data.tokenizer: 'a/tok.model' in the checkpoint, 'b.model' now"]


def test_weights_only() -> None:
    """Taking the weights for another job may stretch RoPE and end texts as chats do, but not change shapes."""
    change = changed(model__rope_theta=5e5, fingerprint__end_of_document=3)
    assert [note.key for note in require_compatible(SAVED, change, PLACE, weights_only=True)] == [
        "model.rope_theta", "data fingerprint, end_of_document"]
    with pytest.raises(CheckpointError, match="vocab_size: 512 in the checkpoint, 600 now"):
        require_compatible(SAVED, changed(model__vocab_size=600), PLACE, weights_only=True)


def test_a_converted_model_has_only_a_shape() -> None:
    saved = {"config": {"model": SAVED["config"]["model"]}}
    assert require_compatible(saved, changed(optim__lr=1.0), PLACE) == []


@pytest.mark.parametrize("name", sorted(ModelConfig.model_fields))
def test_every_key_of_the_model_is_refused_but_the_harmless(name: str) -> None:
    """Also those that are not there yet: nobody has to remember this table when the model learns something."""
    before = {"config": {"model": {name: "one"}}}
    now = {"config": {"model": {name: "another"}}}
    for weights_only, allowed in ((False, HARMLESS), (True, STRETCHABLE)):
        [difference] = differences(before, now, weights_only)
        assert difference.refused == (f"model.{name}" not in allowed)


def test_what_only_a_later_version_knows_is_refused() -> None:
    saved = changed()
    saved["config"]["model"]["moonshine"] = 3
    with pytest.raises(CheckpointError, match=r"model\.moonshine: 3 in the checkpoint, .*does not know"):
        require_compatible(saved, SAVED, PLACE)
