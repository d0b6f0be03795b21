"""The kinds of layers a model can be made of, by the names that `model.attention`, `mlp` and `norm` give them.

A row says where the kind is described, as `module:object`: its parameters and how they are cut, its operations, its
memory, and the class that computes it (`engine.model.kinds`).
"""

from __future__ import annotations

from typing import Annotated

from engine.config.fields import NameOf

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


AttentionName = Annotated[str, NameOf("kind", ATTENTIONS)]
NormName = Annotated[str, NameOf("kind", NORMS)]
MLPName = Annotated[str, NameOf("kind", MLPS)]
