"""What a layer keeps is what autograd keeps: counted in bytes of the storages it saves, in every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import Config, ModelConfig
from engine.distributed.topology import Topology
from engine.model.activations import layer_bytes_per_token
from engine.model.context import Batch
from engine.model.rope import RotaryAngles
from engine.parallel.parallelize import parallelize
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import tiny_config

LENGTH = 16
KINDS: dict[str, dict[str, Any]] = {
    "swiglu": {}, "gelu": {"mlp": "gelu"}, "relu2": {"mlp": "relu2"}, "qk-norm": {"qk_norm": True},
    "biases": {"attention_bias": True, "mlp_bias": True}, "wide heads": {"head_dim": 24},
    "layer norm, halves side by side": {"norm": "layernorm", "residual": "parallel", "mlp": "gelu-tanh"},
    "part of a head turns": {"rope_share": 0.5, "mlp": "geglu"}, "no head turns": {"position": "learned"}}
LAYOUTS: dict[str, dict[str, Any]] = {"alone": {}, "tensor": {"tensor": 2},
                                      "whole sequences": {"tensor": 2, "sequence": False}}


def kept_bytes(config: Config) -> int:
    """Runs on one rank: bytes of all storages that autograd refers to behind one layer, parameters left out."""
    model = parallelize(config, mesh_for(Topology.of(config)))
    model.initialise(1)
    block = model.chunks[0].layers["1"]
    length = LENGTH // (model.mesh.tensor.size if model.tensor.sequence else 1)
    x = torch.randn(length, config.batch.micro, config.model.hidden_size, requires_grad=True)
    positions = torch.arange(LENGTH).unsqueeze(1)
    angles = RotaryAngles(config.model)(positions, x.dtype, len(positions))
    shared = {tensor.untyped_storage().data_ptr() for tensor in (*angles, *(b.param_buffer for b in model.buckets))}
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = block(x, angles, Batch(positions, positions))
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().size() for t in (x, *saved)}
    assert out.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in shared)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_kept_bytes(kind: str, layout: str, rows: int, recompute: str) -> None:
    config = tiny_config(model=KINDS[kind], parallel=LAYOUTS[layout] | {"recompute": recompute},
                         batch={"micro": rows})
    parallel = config.parallel
    want = layer_bytes_per_token(config.model, 4, tensor=parallel.tensor, sequence=parallel.sequence,
                                 recompute=recompute)
    got = run_distributed(kept_bytes, parallel.world_size, config)
    assert got == [want * LENGTH * rows] * parallel.world_size


def test_llama_7b_keeps_what_its_paper_says() -> None:
    """Korthikanti et al. 2022, section 5: with recomputed attention a GPT layer keeps 34·s·b·h bytes; ours has no
    dropout masks, a gated feed-forward layer and the kernel's own recomputation."""
    model = ModelConfig(num_layers=32, hidden_size=4096, num_heads=32, ffn_hidden_size=11008, vocab_size=32000)
    hidden = 4096
    attention = 2 * (2 * hidden + 3 * hidden + hidden) + 4 + 4 * 32
    mlp = 2 * (2 * hidden + 3 * 11008) + 4
    assert layer_bytes_per_token(model, 2) == attention + mlp
