"""Roles that lie in host memory while they have nothing to do: the same run to the last bit, in less memory."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from engine.config import Config
from engine.distributed.mesh import Job
from engine.rl.cast import Member
from engine.rl.loop import Learner
from tests.kit.digits import learner_of
from tests.kit.distributed import job, run_distributed
from tests.kit.layouts import Shards
from tests.rl.test_placements import reward, run_config  # noqa: F401 (a fixture)
from tests.rl.test_resume import rows
from tests.train.test_accelerator import case, told

ALL = {"actor": {"offload": True}, "critic": {"offload": True}, "reference": {"offload": True},
       "reward": {"offload": True}}
PLACEMENTS: dict[str, dict[str, Any]] = {
    "one process, bf16": {"precision": {"compute": "bf16"}},
    "zero 3": {"parallel": {"data": 2, "zero": 3}},
    "tensor, changes alone are sent": {"parallel": {"tensor": 2}, "rollout": {"delta": True}},
    "split, zero 2": {"roles": {"actor": {"ranks": "0:2", "parallel": {"data": 2, "zero": 2}},
                                "critic": {"ranks": "1:2", "parallel": {}}}},
}


def run(config: Config, where: Job, stops_after: int = 0) -> Shards:
    learner = learner_of(config, where, lambda: 0 < stops_after <= learner.state.step + 1)
    try:
        learner.run()
    finally:
        learner.close()
    return [(piece.key, piece.global_shape, box, values.clone()) for piece in learner.state.pieces()
            for box, values in piece.parts()]


def run_here(config: Config, stops_after: int = 0) -> Shards:
    return run(config, job(), stops_after)


def configured(folder: Path, reward: Path, placement: dict[str, Any], offload: bool) -> Config:   # noqa: F811
    rest = {key: value for key, value in placement.items() if key not in ("roles", "parallel", "rollout")}
    roles = placement.get("roles", {})
    merged = {name: roles.get(name, {}) | ALL.get(name, {}) for name in (*ALL, *roles)} if offload else dict(roles)
    return run_config(folder, reward, placement | {"roles": merged}, steps=3, **rest)


@pytest.mark.parametrize("name", PLACEMENTS)
def test_it_is_the_same_run(name: str, tmp_path: Path, reward: Path) -> None:       # noqa: F811
    """Bit for bit; and where it stops and goes on, too."""
    size = 1 if name.startswith("one") else 2
    plain, resting = (configured(tmp_path / str(offload), reward, PLACEMENTS[name], offload)
                      for offload in (False, True))
    want = run_distributed(run_here, size, plain)
    run_distributed(run_here, size, resting, 2)
    assert [*rows(resting)] == [1, 2]
    got = run_distributed(run_here, size, resting)
    for mine, theirs in zip(got, want, strict=True):
        assert all(a[:3] == b[:3] and torch.equal(a[3], b[3]) for a, b in zip(mine, theirs, strict=True)) and mine
    assert rows(resting) == rows(plain)


EVERY = 5


def storages(member: Member) -> dict[int, tuple[int, Tensor]]:
    """All memory of a role on its device, by storage, with the bytes of one that is there."""
    state = member.state
    assert state.model is not None
    tensors: list[Tensor] = [parameter for chunk in state.model.chunks.values() for parameter in chunk.parameters()]
    for bucket in state.model.buckets:
        tensors += [bucket.param_buffer, bucket.master, *bucket.gradients()]
    if state.optimizer is not None:
        tensors += [moment for of in state.optimizer.moments.values() for moment in of.values()]
    return {each.untyped_storage()._cdata: (each.numel() * each.element_size(), each) for each in tensors}


class Ledger(TorchDispatchMode):
    """Bytes of the roles' memory throughout a step, at one operation of `EVERY`: who is there in each phase, and the
    most."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self._learner = learner
        self._tensors = {name: [each for _, each in storages(member).values()]
                         for name, member in learner.cast.members.items()}
        self._count = 0
        self.there: dict[str, set[str]] = defaultdict(set)
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._count += 1
        if self._count % EVERY:
            return function(*args, **(kwargs or {}))
        sizes = {name: sum(each.untyped_storage().nbytes() for each in tensors)
                 for name, tensors in self._tensors.items()}
        self.there[self._learner.phases.now.phase] |= {name for name, size in sizes.items() if size}
        self.most = max(self.most, sum(sizes.values()))
        return function(*args, **(kwargs or {}))


def test_who_is_idle_is_not_on_the_device(tmp_path: Path, reward: Path) -> None:    # noqa: F811
    """Of a step; by the storages of everything that a role has."""
    found = {}
    for offload in (False, True):
        config = configured(tmp_path / str(offload), reward, {"precision": {"compute": "bf16"}}, offload)
        learner = learner_of(config.model_copy(update={"steps": 1}), Job("cpu"))
        whole = {name: sum(size for size, _ in storages(member).values())
                 for name, member in learner.cast.members.items()}
        with Ledger(learner) as ledger:
            learner.run()
        learner.close()
        found[offload] = ledger
    assert found[False].most == sum(whole.values())
    assert {phase: who for phase, who in found[True].there.items() if phase not in ("between", "log", "read", "save")} \
        == {"reshard": {"actor", "rollout"}, "gen": {"rollout"}, "reward": {"rollout", "reward2"},
            "old_log_prob": {"actor"}, "ref": {"reference"}, "values": {"critic"}, "adv": set(),
            "update_critic": {"critic"}, "update_actor": {"actor"}}
    assert not found[True].there["read"] and found[True].there["save"] <= {"actor", "critic"}      # to be compared
    assert found[True].most == max(whole["actor"], whole["critic"]) < 0.45 * found[False].most


def test_on_an_accelerator_it_moves_to_the_host_and_back() -> None:
    """A role that learns: idle, in a forward pass, idle, in an update, idle; and one that does not."""
    two = [{"data": 2, "zero": 3}, {"tensor": 2, "pipeline": 2}]
    cases = [case({}, park=True), *(case(layout, park=True, precision={"compute": "bf16"}) for layout in two)]
    one, zero_3, cut = told(cases)
    judges = ["|", "weights |", "|"]
    assert one == {"judges": judges, "learns": [
        "| cpu", "weights masters | cpu pretend", "| cpu", "weights masters gradients moments | pretend", "| cpu"]}
    assert zero_3 == {"judges": judges, "learns": [
        "| cpu", "shards | cpu", "| cpu", "shards masters gradients moments | pretend", "| cpu"]}
    assert cut == {"judges": judges, "learns": [
        "| cpu", "weights | cpu", "| cpu", "weights masters gradients moments | pretend", "| cpu"]}
