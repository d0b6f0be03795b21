"""Where the time of a run went: sums that add up to the time that has passed, whatever ended an attempt."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from engine.metrics import goodput
from engine.metrics.events import read_events
from engine.metrics.goodput import CAUSES, PREFIX, Goodput, fraction, text
from engine.metrics.phases import Taken
from tests.kit.runs import metrics, octant_train, run_config, train

AT = 1_800_000_000.0                       # a time of day


def record(at_step: int, at: float, **seconds: float) -> dict[str, Any]:
    return {"step": at_step, "time": AT + at, "goodput": 0.5} | {
        PREFIX + cause: seconds.get(cause, 0.0) for cause in CAUSES}


def event(kind: str, step: int, at: float, **detail: Any) -> dict[str, Any]:
    time = datetime.fromtimestamp(AT + at, UTC).isoformat(timespec="seconds")
    return {"time": time, "kind": kind, "step": step, "rank": 0, "detail": detail}


def going_on(folder: Path, step: int, records: list[dict[str, Any]], events: list[dict[str, Any]]) -> Goodput:
    for name, rows in (("metrics", records), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Goodput.going_on(folder, step)


@pytest.fixture(autouse=True)
def began(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process was started 500 s after the run."""
    monkeypatch.setattr(goodput, "began", lambda: AT + 500)


RECORDS = [record(10, 100, step=80, waiting=10, start=10), record(20, 200, step=150, waiting=30, start=10, save=10)]


def test_a_killed_attempt_has_lost_what_lies_behind_its_checkpoint(tmp_path: Path) -> None:
    account = going_on(tmp_path, 15, RECORDS, [event("start", 0, 0)])
    assert account.seconds["step"] == 150 - 35 and account.seconds["waiting"] == 30 - 10
    assert account.seconds["lost"] == 45 and account.seconds["save"] == 10
    assert (account.at, account.first) == (AT + 200, "restart"), "all since the last record"
    assert sum(account.seconds.values()) == 200


def test_all_from_the_last_record_to_the_next_first_step_is_a_restart(tmp_path: Path) -> None:
    account = going_on(tmp_path, 20, RECORDS, [event("start", 0, 0)])
    account._offset = AT + 530 - time.perf_counter()
    row = account.record(Taken({"load": 2.0, "save": 3.0, "evaluate": 4.0}, (2.0,) * 10), 5.0)
    assert row["goodput_s/restart"] == pytest.approx(330 - 20 - 3 - 4, abs=1) and row["goodput_s/waiting"] == 35
    assert row["goodput_s/step"] == 150 + 13 and row["goodput_s/evaluation"] == 4
    assert row["goodput"] == pytest.approx((180 + 20) / 530, abs=1e-2)
    later = account.record(Taken({}, ()), 0.0, between=4.0)
    assert later["goodput_s/other"] == pytest.approx(0, abs=1) and later["goodput_s/waiting"] == 39
    assert later["goodput_s/restart"] == row["goodput_s/restart"]


def test_the_time_between_an_orderly_stop_and_the_next_start_is_nobodys(tmp_path: Path) -> None:
    end = event("end", 20, 205, finished=False, goodput=record(20, 205, step=150, waiting=30, start=10, save=15))
    account = going_on(tmp_path, 20, RECORDS, [event("start", 0, 0), end])
    assert (account.at, account.first, account.seconds["save"]) == (AT + 500, "start", 15)
    account = going_on(tmp_path, 10, RECORDS, [event("start", 0, 0), end])
    assert account.seconds["lost"] == 90 and sum(account.seconds.values()) == 205, "an older checkpoint was taken"


def test_a_new_run_and_one_without_accounts(tmp_path: Path) -> None:
    assert Goodput.going_on(tmp_path / "nowhere", 0).at == AT + 500
    account = going_on(tmp_path, 7, [{"step": 7, "loss": 1.0}], [])
    assert sum(account.seconds.values()) == 0 and account.first == "start"


def test_a_time_of_day_that_goes_back_counts_as_nothing(tmp_path: Path) -> None:
    account = going_on(tmp_path, 20, RECORDS, [])
    account._offset -= 1e9
    assert account.record(Taken({}, (1.0,)), 9.0)["goodput_s/restart"] == 0
    assert account.seconds["waiting"] == 31, "at most all of the steps"


def test_in_words() -> None:
    seconds = dict.fromkeys(CAUSES, 0.0) | {"step": 540.0, "waiting": 30.0, "restart": 30.0, "other": 0.1}
    assert fraction(seconds) == pytest.approx(0.95, abs=1e-3)
    assert text(seconds) == "goodput 95.0% of 0:10:00: step 90.0%, waiting 5.0%, restart 5.0%"


def test_a_run_that_crashes_accounts_for_all_of_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture[str]) -> None:
    """Crashed after step 5, gone on with from step 4: a step lost, and what lies between the attempts is a restart."""
    config, since = run_config(tmp_path, "run", steps=8, eval={"every": 3, "batches": 1}), time.time()
    monkeypatch.setattr(goodput, "began", lambda: since)
    train(config, crash_after=5)
    before = metrics(config)[-1]
    assert octant_train(config) == 0
    rows, events = metrics(config), read_events(Path(config.run.dir))
    assert [row["step"] for row in rows if "lr" in row] == list(range(1, 9))
    last = events[-1].detail["goodput"]
    assert last["goodput_s/lost"] > 0 and last["goodput_s/restart"] > 0 and last["goodput_s/save"] > 0
    assert last["goodput_s/evaluation"] > 0
    for row in (before, rows[-1], last):
        total = sum(row[PREFIX + cause] for cause in CAUSES)
        first = before["time"] - sum(before[PREFIX + cause] for cause in CAUSES)
        assert total == pytest.approx(row["time"] - first, abs=0.05)
        assert row["goodput"] == pytest.approx(sum(row[PREFIX + c] for c in ("step", "load", "waiting")) / total)
    assert "goodput " in capsys.readouterr().out
