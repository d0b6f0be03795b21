"""A job that goes on with fewer nodes: fewer replicas, the same global batch, the same mathematics."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import Config, load_config, resolve_layout
from engine.distributed.environment import launch_environment
from engine.errors import ConfigError, RequestError
from engine.reliability.restarts import nodes_to_use
from tests.kit.layouts import assemble, relative_error
from tests.kit.runs import ROOT, metrics, run_config, saved_steps, train


def auto(config: Config) -> Config:
    return Config.model_validate(config.to_dict() | {"parallel": config.to_dict()["parallel"] | {"data": "auto"}})


def test_four_processes_go_on_as_two(tmp_path: Path) -> None:
    """Stopped on four after three steps, ended on two: the losses and weights of one process."""
    single, config = run_config(tmp_path, "single", steps=6), auto(run_config(tmp_path, "run", steps=6))
    want = assemble(train(single))
    train(resolve_layout(config, 4), stop_at=3)
    assert saved_steps(config)[-1] == 3
    used = nodes_to_use(config, fit=3, per_node=1)                                 # three replicas do not divide four
    assert used == 2
    got = assemble(train(resolve_layout(config, used)))
    for a, b in zip(metrics(config), metrics(single), strict=True):
        assert a["consumed_samples"] == b["consumed_samples"] and a["tokens"] == b["tokens"]
        assert (a["loss"], a["grad_norm"]) == pytest.approx((b["loss"], b["grad_norm"]), rel=1e-5)
    assert max(relative_error(got[name], want[name]) for name in want) < 1e-5


def test_how_many_nodes_make_a_layout() -> None:
    config = load_config(ROOT / "configs" / "llama-65b.yaml", ["parallel.data=auto"])
    assert [nodes_to_use(config, fit, 8) for fit in (256, 255, 200, 128, 100, 8, 7)] == [256, 128, 128, 128, 64, 8, 0]
    fixed = load_config(ROOT / "configs" / "llama-65b.yaml")
    assert [nodes_to_use(fixed, fit, 8) for fit in (256, 255, 128)] == [256, 0, 0]
    with pytest.raises(ConfigError, match="does not make world size 2040"):
        resolve_layout(fixed, 255 * 8)


def test_the_world_size_is_the_one_that_the_batch_script_chose() -> None:
    with pytest.raises(RequestError, match="started 4 processes, the batch script asked for 2"):
        launch_environment({"RANK": "0", "WORLD_SIZE": "4", "MASTER_PORT": "1", "OCTANT_WORLD_SIZE": "2"})
