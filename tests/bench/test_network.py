"""`octant bench network`: every pair once, slow ones by name, and figures that the planner takes."""

from __future__ import annotations

import json
import time
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from engine import cli
from engine.bench import network
from engine.bench.network import OPERATIONS, Network, Pair, fit, measure, rounds, slow_ones
from tests.kit.distributed import job, run_distributed

DELAY = 0.2


@pytest.mark.parametrize("number", range(2, 8))
def test_everybody_meets_everybody_once_and_one_at_a_time(number: int) -> None:
    found = list(rounds(number))
    assert sorted(pair for pairs in found for pair in pairs) == list(combinations(range(number), 2))
    for pairs in found:
        players = [player for pair in pairs for player in pair]
        assert len(players) == len(set(players))


def test_latency_and_bandwidth_are_found_again() -> None:
    points = [(steps, size, 2e-5 * steps + size / 3e9) for steps in (1, 3, 6) for size in (4e3, 1e6, 6e7)]
    found = fit([(steps, size, seconds * (1.02 if size > 1e5 else 0.98)) for steps, size, seconds in points])
    assert found.latency_seconds == pytest.approx(2e-5, rel=0.05) and found.error < 0.03
    assert found.bytes_per_second == pytest.approx(3e9, rel=0.05)
    assert fit([(1, 1e6, 1e-3), (1, 2e6, 1e-3)]).latency_seconds == pytest.approx(1e-3, rel=0.2)
    falling = fit([(1, 1e6, 2e-3), (1, 8e6, 1e-3)])                # no bandwidth explains it
    assert falling.latency_seconds > 0 and falling.bytes_per_second > 1e12


def test_a_pair_a_rank_and_nobody() -> None:
    hosts = [f"host-{rank}" for rank in range(4)]

    def named(*slow: tuple[int, int]) -> list[str]:
        return slow_ones([Pair(pair, "inside", 1e-5, 5e-3 if pair in slow else 1e-3)
                          for pair in combinations(range(4), 2)], hosts)

    assert named() == []
    assert named((1, 2)) == ["ranks 1 (host-1) and 2 (host-2): 5.0 × the median long message inside a node"]
    assert named((0, 3), (1, 3)) == ["rank 3 (host-3) is slow with most others, at worst 5.0 × the median"]
    assert slow_ones([Pair((0, 1), "across", 1.0, 1.0)], hosts) == []


def _network(per_node: int, slow: list[list[int]]) -> dict[str, Any]:
    """In a worker: messages between the ranks of `slow` are late."""
    plain, me, factor = dist.send, dist.get_rank(), network.SLOW

    def late(tensor: Any, to: int, **options: Any) -> None:
        if sorted((me, to)) in slow:
            time.sleep(DELAY)
        plain(tensor, to, **options)

    dist.send, network.SLOW = late, 100.0               # others are slow at times on a machine that does other things
    try:
        found: Network = measure(job(), per_node, f"host-{me // per_node}", [64, 4096], repeats=2)
    finally:
        dist.send, network.SLOW = plain, factor
    return found.record()


def test_the_slow_pair_and_the_slow_rank_are_named() -> None:
    told = run_distributed(_network, 4, 4, [[1, 2]])
    assert told[0] == told[3] and told[0]["slow"][0].startswith("ranks 1 (host-0) and 2 (host-0): ")
    told = run_distributed(_network, 4, 4, [[0, 3], [1, 3], [2, 3]])
    assert told[0]["slow"][0].startswith("rank 3 (host-0) is slow with most others")


def test_inside_across_and_all() -> None:
    record = run_distributed(_network, 4, 2, [])[0]
    assert (record["world"], record["nodes"], record["hosts"]) == (4, 2, ["host-0"] * 2 + ["host-1"] * 2)
    kinds = {(row["scope"], row["ranks"], row["nodes"]) for row in record["rows"]}
    assert kinds == {("inside", 2, 1), ("across", 2, 2), ("all", 4, 2)}
    assert {row["operation"] for row in record["rows"]} == set(OPERATIONS) and len(record["rows"]) == 18
    assert {tuple(pair["ranks"]): pair["scope"] for pair in record["pairs"]} == {
        (0, 1): "inside", (2, 3): "inside", (0, 2): "across", (1, 3): "across"}
    assert set(record["fit"]) == {"inside", "across", "message inside", "message across"}
    assert all(row["seconds"] > 0 and row["bus_bytes_per_second"] > 0 for row in record["rows"])


def test_from_the_command_line_to_a_plan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path, told = tmp_path / "new" / "n.json", tmp_path / "n.md"
    words = ["--processes", "2", "--device", "cpu", "--repeats", "1", "--sizes", "4k,64k", "--markdown", str(told)]
    assert cli.run(["bench", "network", *words, "--json", str(path)]) == 0
    out = capfd.readouterr().out
    assert "inside  reduce_scatter      2  65,536" in out and "latency and bandwidth fitted" in out
    assert told.read_text().startswith("## 2 processes on 1 nodes")
    measured = json.loads(path.read_text())["fit"]["inside"]
    assert cli.run(["plan", "tiny", "parallel.tensor=2", "--gpu", "cpu", "--json"]) == 0
    before = json.loads(capfd.readouterr().out)["breakdown"]
    assert cli.run(["plan", "tiny", "parallel.tensor=2", "--gpu", "cpu", "--json", "--calibrate", str(path)]) == 0
    after = json.loads(capfd.readouterr().out)["breakdown"]
    assert after["compute"] == pytest.approx(before["compute"]) and after["tensor_comm"] != before["tensor_comm"]
    assert measured["latency_seconds"] > 0


@pytest.mark.parametrize(("words", "message"), [
    (["--sizes", "many"], "--sizes many: give bytes"), (["--sizes", "1"], "at least one round, and 4 bytes"),
    (["--repeats", "0"], "at least one round"), (["--json", "configs/tiny.yaml"], "not of this command's making"),
])
def test_wrong_requests(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "network", *words]) == 2
    assert message in capsys.readouterr().err
