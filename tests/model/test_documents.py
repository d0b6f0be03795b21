"""Documents packed into one sequence: loss and every gradient are those of the documents run one by one."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import ModelConfig
from engine.kernels.documents import Documents
from engine.model.context import Batch
from engine.model.parameters import initialise, spec_of
from engine.model.transformer import Transformer

CONFIG = ModelConfig(num_layers=2, hidden_size=32, num_heads=4, num_kv_heads=2, ffn_hidden_size=64, vocab_size=50)
LENGTHS = ((7, 1, 12), (10, 10, 0))      # of the documents in each of two sequences


def summed_loss(model: Transformer, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch.tokens_SB, batch).flatten(0, 1), batch.labels_SB.flatten(), reduction="sum")


def gradients(model: Transformer) -> dict[str, Tensor]:
    out = {spec_of(p).name: p.grad for p in model.parameters()}
    model.zero_grad()
    return out


def test_packed_is_one_by_one() -> None:
    model = Transformer(CONFIG)
    initialise(model, 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5)                # attention far from uniform, so that positions and masks matter
    tokens, labels = torch.randint(0, 50, (2, 20, 2), generator=torch.Generator().manual_seed(2))
    ids = torch.stack([torch.arange(3).repeat_interleave(torch.tensor(row)) for row in LENGTHS])
    documents = Documents.of(ids)
    together = summed_loss(model, Batch(tokens, documents.positions(), labels, documents=documents))
    together.backward()
    packed = gradients(model)
    alone = torch.zeros(())
    for sequence, row in enumerate(LENGTHS):
        for part in torch.arange(20).split(row):
            if len(part):
                cut, positions = (part, slice(sequence, sequence + 1)), torch.arange(len(part)).unsqueeze(1)
                alone = alone + summed_loss(model, Batch(tokens[cut], positions, labels[cut]))
    alone.backward()
    unmasked = summed_loss(model, Batch(tokens, documents.positions(), labels))
    assert unmasked.item() != pytest.approx(alone.item(), rel=1e-3), "this comparison would see a missing mask"
    assert together.item() == pytest.approx(alone.item(), rel=1e-6)
    for name, gradient in gradients(model).items():
        assert (packed[name] - gradient).abs().max() < 1e-5 * gradient.abs().max(), name
