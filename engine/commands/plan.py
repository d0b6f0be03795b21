"""`octant plan CONFIG.yaml`: a job on paper, before anything is started."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

from engine.commands._budget import plan_budget
from engine.config import Config, load_config, resolve_layout
from engine.config.length import read_tokens
from engine.config.placement import learns_from_own_texts, processes_needed
from engine.errors import RequestError
from engine.hints import hint
from engine.parallel.pipeline.timeline import timeline
from engine.plan import search as searching
from engine.plan.calibrate import calibrated
from engine.plan.devices import Device, device, device_named_in
from engine.plan.job import Planned
from engine.plan.roles import PlannedRoles, actor_of, roles_summary
from engine.plan.scaling import scaling_table, search_table
from engine.plan.summary import summary
from engine.report.plan_picture import plan_svg
from engine.report.schedule_picture import schedule_svg, title
from engine.report.svg import standalone
from engine.writing import write_picture

DEFAULT_DEVICE = "a100-80g"


def run(args: argparse.Namespace) -> int:
    """Explain a rank, draw the schedule, search for a layout, or without any of it print the summary.

    Raises:
        RequestError: there is no such rank or device, nothing fits, or a picture cannot be written.
        ConfigError: the configuration is wrong, or impossible on so many processes.
    """
    if args.budget is not None and args.config is None:
        return plan_budget(args)
    if args.config is None or args.budget is not None or args.runs:
        raise RequestError("give either a configuration, whose job is planned, or --budget C (with --runs RUN_DIR …)")
    loaded = _lengthened(load_config(args.config, args.overrides), args.tokens)
    sizes, on = _sizes(args.gpus), _device(args)
    if learns_from_own_texts(loaded):
        return _with_roles(args, loaded, sizes, on)
    if args.search or len(sizes) > 1:
        return _compare(args, loaded, sizes or [_default_size(loaded, on)], on)
    config = resolve_layout(loaded, sizes[0] if sizes else _default_size(loaded, on))
    job = Planned(config, on)
    if args.json:
        print(json.dumps(job.record(), indent=1))
        return 0
    if args.schedule_svg is not None:
        _draw(config, Path(args.schedule_svg))
    if args.svg is not None:
        _draw_plan(job, Path(args.svg))
    if args.explain_rank is not None:
        explanation = import_module("engine.plan.explain").explain(config, args.explain_rank)      # torch from here on
        print(import_module("engine.plan.words").in_words(explanation) + "\n")
    if args.schedule_svg is None and args.explain_rank is None and args.svg is None:
        print(summary(job) + "\n")
        if loaded.parallel.data == "auto" and not sizes:
            print(f"parallel.data is auto, so this is for {job.world} processes; --gpus N plans for more\n")
    print(hint(*_next(args, config)))
    return 0


def _with_roles(args: argparse.Namespace, loaded: Config, sizes: list[int], on: Device) -> int:
    """Who is where, and the memory of each rank.

    Raises:
        RequestError: something was asked for that there is of runs with one model only.
    """
    asked = {"--search": args.search, "--explain-rank": args.explain_rank is not None,
             "--schedule-svg": args.schedule_svg is not None, "--svg": args.svg is not None,
             "--gpus with several numbers": len(sizes) > 1}
    if given := [name for name, is_asked in asked.items() if is_asked]:
        raise RequestError(f"{given[0]}: a run of {loaded.run.objective} has several models, each with a layout of "
                           "its own: plan without it, which says who is where and what each rank holds")
    world = sizes[0] if sizes else processes_needed(loaded) or _default_size(actor_of(loaded), on)
    job = PlannedRoles(resolve_layout(loaded, world), on)
    if args.json:
        print(json.dumps(job.record(), indent=1))
        return 0
    print(roles_summary(job) + "\n")
    print(hint("train", args.config, *args.overrides))
    return 0


def _default_size(config: Config, on: Device) -> int:
    """As many as the configuration names; where its data parallelism is open, the copies that fill a node."""
    parallel, one_copy = config.parallel, config.parallel.model_parallel_size
    if isinstance(parallel.data, int):
        return one_copy * parallel.data
    copies = max(1, on.per_node // one_copy) if on.name != "cpu" else 1
    return one_copy * (copies if config.batch.global_ % (copies * config.batch.micro) == 0 else 1)


def _sizes(asked: str | None) -> list[int]:
    """`2048`, or `512,1024,2048`.

    Raises:
        RequestError: that is no list of numbers.
    """
    try:
        return [] if asked is None else [int(each) for each in asked.split(",")]
    except ValueError:
        raise RequestError(f"--gpus {asked}: give a number, or several with commas between them: 512,1024,2048"
                           ) from None


def _lengthened(config: Config, tokens: str | None) -> Config:
    """With as many steps as so many tokens take.

    Raises:
        RequestError: that is no number of tokens.
    """
    if tokens is None:
        return config
    try:
        count = read_tokens(tokens)
    except ValueError as error:
        raise RequestError(f"--tokens {tokens}: {error}") from None
    steps = max(1, round(count / (config.batch.global_ * config.data.seq_len)))
    return config.model_copy(update={"steps": steps, "tokens": None})


def _device(args: argparse.Namespace) -> Device:
    """The one asked for, else the one that the configuration's first lines name; with measured figures."""
    listed = device(args.gpu or device_named_in(args.config) or DEFAULT_DEVICE)
    found = calibrated(listed, [Path(name) for name in args.calibrate])
    for line in found.said if not args.json else ():
        print(f"calibrated with {line}")
    return found.device


def _compare(args: argparse.Namespace, loaded: Config, sizes: list[int], on: Device) -> int:
    """Several numbers of devices, or several layouts of one, or both."""
    if not args.search:
        jobs = [Planned(_on_so_many(loaded, size), on) for size in sizes]
        print(json.dumps([job.record() for job in jobs], indent=1) if args.json else scaling_table(jobs))
        return 0
    found = {size: searching.search(loaded, size, on) for size in sizes}
    if len(sizes) > 1:
        jobs = [each.best[0] for each in found.values()]
        print(json.dumps([job.record() for job in jobs], indent=1) if args.json else scaling_table(jobs))
        return 0
    [(size, result)] = found.items()
    half = searching.at_half_the_memory(loaded, size, on)
    print(json.dumps(searching.record(result, half), indent=1) if args.json else search_table(result, half))
    if args.svg is not None:
        _draw_plan(result.best[0], Path(args.svg))
    return 0


def _on_so_many(config: Config, num_gpus: int) -> Config:
    """The configuration's own layout with more or fewer copies of the model."""
    parallel = config.parallel.model_copy(update={"data": "auto"})
    return resolve_layout(config.model_copy(update={"parallel": parallel}), num_gpus)


def _draw(config: Config, path: Path) -> None:
    drawn = timeline(config)
    write_picture(path, standalone(schedule_svg(drawn)))
    print(f"{title(drawn)}, where 1 is the forward pass of the stage with the most work; drawn in {path}")


def _draw_plan(job: Planned, path: Path) -> None:
    state = ("parameters", "gradients", "optimizer", "activations", "workspace")
    record = job.record()
    memory = [{name: stage[name] for name in state} for stage in record["memory"]]
    write_picture(path, standalone(plan_svg(searching.words(job.config), memory, job.device.memory,
                                            record["breakdown"])))
    print(f"memory by stage and time by cause, drawn in {path}")


def _next(args: argparse.Namespace, config: Config) -> list[str]:
    """What has not been looked at yet, of the same job: the picture, the last rank; then training."""
    last = config.parallel.world_size - 1
    same = [args.config, *args.overrides, *(["--gpus", str(args.gpus)] if args.gpus is not None else [])]
    if args.schedule_svg is None and config.parallel.pipeline > 1:
        return ["plan", *same, "--schedule-svg", "schedule.svg"]
    if args.explain_rank != last:
        return ["plan", *same, "--explain-rank", str(last)]
    return ["train", args.config, *args.overrides]
