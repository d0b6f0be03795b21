"""A process that calls one reward function: `python -m engine.rl.worker NAME SECONDS`.

Calls come in as lines of JSON on stdin, answers go out as lines on what was stdout; what the function itself prints
goes to stderr.  A function is called in the main thread, so that it may use signals of its own.  The process ends when
its parent does: a thread waits for the end of stdin; and where a function keeps Python's lock for ever, as a regular
expression can, so that no thread gets a turn, the system's own alarm ends it a while behind the time limit.

    {"ready": true} | {"refused": WHY}                                       once, when the function is imported
    {"scores": […]} | {"raised": WHAT} | {"unusable": WHY}                   to every call
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from engine.reading import said
from engine.rl.functions import RewardFunction, find, scores_in

LATE_SECONDS = 5.0


def main() -> None:
    """Answers until stdin ends."""
    name, seconds = sys.argv[1], float(sys.argv[2])
    calls: SimpleQueue[bytes] = SimpleQueue()
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)
        threading.Thread(target=_read, args=(calls,), daemon=True).start()
        sys.path.insert(0, str(Path.cwd()))
        try:
            function = find(name)
        except ValueError as error:
            print(json.dumps({"refused": str(error)}), file=answers, flush=True)
            return
        print(json.dumps({"ready": True}), file=answers, flush=True)
        while True:
            call = json.loads(calls.get())
            signal.setitimer(signal.ITIMER_REAL, 2 * seconds + LATE_SECONDS)
            answer = answer_to(function, call)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(json.dumps(answer), file=answers, flush=True)


def _read(calls: SimpleQueue[bytes]) -> None:
    for line in sys.stdin.buffer:
        calls.put(line)
    os._exit(0)


def answer_to(function: RewardFunction, call: dict[str, Any]) -> dict[str, Any]:
    """What comes of calling the function with `prompts`, `responses`, `records`."""
    count = len(call["responses"])
    try:
        returned = function(call["prompts"], call["responses"], call["records"])
    except BaseException as error:                               # also one that wants to leave: it is asked again
        where = traceback.extract_tb(error.__traceback__)[-1]
        return {"raised": f"{type(error).__name__}: {said(error)} ({where.filename}, line {where.lineno})"}
    try:
        return {"scores": scores_in(returned, count)}
    except ValueError as error:
        return {"unusable": str(error)}


if __name__ == "__main__":
    main()
