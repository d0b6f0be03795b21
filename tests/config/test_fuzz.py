"""Whatever a configuration file holds, it is loaded or refused in a sentence that says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from engine.config import Config, load_config, resolve_layout
from engine.errors import ConfigError
from tests.kit.fuzz import EXTREMES, Reader, bent, damaged, fuzz, hostile

GOOD = b"""# every section once
base: base.yaml
run: {dir: runs/x, seed: 7, name: "a name", device: cpu}
log: &often {every: 1}
model:
  num_heads: 4
  ffn_hidden_size: 96
  num_layers: 4
  hidden_size: 64
  vocab_size: 300
  rope_scaling: {factor: 8, low_freq_factor: 1, high_freq_factor: 4, original_max_seq_len: 64}
parallel: {tensor: 2, pipeline: 2, schedule: zb-v, virtual_stages: 2, data: auto, recompute_layers: [1, 0]}
data:
  seq_len: 128
  train:
    - {path: data/web, weight: 0.67}
    - {path: data/code, epochs: 1_000.5}
  skip: [[3, 5], [7, 9]]
batch: {micro: 2, global: 16}
steps: 1e3
optim: {lr: 3e-4, betas: [0.9, .95], decay: linear}
checkpoint: {async: false, load: null}
eval: {<<: *often, batches: 3}
precision:
"""
VALUES = {"model": {"num_layers": 4, "hidden_size": 64, "num_heads": 4, "num_kv_heads": 2, "head_dim": 16,
                    "ffn_hidden_size": 96, "vocab_size": 300, "max_seq_len": 2048, "rope_theta": 1e4, "norm_eps": 1e-5,
                    "tie_embeddings": False},
          "run": {"dir": "runs/x", "seed": 3, "objective": "pretrain", "name": "x", "device": "auto"},
          "parallel": {"tensor": 1, "pipeline": 2, "context": 1, "data": 2, "schedule": "1f1b", "virtual_stages": 1,
                       "zero": 1, "zero_shard": 0, "recompute": "none", "recompute_layers": [1, 1]},
          "precision": {"compute": "bf16", "fp8": "off"},
          "data": {"tokenizer": "bytes", "seq_len": 64, "train": [{"path": "a", "weight": 1.0}], "skip": [[1, 2]]},
          "batch": {"micro": 1, "global": 8}, "steps": 100,
          "optim": {"lr": 1e-3, "min_lr": 1e-4, "warmup_steps": 3, "betas": [0.9, 0.95], "eps": 1e-8,
                    "weight_decay": 0.1, "grad_clip": 1.0},
          "checkpoint": {"every": 5, "keep": 3, "async": True, "resume": "auto"}, "eval": {"every": 3, "batches": 2},
          "log": {"every": 1, "wandb": None}}
ANCHORS = [  # each a bomb: eight or nine times as many values on every line
    "\n".join(["a0: &a0 [x, x, x, x, x, x, x, x]",
               *(f"a{i}: &a{i} [" + ", ".join([f"*a{i - 1}"] * 8) + "]" for i in range(1, 12))]),
    "\n".join(["a0: &a0 {x: 1}", *(f"a{i}: &a{i} {{<<: [" + ", ".join([f"*a{i - 1}"] * 9) + f"], k{i}: 1}}"
                                   for i in range(1, 12))]),
    "a: &a [*a]", "a: &a {b: *a}", "a: &a {<<: *a}", "a: &a\n  <<: [*a, *a]\n", "model: &m {num_layers: *m}",
]


def read(folder: Path) -> None:
    """What is accepted is also resolved, written and read back: nothing but a whole configuration comes through."""
    config = load_config(folder / "config.yaml")
    (folder / "again.yaml").write_text(config.dump(), encoding="utf-8")
    assert load_config(folder / "again.yaml") == config
    for number in _numbers(config.to_dict()):
        assert abs(number) < 2**64, number
    try:
        resolve_layout(config, config.parallel.model_parallel_size)
    except ConfigError as error:
        if "this layout cannot work" not in str(error) and "not available in this version" not in str(error):
            raise


def _numbers(value: Any) -> list[float]:
    if isinstance(value, dict | list):
        return [number for part in (value.values() if isinstance(value, dict) else value) for number in _numbers(part)]
    return [value] if isinstance(value, int | float) else []


def as_yaml(value: object) -> bytes:
    return json.dumps(value, default=str).encode("utf-8", "surrogatepass")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("template")
    (folder / "base.yaml").write_text("optim: {eps: 1e-6}\n")
    (folder / "config.yaml").write_bytes(GOOD)
    return folder


def test_the_good_one_is_good(template: Path) -> None:
    read(template)
    config = load_config(template / "config.yaml")
    assert (config.model.num_heads, config.optim.eps, config.steps) == (4, 1e-6, 1000)
    assert Config.model_validate(VALUES).to_dict()["steps"] == 100


def test_damaged_configurations(template: Path, request: pytest.FixtureRequest) -> None:
    one = st.one_of(damaged(GOOD), bent(VALUES).map(as_yaml), hostile(), st.sampled_from(ANCHORS).map(str.encode),
                    damaged([anchors.encode() for anchors in ANCHORS]))
    fuzz(Reader("configuration", read, template, limit_bytes=1 << 29),
         st.fixed_dictionaries({"config.yaml": one}), request)


def read_override(folder: Path) -> None:
    """The file holds the words of a command line; a refusal says that they are to blame."""
    words = (folder / "words").read_text(encoding="utf-8").split("\0")
    try:
        load_config(folder / "config.yaml", words)
    except ConfigError as error:
        assert "override" in str(error) or "command line" in str(error) or "config.yaml" in str(error), error
        raise ConfigError(f"words: {error}") from None


def test_damaged_overrides(template: Path, request: pytest.FixtureRequest) -> None:
    keys = st.sampled_from(("optim.lr", "steps", "batch.global", "run.dir", "data.train", "model.preset", "model",
                            "base", "run.seed", "parallel.data", "data.skip", "model.rope_scaling", "data.tokenizer"))
    values = st.one_of(st.sampled_from(EXTREMES).map(str), st.text(max_size=30), st.sampled_from((
        "", "1e26", "9" * 5000, "[" * 5000, "&a [*a]", "!!python/name:os.system", ".nan", "-.inf", "0x" + "f" * 5000,
        "{path: x}", "\x1b[2J", "2024-01-01", "1:30", "a" * 10_000)))
    words = st.one_of(st.builds("{}={}".format, keys, values), st.text(max_size=40),
                      damaged(b"optim.lr=3e-4").map(lambda data: data.decode("utf-8", "replace")),
                      st.just(".".join("a" * 5000) + "=1"))
    files = st.lists(words, max_size=3).map(lambda line: {"words": "\0".join(line).encode("utf-8", "replace")})
    fuzz(Reader("key=value", read_override, template, limit_bytes=1 << 29), files, request)
