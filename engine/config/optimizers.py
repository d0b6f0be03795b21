"""Optimizers, by the names that `optim.name` gives them.

A row says where one is, as `module:class` (`engine.optim.optimizer`), and what it keeps of each weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.config.fields import NameOf


@dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        made_by: `module:class`.
        moments: fp32 numbers that it keeps of each weight, besides the weight itself.
        of_matrices: the same of the layers' matrices, which it then has in buckets of their own; None: as of all.
        factored: of a matrix it keeps a number per row and one per column instead.
        averages: it keeps one more number of each weight where `optim.momentum` is given.
    """

    made_by: str
    moments: int
    of_matrices: int | None = None
    factored: bool = False
    averages: bool = False


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row("engine.optim.adamw:AdamW", 2),
    "sgd": Row("engine.optim.sgd:SGD", 1),
    "adafactor": Row("engine.optim.adafactor:Adafactor", 1, factored=True, averages=True),
    "muon": Row("engine.optim.muon:Muon", 2, of_matrices=1),
}

OptimizerName = Annotated[str, NameOf("optimizer", OPTIMIZERS)]
