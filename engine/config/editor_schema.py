"""The configuration as a JSON Schema: editors complete keys and mark mistakes while a file is written.

It is the schema that loading checks, with what only files have: `base:`, `model.preset`, and that any required key may
come from either of them.
"""

from __future__ import annotations

from typing import Any

from engine.config.load import preset_names
from engine.config.schema import Config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def editor_schema() -> dict[str, Any]:
    """The whole schema as plain JSON values."""
    schema = Config.model_json_schema()
    _clean(schema)
    schema.pop("required", None)
    model = schema["$defs"]["ModelConfig"]
    model.pop("required", None)
    model["properties"]["preset"] = {"enum": preset_names()}
    schema["properties"]["base"] = {"type": "string", "description": "a file to inherit from, relative to this one"}
    return {"$schema": DIALECT, "title": "Octant configuration"} | schema


def _clean(part: Any) -> None:
    """Drops the titles, which only repeat the keys, and lets a section be left empty."""
    for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        _clean(value)
    if isinstance(part, dict):
        if isinstance(part.get("title"), str):
            del part["title"]
        if part.get("default") == {}:
            del part["default"]
