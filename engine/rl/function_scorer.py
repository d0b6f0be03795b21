"""Scores by reward functions: in processes of their own, under a time limit, with a rule for whatever they do wrong.

A function is foreign code that runs on texts which a model has made up: sooner or later it meets one that it raises at,
or never comes back from.  So it is called in worker processes of the first rank's (`engine.rl.calling`).  A call has
the texts of one prompt, or of some, and goes to whichever worker is free; which one answers changes nothing.

    raises, comes too late, or its process dies      the texts of the call are asked for again one by one; one that
                                                     fails alone has no score
    a number that is not finite, or None             that text has no score
    another number of scores, or no numbers          refused: every call would do so

A text without a score counts 0; it is counted, and named by its prompt's number and its place among that prompt's
texts.  Where not one text of a step has a score, or `MOST_IN_A_ROW` calls in a row came too late, the run is refused
with what the function itself said.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np

from engine.config import Config, RewardSource
from engine.distributed.agree import Group, rank_in, share_json
from engine.errors import RequestError
from engine.rl.calling import Failed, Worker
from engine.rl.rollouts import Rollouts
from engine.rl.scores import Numbers

TEXTS_OF_A_CALL = 16                   # at least one prompt's, however many those are
MOST_IN_A_ROW = 8
SAID_AT_ONCE = 3                       # texts without a score that are named, of each step


class FunctionScorer:
    """What a reward function says of texts (`engine.rl.rollouts.Scorer`).

    Args:
        source: names a function.
        group: all ranks of the job, which hear the same; None: there is one.

    Attributes:
        complaints: about texts of the last call without a score, a line each, or one for the rest of many.
    """

    def __init__(self, source: RewardSource, group: Group) -> None:
        assert source.function is not None
        self.name, self.weight = source.function, source.weight
        self.complaints: tuple[str, ...] = ()
        self._group = group
        self._workers = [Worker(source.function, source.timeout_seconds) for _ in range(source.workers)]

    def __call__(self, rollouts: Rollouts) -> Numbers:
        """A number for each row, NaN where there is none.

        Raises:
            RequestError: the function cannot be used.
        """
        answer: dict[str, Any] = {}
        if rank_in(self._group) == 0:
            try:
                answer = _Step(self.name, self._workers, rollouts).scored()
            except RequestError as error:
                answer = {"refused": str(error)}
        answer = share_json(answer, self._group)
        if "refused" in answer:
            raise RequestError(answer["refused"])
        missing: list[str] = answer["missing"]
        rest = f"reward function {self.name}: {len(missing):,} texts of step {rollouts.step} have no score, and count 0"
        self.complaints = (*missing[:SAID_AT_ONCE], *([rest] if len(missing) > SAID_AT_ONCE else []))
        return np.array(answer["scores"], np.float64)

    def close(self) -> None:
        for worker in self._workers:
            worker.close()


class _Step:
    """The texts of one step on their way through the workers."""

    def __init__(self, name: str, workers: Sequence[Worker], rollouts: Rollouts) -> None:
        self._name, self._workers, self._rollouts = name, workers, rollouts
        self._scores = [math.nan] * rollouts.num_rows
        self._why: dict[int, str] = {}                           # of rows without a score
        self._calls: SimpleQueue[list[int]] = SimpleQueue()
        for rows in self._dealt():
            self._calls.put(rows)

    def scored(self) -> dict[str, Any]:
        """`scores` by row, and what is `missing`, a line each.

        Raises:
            RequestError: the function cannot be used.
        """
        with ThreadPoolExecutor(len(self._workers)) as threads:
            done = [threads.submit(self._work, worker) for worker in self._workers]
        for each in done:
            each.result()
        for row, score in enumerate(self._scores):
            if not math.isfinite(score):
                self._scores[row] = math.nan
                self._why.setdefault(row, f"returned {score}")
        if self._scores and len(self._why) == len(self._scores):
            raise RequestError(f"reward function {self._name}: not one of the {len(self._scores)} texts of step "
                               f"{self._rollouts.step} has a score; of the first it {self._why[0]}")
        return {"scores": self._scores, "missing": [self._line(row) for row in sorted(self._why)]}

    def _dealt(self) -> Iterator[list[int]]:
        """Rows of each call: whole prompts."""
        samples = self._rollouts.samples
        size = max(1, TEXTS_OF_A_CALL // samples) * samples
        for first in range(0, self._rollouts.num_rows, size):
            yield [*range(first, min(first + size, self._rollouts.num_rows))]

    def _work(self, worker: Worker) -> None:
        """One worker's part: calls until there are no more, or one that cannot be used."""
        late = 0
        try:
            while True:
                waiting = [self._calls.get_nowait()]
                while waiting:
                    rows = waiting.pop(0)
                    why, too_late = self._asked(worker, rows)
                    late = late + 1 if too_late else late if why else 0
                    if late == MOST_IN_A_ROW:
                        raise RequestError(self._refusal(rows, f"{why}, as {late} calls in a row did"))
                    if why and len(rows) > 1:
                        waiting = [[row] for row in rows]
                    elif why:
                        self._why[rows[0]] = why
        except Empty:
            pass
        except BaseException:
            with contextlib.suppress(Empty):
                while True:
                    self._calls.get_nowait()
            raise

    def _asked(self, worker: Worker, rows: Sequence[int]) -> tuple[str, bool]:
        """Why a call came to nothing, or an empty text; and whether it was late."""
        step = self._rollouts
        call = {"prompts": [step.prompt_of(row).text for row in rows], "responses": [step.texts[row] for row in rows],
                "records": [dict(step.prompt_of(row).record) for row in rows]}
        try:
            scores = worker.ask(call)
        except Failed as error:
            return str(error), error.late
        except RequestError as error:
            raise RequestError(self._refusal(rows, str(error))) from None
        for row, score in zip(rows, scores, strict=True):
            self._scores[row] = score
        return "", False

    def _refusal(self, rows: Sequence[int], why: str) -> str:
        return f"reward function {self._name}: called for {self._place(rows[0])} of step {self._rollouts.step}: {why}"

    def _line(self, row: int) -> str:
        return (f"reward function {self._name}: {self._place(row)} of step {self._rollouts.step} has no score, and "
                f"counts 0: it {self._why[row]}")

    def _place(self, row: int) -> str:
        return f"prompt {self._rollouts.prompt_of(row).number:,}, sample {self._rollouts.sample_of(row)},"


def open_scorers(config: Config, group: Group) -> list[FunctionScorer]:
    """Those of a run; no process is started before the first call."""
    return [FunctionScorer(source, group) for source in config.roles.reward if source.function is not None]
