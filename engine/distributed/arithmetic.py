"""The arithmetic of this process, as far as torch keeps it in switches of its own.

On a GPU some of torch's fastest algorithms add up in whatever order their threads come by, so that the same step gives
other last bits each time: backward passes of attention, `index_add_`, products split along their inner dimension.  With
`parallel.reproducible` torch takes the ones that keep an order, or fails where there is none.  On a processor they all
keep one.

A product of bf16 matrices that is split along its inner dimension may add up its parts in bf16: not here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch

# Two buffers for each stream: what makes cuBLAS repeat itself (its documentation, "Results reproducibility").
CUBLAS_WORKSPACE = ":4096:8"


@contextmanager
def arithmetic(*, deterministic: bool) -> Iterator[None]:
    """Sets the switches, before the first product on a GPU, and puts them back at the end."""
    matmul, memory = torch.backends.cuda.matmul, cast(Any, torch.utils.deterministic)
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    switches = (memory.fill_uninitialized_memory, matmul.allow_bf16_reduced_precision_reduction)
    matmul.allow_bf16_reduced_precision_reduction = False
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", CUBLAS_WORKSPACE)
        torch.use_deterministic_algorithms(True)
        memory.fill_uninitialized_memory = False            # buffers are freed and come back, and are written to first
    try:
        yield
    finally:
        if deterministic:                                   # else untouched; the call alone imports torch's compiler
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory, matmul.allow_bf16_reduced_precision_reduction = switches
