"""The kinds of layers a model can be made of, by the names that `model.attention`, `mlp` and `norm` give them.

A row says where the kind is described, as `module:object`: its parameters and how they are cut, its operations, its
memory, and the class that computes it (`engine.model.kinds`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from engine.config.fields import nearest

ATTENTIONS: dict[str, str] = {
    "grouped-query": "engine.model.kinds:GROUPED_QUERY",                # multi-head and multi-query are its ends
}
MLPS: dict[str, str] = {
    "swiglu": "engine.model.kinds:SWIGLU",
    "gelu": "engine.model.kinds:GELU",
    "relu2": "engine.model.kinds:RELU2",
    "gelu-tanh": "engine.model.kinds:GELU_TANH",
    "relu": "engine.model.kinds:RELU",
    "geglu": "engine.model.kinds:GEGLU",
}
NORMS: dict[str, str] = {
    "rmsnorm": "engine.model.kinds:RMS_NORM",
    "rmsnorm-1p": "engine.model.kinds:RMS_NORM_1P",                     # weights stored less one (Gemma)
    "layernorm": "engine.model.kinds:LAYER_NORM",
}


def _row_of(table: dict[str, str]) -> Callable[[str], str]:
    def check(name: str) -> str:
        if name not in table:
            raise ValueError(f"there is no kind {name!r}; {nearest(name, tuple(table))}")
        return name

    return check


def _enumerate(table: dict[str, str]) -> Callable[[dict[str, Any]], None]:
    return lambda schema: schema.update(enum=[*table])


AttentionName = Annotated[str, AfterValidator(_row_of(ATTENTIONS)), Field(json_schema_extra=_enumerate(ATTENTIONS))]
NormName = Annotated[str, AfterValidator(_row_of(NORMS)), Field(json_schema_extra=_enumerate(NORMS))]
MLPName = Annotated[str, AfterValidator(_row_of(MLPS)), Field(json_schema_extra=_enumerate(MLPS))]
