"""Faults on purpose: what a run survives is only known once it has happened to it.

    octant train CONFIG 'reliability.inject=[{kind: kill, rank: 1, step: 7}]'
    OCTANT_INJECT='[{kind: hang, rank: 3, step: 5, phase: reduce}]' sbatch launch/train.sh CONFIG

A fault strikes as its phase begins, on one rank (`engine.config.reliability.FaultConfig`):

    kill              SIGKILL, as a machine that runs out of memory does
    segfault          SIGSEGV, as a library that goes wrong does
    exit              gone without a word, exit code 1
    terminate         SIGTERM: a request to stop
    stop              SIGSTOP: the process is there and does nothing, no thread of it
    hang              the main thread waits for ever; others go on
    raise             an exception
    nan               a weight reads as NaN in this step, and is itself again before the update
    slow              so many seconds later than it should be
    bit_flip          one bit of one weight is another from now on
    network_drop      every connection to the other ranks is cut
    clock_jump        the time of day leaps by so many seconds
    disk_full         the save that this step begins, or the next one, finds no room on this rank
    stalled_writer    that save waits so many seconds on this rank
    damage            a byte of the newest checkpoint is another on disk

Which faults have struck is remembered in the run's folder, before they do, so that a restart that comes by the same
step goes on; with `every_time` they strike again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from engine.checkpoint.folder import CHECKPOINTS, committed_steps
from engine.config.reliability import OF_SAVES, FaultConfig
from engine.metrics.events import append_event
from engine.metrics.phases import Moment
from engine.parallel.data.buckets import Bucket
from engine.parallel.data.flat import is_free

FOLDER = "injected"
FLIPPED_BIT = 20                           # of fp32's bits 0 … 31, or bit 4 of bf16: some per cent, and no alarm


class InjectedFault(RuntimeError):
    """What `raise` raises."""


class Injector:
    """A listener to the phases of one rank, and to the points of its saves.

    Args:
        faults: of all ranks.
        directory: the run's folder.
        buckets: of this rank's model.
        first_phase: of every step.
    """

    def __init__(self, faults: Sequence[FaultConfig], rank: int, directory: Path, buckets: Sequence[Bucket],
                 first_phase: str = "load") -> None:
        self._faults = [(number, fault) for number, fault in enumerate(faults) if fault.rank == rank]
        self._directory, self._buckets, self._first_phase = directory, buckets, first_phase
        self._undo: list[Callable[[], None]] = []
        self._at_next_save: list[FaultConfig] = []

    def __call__(self, moment: Moment) -> None:
        """Lets those strike whose time has come."""
        if moment.phase == "reduce":
            while self._undo:
                self._undo.pop()()
        for number, fault in self._faults:
            if fault.step <= moment.step < fault.step + fault.steps and self._is_at(fault, moment.phase) \
                    and self._first_time(number, fault, moment.step):
                self._tell(fault, moment)
                self._strike(fault)

    def at_point(self, name: str) -> None:
        """A point of a save (`engine.checkpoint.commit.POINTS`), in whatever thread writes it."""
        while name == "shard created" and self._at_next_save:
            fault = self._at_next_save.pop()
            if fault.kind == "stalled_writer":
                time.sleep(max(0.0, fault.seconds))
            else:
                raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (injected)")

    def _is_at(self, fault: FaultConfig, phase: str) -> bool:
        """Faults of a save are prepared at the beginning of their step, so that any save behind it meets them."""
        return phase == (self._first_phase if fault.kind in OF_SAVES else fault.phase)

    def _first_time(self, number: int, fault: FaultConfig, step: int) -> bool:
        if fault.every_time:
            return True
        folder = self._directory / FOLDER
        folder.mkdir(exist_ok=True)
        try:
            (folder / f"{number}-{fault.kind}-rank-{fault.rank}-step-{step}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def _tell(self, fault: FaultConfig, moment: Moment) -> None:
        print(f"INJECTED FAULT: {fault.kind} on rank {fault.rank} in step {moment.step}, {moment.phase}", flush=True)
        with contextlib.suppress(OSError):
            append_event(self._directory, "injected", moment.step, {"fault": fault.kind, "phase": moment.phase},
                         fault.rank)

    def _strike(self, fault: FaultConfig) -> None:
        STRIKES[fault.kind](self, fault)

    def _nan(self) -> None:
        first = _small_weight(self._buckets)[:1]
        before = first.clone()
        first.fill_(float("nan"))

        def undo() -> None:
            first.copy_(before)

        self._undo.append(undo)

    def _save_fault(self, fault: FaultConfig) -> None:
        self._at_next_save.append(fault)


def _wait_for_ever() -> None:
    threading.Event().wait()


def _raise() -> None:
    raise InjectedFault("an exception, injected")


def _signal_self(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def _jump(seconds: float) -> None:
    now = time.time
    time.time = lambda: now() + seconds


def _cut_connections() -> None:
    """Both directions of every connected TCP socket of this process."""
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
            if one.family in (socket.AF_INET, socket.AF_INET6) and one.type == socket.SOCK_STREAM:
                one.shutdown(socket.SHUT_RDWR)


def _small_weight(buckets: Sequence[Bucket]) -> Tensor:
    """The smallest parameter that is here: flat, live."""
    there = [bucket for bucket in buckets if bucket.level < 3 and not is_free(bucket.param_buffer)]
    if not there and (not buckets or is_free(buckets[0].param_shard)):
        raise InjectedFault("no weight of a role that learns is in the device's memory here: leave offload out")
    if not there:
        return buckets[0].param_shard.detach()
    return min((entry.parameter.detach() for bucket in there for entry in bucket.entries),
               key=lambda weight: weight.numel()).flatten()


def _damage(directory: Path) -> None:
    """The byte in the middle of the largest file of the newest checkpoint, where there is one."""
    for newest in list(committed_steps(directory / CHECKPOINTS).values())[-1:]:
        with max(newest.iterdir(), key=lambda path: path.stat().st_size).open("r+b") as file:
            middle = file.seek(0, os.SEEK_END) // 2
            file.seek(middle)
            [byte] = file.read(1)
            file.seek(middle)
            file.write(bytes([byte ^ 1]))


def _flip(weight: Tensor) -> None:
    """A bit of its first element's mantissa."""
    words = weight.view(torch.int16 if weight.element_size() == 2 else torch.int32)
    words[:1] ^= 1 << (FLIPPED_BIT - 16 if weight.element_size() == 2 else FLIPPED_BIT)


class Strike(Protocol):
    def __call__(self, injector: Injector, fault: FaultConfig) -> None: ...


STRIKES: dict[str, Strike] = {
    "kill": lambda injector, fault: _signal_self(signal.SIGKILL),
    "segfault": lambda injector, fault: _signal_self(signal.SIGSEGV),
    "exit": lambda injector, fault: os._exit(1),
    "terminate": lambda injector, fault: _signal_self(signal.SIGTERM),
    "stop": lambda injector, fault: _signal_self(signal.SIGSTOP),
    "hang": lambda injector, fault: _wait_for_ever(),
    "raise": lambda injector, fault: _raise(),
    "nan": lambda injector, fault: injector._nan(),
    "slow": lambda injector, fault: time.sleep(max(0.0, fault.seconds)),
    "bit_flip": lambda injector, fault: _flip(_small_weight(injector._buckets)),
    "network_drop": lambda injector, fault: _cut_connections(),
    "clock_jump": lambda injector, fault: _jump(fault.seconds),
    "disk_full": lambda injector, fault: injector._save_fault(fault),
    "stalled_writer": lambda injector, fault: injector._save_fault(fault),
    "damage": lambda injector, fault: _damage(injector._directory),
}
