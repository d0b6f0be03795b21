"""What every section of the configuration is made of: its base class, the kinds of numbers, and the nearest name."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def _refuse_bool(value: object) -> object:
    """YAML's `true` would otherwise pass for the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def count_or_auto(value: object) -> object:
    """For `PlainValidator`: a number of at least 1, or the word `auto`."""
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError(f"must be a number of at least 1, or `auto`; it is {value!r}")


Count = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=1)]
NonNegative = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0)]
Positive = Annotated[float, BeforeValidator(_refuse_bool), Field(gt=0, allow_inf_nan=False)]
Number = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, BeforeValidator(_refuse_bool), Field(ge=0, lt=1)]
ZeroLevel = Annotated[int, BeforeValidator(_refuse_bool), Field(ge=0, le=3)]


class Section(BaseModel):
    """Frozen, strict about its keys, and constructible from Python by attribute name."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean …?` where some known name is close, else the list of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else "known: " + ", ".join(known)
