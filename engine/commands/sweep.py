"""`octant sweep MIXTURES.yaml`: small models on mixtures of sources, one after the other, and the loss on each source.

Each mixture is a run of its own, `octant train` on a configuration that is written beside its folder.  So whatever
stops the sweep, the same command goes on: finished runs are read, an unfinished one resumes from its checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from engine.config import Config, load_config
from engine.config.yaml_values import dump_yaml
from engine.errors import ConfigError, RequestError, WorkerError
from engine.hints import hint
from engine.plan.mixtures import Sweep, Tried, losses_chart, losses_table, read_sweep
from engine.reliability.wishes import DONE_FILE
from engine.report.charts import line_chart
from engine.report.runs import read_run
from engine.report.svg import standalone
from engine.writing import write_errors, write_picture, write_whole

STOPPED = 3                                                  # the exit code of a run that was asked to stop
COMPARED = ("model", "data", "batch", "optim", "precision", "steps")
VALID = "valid_loss/"


def run(args: argparse.Namespace) -> int:
    """Trains what is missing; prints and draws what came of all.

    Raises:
        ConfigError: a mixture is no configuration that can be trained.
        RequestError: a run's folder holds another one.
        WorkerError: a run failed.
    """
    sweep = read_sweep(Path(args.mixtures))
    mixtures = sweep.all()
    written = {name: _configuration(sweep, name, shares) for name, shares in mixtures.items()}
    configs = {name: _checked(path, Path(sweep.dir) / name) for name, path in written.items()}
    for place, (name, config) in enumerate(configs.items(), 1):
        if _is_done(config):
            continue
        print(f"mixture {place} of {len(configs)}: {name} (log: {written[name].with_suffix('.log')})", flush=True)
        if (code := _train(written[name])) == STOPPED:
            print(f"stopped; `octant sweep {args.mixtures}` goes on from there")
            return STOPPED
        if code:
            raise WorkerError(f"mixture {name} failed with exit code {code}: {written[name].with_suffix('.log')} says "
                              f"why; `octant sweep {args.mixtures}` goes on with it")
    found = [_tried(name, shares, configs[name]) for name, shares in mixtures.items()]
    write_picture(Path(sweep.dir) / "mixtures.svg", standalone(line_chart(losses_chart(found))))
    if args.json:
        print(json.dumps([one.told() for one in found], indent=1))
        return 0
    best = min(found, key=lambda one: one.loss).name
    print(losses_table(found))
    print(f"picture: {Path(sweep.dir) / 'mixtures.svg'}\nthe best as a configuration: {written[best]}")
    print(hint("report", configs[best].run.dir))
    return 0


def _configuration(sweep: Sweep, name: str, shares: dict[str, float]) -> Path:
    """The configuration of a mixture, as a file beside the run's folder."""
    folder = Path(sweep.dir)
    train = [{"path": sweep.sources[source], "weight": share} for source, share in shares.items() if share > 0]
    base = Path(sweep.base)
    values = {"base": str(base.resolve()) if base.is_file() else sweep.base, "run": {"dir": str(folder / name)},
              "data": {"train": train}}
    path = folder / f"{name}.yaml"
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, dump_yaml(values))
    return path


def _checked(path: Path, directory: Path) -> Config:
    """The configuration, if it can be trained here."""
    config = load_config(path)
    if not config.data.valid or not config.eval.every:
        raise ConfigError(f"{path}: a sweep compares losses on held-out data: data.valid of the base names "
                          "sources, and eval.every is above 0")
    if config.steps % config.eval.every:
        raise ConfigError(f"{path}: the last step ({config.steps}) is to be evaluated: make eval.every "
                          f"({config.eval.every}) a divisor of it")
    if (directory / DONE_FILE).exists():
        before, now = load_config(directory / "config.yaml").to_dict(), config.to_dict()
        if other := [key for key in COMPARED if before[key] != now[key]]:
            raise RequestError(f"{directory} was trained with another {', '.join(other)}: give the sweep another dir, "
                               "or remove the folder")
    return config


def _is_done(config: Config) -> bool:
    return (Path(config.run.dir) / DONE_FILE).exists()


def _train(path: Path) -> int:
    """A run in processes of its own, which hear of Ctrl-C as this one does; what it prints goes to a file."""
    with open(path.with_suffix(".log"), "ab") as log, subprocess.Popen(
            [sys.executable, "-m", "engine", "train", str(path)], stdout=log, stderr=subprocess.STDOUT) as child:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:
                continue                                     # it saves, and ends


def _tried(name: str, shares: dict[str, float], config: Config) -> Tried:
    run = read_run(config.run.dir)
    last = next(record for record in reversed(run.records) if "valid_loss" in record)
    losses = {key.removeprefix(VALID): value for key, value in last.items() if key.startswith(VALID)}
    if not losses:
        losses = {Path(config.data.valid[0].path).name: last["valid_loss"]}
    return Tried(name, shares, losses, last["valid_loss"])
