"""One thread per process, and quick tests first."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")               # before torch is imported; threads of many processes fight

# Folders (and a file) whose tests start processes or train; everything else comes before them, in this order.
SLOW = ("model", "data", "corpus_tools", "generate", "bench", "checkpoints_tools", "parallel", "checkpoint", "train",
        "test_demo.py")

settings.register_profile("octant", deadline=None)          # a busy machine is no defect
settings.load_profile("octant")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A mistake should show in the first seconds rather than in the last ones."""

    def rank(item: pytest.Item) -> int:
        parts = item.path.relative_to(item.config.rootpath).parts
        return max((SLOW.index(part) + 1 for part in parts if part in SLOW), default=0)

    items.sort(key=rank)
