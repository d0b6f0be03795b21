"""Hangs: every rank says where it stands, one line says whose fault it is, and the job ends in seconds."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from engine import cli
from engine.config import Config, WatchdogConfig
from engine.metrics.events import read_events
from engine.metrics.phases import Moment, Phases
from engine.reliability import watchdog as watchdog_module
from engine.reliability.watchdog import HUNG, Report, Watchdog, position, verdict
from engine.reliability.wishes import Wishes
from engine.train.stop import StopRequest
from tests.kit.runs import (
    await_true,
    children_of,
    end,
    is_running,
    metrics,
    run_config,
    saved_steps,
    start,
    train,
    trained,
    write_config,
)

LIMITS = WatchdogConfig(step_factor=5, min_seconds=0.2, start_seconds=30, save_seconds=40)


def watchdog(tmp_path: Path, **options: Any) -> tuple[Watchdog, Phases, list[int]]:
    phases, codes = Phases(torch.device("cpu")), list[int]()
    return Watchdog(LIMITS, phases, 0, 1, tmp_path, codes.append, **options), phases, codes


def test_limits_are_learned(tmp_path: Path) -> None:
    dog, _, _ = watchdog(tmp_path)
    assert dog.limit("load") == dog.limit("save") == dog.limit("evaluate") == 30, "nothing is known yet"
    for step, begin, seconds in ((1, 0.0, 9.0), (2, 10.0, 1.0), (3, 20.0, 2.0)):
        for phase, at in (("load", begin), ("forward_backward", begin + 0.1), ("read", begin + 0.5)):
            dog(Moment(phase, step, at))
        dog(Moment("evaluate", step, begin + seconds))
        dog(Moment("save", step, begin + seconds + 0.5))
    assert dog.limit("reduce") == 5 * 2.0 and dog.limit("between") == 10
    assert dog.limit("evaluate") == 5 * 0.5 and dog.limit("save") == 40 and dog.limit("check_replicas") == 30


def test_limits_are_learned_of_steps_with_other_phases(tmp_path: Path) -> None:
    dog, _, _ = watchdog(tmp_path)
    for step, begin, seconds in ((1, 100.0, 9.0), (2, 110.0, 1.0), (3, 120.0, 2.0)):
        for phase, at in (("reshard", begin), ("gen", begin + 0.1), ("read", begin + 0.5)):
            dog(Moment(phase, step, at))
        dog(Moment("save", step, begin + seconds))
    assert dog.limit("gen") == dog.limit("update_critic") == 5 * 2.0


def test_a_rank_that_does_not_get_on_ends_with_its_own_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    dog, phases, codes = watchdog(tmp_path)
    for step in (1, 2):
        with phases.step(step):
            for phase in ("load", "read"):
                dog(Moment(phase, step, time.perf_counter()))
    with phases("save"):
        dog(Moment("save", 2, time.perf_counter()))
        dog.start()
        time.sleep(0.3)
        assert not codes, "a save has a limit of its own"
    with phases.step(3), phases("reduce"):
        deadline = time.monotonic() + 10
        while not codes and time.monotonic() < deadline:
            time.sleep(0.05)
    assert codes == [HUNG]
    error = json.loads((tmp_path / "logs" / "rank-00000.error.json").read_text())
    assert error["exit_code"] == HUNG and "took more than 0.2 s: rank 0 on " in error["message"]
    assert "in test_a_rank_that_does_not_get_on_ends_with_its_own_code" in capfd.readouterr().err


def report(rank: int, waits: bool = True, where: str = "engine/distributed/collectives.py:106 all_reduce",
           **changes: Any) -> Report:
    return replace(Report(rank, f"gpu{rank:03d}", 7, "reduce", 61.0, 60.0, where, waits), **changes)


@pytest.mark.parametrize(("reports", "world_size", "expected"), [
    ([report(0), report(1)], 3, "rank 2 cannot even report: frozen, or the machine is gone (cause: hardware); "
                                "ranks 0, 1 only waited"),
    ([report(0), report(1, False, "engine/data/indexed.py:88 tokens", phase="load", step=8), report(2)], 3,
     "rank 1 on gpu001 stands at engine/data/indexed.py:88 tokens (cause: data); ranks 0, 2 only waited"),
    ([report(0, False, "engine/checkpoint/shard.py:9 write", phase="save"), report(1, phase="save")], 2,
     "rank 0 on gpu000 stands at engine/checkpoint/shard.py:9 write (cause: file system); rank 1 only waited"),
    ([report(0, phase="save"), report(1, phase="save")], 2, "all ranks wait for a save to be written (cause: file sys"),
    ([report(0), report(1, where="engine/parallel/x.py:1 f")], 2, "all ranks wait, at different places (cause: code)"),
    ([report(0), report(1)], 2, "all ranks wait for one another at engine/distributed/collectives.py:106 all_reduce "
                                "(cause: network)"),
    ([report(0, False, "engine/reliability/inject.py:1 f")], 1, "(cause: asked for)"),
])
def test_one_line(reports: list[Report], world_size: int, expected: str) -> None:
    line = verdict({each.rank: each for each in reports}, world_size)
    assert line.startswith(f"{reports[0].phase} of step {reports[0].step} took more than 60 s: ") and expected in line


def test_a_few_judge_and_the_others_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 ranks every eighth puts reports side by side; here the first of those that can is rank 8."""
    monkeypatch.setattr(watchdog_module, "PATIENCE_SECONDS", 1.0)
    (tmp_path / "logs").mkdir()
    mine = {rank: report(rank) for rank in (5, 8, 9, 16)}
    for rank, each in mine.items():
        (tmp_path / "logs" / f"rank-{rank:05d}.hang").write_text(json.dumps(asdict(each)))
    listed: list[int] = []

    def agree(rank: int) -> str:
        dog = Watchdog(LIMITS, Phases(torch.device("cpu")), rank, 64, tmp_path)
        look = dog._reported
        monkeypatch.setattr(dog, "_reported", lambda: listed.append(rank) or look())   # type: ignore[func-returns-value]
        return dog._agree(mine[rank])

    with ThreadPoolExecutor(len(mine)) as pool:
        lines = list(pool.map(agree, mine))
    assert len(set(lines)) == 1 and "ranks 0, 1, 2, 3, 4, 6, 7, 10 and 52 more cannot even report" in lines[0]
    assert set(listed) == {8, 16} and [event.rank for event in read_events(tmp_path)] == [8]


def test_position() -> None:
    ready = threading.Event()
    dog = Watchdog(LIMITS.model_copy(update={"min_seconds": 40.0}), Phases(torch.device("cpu")), 0, 1, Path("nowhere"))
    thread = threading.Thread(target=lambda: (ready.set(), dog._watch()))
    thread.start()
    ready.wait()
    time.sleep(0.1)
    where, waits = position(thread.ident or 0)
    assert where.startswith("engine/reliability/watchdog.py:") and where.endswith(" _watch") and not waits
    dog.close()
    thread.join()


@pytest.mark.parametrize(("kind", "expected"), [
    ("stop", "rank 1 cannot even report: frozen, or the machine is gone (cause: hardware); rank 0 only waited"),
    ("hang", "rank 1 on HOST stands at engine/reliability/inject.py:LINE _wait_for_ever (cause: asked for); rank 0"),
])
def test_a_frozen_and_a_hanging_rank(tmp_path: Path, kind: str, expected: str) -> None:
    """Real processes: seconds over the limit, one line, an exit code of its own; the same command then goes on."""
    limits = {"min_seconds": 2, "start_seconds": 120, "step_factor": 5}
    whole, config = (run_config(tmp_path, name, steps=6, parallel={"data": 2}, eval={"every": 0},
                                reliability={"watchdog": limits, "inject": faults}) for name, faults in
                     (("whole", None), ("run", [{"kind": kind, "rank": 1, "step": 4}])))
    path = write_config(config, tmp_path / "run.yaml")
    job = start("train", path)
    try:
        await_true(lambda: (Path(config.run.dir) / "injected").is_dir(), "the fault", job)
        began = time.monotonic()
        ranks = children_of(job.pid)
        _, error = job.communicate(timeout=120)
        assert time.monotonic() - began < 2 + 15
    finally:
        end(job)
    assert job.returncode == HUNG
    first, rest = expected.split("LINE") if "LINE" in expected else (expected, "")
    assert first.replace("HOST", os.uname().nodename) in error and rest in error
    assert not any(is_running(rank) for rank in ranks)
    log = (Path(config.run.dir) / "logs" / "rank-00000.log").read_text()
    assert "all_reduce" in log or "wait" in log
    kinds = [event.kind for event in read_events(Path(config.run.dir)) if event.kind != "save"]
    assert kinds == ["start", "injected", "hang"]
    again = start("train", path)
    _, error = again.communicate(timeout=120)
    assert again.returncode == 0, error
    train(whole)
    assert trained(config) == trained(whole)


def test_a_main_thread_that_cannot_stop_is_cut_short(tmp_path: Path) -> None:
    code = ("import ctypes, os\nfrom engine.train.stop import StopRequest\nstop = StopRequest()\n"
            "with stop.bounded(0.3):\n os.write(1, b'ready')\n ctypes.CDLL(None).system(b'sleep 9 >&- 2>&-')\n")
    job = start("-c", code, module=False)
    assert job.stdout is not None and job.stdout.read(5) == "ready"
    job.send_signal(signal.SIGTERM)
    _, error = job.communicate(timeout=20)
    assert job.returncode == 1 and "asked to stop 0.3 s ago, and not able to: ended" in error


def test_one_that_stops_in_time_is_left_alone() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP,
                                                              signal.SIGUSR1)}
    try:
        stop = StopRequest()
        with stop.bounded(0.2):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.05)
        assert stop()
        time.sleep(0.4)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_files_that_ask(tmp_path: Path) -> None:
    seconds = [0.0]
    wishes = Wishes(tmp_path, lambda: seconds[0])
    wishes.look()
    assert (wishes.stop, wishes.save) == (False, False)
    (tmp_path / "STOP").touch(), (tmp_path / "SAVE").touch()
    wishes.look()
    assert not wishes.stop, "not yet"
    seconds[0] = 1.0
    wishes.look()
    assert wishes.stop and wishes.save
    wishes.saving()
    assert not wishes.save and not (tmp_path / "SAVE").exists() and (tmp_path / "STOP").exists()


@pytest.mark.parametrize("log_every", [1, 7])
def test_stop_and_save_and_done(tmp_path: Path, log_every: int, capsys: pytest.CaptureFixture[str],
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.reliability.wishes.LOOK_SECONDS", 0.0)
    config: Config = run_config(tmp_path, "run", steps=20, eval={"every": 0}, checkpoint={"every": 0},
                                log={"every": log_every})
    path, folder = write_config(config, tmp_path / "run.yaml"), Path(config.run.dir)
    folder.mkdir()
    (folder / "SAVE").touch()
    assert cli.run(["train", str(path)]) == 0
    assert saved_steps(config) == [1, 20]
    assert not (folder / "SAVE").exists() and (folder / "DONE").read_text() == "20\n"
    (folder / "STOP").touch()
    capsys.readouterr()
    assert cli.run(["train", str(path), "steps=30"]) == 3
    assert "STOP is there, so nothing is trained: remove it to go on" in capsys.readouterr().out
    (folder / "STOP").unlink()
    original = Wishes.look

    def look(self: Wishes) -> None:
        if len(metrics(config)) > (21 if log_every == 1 else 3):
            (folder / "STOP").touch()
        original(self)

    monkeypatch.setattr(Wishes, "look", look)
    assert cli.run(["train", str(path), "steps=40"]) == 3
    assert 20 < saved_steps(config)[-1] < 40 and not (folder / "DONE").exists()
