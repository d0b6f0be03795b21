"""What comes with Octant besides its code: run configurations and batch scripts.

In a clone they lie in `configs/` and `launch/` at its root, where people read and change them.  An installed package
has them inside itself (see setup.py), because such names belong to nobody at the top level.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

PACKAGE = Path(__file__).resolve().parent


def shipped(name: Literal["configs", "launch"]) -> Path:
    """The folder of that name, wherever this installation has it."""
    inside = PACKAGE / name
    return inside if inside.is_dir() else PACKAGE.parent / name
