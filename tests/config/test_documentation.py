"""docs/configuration.md names every key, every preset and every shipped file, and no other key."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from engine.config import Config, preset_names

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")


def sections() -> dict[str, set[str]]:
    """YAML keys by section."""
    found = {}
    for name, field in Config.model_fields.items():
        for section in (field.annotation, *get_args(field.annotation)):                 # of `Section | None`
            if isinstance(section, type) and issubclass(section, BaseModel):
                found[name] = {str(inner.validation_alias or key) for key, inner in section.model_fields.items()}
    return found


def documented() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {name: set() for name in sections()}
    for title, body in re.findall(r"^### (.*?)\n(.*?)(?=^##|\Z)", TEXT, re.MULTILINE | re.DOTALL):
        section = re.findall(r"`(\w+)`", title)[0]
        for key in re.findall(r"^\| `([\w.]+)`", body, re.MULTILINE):
            owner, _, name = key.rpartition(".")
            found[owner or section].add(name)
    found["batch"] -= {"steps", "tokens"}                     # top level, listed beside the batch
    return found


def test_every_key_is_documented_and_no_other() -> None:
    assert documented() == sections()


def test_every_preset_and_file_is_named() -> None:
    names = [*preset_names(), *(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.yaml"))]
    assert [name for name in names if f"`{name}`" not in TEXT and name != "configs/llama.yaml"] == []
