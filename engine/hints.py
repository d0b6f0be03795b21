"""The last line of a command: what comes next, as a command that can be pasted and runs."""

from __future__ import annotations

import shlex


def hint(*words: object, why: str = "") -> str:
    """`next: octant …` with the words quoted as a shell needs them, and a comment behind it."""
    return f"next: octant {shlex.join(map(str, words))}" + (f"   # {why}" if why else "")
