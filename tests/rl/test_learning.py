"""It learns: a small `grpo` of benchmarks/rl/learning.py, whose table has all variants and seeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.rl import learning


def test_grpo_learns_from_exact_matches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From demonstrations of which half are wrong, by twelve steps."""
    for name, value in (("DIGITS", "01234"), ("NUMBER", 3), ("HELD_OUT", 10), ("FEW", 10), ("CHATS", 4000),
                        ("SFT_STEPS", 200)):
        monkeypatch.setattr(learning, name, value)
    right = learning.run("grpo", 0, tmp_path, steps=12).values(learning.SCORE)
    assert len(right) == 12
    assert right[0] < 0.7
    assert np.mean(right[-3:]) > 0.85
