"""Local ranks: one cause when they fail, requests to stop passed on, nobody left behind.  These ranks need no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from engine.distributed.last_words import log_path
from engine.launching import local
from engine.launching.local import RankFailure, launch_local
from tests.kit.runs import ROOT, await_true, end, is_running, start

# A rank: says who it is, then does what its name tells.  The peers of one that fails notice it as gloo does.
WORKER = """
import os, signal, sys, time
from pathlib import Path
from engine.distributed.last_words import write_down
from engine.launching.local import end_with_parent
from engine.train.stop import StopRequest

folder, behaviours = Path(sys.argv[1]), sys.argv[2:]
rank = int(os.environ["RANK"])
end_with_parent()
(folder / f"pid-{rank}").write_text(str(os.getpid()))

def fail(error, code=1):
    write_down(folder, rank, error, code)
    os._exit(code)

def others_gone():
    while not (folder / "failed").exists():
        time.sleep(0.01)
    time.sleep(0.05)

def failing(how):
    (folder / "failed").touch()
    how()

LOST = "[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234"

def train():
    "Stops on request; `early` is long in coming to the point where it can."
    stop = StopRequest()
    (folder / f"ready-{rank}").touch()
    while not stop():
        time.sleep(0.01)
    (folder / f"saved-{rank}").touch()
    stop.shut_out()
    sys.exit(3)

def hang():
    StopRequest()
    (folder / f"ready-{rank}").touch()
    while True:
        time.sleep(1)

def slow_start():
    time.sleep(0.3)
    train()

{"done": lambda: None, "stopped": lambda: sys.exit(3), "train": train, "hang": hang, "slow": slow_start,
 "raise": lambda: failing(lambda: fail(RuntimeError("boom"))),
 "raise late": lambda: failing(lambda: (time.sleep(0.3), fail(RuntimeError("boom")))),
 "refuse": lambda: failing(lambda: fail(ValueError("token 400 is outside the vocabulary of 257"), 2)),
 "kill": lambda: failing(lambda: os.kill(os.getpid(), signal.SIGKILL)),
 "exit": lambda: failing(lambda: os._exit(7)),
 "abort": lambda: failing(lambda: os.abort()),
 "time out": lambda: failing(lambda: fail(RuntimeError("Application timeout caused pair closure"))),
 "echo": lambda: (others_gone(), fail(RuntimeError(LOST))),
 "abort later": lambda: (others_gone(), os.abort()),
}[behaviours[rank]]()
"""


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    path = tmp_path / "worker.py"
    path.write_text(WORKER)
    return path


@pytest.fixture
def short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "GRACE_SECONDS", 1.0)


def pids(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in folder.glob("pid-*") if path.read_text()]


def run_workers(worker: Path, *behaviours: str) -> int:
    return launch_local([sys.executable, str(worker), str(worker.parent), *behaviours], len(behaviours), worker.parent)


@pytest.mark.parametrize(("behaviours", "code"), [(("done", "done", "done"), 0), (("stopped", "stopped"), 3)])
def test_ranks_that_agree(worker: Path, behaviours: tuple[str, ...], code: int) -> None:
    assert run_workers(worker, *behaviours) == code


@pytest.mark.parametrize(("behaviours", "message", "code"), [
    (("echo", "echo", "raise"), "rank 2 failed first: RuntimeError: boom\nits traceback is in LOG2", 1),
    (("echo", "raise late"), "rank 1 failed first: RuntimeError: boom\nits traceback is in LOG1", 1),
    (("echo", "refuse"), "token 400 is outside the vocabulary of 257", 2),
    (("echo", "kill", "echo"), "rank 1 was ended by SIGKILL; out of memory? (its log: LOG1)", 1),
    (("exit", "echo"), "rank 0 ended with exit code 7 (its log: LOG0)", 1),
    (("abort", "echo"), "rank 0 was ended by SIGABRT (its log: LOG0)", 1),
    (("abort later", "raise"), "rank 1 failed first: RuntimeError: boom\nits traceback is in LOG1", 1),
    (("hang", "time out", "echo"), "rank 0 stopped answering, and its peers gave up (its log: LOG0)", 1),
    (("abort later", "time out", "hang"), "rank 2 stopped answering, and its peers gave up (its log: LOG2)", 1),
    (("hang", "raise", "done"), "rank 1 failed first: RuntimeError: boom\nits traceback is in LOG1", 1),
], ids=lambda value: ", ".join(value) if isinstance(value, tuple) else "")
def test_one_cause_and_nobody_left(worker: Path, behaviours: tuple[str, ...], message: str, code: int,
                                   short_grace: None) -> None:
    with pytest.raises(RankFailure) as caught:
        run_workers(worker, *behaviours)
    for rank in range(len(behaviours)):
        message = message.replace(f"LOG{rank}", str(log_path(worker.parent, rank)))
    assert (str(caught.value), caught.value.exit_code) == (message, code)
    assert len(pids(worker.parent)) == len(behaviours)
    assert not any(is_running(pid) for pid in pids(worker.parent))


def test_yesterdays_errors_do_not_count(worker: Path, short_grace: None) -> None:
    local.write_down(worker.parent, 0, RuntimeError("yesterday"), 1)
    with pytest.raises(RankFailure, match="rank 1 was ended by SIGKILL"):
        run_workers(worker, "echo", "kill")


PARENT = """
import sys
from pathlib import Path
from engine.launching.local import launch_local
worker, graceful, *behaviours = sys.argv[1:]
folder = Path(worker).parent
try:
    sys.exit(launch_local([sys.executable, worker, str(folder), *behaviours], len(behaviours), folder,
                          graceful=graceful == "graceful"))
except KeyboardInterrupt:
    sys.exit("interrupted")
"""


@pytest.fixture
def parent(worker: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Processes to end after the test, whatever happens."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        end(process)
    for pid in filter(is_running, pids(worker.parent)):
        os.kill(pid, signal.SIGKILL)


def start_parent(worker: Path, running: list[subprocess.Popen[str]], *behaviours: str, graceful: str = "graceful",
                 ignoring: signal.Signals | None = None) -> subprocess.Popen[str]:
    (worker.parent / "parent.py").write_text(PARENT)

    def dispositions() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)            # a test run in the background ignores it
        if ignoring is not None:
            signal.signal(ignoring, signal.SIG_IGN)

    process = start(worker.parent / "parent.py", worker, graceful, *behaviours, module=False, preexec_fn=dispositions)
    running.append(process)
    return process


def ready(folder: Path, count: int) -> bool:
    return len(list(folder.glob("ready-*"))) == count


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_a_request_to_stop_reaches_every_rank(worker: Path, parent: list[subprocess.Popen[str]],
                                              number: signal.Signals) -> None:
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"the tests were started with {number.name} ignored (nohup), and so are the processes they start")
    process = start_parent(worker, parent, "train", "train", "train")
    await_true(lambda: ready(worker.parent, 3), "three ranks", process)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 3
    assert stderr == ("stopping after this step and saving; Ctrl-C again ends at once\n" * (number == signal.SIGINT))
    assert len(list(worker.parent.glob("saved-*"))) == 3


@pytest.mark.parametrize("delay_ms", [0, 40, 120, 250])
def test_no_request_is_lost_while_ranks_are_starting(worker: Path, parent: list[subprocess.Popen[str]],
                                                     delay_ms: int) -> None:
    """They are interpreters that are still importing: a signal would kill them, or be taken for Ctrl-C."""
    process = start_parent(worker, parent, "slow", "train")
    await_true(log_path(worker.parent, 0).exists, "the launcher", process)
    time.sleep(delay_ms / 1000)
    os.killpg(process.pid, signal.SIGINT)                                     # as a terminal does: to all of them
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr.count("\n")) == (3, 1), stderr
    assert len(list(worker.parent.glob("saved-*"))) == 2
    assert "Traceback" not in log_path(worker.parent, 1).read_text()


@pytest.mark.parametrize(("graceful", "interrupts"), [("graceful", 2), ("at once", 1)])
def test_the_last_ctrl_c_ends_everything_at_once(worker: Path, parent: list[subprocess.Popen[str]], graceful: str,
                                                 interrupts: int) -> None:
    """Also ranks that never look: they may be waiting for each other inside a collective."""
    process = start_parent(worker, parent, "hang", "hang", graceful=graceful)
    await_true(lambda: ready(worker.parent, 2), "two ranks", process)
    for _ in range(interrupts):
        process.send_signal(signal.SIGINT)
        time.sleep(0.2)
    _, stderr = process.communicate(timeout=10)
    assert process.returncode == 1 and stderr.endswith("interrupted\n")
    assert not any(is_running(pid) for pid in pids(worker.parent))


def test_what_nohup_ignores_stays_ignored(worker: Path, parent: list[subprocess.Popen[str]]) -> None:
    process = start_parent(worker, parent, "train", "train", ignoring=signal.SIGHUP)
    await_true(lambda: ready(worker.parent, 2), "two ranks", process)
    os.killpg(process.pid, signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None and not list(worker.parent.glob("saved-*"))
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 3


def test_ranks_do_not_outlive_their_parent(worker: Path, parent: list[subprocess.Popen[str]]) -> None:
    process = start_parent(worker, parent, "hang", "train", "slow")
    await_true(lambda: len(pids(worker.parent)) == 3, "three ranks", process)
    process.kill()
    process.wait()
    await_true(lambda: not any(is_running(pid) for pid in pids(worker.parent)), "the end of the ranks")
