"""Sums of very many fp32 numbers.

A running fp32 sum of n numbers of one sign is wrong by up to n·2⁻²⁴: every addition rounds to the last place of what
has been summed up so far, and when that is 2²⁴ times a summand, nothing is added any more.  On a GPU the terms of a
reduction are spread over thousands of threads; on a processor `torch.linalg.vector_norm` of a flat vector keeps 16
running sums, which at 100 million elements is one per cent too little.  (`Tensor.sum` adds in pairs and is right, but
needs the squares written out.)  So the vector is folded into short rows, each summed up in fp32, and the rows in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a row: short enough for fp32 whatever they hold (7e-7 when all are equal), long enough for full speed.
ROW = 1024


def sum_of_squares(x: Tensor) -> Tensor:
    """Σ x² of a flat vector of any length: an fp64 scalar within 1e-6 of the true value."""
    whole = x.numel() // ROW * ROW
    parts = [torch.linalg.vector_norm(rows, dim=1) for rows in (x[:whole].view(-1, ROW), x[whole:].view(1, -1))
             if rows.numel()]
    return torch.cat(parts).double().square().sum() if parts else x.new_zeros((), dtype=torch.float64)
