"""Optimizers, by the names that `optim.name` gives them.

A row says where one is, as `module:class` (`engine.optim.optimizer`), and what it keeps of each weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from engine.config.fields import nearest


@dataclass(frozen=True)
class Row:
    """An optimizer.

    Attributes:
        made_by: `module:class`.
        moments: fp32 numbers that it keeps of each weight, besides the weight itself.
        of_matrices: the same of the layers' matrices, which it then has in buckets of their own; None: as of all.
    """

    made_by: str
    moments: int
    of_matrices: int | None = None


OPTIMIZERS: dict[str, Row] = {
    "adamw": Row("engine.optim.adamw:AdamW", 2),
    "sgd": Row("engine.optim.sgd:SGD", 1),
    "muon": Row("engine.optim.muon:Muon", 2, of_matrices=1),
}


def _row_of(name: str) -> str:
    if name not in OPTIMIZERS:
        raise ValueError(f"there is no optimizer {name!r}; {nearest(name, tuple(OPTIMIZERS))}")
    return name


def _enumerate(schema: dict[str, Any]) -> None:
    schema.update(enum=[*OPTIMIZERS])


OptimizerName = Annotated[str, AfterValidator(_row_of), Field(json_schema_extra=_enumerate)]
