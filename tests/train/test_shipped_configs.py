"""Every shipped configuration trains: its own settings, on a model and a layout small enough for this machine."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from engine.config import Config, load_config, resolve_layout
from engine.config.placement import learns_from_own_texts, processes_needed
from engine.distributed.mesh import Job
from engine.metrics.phases import Phases
from engine.plan.devices import device, device_named_in
from engine.plan.roles import PlannedRoles
from engine.plan.stages import all_stages
from engine.rl.start import begin
from tests.align.test_comparisons import write_pairs
from tests.align.test_sft import write_chats
from tests.kit.runs import metrics, saved_steps, train, write_corpus

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["model.num_layers=4", "model.hidden_size=64", "model.num_heads=4", "model.num_kv_heads=2", "model.head_dim=16",
         "model.ffn_hidden_size=128", "model.vocab_size=257", "model.max_seq_len=128", "data.seq_len=64",
         "data.tokenizer=bytes", "batch.global=8", "batch.micro=1", "run.device=cpu", "steps=2", "eval.every=2",
         "eval.batches=1"]
CONFIGS, WITH_ROLES = ([path for path in sorted((ROOT / "configs").glob("*.yaml"))
                        if learns_from_own_texts(load_config(path)) == with_roles] for with_roles in (False, True))


def small_config(path: Path, overrides: list[str]) -> Config:
    config = load_config(path, overrides)
    return resolve_layout(config, config.parallel.world_size)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configuration_trains(path: Path, tmp_path: Path) -> None:
    """Every axis that it cuts is cut in two."""
    shipped = load_config(path)
    asked = shipped.parallel
    degrees = {axis: min(2, getattr(asked, axis)) for axis in ("tensor", "context", "pipeline")}
    degrees["data"] = 2 if asked.data == "auto" else min(2, asked.data_size)
    corpus, low, high = data_for(shipped.run.objective, tmp_path)
    chats = shipped.run.objective != "pretrain"
    also = ["checkpoint.load=null", "data.template=plain"] if chats else []
    overrides = [*SMALL, *also, f"data.train=[{{path: {corpus}}}]", f"data.valid=[{{path: {corpus}}}]",
                 *(f"parallel.{axis}={degree}" for axis, degree in degrees.items())]
    if shipped.adapter is not None:                                    # it is trained on top of a model
        as_is = ["model.head=language_model", "run.objective=orpo"] if high < 5 else []
        train(small_config(path, [*overrides, *as_is, "adapter=null", f"run.dir={tmp_path}/base", "optim.lr=1e-8"]))
        overrides.append(f"checkpoint.load={tmp_path}/base")
    config = small_config(path, [*overrides, f"run.dir={tmp_path}/run"])
    train(config)
    first, second = metrics(config)
    assert low < first["loss"] < high
    assert 0 < second["grad_norm"] < 10 and second["skipped"] == 0
    assert abs(second["valid_loss"] - second["loss"]) < 0.5
    assert saved_steps(config) == [2]


def data_for(objective: str, folder: Path) -> tuple[str, float, float]:
    """A file to learn from, and between what the loss of a model is that knows nothing yet: of tokens, or of pairs."""
    if objective == "pretrain":
        return write_corpus(folder / "corpus"), 5, 6                   # ln 257 = 5.55
    if objective == "sft":
        return str(write_chats(folder / "chats.jsonl")), 5, 6
    return str(write_pairs(folder / "pairs.jsonl", margins=False)), 0.3, 1.5                     # ln 2 = 0.69


@pytest.mark.parametrize("path", [path for path in CONFIGS if "-llama" in path.stem], ids=lambda path: path.stem)
def test_first_lines_say_what_the_planner_counts(path: Path) -> None:
    """`… on the fullest rank, 26.7 of 79.1 GiB: …`"""
    config = load_config(path)
    data = 1 if config.parallel.data == "auto" else config.parallel.data_size
    config = resolve_layout(config, config.parallel.model_parallel_size * data)
    head = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    found = re.search(r"on the fullest rank, ([\d.]+) of ([\d.]+) GiB", head)
    assert found is not None
    fullest = max(stage.total for stage in all_stages(config, on_gpu=True)) / 2**30
    assert f"{fullest:.1f}" == found[1] and fullest < float(found[2])


@pytest.mark.parametrize("path", WITH_ROLES, ids=lambda path: path.stem)
def test_first_lines_of_roles_say_what_the_planner_counts(path: Path) -> None:
    config, on = load_config(path), device(device_named_in(str(path)) or "")
    job = PlannedRoles(resolve_layout(config, processes_needed(config) or on.per_node), on)
    head = " ".join(line.lstrip("# ") for line in path.read_text().splitlines() if line.startswith("#"))
    parts = job.fullest.parts
    numbers = [job.fullest.total, on.memory, *(sum(getattr(part.state, name) for part in parts)
                                               for name in ("parameters", "gradients", "optimizer")),
               job.fullest.longest.turn]
    found = re.search(r"on the fullest rank, ([\d.]+) of ([\d.]+) GiB: weights ([\d.]+), gradients ([\d.]+), optimizer "
                      r"state ([\d.]+), [a-z ]+ ([\d.]+)\.", head)
    assert found is not None and [*found.groups()] == [f"{number / 2**30:.1f}" for number in numbers]
    assert job.fits


@pytest.mark.parametrize("path", WITH_ROLES, ids=lambda path: path.stem)
def test_shipped_configuration_with_roles_trains(path: Path, tmp_path: Path) -> None:
    """Its own settings, with everybody on one rank."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "{i} + 1?", "answer": "#### {i + 1}"}}\n' for i in range(9)))
    shipped = load_config(path)
    small = load_config(path, [*(each for each in SMALL if not each.startswith("batch.global")), "data.template=plain",
                               "rollout.prompts=4", "rollout.max_new_tokens=8", f"run.dir={tmp_path}/run",
                               f"{shipped.learning_section}.minibatch=4", f"data.train=[{{path: {prompts}}}]"])
    functions = [{"function": source.function or "exact_match"} for source in shipped.roles.reward]
    alone = {"parallel": {"data": 1}, "batch": {"micro": 1}, "roles": {"reward": functions}}
    config = resolve_layout(Config.model_validate(small.to_dict() | alone), 1)
    learner = begin(config, lambda: False, False)(Job("cpu"), Phases(Job("cpu").device))
    learner.run()
    learner.close()
    _, second = metrics(config)
    assert second["step"] == 2 and second["skipped"] == 0 and second["actor/entropy"] > 3
    assert saved_steps(config) == [2]
