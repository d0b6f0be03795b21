"""What keeps large runs stable: in every kind of layout as written down for one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import Config, ModelConfig
from engine.distributed.mesh import single_mesh
from engine.model.context import Batch
from engine.model.inventory import end_specs, layer_specs
from engine.model.objective import NextTokenWithZLoss, next_token
from engine.model.transformer import Transformer
from engine.parallel.parallelize import parallelize
from tests.kit.distributed import run_distributed
from tests.kit.layouts import check, microbatches, tiny_config, train_layout
from tests.kit.reference import PRETRAINING, Task, global_batch, train_reference
from tests.parallel.test_vocabulary import in_small_chunks

Z = 0.01                                                          # large, so that it matters in a model that is small
LAYOUTS: dict[str, dict[str, Any]] = {
    "one process": {}, "reproducible": {"data": 2, "reproducible": True}, "tensor × zero 3": {"tensor": 2, "data": 2,
                                                                                            "zero": 3},
    "tensor without sequence × pipeline": {"tensor": 2, "sequence": False, "pipeline": 2},
    "context × zb-v": {"context": 2, "pipeline": 2, "schedule": "zb-v", "virtual_stages": 2}}


def sums_with_z(model: Transformer, batch: Batch) -> list[Tensor]:
    """From the logits: cross-entropy and Z·log²Z; cross-entropy."""
    assert batch.labels_SB is not None
    logits = model(batch.tokens_SB, batch)
    losses = F.cross_entropy(logits.flatten(0, 1), batch.labels_SB.flatten(), reduction="none").view(logits.shape[:2])
    with_z = losses + Z * logits.exp().sum(-1).log() ** 2
    mask = torch.ones_like(losses) if batch.loss_mask_SB is None else batch.loss_mask_SB
    return [(with_z * mask).sum(), (losses * mask).sum()]


@pytest.mark.parametrize("name", LAYOUTS)
def test_z_loss(name: str) -> None:
    config = tiny_config(parallel=LAYOUTS[name], model={"vocab_size": 61}, data={"document_mask": True})
    task = Task(NextTokenWithZLoss(Z), sums=sums_with_z)
    check(run_distributed(in_small_chunks, config.parallel.world_size, config, 3, task),
          train_reference(config, 3, task))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_share_of_the_embeddings_gradient(name: str, tied: bool) -> None:
    """Tied, the output layer's part of the gradient stays whole."""
    config = tiny_config(parallel=LAYOUTS[name], model={"tie_embeddings": tied}, optim={"embedding_grad": 0.1})
    check(run_distributed(train_layout, config.parallel.world_size, config, 3, PRETRAINING),
          train_reference(config, 3))


def test_what_is_logged_is_the_labels_loss_and_the_term_apart() -> None:
    config, mesh = tiny_config(optim={"z_loss": Z}), single_mesh()
    objective = next_token(config)
    model = parallelize(config, mesh, objective=objective)
    model.initialise(1)
    batch = global_batch(config, 1)
    want = parallelize(config, mesh)
    want.initialise(1)
    for run in ("forward_backward", "evaluate"):
        arguments = (1.0,) if run == "forward_backward" else ()
        totals = getattr(model, run)(microbatches(config, batch, mesh), *arguments).sum(0).tolist()
        plain = want.evaluate(microbatches(config, batch, mesh)).sum().item()
        numbers = objective.numbers(totals, 1.0)
        assert numbers["loss"] == pytest.approx(plain, rel=1e-6) and numbers["z_loss"] > 0


def test_z_loss_is_of_pretraining() -> None:
    with pytest.raises(ValueError, match=r"optim.z_loss\(0.01\) is added to the loss of run.objective pretrain"):
        Config.model_validate(tiny_config().to_dict() | {"optim": {"z_loss": Z}, "run": {"objective": "sft"}})


SHAPE = {"num_layers": 8, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 64, "vocab_size": 97}


@pytest.mark.parametrize(("keys", "matrices", "outputs"), [
    ({}, 0.02, 0.02 / 4), ({"init_std": 0.006}, 0.006, 0.0015), ({"init_output": "plain"}, 0.02, 0.02),
    ({"init_std": "small", "init_output": "wang"}, (2 / 160) ** 0.5, 2 / 8 / 32 ** 0.5)], ids=str)
def test_what_matrices_start_with(keys: dict[str, Any], matrices: float, outputs: float) -> None:
    """The formulas of GPT-2, OPT, OLMo and GPT-NeoX."""
    config = ModelConfig.model_validate(SHAPE | keys)
    specs = {**end_specs(config), **layer_specs(config, 0)}
    found = {name: spec.init_std for name, spec in specs.items() if spec.init == "normal"}
    assert found == {name: pytest.approx(outputs if "proj" in name or "fc2" in name else matrices) for name in found}
