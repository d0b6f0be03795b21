"""One training sequence, wherever it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from engine.model.fields import Field


@dataclass(frozen=True, slots=True)
class Sample:
    """One training sequence: inputs `tokens[:-1]`, targets `tokens[1:]`."""

    tokens: np.ndarray  # int64 [seq_len + 1]
    loss_mask: np.ndarray | None  # bool [seq_len]: False where the target is not to be learned; None: all are
    document_ids: np.ndarray | None  # int32 [seq_len]: the inputs' documents, 0, 1, …; None: no document mask
    source: int
    window: int
    extra: Mapping[Field, np.ndarray] = field(default_factory=dict)  # what the objective needs besides, without rows
    used: int | None = None  # inputs up to the last that is no padding; None: all of them
    rest: tuple[Sample, ...] = ()  # further sequences that belong to the same sample: the other text of a pair
