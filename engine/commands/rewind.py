"""`octant rewind`: a run goes back to an earlier checkpoint and leaves out the data behind it."""

from __future__ import annotations

import argparse
from pathlib import Path

from engine.checkpoint.folder import CHECKPOINTS, committed_steps
from engine.config import load_config
from engine.errors import RequestError
from engine.hints import hint
from engine.reliability.rewind import make, with_rewinds
from engine.train.rewinding import rewind_folder
from engine.train.run_folder import CONFIG_FILE, locked


def run(args: argparse.Namespace) -> int:
    run_dir = Path(args.run_dir)
    if not (run_dir / CONFIG_FILE).is_file():
        raise RequestError(f"{run_dir} is no run's folder: it holds no {CONFIG_FILE}")
    if args.to < 0 or args.skip_steps < 1:
        raise RequestError(f"--to {args.to} --skip-steps {args.skip_steps}: a step from 0 on, and at least one to skip")
    with locked(run_dir):
        config = with_rewinds(load_config(run_dir / CONFIG_FILE, [f"run.dir={run_dir}", "checkpoint.resume=auto"]))
        saved = list(committed_steps(run_dir / CHECKPOINTS))
        if args.to and args.to not in saved:
            raise RequestError(f"{run_dir} has no checkpoint of step {args.to}; it has those of "
                               f"{', '.join(map(str, saved)) or 'no step'} (0: the beginning)")
        rewind = make(config, max(saved, default=0), args.to, (args.to, args.to + args.skip_steps), "by hand")
        earlier = rewind_folder(run_dir, rewind)
    print(f"{run_dir} goes on from step {args.to}; samples {rewind.skip[0]:,} to {rewind.skip[1] - 1:,} of the stream "
          f"({args.skip_steps:,} steps) are left out from now on")
    if earlier is not None:
        print(f"what it held of later steps is in {earlier}")
    print("the command that started the run goes on with it" + ("" if args.to else ", from the beginning"))
    print(hint("train", run_dir / CONFIG_FILE))
    return 0
