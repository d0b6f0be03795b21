"""Copies on the nodes' own disks: read where they are whole and of that very checkpoint, else the shared one is."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from engine.checkpoint.folder import committed_steps
from engine.checkpoint.local import LocalCopies, kept_by
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.write import CheckpointWriter
from engine.config import Config
from engine.distributed.topology import Topology
from engine.train.corpora import Corpora
from engine.train.loop import Trainer
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.kills import state_of
from tests.kit.runs import assert_equal_tensors, metrics, run_config, saved_steps, tensors, train, trained


def configs(folder: Path, **parallel: Any) -> tuple[Config, Config]:
    """A run with copies, and the same without."""
    return (run_config(folder, "run", steps=8, parallel=parallel, eval={"every": 0},
                       checkpoint={"every": 2, "keep": 0, "local": str(folder / "node")}),
            run_config(folder, "whole", steps=8, parallel=parallel, eval={"every": 0}))


def go_on(config: Config) -> list[str]:
    """The rest of the run on one rank; what it said at the start."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.metrics.console.Console.note", lambda self, text: said.append(text))
        trainer = Trainer.start(config, mesh_for(Topology.of(config)), Corpora.open(config), lambda: False)
        trainer.run()
        trainer.close()
    return said


def shared(config: Config, step: int) -> Path:
    return Path(config.run.dir) / "checkpoints" / f"step-{step:08d}"


def copies(config: Config) -> Path:
    assert config.checkpoint.local is not None
    [folder] = Path(config.checkpoint.local).iterdir()
    return folder


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("parallel", [{"data": 2, "zero": 1}, {"data": 2, "zero": 0}, {"tensor": 2}], ids=str)
def test_a_restart_reads_the_copies_where_the_shared_files_cannot_be_read(tmp_path: Path,
                                                                          parallel: dict[str, int]) -> None:
    """Of the shared checkpoint only the manifest is left; the run ends as one that was never interrupted."""
    config, whole = configs(tmp_path, **parallel)
    train(config, crash_after=5)
    for path in shared(config, 4).glob("*.safetensors"):
        path.unlink()
    said, _ = run_distributed(go_on, 2, config)
    assert any(line.startswith(f"resumed from {copies(config)}/rank-00000/step-00000004 (step 4") for line in said)
    assert not [line for line in said if "not used" in line or "skipped" in line]
    train(whole)
    assert trained(config) == trained(whole)
    assert_equal_tensors(tensors(config, 8), tensors(whole, 8))
    for rank in range(2):
        assert list(committed_steps(copies(config) / f"rank-{rank:05d}")) == [6, 8], "the newest two"


def test_a_damaged_copy_is_not_used_and_said_so(tmp_path: Path) -> None:
    config, whole = configs(tmp_path, data=2, zero=1)
    train(config, crash_after=5)
    damaged = copies(config) / "rank-00001" / "step-00000004" / "rank-00001.safetensors"
    flip(damaged)
    said, _ = run_distributed(go_on, 2, config)
    assert [line for line in said if "not used" in line] == [
        f"copies on the nodes are not used (rank 1: {damaged}: the content has changed since it was written): reading "
        f"{shared(config, 4)}"]
    train(whole)
    assert trained(config) == trained(whole)
    assert saved_steps(config) == [2, 4, 6, 8]


@pytest.mark.parametrize("what", ["gone", "other", "layout", "both damaged"])
def test_what_is_no_copy_of_the_newest_checkpoint_is_not_read(tmp_path: Path, what: str) -> None:
    config, whole = configs(tmp_path, data=2, zero=1)
    train(config, crash_after=5)
    mine = copies(config) / "rank-00001" / "step-00000004"
    if what == "gone":
        shutil.rmtree(mine)
    elif what == "other":
        shutil.rmtree(mine)
        mine.parent.joinpath("step-00000002").rename(mine)
    elif what == "both damaged":
        flip(mine / "rank-00001.safetensors")
        flip(shared(config, 4) / "rank-00001.safetensors")
    else:
        config = Config.model_validate(config.to_dict() | {
            "parallel": config.parallel.model_dump(mode="json") | {"data": 1, "tensor": 2}})
    said, _ = run_distributed(go_on, 2, config)
    assert any({"gone": "no such checkpoint", "other": "is the copy of another checkpoint", "layout": "",
                "both damaged": "checkpoint of step 4 skipped, now step-00000004.corrupt"}[what] in line
               for line in said), said
    train(whole)
    if what != "layout":
        assert trained(config) == trained(whole)
    assert metrics(config)[-1]["step"] == 8


def on_nodes(folder: str, replaced: str) -> tuple[str, str, list[int]]:
    """One of four ranks on two nodes, of which one is replaced between saving and reading."""
    mesh = mesh_for(Topology(data=4))
    rank, group = mesh.rank, mesh.world.group
    host = f"n{rank // 2}"
    made = LocalCopies(Path(folder) / host, Path(folder) / "run", group, host)
    writer = CheckpointWriter(Path(folder) / "run", None, True, group, copies=made)
    pieces = state_of(1, rank, 4)
    writer.save(1, pieces, {})
    [report] = writer.wait()
    assert report.error is None and report.path is not None and report.warning is None
    mesh_for(Topology(data=4)).world.group.barrier().wait()                            # type: ignore[union-attr]
    for node in replaced.split() if rank == 0 else ():
        shutil.rmtree(Path(folder) / node)
    mesh.world.group.barrier().wait()                                                  # type: ignore[union-attr]
    wanted = state_of(0, rank, 4)
    reader, why = made.open(CheckpointReader(report.path), wanted)
    if reader is None:
        return "", why, list(made.kept)
    reader.load_into(wanted)
    assert all((got.tensor == right.tensor).all() for got, right in zip(wanted, pieces, strict=True))
    return str(reader.path.relative_to(folder)), why, list(made.kept)


@pytest.mark.parametrize("replaced", ["", "n0", "n1"])
def test_a_node_that_was_replaced_gets_its_files_from_its_neighbour(tmp_path: Path, replaced: str) -> None:
    found = run_distributed(on_nodes, 4, str(tmp_path), replaced)
    for rank, (path, why, kept) in enumerate(found):
        assert path.startswith(f"n{rank // 2}/run-") and path.endswith(f"rank-{rank:05d}/step-00000001") and not why
        assert kept == [rank, (rank + 2) % 4]


def test_both_nodes_were_replaced(tmp_path: Path) -> None:
    for _, why, _ in run_distributed(on_nodes, 4, str(tmp_path), "n0 n1"):
        assert why.startswith("rank 0: ") and why.endswith("no such checkpoint (and 3 more ranks)")


def test_who_keeps_what() -> None:
    assert [kept_by(rank, ["a", "a", "b", "b"]) for rank in range(4)] == [(0, 2), (1, 3), (2, 0), (3, 1)]
    assert kept_by(1, ["a", "a"]) == (1,)
    assert [kept_by(rank, ["a", "a", "b"]) for rank in range(3)] == [(0, 2), (1,), (2, 0)]


def test_a_node_without_room_costs_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("a file, where a folder should be made")
    made = LocalCopies(tmp_path / "full" / "node", tmp_path / "run", None)
    writer = CheckpointWriter(tmp_path / "run", None, False, copies=made)
    writer.save(1, state_of(1, 0, 1), {})
    [report] = writer.wait()
    assert report.error is None and report.warning == f"no copy of it is kept in {made.folder}: {os.strerror(17)}"
