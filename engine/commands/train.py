"""`octant train`: one rank of a job, or, started plainly, the local processes that the layout needs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path

from corpus_tools.conversations.start import open_corpora, prepared
from engine.checkpoint.folder import checkpoints_at, no_checkpoint
from engine.commands._layout import local_processes, start_ranks
from engine.config import Config, load_config, resolve_layout, world_size_of
from engine.config.placement import learns_from_own_texts
from engine.distributed.environment import LaunchEnvironment, injected_faults, launch_environment, tune_gpu
from engine.distributed.host_memory import Room, host_memory
from engine.distributed.topology import Topology
from engine.launching.local import run_as_rank
from engine.metrics.console import Console
from engine.metrics.sinks import require_packages
from engine.plan.memory import require_room
from engine.plan.roles_room import require_room_for_roles
from engine.reliability.rewind import with_rewinds
from engine.reliability.wishes import STOP_FILE
from engine.rl.calling import require_functions
from engine.rl.prompts import Prompts
from engine.train.corpora import Corpora
from engine.train.introduction import introduction, introduction_of_roles
from engine.train.run_folder import locked, require_at_home
from engine.train.stop import StopRequest

STOPPED = 3


def run(args: argparse.Namespace) -> int:
    """Train as the configuration says."""
    launched = launch_environment()
    stop = None if launched is None else StopRequest()
    config = _load(args)
    if (wish := Path(config.run.dir) / STOP_FILE).exists():
        if launched is None or launched.rank == 0:
            print(f"{wish} is there, so nothing is trained: remove it to go on")
        return STOPPED
    if launched is None or stop is None:
        return _start_plainly(args, config)
    config = resolve_layout(config, launched.world_size)
    code = run_as_rank(launched, Path(config.run.dir), lambda: _run_launched(config, launched, stop))
    stop.shut_out()
    return code


def _load(args: argparse.Namespace) -> Config:
    """
    Raises:
        ConfigError: the file, or what was changed of it, is no configuration.
        RequestError: it is the record of a run that lies elsewhere now.
    """
    faults = injected_faults()
    config = load_config(args.config, [*args.overrides, *([f"reliability.inject={faults}"] if faults else [])])
    require_at_home(Path(args.config), Path(config.run.dir), given=any(
        override.startswith("run.dir=") for override in args.overrides))
    return with_rewinds(config)


def _run_launched(config: Config, launched: LaunchEnvironment, stop: StopRequest) -> int:
    """One rank of several; of local ones the parent has introduced the job."""
    if launched.rank == 0 and launched.launcher != "octant":
        _introduce(config, _opened(config), stamped=True)
    return _run_rank(config, launched, stop)


def _start_plainly(args: argparse.Namespace, config: Config) -> int:
    """Find problems now, then run here (one process) or start the others."""
    config = resolve_layout(config, local_processes(config))
    _introduce(config, _refuse_early(config))
    if (size := world_size_of(config)) == 1:
        return _run_rank(config, None, StopRequest())
    with locked(Path(config.run.dir)):
        pass                                                       # rank 0 takes the lock; this tells at once
    return start_ranks(args, size, Path(config.run.dir), graceful=True)


def _opened(config: Config) -> Corpora | Prompts:
    """What a run reads.

    Raises:
        DataError, ConfigError: it cannot be used.
        RequestError: a reward function cannot.
    """
    require_functions(config.roles.reward)
    return Prompts.open(config) if learns_from_own_texts(config) else open_corpora(config)


def _introduce(config: Config, opened: Corpora | Prompts, stamped: bool = False) -> None:
    console = Console(config.steps, is_terminal=False, stamped=stamped)
    lines = introduction(config, opened) if isinstance(opened, Corpora) else \
        [*introduction_of_roles(config), *(file.about() for file in opened.files)]
    for line in lines:
        console.note(line)


def _refuse_early(config: Config) -> Corpora | Prompts:
    """What can be seen without torch, before any process is started; what the run reads, where it is all right.

    Raises:
        RequestError: data, checkpoints or packages that the configuration names cannot be used, or the memory of this
            machine does not suffice.
    """
    roles = config.roles
    named = [role.load for role in (roles.actor, roles.critic, roles.reference, *roles.reward)]
    for path in (config.checkpoint.load, config.checkpoint.resume, *named):
        if path not in (None, "auto", "never") and not any(found.is_dir() for found in checkpoints_at(Path(path))):
            raise no_checkpoint(Path(path))
    require_packages(config.log)
    if config.run.device == "cpu":
        _require_room(config, range(world_size_of(config)), host_memory(), on_gpu=False)
    return _opened(config)


def _run_rank(config: Config, launched: LaunchEnvironment | None, stop: StopRequest) -> int:
    tune_gpu(config.parallel)
    rank_module = import_module("engine.train.rank")      # torch is needed from here on
    notes = _memory(config, launched)
    report = import_module("engine.commands.doctor").doctor_report(operations=False) \
        if launched is None or launched.rank == 0 else ""
    with_roles = learns_from_own_texts(config)
    topology = Topology(data=world_size_of(config)) if with_roles else Topology.of(config)
    chats = {} if with_roles else prepared(config, say=lambda line: None)
    watchdog = config.reliability.watchdog
    with stop.bounded(watchdog.drain_seconds) if watchdog else nullcontext():
        finished = rank_module.run_rank(config, topology, launched, report, stop, notes, chats)
    return 0 if finished else STOPPED


def _memory(config: Config, launched: LaunchEnvironment | None) -> list[str]:
    """What there is to say of this rank's memory.

    Raises:
        RequestError: it does not suffice, or the device is not there.
    """
    rank, local_rank, own, on_host = (launched.rank, launched.local_rank, launched.own_device,
                                      launched.ranks_on_host) if launched else (0, 0, False, range(1))
    process = import_module("engine.distributed.process")
    device = process.pick_device(config.run.device, local_rank, own)
    on_gpu = device.type == "cuda"
    return _require_room(config, [rank] if on_gpu else on_host, process.free_memory(device), on_gpu=on_gpu)


def _require_room(config: Config, ranks: Sequence[int], room: Room | None, on_gpu: bool) -> list[str]:
    """As `engine.plan.memory.require_room`, whatever the run learns from."""
    require = require_room_for_roles if learns_from_own_texts(config) else require_room
    return require(config, ranks, room, on_gpu=on_gpu)
