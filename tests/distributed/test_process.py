"""Which device a process takes, and that all of a job take the same kind."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from engine.distributed.environment import LaunchEnvironment
from engine.distributed.process import pick_device, require_one_kind
from engine.errors import RequestError


def launched(rank: int, world_size: int) -> LaunchEnvironment:
    return LaunchEnvironment("slurm", rank, world_size, 0, "127.0.0.1", 0)


def verdicts(kinds: list[str]) -> list[str]:
    """What ranks with these devices are told when they meet."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=10))

    def meet(rank: int) -> str:
        try:
            require_one_kind(store, launched(rank, len(kinds)), kinds[rank])
        except RequestError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(kinds)) as pool:
        return list(pool.map(meet, range(len(kinds))))


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_ranks_of_one_kind_go_on(kind: str) -> None:
    assert verdicts([kind] * 5) == [""] * 5


@pytest.mark.parametrize("odd", [0, 3, 4])
def test_a_host_without_a_gpu_among_others_is_named_on_every_rank(odd: int) -> None:
    kinds = ["cuda"] * 5
    kinds[odd] = "cpu"
    for message in verdicts(kinds):
        assert f"rank {odd} on " in message and "has no GPU" in message


@pytest.mark.parametrize(("wanted", "count", "local_rank", "own", "expected"), [
    ("auto", 0, 0, False, "cpu"), ("cpu", 8, 3, False, "cpu"), ("auto", 8, 3, False, "cuda:3"),
    ("cuda", 1, 0, False, "cuda:0"), ("cuda", 1, 5, True, "cuda:0"), ("cuda", 8, 5, True, "cuda:5"),
    ("cuda", 1, 5, False, None), ("cuda", 0, 0, True, None)])
def test_the_device_of_a_process(monkeypatch: pytest.MonkeyPatch, wanted: str, count: int, local_rank: int, own: bool,
                                 expected: str | None) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    if expected is None:
        with pytest.raises(RequestError, match=f"local rank {local_rank}, and this host has {count}"):
            pick_device(wanted, local_rank, own)
    else:
        assert pick_device(wanted, local_rank, own) == torch.device(expected)
