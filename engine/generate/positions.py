"""`octant eval --positions` on one rank: the loss at each position of a window.

A token at position p is predicted from p + 1 tokens, those before it in its window.  Where the loss still falls with
p, more context helps; where it rises again, the model is beyond what it has learned (Press et al. 2022, "Train short,
test long", section 2; Chen et al. 2023, section 3.4, for stretched positions).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from engine.distributed.collectives import all_reduce
from engine.model.context import Batch
from engine.model.objective import NEXT_TOKEN, Head
from engine.parallel.parallelize import ParallelModel
from engine.progress import Progress
from engine.report.charts import Chart, Series, line_chart
from engine.report.svg import standalone
from engine.train.batches import Loader, Samples, up_to
from engine.writing import write_picture

POINTS = 256                                                 # of the picture: means of so many stretches of positions


@dataclass(frozen=True)
class Stretch:
    """Positions `first` to `last`, and the mean loss of the tokens there, in nats."""

    first: int
    last: int
    loss: float
    num_tokens: int


def sums_by_position(model: ParallelModel, window: Samples, windows: int, shown: bool) -> npt.NDArray[np.float64]:
    """Summed loss and number of predicted tokens by position, [2, seq_len], on every rank; all ranks call this alike.

    Args:
        window: one by its number; which of its tokens count is its mask.
    """
    config, mesh, batch, seq_len = model.config, model.mesh, model.config.batch.global_, model.config.data.seq_len
    samples: Samples = up_to(window, windows)
    loader = Loader(samples, config, mesh, NEXT_TOKEN, uses=len(model.chunks))
    totals = torch.zeros(2, seq_len, dtype=torch.float64)
    counts = mesh.tensor.index == 0 and mesh.context.index == 0
    with Progress("evaluating", windows, "windows", shown) as progress:
        for first in range(0, windows, batch):
            measured = model.evaluate(loader.step(first).microbatches, partial(_by_position, seq_len))
            if measured is not None and counts:
                totals += measured.double().sum(0).cpu()
            progress.reach(min(windows, first + batch))
    all_reduce(totals, mesh.world)
    return totals.numpy()


def _by_position(seq_len: int, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """A `Measure`: summed loss, and how many tokens count, of every position."""
    assert batch.labels_SB is not None and batch.loss_mask_SB is not None
    mask = batch.loss_mask_SB.float()
    sums = ((head.token_losses(x_SBH, batch.labels_SB) * mask).sum(1), mask.sum(1))
    return [F.pad(each, (0, seq_len - len(each))) for each in sums]


def stretches(sums: npt.NDArray[np.float64], edges: Sequence[int]) -> list[Stretch]:
    """Means over the positions between the edges; where nothing was predicted there is none."""
    found = []
    for first, stop in pairwise(edges):
        loss, count = sums[:, first:stop].sum(1)
        if count:
            found.append(Stretch(first, stop - 1, float(loss / count), int(count)))
    return found


def doubling(seq_len: int) -> list[int]:
    """0, 1, 2, 4, 8 … and the end."""
    return [0, *(2**power for power in range((seq_len - 1).bit_length()) if 2**power < seq_len), seq_len]


def lines_of(found: Sequence[Stretch]) -> str:
    """For people."""
    rows = [f"{one.first:>9,} – {one.last:<9,} {one.loss:8.4f} {one.num_tokens:>12,}" for one in found]
    return "\n".join([f"{'position':^21} {'loss':>8} {'tokens':>12}", *rows])


def write_positions(path: Path, sums: npt.NDArray[np.float64]) -> None:
    """The picture: loss over the position.

    Raises:
        RequestError: it cannot be written.
    """
    seq_len = sums.shape[1]
    edges = sorted({round(share) for share in np.linspace(0, seq_len, min(seq_len, POINTS) + 1)})
    points = [((one.first + one.last) / 2, one.loss) for one in stretches(sums, edges)]
    chart = Chart("Loss by position in the window", [Series("loss", points)], clipped=True, across="position")
    write_picture(path, standalone(line_chart(chart)))


