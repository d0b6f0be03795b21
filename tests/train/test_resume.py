"""N steps are k steps and a resume, bit for bit, in every layout; a checkpoint of any layout loads into any other."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoint.resume import open_checkpoint
from engine.config import Config
from engine.distributed.topology import Topology
from engine.optim.adamw import AdamW
from engine.parallel.parallelize import parallelize
from engine.train.role import Role, RoleState
from engine.train.state import TrainState
from tests.kit.compare import relative_error
from tests.kit.distributed import mesh_for, run_distributed
from tests.kit.layouts import Shards, assemble, parameters_match
from tests.kit.runs import LAYOUTS, metrics, run_config, saved_steps, state_shards, train, trained


def assert_same_bits(got: list[Shards], want: list[Shards]) -> None:
    """Every rank holds the same boxes with the same values."""
    for mine, theirs in zip(got, want, strict=True):
        assert [entry[:3] for entry in mine] == [entry[:3] for entry in theirs]
        differing = [a[0] for a, b in zip(mine, theirs, strict=True) if not torch.equal(a[3], b[3])]
        assert not differing


@pytest.mark.parametrize(("layout", "precision"), [
    *((layout, "fp32") for layout in LAYOUTS), ("single", "bf16"), ("zero 1", "bf16"), ("tensor × pipeline", "bf16")])
def test_a_resumed_run_is_the_same_run(tmp_path: Path, layout: str, precision: str) -> None:
    """All ranks gone after step 3, with a checkpoint of step 2; then stopped on request in step 4; saved both ways."""
    sections = {"parallel": LAYOUTS[layout], "precision": {"compute": precision}}

    def interrupted(asynchronous: bool) -> Config:
        return run_config(tmp_path, "interrupted", **sections, checkpoint={"async": asynchronous})

    whole = run_config(tmp_path, "whole", **sections)
    want = train(whole)
    assert saved_steps(whole) == [2, 4, 5]
    train(interrupted(asynchronous=True), crash_after=3)
    assert saved_steps(interrupted(False)) == [2]
    train(interrupted(asynchronous=False), stop_at=4)
    assert saved_steps(interrupted(False)) == [2, 4]
    assert_same_bits(train(interrupted(asynchronous=True)), want)
    assert trained(interrupted(True)) == trained(whole)
    assert saved_steps(interrupted(True)) == [2, 4, 5]


def test_a_request_is_heard_between_logged_steps(tmp_path: Path) -> None:
    """One step late, so that the host need not wait for the device; by all ranks after the same step."""
    config = run_config(tmp_path, "run", steps=40, parallel={"data": 2}, log={"every": 30}, checkpoint={"every": 0})
    train(config, stop_at=3)
    assert saved_steps(config) == [4]


def test_bf16_trains_with_fp32_masters(tmp_path: Path) -> None:
    exact, rounded = (run_config(tmp_path, compute, steps=20, precision={"compute": compute}, checkpoint={"every": 0})
                      for compute in ("fp32", "bf16"))
    train(exact)
    [shards] = train(rounded)
    assert {values.dtype for *_, values in shards} == {torch.float32}
    masters = [values for name, *_, values in shards if name.startswith("model.") and values.dim() > 1]
    assert all(not torch.equal(values, values.bfloat16().float()) for values in masters)
    losses, exact_losses = ([row["loss"] for row in metrics(config)] for config in (rounded, exact))
    assert losses != exact_losses and losses == pytest.approx(exact_losses, rel=0.02)
    assert losses[-1] < losses[0] - 0.3


def load_here(config: Config, paths: list[Path]) -> list[Shards]:
    """In a worker: what this rank holds after loading each checkpoint over a state of NaNs."""
    mesh = mesh_for(Topology.of(config))
    model = parallelize(config, mesh, bucket_elements=6000)
    optimizer = AdamW(model.buckets, config.optim, model.operations)
    state = TrainState((RoleState(Role.of(config), mesh, model, optimizer),))
    found = []
    for path in paths:
        for piece in state.pieces():
            piece.tensor.fill_(torch.nan)
        state.load(open_checkpoint(path, group=torch.distributed.group.WORLD))
        assert (state.step, state.consumed_samples, state.optimizer.num_steps()) == (3, 12, 3)
        assert parameters_match(model)
        found.append(state_shards(state))
    return found


# The second model has everything that the first has not; the layouts of its matrix are those that cut it differently.
MODELS: dict[str, dict[str, Any]] = {"plain": {}, "tied": {"tie_embeddings": True, "qkv_bias": True, "num_kv_heads": 2}}
MATRIX = {"plain": tuple(LAYOUTS), "tied": ("single", "interleaved", "zero 3", "tensor × pipeline")}
PAIRS = [(model, *pair) for model, layouts in MATRIX.items() for pair in permutations(layouts, 2)]
TARGETS = [(model, layout) for model, layouts in MATRIX.items() for layout in layouts]
CONTINUED = (("single", "tensor × pipeline"), ("tensor × pipeline", "zero 3"), ("zero 2", "interleaved"),
             ("zb-v × zero 2", "single"), ("context", "tensor × zero 1"))


def source_config(folder: Path, model: str, layout: str, **sections: Any) -> Config:
    return run_config(folder, f"{model} {layout}", parallel=LAYOUTS[layout], model=MODELS[model],
                      **{"checkpoint": {"every": 0}} | sections)


def saved_by(config: Config) -> Path:
    return Path(config.run.dir) / "checkpoints" / "step-00000003"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[tuple[str, str], dict[str, Tensor]]]:
    """A checkpoint after three steps of every layout, and its global tensors."""
    folder = tmp_path_factory.mktemp("sources")
    return folder, {target: assemble(train(source_config(folder, *target), stop_at=3)) for target in TARGETS}


def test_the_matrix_is_large_enough() -> None:
    assert len(PAIRS) >= 20


@pytest.mark.parametrize(("model", "layout"), [target for target in TARGETS if target[1] != "single"])
def test_rank_0_writes_the_same_numbers_in_every_layout(
        sources: tuple[Path, dict[tuple[str, str], dict[str, Tensor]]], model: str, layout: str) -> None:
    """The losses, which the last stage of a pipeline knows, and the evaluation's among them."""
    folder, _ = sources
    got, want = (trained(source_config(folder, model, name)) for name in (layout, "single"))
    assert [len(row) for row in want] == [7, 7, 8]                            # step 3 has an evaluation
    for row, expected in zip(got, want, strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(("model", "target"), TARGETS)
def test_a_checkpoint_of_any_layout_loads_bit_for_bit(
        sources: tuple[Path, dict[tuple[str, str], dict[str, Tensor]]], model: str, target: str) -> None:
    folder, states = sources
    origins = [layout for layout in MATRIX[model] if layout != target]
    config = source_config(folder, model, target)
    paths = [saved_by(source_config(folder, model, origin)) for origin in origins]
    by_rank = run_distributed(load_here, config.parallel.world_size, config, paths)
    for index, origin in enumerate(origins):
        found, want = assemble(shards[index] for shards in by_rank), states[model, origin]
        assert found.keys() == want.keys()
        differing = [name for name in want if not torch.equal(found[name], want[name])]
        assert not differing, f"{origin} into {target}"


@pytest.mark.parametrize(("origin", "target"), CONTINUED)
def test_training_goes_on_in_another_layout(
        sources: tuple[Path, dict[tuple[str, str], dict[str, Tensor]]], origin: str, target: str) -> None:
    """As if nothing had happened, up to the rounding of fp32."""
    folder, _ = sources
    path = str(saved_by(source_config(folder, "plain", origin)))
    runs = [source_config(folder, "plain", layout, run={"dir": str(folder / f"{origin} into {layout}")},
                          checkpoint={"resume": path, "every": 0}) for layout in (origin, target)]
    want, got = (assemble(train(config)) for config in runs)
    for a, b in zip(*(metrics(config) for config in runs), strict=True):
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert max(errors.values()) < 2e-5, max(errors, key=errors.__getitem__)
