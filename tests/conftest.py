"""One thread per process, and quick tests first."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.kit.fuzz import totals_table

os.environ.setdefault("OMP_NUM_THREADS", "1")               # before torch is imported; threads of many processes fight
if not Path("/proc/driver/nvidia").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")          # before triton is: its kernels run on the processor

# Folders (and a file) whose tests start processes or train; everything else comes before them, in this order.
SLOW = ("model", "data", "corpus_tools", "generate", "bench", "checkpoints_tools", "parallel", "checkpoint", "train",
        "test_demo.py")

settings.register_profile("octant", deadline=None)          # a busy machine is no defect
settings.load_profile("octant")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, metavar="N", help="damaged inputs per reader, new ones each time (default: "
                                                           "200, the same each time)")
    parser.addoption("--chaos", action="store_true", help="also the faults that take long to be survived")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.getoption("--fuzz") is not None and (table := totals_table()):
        terminalreporter.section("damaged inputs")
        terminalreporter.write_line("\n".join(table))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A mistake should show in the first seconds rather than in the last ones."""

    def rank(item: pytest.Item) -> int:
        parts = item.path.relative_to(item.config.rootpath).parts
        return max((SLOW.index(part) + 1 for part in parts if part in SLOW), default=0)

    items.sort(key=rank)
