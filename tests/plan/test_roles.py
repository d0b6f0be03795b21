"""`octant plan` of a run with roles: who is where, and what every rank holds of all who live on it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from engine import cli
from engine.config import Config
from engine.distributed.host_memory import Room
from engine.distributed.mesh import Job
from engine.errors import RequestError
from engine.plan.devices import device
from engine.plan.roles import PlannedRoles, texts_in_the_making
from engine.plan.roles_room import require_room_for_roles
from engine.rl.cast import Cast
from tests.kit.digits import rl_config

ROOT = Path(__file__).resolve().parents[2]
LARGE, SMALL, GROUPS = (str(ROOT / "configs" / f"{name}.yaml") for name in (
    "ppo-llama-65b", "ppo-llama2-7b", "grpo-qwen2.5-0.5b-gsm8k"))


def planned(config: Config) -> PlannedRoles:
    return PlannedRoles(config, device("cpu"))


def held(cast: Cast) -> dict[str, tuple[int, int]]:
    """By role what is there: bytes of weights, and of optimizer state and masters that are no weights."""
    found = {}
    for name, member in cast.members.items():
        weights = sum(piece.tensor.numel() * piece.tensor.element_size() for piece in member.state.weights())
        moments = sum(piece.tensor.numel() * 4 for piece in member.state.moments())
        found[name] = weights, moments
    return found


@pytest.mark.parametrize("objective", ["ppo", "grpo"])
def test_weights_and_optimizer_state_are_what_a_rank_builds(objective: str, tmp_path: Path) -> None:
    config = rl_config(tmp_path, run={"objective": objective}, grpo={"kl_coef": 0.1})
    cast = Cast.build(config, Job("cpu"))
    [place] = planned(config).places
    for part in place.parts:
        weights, moments = held(cast)[part.role]
        padding = 64 * 4 * 40
        assert weights <= part.state.parameters <= weights + padding, part.role
        assert moments <= part.state.optimizer <= moments + 2 * padding, part.role
    assert [part.role for part in place.parts] == [*cast.members]


def test_roles_take_turns(tmp_path: Path) -> None:
    [place] = planned(rl_config(tmp_path)).places
    assert place.total == sum(part.state.total for part in place.parts) + max(part.turn for part in place.parts)


def test_who_rests_in_host_memory_counts_in_its_turn(tmp_path: Path) -> None:
    roles = {name: {"offload": True} for name in ("actor", "critic", "reference")}
    config = rl_config(tmp_path, precision={"compute": "bf16"}, roles=roles | {"reward": {"function": "places"}})
    [place], [plain] = planned(config).places, planned(rl_config(tmp_path, precision={"compute": "bf16"})).places
    parts = {part.role: part for part in place.parts}
    assert place.stays == 0 and place.longest.role in ("actor", "critic")
    assert place.total == place.longest.state.total + place.longest.turn < plain.total
    assert place.turn(parts["rollout"]) == parts["rollout"].state.total + max(
        parts["rollout"].turn, parts["actor"].state.parameters)
    assert place.on_host == sum(parts[name].state.parameters + parts[name].state.optimizer for name in roles)
    [critic_stays] = planned(rl_config(tmp_path, roles=roles | {"critic": {}, "reward": {"function": "places"}})).places
    assert [part.role for part in critic_stays.staying] == ["critic"] and critic_stays.stays > 0


def test_a_run_that_cannot_fit_is_refused_with_numbers_and_what_helps(tmp_path: Path) -> None:
    """On a GPU roles rest first; on the CPU that helps nobody."""
    config = rl_config(tmp_path, precision={"compute": "bf16"}, rollout={"batch": 2})
    place = planned(config).places[0]
    with pytest.raises(RequestError, match=r"this process would hold .*, and .* are in a test. On rank 0 live actor, "
                                           r"rollout, critic, reference: .* stay, and .* in its turn. Set "
                                           r"roles.reference.offload=true and that of roles.reward: "):
        require_room_for_roles(config, [0], Room(int(place.total * 0.96), "in a test"), on_gpu=True)
    with pytest.raises(RequestError, match=r"Set .*; roles.actor.offload=true: "):
        require_room_for_roles(config, [0], Room(int(place.total * 0.75), "in a test"), on_gpu=True)
    with pytest.raises(RequestError, match=r"Set batch.micro=1"):
        require_room_for_roles(config, [0], Room(int(place.total * 0.96), "in a test"), on_gpu=False)
    with pytest.raises(RequestError, match=r"No change on as many processes is enough"):
        require_room_for_roles(config, [0], Room(1000, "in a test"), on_gpu=False)
    assert require_room_for_roles(config, [0], Room(2 * int(place.total), "in a test"), on_gpu=False)[0].startswith(
        "memory: at most ")


def test_all_roles_of_all_ranks_of_a_machine_are_counted(tmp_path: Path) -> None:
    roles = {"actor": {"ranks": "0:2", "parallel": {"tensor": 2}}, "critic": {"ranks": "2:3", "parallel": {}}}
    config = rl_config(tmp_path, roles=roles | {"reward": {"function": "places"}})
    first, second, critic = planned(config).places[0], planned(config).places[0], planned(config).places[1]
    needed = first.total + second.total + critic.total
    require_room_for_roles(config, range(3), Room(int(needed), "here"), on_gpu=False)
    with pytest.raises(RequestError, match="the 3 processes on this machine would hold"):
        require_room_for_roles(config, range(3), Room(int(needed * 0.9), "here"), on_gpu=False)


def test_the_command_asks_before_it_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = rl_config(tmp_path / "run").to_dict()
    huge = {"num_layers": 80, "hidden_size": 65536, "ffn_hidden_size": 65536}
    (tmp_path / "ppo.yaml").write_text(json.dumps(config | {"model": config["model"] | huge}))
    assert cli.run(["train", str(tmp_path / "ppo.yaml")]) == 2
    assert "this job does not fit: this process would hold" in capsys.readouterr().err


def test_ranks_with_the_same_on_them_are_one_row(tmp_path: Path) -> None:
    roles = {"actor": {"ranks": "0:4", "parallel": {"tensor": 2, "data": 2}},
             "critic": {"ranks": "4:6", "parallel": {"pipeline": 2}}, "reference": {"ranks": "4:6"} | {
                 "parallel": {"data": 2}}, "reward": {"function": "places"}}
    places = planned(rl_config(tmp_path, roles=roles)).places
    assert [(place.ranks, [part.name for part in place.parts]) for place in places] == [
        (range(4), ["actor 0", "rollout 0"]), (range(4, 5), ["critic 0", "reference 0"]),
        (range(5, 6), ["critic 1", "reference 0"])]


def test_keys_and_values_of_texts_are_divided_as_the_layout_says(tmp_path: Path) -> None:
    config = rl_config(tmp_path, rollout={"batch": 10})
    whole, other = (texts_in_the_making(config, planned(config).roles["rollout"][1].with_changes(parallel=parallel), 0)
                    for parallel in ({}, {"tensor": 2}))
    # 2 layers, keys and values of 4 heads of 4 numbers for 8 tokens of 10 texts, and twice the logits of 13 ids
    assert whole == 10 * 8 * 2 * 2 * 16 * 4 + 2 * 10 * 13 * 4
    assert other == whole / 2


def test_the_shipped_placement_is_drawn(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", LARGE]) == 0
    out = capsys.readouterr().out
    for line in ("Who is where, on 128 × a100-80g",
                 "actor      0 to 63    ████████████████████████························  tensor 8 × pipeline 4 × ",
                 "critic     64 to 95   ························████████████············",
                 "reference  96 to 127  ····································████████████",
                 "1,024 prompts × 1 = 1,024 texts of at most 1,024 new tokens", "  fits: "):
        assert line in out, line
    assert out.endswith(f"next: octant train {LARGE}\n")


def test_programs_read_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", LARGE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["world"] == 128 and found["fits"] and found["roles"]["critic"]["ranks"] == [64, 96]
    assert found["memory"][0]["roles"] == ["actor", "rollout"]
    assert max(place["total"] for place in found["memory"]) < found["needed_bytes"] < found["device_bytes"]


def test_what_does_not_fit_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", SMALL, "rollout.batch=256"]) == 0
    assert "DOES NOT FIT: " in capsys.readouterr().out


@pytest.mark.parametrize(("config", "arguments", "world"), [(GROUPS, [], 8), (GROUPS, ["--gpus", "4"], 4)])
def test_an_open_number_of_copies(config: str, arguments: list[str], world: int,
                                  capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", config, *arguments]) == 0
    assert f"on {world} × a100-80g" in capsys.readouterr().out


@pytest.mark.parametrize(("override", "why"), [
    ('roles.critic.ranks="64:92"', r"roles.critic: tensor\(8\) × context\(1\) × pipeline\(4\) × data\(1\)"),
    ('roles.reward=[{load: a, ranks: "100:132"}]', "roles.reward: tensor.8. × context.1. × pipeline.4. × data.2."),
    ("roles.actor.parallel.tensor=7", r"roles.actor: tensor\(7\)")])
def test_impossible_placements_are_refused_before_a_process_starts(override: str, why: str,
                                                                   capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", LARGE, override]) == 2
    assert re.search(why, capsys.readouterr().err)


@pytest.mark.parametrize("option", ["--search", "--explain-rank=0", "--schedule-svg=a.svg", "--gpus=8,16"])
def test_what_is_of_one_model_is_refused(option: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", LARGE, option]) == 2
    assert "has several models, each with a layout of its own" in capsys.readouterr().err
