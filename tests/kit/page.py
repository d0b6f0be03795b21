"""The examples of docs/extending.md, so that what they show is what is tested."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "extending.md"


def example(mark: str) -> str:
    """The code block that holds `mark`."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    [found] = [block for block in blocks if mark in block]
    return str(found)


def run_example(mark: str, **names: Any) -> dict[str, Any]:
    """What the block defines, given `names`."""
    exec(example(mark), names)
    return names


def importable(patch: pytest.MonkeyPatch, mark: str, module: str) -> None:
    """Makes the block a module of that name."""
    made = ModuleType(module)
    exec(example(mark), made.__dict__)
    patch.setitem(sys.modules, module, made)
