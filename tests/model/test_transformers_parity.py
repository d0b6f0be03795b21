"""The uncut model is `transformers`' Llama, Mistral, Qwen2 and 3, and Arcee: loss and every gradient, fp32.

So is the training path of one process, which goes through buckets, gradient slots and the executor.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import Config, ModelConfig, RopeScalingConfig, resolve_layout
from engine.distributed.mesh import single_mesh
from engine.model.context import Batch
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from engine.parallel.parallelize import parallelize

hugging_face = pytest.importorskip("tests.kit.hugging_face", exc_type=ImportError)

TOLERANCE = 1e-5
BATCH_SIZE = 2
PLAIN: dict[str, Any] = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 160, "vocab_size": 256,
                         "max_seq_len": 48}
LLAMA3 = RopeScalingConfig(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_seq_len=32)


@dataclass(frozen=True)
class Case:
    """A shape of the model; sequences are as long as it allows."""

    family: str
    changes: dict[str, Any]

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.model_validate(PLAIN | self.changes)


CASES = {
    "plain": Case("llama", {}),
    "grouped-queries": Case("llama", {"num_kv_heads": 2}),
    "one-key-head": Case("mistral", {"num_kv_heads": 1, "rope_theta": 1e6}),
    "tied-embeddings": Case("llama", {"tie_embeddings": True, "num_kv_heads": 2}),
    "llama3-rope-past-original-length": Case("llama", {"rope_scaling": LLAMA3, "max_seq_len": 128, "rope_theta": 5e5}),
    "qkv-bias": Case("qwen2", {"qkv_bias": True, "num_kv_heads": 2}),
    "qkv-bias-tied": Case("qwen2", {"qkv_bias": True, "tie_embeddings": True, "vocab_size": 251}),
    "odd-vocabulary": Case("llama", {"vocab_size": 199}),
    "wide-heads": Case("mistral", {"head_dim": 24, "num_kv_heads": 2}),
    "narrow-heads": Case("llama", {"head_dim": 10, "hidden_size": 72}),
    "large-norm-eps": Case("llama", {"norm_eps": 0.1}),
    "long-sequence": Case("llama", {"max_seq_len": 600, "num_layers": 1}),
    "all-biases": Case("llama", {"attention_bias": True, "mlp_bias": True, "num_kv_heads": 2}),
    "qk-norm": Case("qwen3", {"qk_norm": True, "num_kv_heads": 2, "head_dim": 24}),
    "qk-norm-bias-tied": Case("qwen3", {"qk_norm": True, "attention_bias": True, "tie_embeddings": True}),
    "squared-relu": Case("arcee", {"mlp": "relu2", "num_kv_heads": 2}),
    "gelu-all-biases": Case("arcee", {"mlp": "gelu", "attention_bias": True, "mlp_bias": True}),
}


@dataclass(frozen=True)
class Outcome:
    """Mean loss per token and the gradients of it, under the twin's names."""

    loss: Tensor
    gradients: dict[str, Tensor]


@cache
def weights_of(name: str) -> dict[str, Tensor]:
    """Random weights under our names, large enough that attention is far from uniform and norms matter."""
    model = Transformer(CASES[name].model)
    generator = torch.Generator().manual_seed(3)
    return {spec_of(p).name: torch.randn(p.shape, generator=generator) * 0.15 + (spec_of(p).init == "ones")
            for p in model.parameters()}


def tokens_of(name: str) -> tuple[Tensor, Tensor]:
    """Tokens and labels, [B, S]."""
    model, generator = CASES[name].model, torch.Generator().manual_seed(4)
    ids = torch.randint(0, model.vocab_size, (BATCH_SIZE, model.max_seq_len + 1), generator=generator)
    return ids[:, :-1], ids[:, 1:]


def our_batch(name: str) -> Batch:
    tokens, labels = tokens_of(name)
    return Batch(tokens.T.contiguous(), torch.arange(tokens.shape[1]).unsqueeze(1), labels.T.contiguous())


@cache
def theirs(name: str) -> Outcome:
    case = CASES[name]
    twin = hugging_face.build_twin(case.model, case.family)
    hugging_face.load_twin(twin, hugging_face.twin_names(weights_of(name), case.model))
    tokens, labels = tokens_of(name)
    loss = F.cross_entropy(twin(tokens).logits.flatten(0, 1), labels.flatten())
    loss.backward()
    return Outcome(loss.detach(), {key: p.grad for key, p in twin.named_parameters()})


def uncut_model(name: str) -> Outcome:
    """`Transformer` and torch's own loss and autograd."""
    model, weights, batch = Transformer(CASES[name].model), weights_of(name), our_batch(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(weights[spec_of(parameter).name])
    loss = F.cross_entropy(model(batch.tokens_SB, batch).flatten(0, 1), batch.labels_SB.flatten())
    loss.backward()
    gradients = {spec_of(p).name: p.grad for p in model.parameters()}
    return Outcome(loss.detach(), hugging_face.twin_names(gradients, CASES[name].model))


def training_path(name: str) -> Outcome:
    """What `octant train` runs in one process, the batch as two microbatches."""
    model, batch = CASES[name].model, our_batch(name)
    config = resolve_layout(Config.model_validate({
        "model": model.model_dump(), "precision": {"compute": "fp32"}, "data": {"seq_len": model.max_seq_len},
        "batch": {"micro": 1, "global": BATCH_SIZE}, "steps": 1}), 1)
    parts = [Batch(batch.tokens_SB[:, i : i + 1], batch.positions_SB, batch.labels_SB[:, i : i + 1])
             for i in range(BATCH_SIZE)]
    ours = parallelize(config, single_mesh())
    for bucket in ours.buckets:
        for entry in bucket.entries:
            bucket.set_master(entry, weights_of(name)[entry.spec.name])
    ours.publish()
    scale = 1 / batch.tokens_SB.numel()
    losses = ours.forward_backward(parts, scale)
    gradients = {spec.name: view for bucket in ours.buckets for spec, _, view in bucket.boxes(bucket.grad_shard)}
    return Outcome(losses.sum() * scale, hugging_face.twin_names(gradients, model))


@pytest.mark.parametrize("ours", [uncut_model, training_path], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", CASES)
def test_loss_and_every_gradient(name: str, ours: Any) -> None:
    got, want = ours(name), theirs(name)
    assert got.loss.item() == pytest.approx(want.loss.item(), rel=TOLERANCE)
    assert got.gradients.keys() == want.gradients.keys()
    for key, gradient in want.gradients.items():
        error = (got.gradients[key] - gradient).abs().max() / gradient.abs().max()
        assert error < TOLERANCE, f"{key}: {error:.1e}"
