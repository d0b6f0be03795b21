"""`octant plan CONFIG.yaml`: a job on paper, before anything is started."""

from __future__ import annotations

import argparse
import json
from importlib import import_module
from pathlib import Path

from engine.config import Config, load_config, resolve_layout
from engine.hints import hint
from engine.parallel.pipeline.timeline import timeline
from engine.plan.devices import Device, device, device_named_in
from engine.plan.job import Planned
from engine.plan.summary import summary
from engine.report.schedule_picture import schedule_svg, title
from engine.report.svg import standalone
from engine.writing import write_picture

DEFAULT_DEVICE = "a100-80g"


def run(args: argparse.Namespace) -> int:
    """Explain a rank, draw the schedule, or without either print the summary.

    Raises:
        RequestError: there is no such rank or device, or the picture cannot be written.
        ConfigError: the configuration is wrong, or impossible on so many processes.
    """
    loaded = load_config(args.config, args.overrides)
    config = resolved(loaded, args.gpus)
    job = Planned(config, _device(args))
    if args.json:
        print(json.dumps(job.record(), indent=1))
        return 0
    if args.schedule_svg is not None:
        _draw(config, Path(args.schedule_svg))
    if args.explain_rank is not None:
        explanation = import_module("engine.plan.explain").explain(config, args.explain_rank)      # torch from here on
        print(import_module("engine.plan.words").in_words(explanation) + "\n")
    if args.schedule_svg is None and args.explain_rank is None:
        print(summary(job) + "\n")
        if loaded.parallel.data == "auto" and args.gpus is None:
            print("parallel.data is auto, so this is one copy of the model; --gpus N plans for more\n")
    print(hint(*_next(args, config)))
    return 0


def resolved(config: Config, num_gpus: int | None) -> Config:
    """On so many GPUs; by default on as many as the configuration names, or one copy of the model takes."""
    parallel = config.parallel
    if num_gpus is None:
        num_gpus = parallel.model_parallel_size * (parallel.data if isinstance(parallel.data, int) else 1)
    return resolve_layout(config, num_gpus)


def _device(args: argparse.Namespace) -> Device:
    """The one asked for, else the one that the configuration's first lines name."""
    return device(args.gpu or device_named_in(args.config) or DEFAULT_DEVICE)


def _draw(config: Config, path: Path) -> None:
    drawn = timeline(config)
    write_picture(path, standalone(schedule_svg(drawn)))
    print(f"{title(drawn)}, where 1 is the forward pass of the stage with the most work; drawn in {path}")


def _next(args: argparse.Namespace, config: Config) -> list[str]:
    """What has not been looked at yet, of the same job: the picture, the last rank; then training."""
    last = config.parallel.world_size - 1
    same = [args.config, *args.overrides, *(["--gpus", str(args.gpus)] if args.gpus is not None else [])]
    if args.schedule_svg is None and config.parallel.pipeline > 1:
        return ["plan", *same, "--schedule-svg", "schedule.svg"]
    if args.explain_rank != last:
        return ["plan", *same, "--explain-rank", str(last)]
    return ["train", args.config, *args.overrides]
