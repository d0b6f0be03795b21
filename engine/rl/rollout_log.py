"""`rollouts.jsonl`: some texts of every step, to be read by people; one flat JSON object per text, written by rank 0.

    {"step": 7, "number": 96, "sample": 0, "prompt": "…", "response": "…", "score": 1.0, "score/gsm8k": 1.0,
     "tokens": 41, "ended": true}

Of each step the first texts of its first prompts; and whenever one of the first step's prompts comes again, its texts
too, so that it can be seen how the answers to one prompt change.  As in `metrics.jsonl` each step occurs once: lines of
steps that are done again are dropped when the file is opened.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.metrics.sinks import ROLLOUTS_FILE, JsonlSink
from engine.rl.rollouts import Rollouts
from engine.train.run_folder import writing

PROMPTS, SAMPLES = 4, 2                # of a step: its first prompts, and the first texts of each


class RolloutLog:
    """Writes some texts of every step.

    Args:
        step: the run goes on behind it.
        warn: hears why a step's texts could not be written.

    Raises:
        RequestError: the file cannot be written.
    """

    def __init__(self, directory: Path, step: int, warn: Callable[[str], None]) -> None:
        with writing(directory):
            self._sink = JsonlSink(directory / ROLLOUTS_FILE)
            self._sink.truncate_after(step)
        self._warn = warn
        self._followed = _prompts_of_the_first_step(self._sink.path)

    def __call__(self, rollouts: Rollouts) -> None:
        """Writes some texts of a step."""
        if not self._followed:
            self._followed = {prompt.text for prompt in rollouts.prompts[:PROMPTS]}
        try:
            for row in self._rows(rollouts):
                self._sink.log(record_of(rollouts, row))
        except OSError as error:                                 # a full disk: what it spoils is the log
            self._warn(f"texts of step {rollouts.step} could not be written: {error}")

    def close(self) -> None:
        """Closes the file."""
        self._sink.close()

    def _rows(self, rollouts: Rollouts) -> Iterator[int]:
        for place, prompt in enumerate(rollouts.prompts):
            if place < PROMPTS or prompt.text in self._followed:
                first = place * rollouts.samples
                yield from range(first, first + min(SAMPLES, rollouts.samples))


def record_of(rollouts: Rollouts, row: int) -> dict[str, Any]:
    """What is written of one text."""
    prompt, response = rollouts.prompt_of(row), rollouts.responses[row]
    parts = {f"score/{name}": float(scores[row]) for name, scores in rollouts.parts.items()}
    return {"step": rollouts.step, "number": prompt.number, "sample": rollouts.sample_of(row), "prompt": prompt.text,
            "response": rollouts.texts[row], "score": float(rollouts.scores[row]), **parts,
            "tokens": len(response.tokens), "ended": response.ended}


def _prompts_of_the_first_step(path: Path) -> set[str]:
    """As far as the file goes back."""
    found: set[str] = set()
    first: int | None = None
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = json.loads(line)
            first = record["step"] if first is None else first
            if record["step"] != first:
                break
            found.add(record["prompt"])
    return found
