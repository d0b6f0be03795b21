"""Any rank of a job of any size in this process: torch's fake backend, whose collectives do nothing.

What a rank calls does not depend on what its peers send, so a layout can be walked rank by rank, and a job of thousands
looked at from one of its ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist

from engine.distributed.mesh import Job


@contextmanager
def fake_rank(rank: int, world_size: int, device: str = "cpu", backend: str = "fake") -> Iterator[Job]:
    """This process as one rank of a job that is not there."""
    fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group(backend, store=fake_pg.FakeStore(), rank=rank, world_size=world_size)
    try:
        yield Job(device)
    finally:
        dist.destroy_process_group()
