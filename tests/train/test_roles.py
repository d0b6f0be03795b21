"""Several models in one program, each on its ranks and in its layout: every placement is the same mathematics.

An actor that learns to predict tokens, a critic of another size with another head and objective, and a reference that
is not trained: on all ranks alike, on ranks that overlap, on ranks of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.resume import open_checkpoint
from engine.checkpoint.write import save
from engine.config import Config, ParallelConfig
from engine.distributed.mesh import Job
from engine.distributed.pieces import Piece
from engine.distributed.reshard import Reshard
from engine.distributed.topology import Topology
from engine.errors import ConfigError, RequestError
from engine.model.context import Batch
from engine.model.objective import NEXT_TOKEN, Head, Objective
from engine.optim.schedule import learning_rate
from engine.train.role import Role, RoleState
from engine.train.state import TrainState
from tests.kit.distributed import job, run_distributed
from tests.kit.layouts import TOLERANCE, Result, Shards, assemble, check, microbatches, reference, shards, tiny_config
from tests.kit.reference import global_batch

NUM_RANKS, NUM_STEPS = 6, 3
CRITIC = {"num_layers": 5, "hidden_size": 24, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 40,
          "vocab_size": 97, "max_seq_len": 64, "head": "score", "qkv_bias": True}


class Distance(Objective):
    """The squared distance of every token's score from its label."""

    head = "score"

    def __call__(self, x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
        assert batch.labels_SB is not None
        return [(head.scores(x_SBH) - batch.labels_SB / 50).square().sum()]

    def count(self, batch: Batch) -> Tensor | int:
        return batch.tokens_SB.numel()


@dataclass(frozen=True)
class Placement:
    """Ranks and layout of each role."""

    actor: tuple[range, dict[str, Any]]
    critic: tuple[range, dict[str, Any]]
    frozen: tuple[range, dict[str, Any]]

    def roles(self) -> list[Role]:
        run = tiny_config()
        critic = Config.model_validate(run.to_dict() | {"model": CRITIC}).model

        def role(name: str, place: tuple[range, dict[str, Any]], **others: Any) -> Role:
            model = critic if name == "critic" else run.model
            return Role(name, model, ParallelConfig(**place[1]), place[0], **others)

        return [role("actor", self.actor), role("critic", self.critic, objective=Distance()),
                role("reference", self.frozen, trainable=False)]


ALONE = Placement(*[(range(1), {})] * 3)
PLACEMENTS = {
    "all on all": Placement((range(6), {"pipeline": 3, "data": 2}), (range(6), {"pipeline": 3, "data": 2, "zero": 3}),
                            (range(6), {"pipeline": 3, "data": 2})),
    "overlapping": Placement((range(4), {"tensor": 2, "pipeline": 2}), (range(2, 6), {"pipeline": 2, "data": 2}),
                             (range(3, 5), {"tensor": 2})),
    "disjoint": Placement((range(2), {"tensor": 2, "sequence": False}),
                          (range(2, 4), {"data": 2, "zero": 2}), (range(4, 6), {"pipeline": 2})),
    "nested": Placement((range(1, 5), {"data": 4, "zero": 3}), (range(2, 3), {}), (range(4), {"context": 2,
                                                                                               "tensor": 2})),
    "zero bubble beside context": Placement((range(2), {"pipeline": 2, "schedule": "zb-v", "virtual_stages": 2}),
                                            (range(2, 6), {"context": 2, "tensor": 2}), (range(5, 6), {})),
}


def train_roles(placement: Placement, where: Job) -> dict[str, Result]:
    """One program on every rank; what it saw of each role."""
    run, roles = tiny_config(), placement.roles()
    states = [RoleState.build(role, run, where) for role in roles]
    out = {role.name: Result() for role in roles}
    for state in states:
        state.initialise(run.run.seed)
        if state.model is not None:
            out[state.role.name].initial = shards(state.model.buckets, "master")
    for step in range(1, NUM_STEPS + 1):
        for state in states:
            config = state.role.config(run)
            batch = global_batch(config, step)
            batches = [] if state.mesh is None else microbatches(config, batch, state.mesh)
            scale = 1 / batch.tokens_SB.numel()
            if not state.role.trainable:
                totals = state.totals(state.evaluate(batches), with_gradients=False)
            else:
                totals = state.totals(state.forward_backward(batches, scale))
                if step == 1 and state.model is not None:
                    out[state.role.name].gradients = shards(state.model.buckets, "grad_shard")
                state.update(learning_rate(step, run.steps, run.optim), totals)
                state.publish()
            assert (totals is not None) == (state.model is not None)
            if totals is not None:
                out[state.role.name].totals.append(totals.sums.tolist())
                out[state.role.name].losses.append(totals.sums.item() * scale)
                out[state.role.name].grad_norms.append(totals.grad_norm.item())
    for state in states:
        if state.model is not None:
            out[state.role.name].weights = shards(state.model.buckets, "master")
    return out


def train_here(placement: Placement) -> dict[str, Result]:
    return train_roles(placement, job())


@cache
def alone() -> dict[str, Result]:
    """The same program in one process, which never heard of others."""
    return train_roles(ALONE, Job("cpu"))


@pytest.mark.parametrize("name", PLACEMENTS)
def test_every_placement_is_the_same_mathematics(name: str) -> None:
    by_rank, placement = run_distributed(train_here, NUM_RANKS, PLACEMENTS[name]), PLACEMENTS[name]
    check([by_rank[rank]["actor"] for rank in placement.actor[0]], reference(tiny_config(), NUM_STEPS))
    one = alone()
    for role, place in (("critic", placement.critic[0]), ("reference", placement.frozen[0])):
        for rank in place:
            assert by_rank[rank][role].losses == pytest.approx(one[role].losses, rel=TOLERANCE)
            assert by_rank[rank][role].grad_norms == pytest.approx(one[role].grad_norms, rel=TOLERANCE)
    for what in ("initial", "gradients", "weights"):
        got = assemble(getattr(by_rank[rank]["critic"], what) for rank in placement.critic[0])
        want = assemble([getattr(one["critic"], what)])
        assert got.keys() == want.keys()
        for key in want:
            assert torch.allclose(got[key], want[key], rtol=0, atol=TOLERANCE * float(want[key].abs().max())), key


def test_a_role_leaves_no_trace_where_it_does_not_live() -> None:
    by_rank = run_distributed(train_here, NUM_RANKS, PLACEMENTS["disjoint"])
    for rank, results in enumerate(by_rank):
        lives = [role for role, result in results.items() if result.losses]
        assert lives == [("actor", "critic", "reference")[rank // 2]]


def test_a_role_that_is_not_trained_has_weights_only() -> None:
    frozen = RoleState.build(replace(Role.of(tiny_config()), trainable=False), tiny_config(), Job("cpu"))
    assert frozen.model is not None and frozen.optimizer is None and not frozen.model.buckets
    assert not frozen.masters() and not frozen.moments()
    assert all(not piece.tensor.requires_grad for piece in frozen.weights())
    assert {piece.key for piece in frozen.weights()} == {
        piece.key for piece in RoleState.build(Role.of(tiny_config()), tiny_config(), Job("cpu")).masters()}


def refresh(placement: Placement, model: dict[str, Any]) -> list[list[tuple[float, Shards]]]:
    """On one rank: loss and weights of actor and reference after the one has been moved to the other, twice."""
    run = tiny_config(model=model)
    actor = Role("actor", run.model, ParallelConfig(**placement.actor[1]), placement.actor[0])
    frozen = Role("reference", run.model, ParallelConfig(**placement.frozen[1]), placement.frozen[0], trainable=False)
    roles = [RoleState.build(role, run, job()) for role in (actor, frozen)]
    roles[0].initialise(3)
    way = Reshard.plan(roles[0].weights(), roles[1].weights(), job().mesh(Topology(data=NUM_RANKS)), bucket_bytes=4096)
    out = []
    for step in (1, 2):
        way.run(roles[0].weights(), roles[1].weights())
        batch, both = global_batch(run, step), []
        for state in roles:
            config = state.role.config(run)
            batches = [] if state.mesh is None else microbatches(config, batch, state.mesh)
            totals = state.totals(state.evaluate(batches), with_gradients=False)
            both.append((float("nan") if totals is None else totals.sums.item(), copied(state.weights())))
        out.append(both)
        batches = [] if roles[0].mesh is None else microbatches(actor.config(run), batch, roles[0].mesh)
        roles[0].update(1e-2, roles[0].totals(roles[0].forward_backward(batches, 1 / batch.tokens_SB.numel())))
        roles[0].publish()
    return out


@pytest.mark.parametrize("model", [{}, {"tie_embeddings": True, "vocab_size": 61, "qkv_bias": True}],
                         ids=["plain", "tied, odd vocabulary"])
@pytest.mark.parametrize("name", PLACEMENTS)
def test_a_reference_takes_over_the_actor_s_weights(name: str, model: dict[str, Any]) -> None:
    """Of live models, in any layout; and again after a step of training, by the same plan."""
    placement = PLACEMENTS[name]
    by_rank = run_distributed(refresh, NUM_RANKS, placement, model)
    seen = []
    for step in (0, 1):
        actor, frozen = ([by_rank[rank][step][which] for rank in place] for which, place in
                         enumerate((placement.actor[0], placement.frozen[0])))
        assert len({loss for loss, _ in actor}) == len({loss for loss, _ in frozen}) == 1
        assert actor[0][0] == pytest.approx(frozen[0][0], rel=TOLERANCE)
        weights, taken_over = (assemble(held for _, held in role) for role in (actor, frozen))
        assert weights.keys() == taken_over.keys()
        assert not [key for key in weights if not torch.equal(weights[key], taken_over[key])]
        seen.append(weights)
    assert all(not torch.equal(seen[0][key], seen[1][key]) for key in seen[0])


def state_on(placement: Placement, where: Job) -> TrainState:
    run = tiny_config()
    return TrainState(tuple(RoleState.build(role, run, where) for role in placement.roles()))


def save_here(placement: Placement, directory: str) -> Shards:
    """One update of each, with made-up gradients, then a checkpoint of all."""
    state = state_on(placement, job())
    for role in state.roles:
        role.initialise(7)
        for bucket in role.model.buckets if role.model is not None and role.optimizer is not None else ():
            bucket.grad_shard.copy_(bucket.master * 0.5)
        if role.optimizer is not None:
            for _ in range(3 if role.role.name == "critic" else 2):
                role.optimizer.step(1e-2, torch.ones(()), torch.zeros(()))
    state.step, state.consumed_samples = 2, 16
    metadata = state.metadata(tiny_config(), {}) if job().rank == 0 else {}
    save(Path(directory), 2, state.pieces(), metadata, group=job().world.group, keep=None)
    return copied(state.pieces())


def load_here(placement: Placement, directory: str) -> Shards:
    """Over a state of NaNs."""
    state = state_on(placement, job())
    for piece in state.pieces():
        piece.tensor.fill_(torch.nan)
    state.load(open_checkpoint(Path(directory), group=job().world.group))
    assert (state.step, state.consumed_samples) == (2, 16)
    for role, count in zip(state.roles, (2, 3, 0), strict=True):
        if role.optimizer is not None:
            assert {int(steps) for steps in role.optimizer.steps} == {count}
    return copied(state.pieces())


def copied(pieces: Sequence[Piece]) -> Shards:
    return [(piece.key, piece.global_shape, box, values.clone()) for piece in pieces for box, values in piece.parts()]


def test_all_roles_are_saved_together_and_loaded_in_another_placement(tmp_path: Path) -> None:
    saved = assemble(run_distributed(save_here, NUM_RANKS, PLACEMENTS["overlapping"], str(tmp_path)))
    assert {key.split(".")[0] for key in saved} == {"model", "optimizer", "roles"}
    assert {key.split(".")[1] for key in saved if key.startswith("roles.")} == {"critic"}
    for other in ("overlapping", "nested", "all on all"):
        loaded = assemble(run_distributed(load_here, NUM_RANKS, PLACEMENTS[other], str(tmp_path)))
        assert loaded.keys() == saved.keys()
        assert not [key for key in saved if not torch.equal(saved[key], loaded[key])]


def test_the_first_role_is_the_run_s_model(tmp_path: Path) -> None:
    """What knows nothing of roles reads a checkpoint of several: the names are those of a run with one."""
    run_distributed(save_here, NUM_RANKS, PLACEMENTS["disjoint"], str(tmp_path))
    only = TrainState((RoleState.build(Role.of(tiny_config()), tiny_config(), Job("cpu")),))
    only.load(open_checkpoint(tmp_path))
    assert only.step == 2 and only.optimizer.num_steps() == 2


def test_impossible_placements_are_refused() -> None:
    run = tiny_config()
    with pytest.raises(ConfigError, match="does not make world size 3"):
        RoleState.build(Role("actor", run.model, ParallelConfig(tensor=2), range(3)), run, Job("cpu"))
    with pytest.raises(RequestError, match="cannot lie on ranks 4 to 5 of a job of 1"):
        RoleState.build(Role("actor", run.model, ParallelConfig(tensor=2), range(4, 6)), run, Job("cpu"))


def test_a_run_with_one_role_is_the_run_there_was() -> None:
    role = Role.of(tiny_config(parallel={"tensor": 2}))
    assert (role.ranks, role.objective, role.trainable) == (range(2), NEXT_TOKEN, True)
    assert role.config(tiny_config()) == tiny_config(parallel={"tensor": 2})
