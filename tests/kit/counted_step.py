"""A step of a large model on the make-believe accelerator, its launches and bytes counted.

Run as a program, in a process of its own as `tests.kit.accelerator` must be:

    python -m tests.kit.counted_step

Two models of Llama-3.2-1B's sizes, of two and of three layers, take a step over one microbatch of 8,192 tokens, once
with what a GPU computes with and once with the operations that run anywhere; the difference is what a layer costs, and
with it what the sixteen do.  Prints one JSON line of `Cost`s by what was computed with and direction.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from engine.config import load_config, resolve_layout
from engine.distributed.topology import Topology
from engine.kernels.documents import Documents
from engine.kernels.matmul import add_product_in_fp32
from engine.kernels.operation import Place
from engine.kernels.table import PORTABLE, TABLE, Operations
from engine.model.context import Batch
from engine.parallel.parallelize import parallelize
from engine.schedules.action import Action, Kind
from tests.kit.accelerator import DEVICE, install, one_rank, pretending
from tests.kit.launches import Launches, triton_counted

TOKENS, LAYERS = 8192, 16
GPU = Place(torch.device("cuda"), torch.bfloat16)


@dataclass(frozen=True)
class Cost:
    """Of a layer, and of a microbatch through the whole model: launches, bytes besides products and attention.

    Attributes:
        by_operation: launches of a layer.
    """

    launches: int
    nbytes: int
    whole_launches: int
    whole_bytes: int
    by_operation: dict[str, int]


def flash(q_SBGQD: Tensor, k_SBGD: Tensor, v_SBGD: Tensor, mask: Tensor | None = None,
          documents: Documents | None = None) -> Tensor:
    """The kernel that torch takes on a GPU, by name: on a device it does not know it would take none."""
    q = q_SBGQD.flatten(2, 3).permute(1, 2, 0, 3)
    k, v = (x.permute(1, 2, 0, 3) for x in (k_SBGD, v_SBGD))
    out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[0]
    return out.permute(2, 0, 1, 3).flatten(2)


def on_a_gpu() -> Operations:
    """As a GPU's, as far as they are not found by trying them out there."""
    ours = {operation.name: entry.find(GPU) for operation in TABLE for entry in operation.implementations
            if entry.name == "triton"}
    return replace(PORTABLE, attention=flash, weight_gradient=add_product_in_fp32, **ours)


def step(operations: Operations, num_layers: int) -> dict[Kind, Launches]:
    """What a microbatch's forward and backward pass were counted to be."""
    config = resolve_layout(load_config("llama3.2-1b", [
        f"data.seq_len={TOKENS}", "batch.micro=1", "batch.global=1", f"model.num_layers={num_layers}"]), 1)
    counts = {Kind.F: Launches(), Kind.BW: Launches()}
    with one_rank(Topology.of(config), 0, DEVICE) as mesh, pretending():
        model = parallelize(config, mesh, operations=operations)

        def counted(kind: Kind, do: Callable[[Action], None]) -> Callable[[Action], None]:
            def run(action: Action) -> None:
                with triton_counted(counts[kind]), counts[kind]:
                    do(action)

            return run

        for kind in counts:
            model.executor._do[kind] = counted(kind, model.executor._do[kind])
        tokens, positions, labels = (torch.zeros(TOKENS, 1, dtype=torch.int64, device=DEVICE) for _ in range(3))
        model.forward_backward([Batch(tokens, positions, labels)], 1 / TOKENS)
    return counts


def costs(operations: Operations) -> dict[str, Cost]:
    fewer, more = step(operations, 2), step(operations, 3)

    def cost(kind: Kind) -> Cost:
        layer = more[kind].minus(fewer[kind])
        rest = LAYERS - 2
        return Cost(layer.num_kernels, layer.elementwise_bytes,
                    fewer[kind].num_kernels + rest * layer.num_kernels,
                    fewer[kind].elementwise_bytes + rest * layer.elementwise_bytes, dict(layer.kernels))

    return {"forward": cost(Kind.F), "backward": cost(Kind.BW)}


def main() -> None:
    install()
    found = {"fused": costs(on_a_gpu()), "anywhere": costs(replace(PORTABLE, attention=flash))}
    print(json.dumps({name: {direction: asdict(each) for direction, each in both.items()}
                      for name, both in found.items()}), flush=True)
    os._exit(0)                     # autograd's thread of a device that does not exist cannot be joined


if __name__ == "__main__":
    main()
