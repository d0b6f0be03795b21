"""Small Hugging Face folders, made and saved by `transformers` itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

transformers = pytest.importorskip("transformers")


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def save_hf(folder: Path, name: str, dtype: torch.dtype = torch.float32, shard: str = "40KB", **settings: Any) -> Path:
    """A random model, in files of at most `shard`."""
    shape = {"num_hidden_layers": 2, "hidden_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
             "intermediate_size": 80, "vocab_size": 259, "max_position_embeddings": 128}
    config = getattr(transformers, name + "Config")(**shape | settings)
    made = getattr(transformers, name + "ForCausalLM")(config).to(dtype)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.3, generator=generator)
    made.save_pretrained(folder, max_shard_size=shard)
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
