"""Every preset has the published number of parameters, and every shipped configuration loads and can be laid out."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import ModelConfig, load_config, preset_names, resolve_layout
from engine.config.load import PRESETS, _read_yaml
from engine.config.placement import processes_needed

ROOT = Path(__file__).resolve().parents[2]

# As counted from the released checkpoints, embeddings included, tied ones once.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.2-1b": 1_235_814_400,
    "tinyllama-1.1b": 1_100_048_384,
    "qwen2.5-0.5b": 494_032_768,
}


def preset(name: str) -> ModelConfig:
    return ModelConfig.model_validate(_read_yaml(PRESETS / f"{name}.yaml")[0])


def num_parameters(m: ModelConfig) -> int:
    queries, keys = m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim
    attention = m.hidden_size * (queries + 2 * keys) + queries * m.hidden_size + m.qkv_bias * (queries + 2 * keys)
    layer = attention + 3 * m.hidden_size * m.ffn_hidden_size + 2 * m.hidden_size
    return m.num_layers * layer + m.hidden_size + m.vocab_size * m.hidden_size * (1 if m.tie_embeddings else 2)


@pytest.mark.parametrize("name", PUBLISHED)
def test_preset_has_the_published_size(name: str) -> None:
    assert num_parameters(preset(name)) == PUBLISHED[name]


def test_every_preset_is_checked() -> None:
    assert set(preset_names()) == {*PUBLISHED, "tiny"}
    assert num_parameters(preset("tiny")) < 2_000_000


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configuration_can_be_laid_out(path: Path) -> None:
    config = load_config(path)
    world_size = config.parallel.model_parallel_size
    if isinstance(config.parallel.data, int):
        world_size *= config.parallel.data
    if config.run.objective in ("ppo", "grpo", "rloo"):
        world_size = processes_needed(config) or world_size
    assert resolve_layout(config, world_size).num_microbatches >= 1
