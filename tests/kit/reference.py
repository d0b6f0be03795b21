"""The plain computation that every layout is compared with: one process, torch's own autograd, cross-entropy and AdamW.

It shares the model's definition with the engine (`engine.model`, itself compared with `transformers` in
tests/model/test_transformers_parity.py) and nothing else: no buckets, no slots, no executor, no cut layers, no head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import Config
from engine.kernels.documents import Documents
from engine.model.adapter import attach_adapters
from engine.model.context import Batch
from engine.model.dropout import token_keys
from engine.model.fields import NOISE
from engine.model.objective import NEXT_TOKEN, Objective
from engine.model.parameters import initial_values, initialise, spec_of
from engine.model.spec import ParamSpec
from engine.model.transformer import Transformer
from engine.optim.schedule import learning_rate
from tests.kit.adafactor import Adafactor
from tests.kit.muon import Muon


@dataclass
class Reference:
    """Loss per token and gradients of the first step; losses, norms and weights after all."""

    losses: list[float]
    grad_norms: list[float]
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    initial: dict[str, Tensor]
    totals: list[list[float]] = field(default_factory=list)      # all sums of the objective, by step


def global_batch(config: Config, step: int) -> Batch:
    """A random global batch; with `document_mask` its documents have random lengths, and some labels are masked."""
    generator = torch.Generator().manual_seed(1000 + step)
    shape = (config.data.seq_len, config.batch.global_)
    tokens = torch.randint(0, config.model.vocab_size, (shape[0] + 1, shape[1]), generator=generator)
    positions, documents, loss_mask = torch.arange(shape[0]).unsqueeze(1), None, None
    if config.data.document_mask:
        ids = (torch.rand(shape[1], shape[0], generator=generator) < 0.1).cumsum(1)
        documents = Documents.of(ids)
        positions = documents.positions()
        loss_mask = torch.rand(shape, generator=generator) < 0.8
    extra = {}
    if config.adapter is not None and config.adapter.dropout:
        keys = [token_keys(config.run.seed, 1000 * step + row, 0, shape[0]) for row in range(shape[1])]
        extra = {NOISE: torch.from_numpy(np.stack(keys, axis=1))}
    return Batch(tokens[:-1], positions, tokens[1:], loss_mask, documents=documents, extra=extra)


def num_tokens(batch: Batch) -> int:
    """Labels that count."""
    assert batch.labels_SB is not None
    return batch.labels_SB.numel() if batch.loss_mask_SB is None else int(batch.loss_mask_SB.sum())


def summed_loss(model: Transformer, batch: Batch) -> list[Tensor]:
    """Pretraining's only sum, from the logits."""
    assert batch.labels_SB is not None
    logits = model(batch.tokens_SB, batch).flatten(0, 1)
    losses = F.cross_entropy(logits, batch.labels_SB.flatten(), reduction="none")
    if batch.loss_mask_SB is not None:
        losses = losses * batch.loss_mask_SB.flatten()
    return [losses.sum()]


@dataclass(frozen=True)
class Task:
    """Something to train: the engine's objective, and what it should compute, written out for a whole model."""

    objective: Objective = NEXT_TOKEN
    batch: Callable[[Config, int], Batch] = global_batch
    sums: Callable[[Transformer, Batch], Sequence[Tensor]] = summed_loss
    divisor: Callable[[Batch], int] = num_tokens


PRETRAINING = Task()


def adapter_values(spec: ParamSpec) -> Tensor | None:
    """What the B of an adapter begins with in tests: as zeros, it would leave its A without a gradient."""
    if ".lora_b." not in spec.name:
        return None
    return initial_values(replace(spec, init="normal", init_std=0.1), 11)


def optimizers_of(named: dict[str, torch.nn.Parameter], config: Config) -> list[torch.optim.Optimizer]:
    """Torch's own, and Muon by its definition (`tests.kit.muon`), of parameters by name."""
    optim, matrices = config.optim, []
    if optim.name == "muon":
        matrices = [name for name, p in named.items() if name.startswith("layers.") and p.dim() > 1
                    and name.endswith(".weight")]
    rest = [p for name, p in named.items() if name not in matrices]
    if optim.name == "adafactor":
        return [Adafactor(named, config)]
    groups = [{"params": [p for p in rest if spec_of(p).decay], "weight_decay": optim.weight_decay},
              {"params": [p for p in rest if not spec_of(p).decay], "weight_decay": 0.0}]
    if optim.name == "sgd":
        return [torch.optim.SGD(groups, momentum=optim.momentum or 0.9)]
    others = [torch.optim.AdamW(groups, betas=optim.betas, eps=optim.eps)]
    return [*others, *([Muon({name: named[name] for name in matrices}, config)] if matrices else [])]


def train_reference(config: Config, num_steps: int, task: Task = PRETRAINING) -> Reference:
    """`num_steps` of training on the whole global batch at once."""
    model = Transformer(config.model)
    if config.adapter is not None:
        attach_adapters(model, config.adapter)
    initialise(model, config.run.seed)
    if (share := config.optim.embedding_grad) != 1:
        model.embedding.register_forward_hook(lambda *call: call[-1] * share + call[-1].detach() * (1 - share))
    with torch.no_grad():
        for p in model.parameters():
            if (values := adapter_values(spec_of(p))) is not None:
                p.copy_(values)
    named = {spec_of(p).name: p for p in model.parameters() if p.requires_grad}
    optimizers = optimizers_of(named, config)
    out = Reference([], [], {}, {}, {name: p.detach().clone() for name, p in named.items()})
    for step in range(1, num_steps + 1):
        batch = task.batch(config, step)
        sums = task.sums(model, batch)
        loss = sums[0] / task.divisor(batch)
        model.zero_grad()
        loss.backward()
        if step == 1:
            out.gradients = {name: p.grad.clone() for name, p in named.items()}
        norm = torch.nn.utils.get_total_norm([p.grad for p in named.values()])
        if config.optim.grad_clip and norm > config.optim.grad_clip:
            for p in named.values():
                p.grad.mul_(config.optim.grad_clip / norm)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.optim)
            optimizer.step()
        out.losses.append(loss.item())
        out.totals.append([total.item() for total in sums])
        out.grad_norms.append(norm.item())
    out.weights = {name: p.detach().clone() for name, p in named.items()}
    return out
