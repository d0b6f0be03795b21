"""Does it fit: what the ranks would hold against what there is, and what is proposed where it does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.commands import train
from engine.config import load_config, resolve_layout
from engine.distributed.host_memory import Room
from engine.errors import RequestError
from engine.plan.memory import changes, gib, require_room, stages_of
from engine.plan.stages import all_stages
from tests.kit.layouts import tiny_config
from tests.kit.runs import run_config

GIB = 2**30
WIDE = {"hidden_size": 256, "ffn_hidden_size": 512, "num_layers": 8}


def test_a_job_that_fits_says_what_is_left() -> None:
    lines = require_room(tiny_config(), [0], Room(10 * GIB, "free on cuda:0"), on_gpu=True)
    assert lines[0].startswith("memory: at most ") and lines[0].endswith(", and 10.0 GiB free on cuda:0")
    assert lines[1].startswith("  state ") and ", activations and workspace " in lines[1]
    assert max(map(len, lines)) <= 80
    line, _ = require_room(tiny_config(parallel={"data": 2}), [0, 1], None, on_gpu=False)
    assert line.endswith(" of 2 processes")


def test_a_job_that_does_not_fit_is_refused_with_numbers_and_the_cheapest_remedy() -> None:
    config = tiny_config(model=WIDE, batch={"micro": 8, "global": 8})
    [stage] = all_stages(config, on_gpu=False)
    selective = all_stages(config.with_changes(parallel={"recompute": "selective"}), on_gpu=False)[0].total
    with pytest.raises(RequestError) as caught:
        require_room(config, [0], Room(round(selective) + 1, "on this machine"), on_gpu=False)
    name, size = stage.largest
    assert str(caught.value) == (
        f"this job does not fit: this process would hold {gib(stage.total)} ({gib(stage.state.total)} of weights, "
        f"gradients and optimizer state and {gib(stage.activations + stage.workspace)} of activations and workspace), "
        f"and {gib(selective)} are on this machine. The largest part is {name} ({gib(size)} of a process). "
        f"Set parallel.recompute=selective: {gib(selective)}")


def test_where_no_change_is_enough_that_is_said() -> None:
    with pytest.raises(RequestError, match=r"the 2 processes on this machine .* No change of the layout"):
        require_room(tiny_config(parallel={"data": 2}), [0, 1], Room(1000, "on this machine"), on_gpu=False)


def test_a_prediction_a_little_too_high_refuses_nobody() -> None:
    config = tiny_config(model=WIDE)
    total = all_stages(config, on_gpu=False)[0].total
    assert require_room(config, [0], Room(round(total * 0.98), "here"), on_gpu=False)
    with pytest.raises(RequestError):
        require_room(config, [0], Room(round(total * 0.96), "here"), on_gpu=False)


def test_every_change_saves_memory() -> None:
    config = tiny_config(model=WIDE, parallel={"data": 2, "zero": 0}, batch={"micro": 4, "global": 8},
                         precision={"compute": "bf16"})
    before = all_stages(config)[0].total
    proposed = dict(changes(config))
    assert list(proposed)[:2] == ["parallel.recompute=selective", "parallel.zero=1"]
    assert all(all_stages(changed)[0].total < before for changed in proposed.values())


def test_a_7b_in_fp32_on_a_machine_of_24_gb_is_refused() -> None:
    changes = ["precision.compute=fp32", "parallel.data=1", "parallel.tensor=1"]
    config = resolve_layout(load_config("llama-7b", changes), 1)
    with pytest.raises(RequestError, match=r"would hold 1\d\d\.\d GiB .* train adapters"):
        require_room(config, [0], Room(24 * GIB, "on this machine"), on_gpu=False)


def test_training_refuses_before_torch_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = run_config(tmp_path, "run", run={"device": "cpu"})
    monkeypatch.setattr(train, "host_memory", lambda: Room(1000, "within the limit of 0.0 GiB"))
    with pytest.raises(RequestError, match=r"this job does not fit: this process .* within the limit"):
        train._refuse_early(config)
    program = "import sys; sys.modules['torch'] = None; import engine.commands.train, engine.commands.plan"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("parallel", [{"pipeline": 2}, {"pipeline": 2, "data": 2}], ids=str)
def test_ranks_hold_what_their_stage_does(parallel: dict[str, Any]) -> None:
    config = tiny_config(parallel=parallel)
    first, last = all_stages(config)
    ranks = range(config.parallel.world_size)
    half = len(ranks) // 2
    assert stages_of(config, ranks, True) == [first] * half + [last] * half


def test_sizes_for_people() -> None:
    assert (gib(2**30), gib(3.2e9), gib(5e6)) == ("1.0 GiB", "3.0 GiB", "4.8 MiB")
