"""What every section of the configuration is made of: its base class, kinds of numbers and words, the nearest name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    PlainValidator,
    WithJsonSchema,
)
from pydantic_core.core_schema import CoreSchema, no_info_after_validator_function

from engine.errors import printable


def _refuse_bool(value: object) -> object:
    """YAML's `true` would otherwise pass for the number 1."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number, not {str(value).lower()}")
    return value


def _degree_or_auto(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MOST_RANKS):
        return value
    raise ValueError(f"must be a number from 1 to {MOST_RANKS:,}, or `auto`; it is {value!r:.60}")


def _words(value: str) -> str:
    """Something that can be the name of a file."""
    if not value.strip():
        raise ValueError("must not be empty")
    if printable(value) != value or "\n" in value:
        raise ValueError(f"holds a control character: {value!r:.60}")
    return value


# Every number has a bound: far above what anybody trains, far below where arithmetic or memory ends.
MOST_RANKS, MOST_LAYERS, MOST = 1_000_000, 10_000, 10**12
_NUMBER = BeforeValidator(_refuse_bool)
Count = Annotated[int, Field(ge=1, le=MOST), _NUMBER]
Size = Annotated[int, Field(ge=1, le=2**31 - 1), _NUMBER]                # of a dimension, of a batch
Degree = Annotated[int, Field(ge=1, le=MOST_RANKS), _NUMBER]
DegreeOrAuto = Annotated[int | Literal["auto"], PlainValidator(_degree_or_auto), WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 1, "maximum": MOST_RANKS}, {"const": "auto"}]})]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS), _NUMBER]
NonNegative = Annotated[int, Field(ge=0, le=MOST), _NUMBER]
Seed = Annotated[int, Field(ge=0, le=2**64 - 1), _NUMBER]
Sample = Annotated[int, Field(ge=0, le=2**63 - 1), _NUMBER]
Positive = Annotated[float, Field(gt=0, le=MOST, allow_inf_nan=False), _NUMBER]
Number = Annotated[float, Field(ge=0, le=MOST, allow_inf_nan=False), _NUMBER]
Signed = Annotated[float, Field(ge=-MOST, le=MOST, allow_inf_nan=False), _NUMBER]
Rate = Annotated[float, Field(gt=0, le=10, allow_inf_nan=False), _NUMBER]
RateOrZero = Annotated[float, Field(ge=0, le=10, allow_inf_nan=False), _NUMBER]
Fraction = Annotated[float, Field(ge=0, lt=1), _NUMBER]
Share = Annotated[float, Field(gt=0, le=1), _NUMBER]
ZeroLevel = Annotated[int, Field(ge=0, le=3), _NUMBER]
Words = Annotated[str, AfterValidator(_words), Field(max_length=4096)]


class Section(BaseModel):
    """Frozen, strict about its keys, and constructible from Python by attribute name."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, protected_namespaces=())


@dataclass(frozen=True)
class NameOf:
    """Of a string: it names a row of `table`, which is looked at when the name is checked, not before."""

    what: str
    table: Mapping[str, Any]

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return no_info_after_validator_function(self._known, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": [*self.table]}

    def _known(self, name: str) -> str:
        if name not in self.table:
            raise ValueError(f"there is no {self.what} {name!r}; {nearest(name, tuple(self.table))}")
        return name


def nearest(name: str, known: Sequence[str]) -> str:
    """`did you mean …?` where some known name is close, else the list of them."""
    close = get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean `{close[0]}`?" if close else "known: " + ", ".join(known)
