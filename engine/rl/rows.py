"""From texts to rows of a batch, and back from what models say of places to numbers of tokens.

Token t of a response is the label at place `prompt − 1 + t` (`engine.rl.objectives`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from torch import Tensor

from engine.config import Config
from engine.data.sample import Sample
from engine.distributed.collectives import all_gather
from engine.distributed.mesh import Mesh
from engine.distributed.topology import Topology
from engine.model.context import Batches
from engine.model.fields import END, Field
from engine.parallel.context.zigzag import whole
from engine.rl.rollouts import Rollouts
from engine.schedules.table import recipe
from engine.train.batches import HostBatch, collate, row_multiple


def sample_of(rollouts: Rollouts, row: int, seq_len: int, extra: Mapping[Field, np.ndarray]) -> Sample:
    """A row as a training sequence; its loss mask is on the response."""
    prompt, response = rollouts.prompt_of(row).tokens, rollouts.responses[row].tokens
    tokens = np.zeros(seq_len + 1, np.int64)
    length = len(prompt) + len(response)
    tokens[: len(prompt)], tokens[len(prompt) : length] = prompt, response
    mask = np.zeros(seq_len, bool)
    mask[len(prompt) - 1 : length - 1] = True
    return Sample(tokens, mask, None, 0, row, extra, length)


def at_places(rollouts: Rollouts, row: int, seq_len: int, numbers: Tensor) -> np.ndarray:
    """Numbers of a response's tokens at their places, fp32 [seq_len]; 0 elsewhere."""
    out = np.zeros(seq_len, np.float32)
    first = len(rollouts.prompt_of(row).tokens) - 1
    out[first : first + len(numbers)] = numbers.numpy()
    return out


def end_of(rollouts: Rollouts, row: int, seq_len: int) -> np.ndarray:
    """True at a row's last token, which a reward model reads."""
    out = np.zeros(seq_len, bool)
    out[len(rollouts.prompt_of(row).tokens) + len(rollouts.responses[row].tokens) - 1] = True
    return out


def with_end(rollouts: Rollouts, seq_len: int) -> Callable[[int], Sample]:
    """Rows as reward models read them, by number."""
    return lambda row: sample_of(rollouts, row, seq_len, {END: end_of(rollouts, row, seq_len)})


def plain(rollouts: Rollouts, seq_len: int) -> Callable[[int], Sample]:
    """Rows with nothing besides, by number."""
    return lambda row: sample_of(rollouts, row, seq_len, {})


def dealt(order: Sequence[int], config: Config, data_index: int) -> list[list[int]]:
    """The rows of each microbatch of a data rank, where the rows of `order` are worked through one global batch at a
    time: those that `engine.train.batches.Loader` would give it."""
    micro, unit = config.batch.micro, config.batch.micro * config.parallel.data_size
    return [list(order[first + data_index * micro : first + (data_index + 1) * micro])
            for first in range(0, len(order), unit)]


def collated(rows: Sequence[Sequence[int]], sample: Callable[[int], Sample], config: Config,
             mesh: Mesh) -> list[HostBatch]:
    """The microbatches of these rows, for a role of this configuration."""
    return [collate([sample(row) for row in each], row_multiple(config), mesh.device.type == "cuda") for each in rows]


def of_tokens(measured: Tensor | None, batches: Batches, rows: Sequence[Sequence[int]], rollouts: Rollouts,
              mesh: Mesh) -> dict[int, Tensor]:
    """What was measured of each response's tokens, fp32 on the CPU, by row.

    Args:
        measured: [microbatches, 1, S, B] of the last chunk; None where that is not.
        batches: of which it was measured.

    Returns:
        Nothing but on the rank that answers for its rows (`owner`).
    """
    if measured is None:
        return {}
    parts = all_gather(measured[:, 0].unsqueeze(0), mesh.context)                     # [context, M, S part, B]
    if mesh.tensor.index or mesh.context.index:
        return {}
    parts = parts.float().cpu()
    found: dict[int, Tensor] = {}
    for index, each in enumerate(rows):
        numbers = whole(parts[:, index, : batches.shape(index)[0]])
        for place, row in enumerate(each):
            first = len(rollouts.prompt_of(row).tokens) - 1
            found[row] = numbers[first : first + len(rollouts.responses[row].tokens), place]
    return found


def owner(ranks: range, config: Config, data_index: int) -> int:
    """The rank of the job that answers for the rows of a role's data rank: of those with the last chunk, the first."""
    last = 0 if recipe(config.parallel.schedule).v_shaped else config.parallel.pipeline - 1
    return ranks.start + Topology.of(config).rank(pipeline=last, data=data_index)


def owners(ranks: range, config: Config, order: Sequence[int]) -> list[int]:
    """The rank that answers for each row, by row."""
    found = [0] * len(order)
    for index in range(config.parallel.data_size):
        for rows in dealt(order, config, index):
            for row in rows:
                found[row] = owner(ranks, config, index)
    return found
