"""The texts of a run that learns from its own, on its page: the same prompts over time, from `rollouts.jsonl`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from engine.errors import DataError
from engine.metrics.sinks import ROLLOUTS_FILE
from engine.reading import parse_object, read_bytes

PROMPTS, TIMES = 4, 7                    # prompts that are shown, and how often each
LONGEST = 600                            # characters of a text that are shown
MOST_BYTES = 1 << 30

Text = dict[str, Any]


def texts_section(directory: Path) -> str:
    """HTML of a few prompts and how they were answered over time; empty where a run has none.

    Raises:
        DataError: a line of the file is damaged.
    """
    followed = over_time(read_rollouts(directory / ROLLOUTS_FILE))
    cards = (f'<div class="card scroll"><p><b>{_shown(prompt)}</b></p>{_table(texts)}</div>'
             for prompt, texts in followed.items())
    return f'<h2>Texts over time</h2><div class="charts">{"".join(cards)}</div>' if followed else ""


def over_time(texts: Sequence[Text]) -> dict[str, list[Text]]:
    """The prompts that came in most steps, at most `PROMPTS`; of each one text of a step, at most `TIMES`, evenly."""
    first_of: dict[str, dict[int, Text]] = {}
    for text in texts:
        first_of.setdefault(text["prompt"], {}).setdefault(text["step"], text)
    chosen = sorted(first_of, key=lambda prompt: -len(first_of[prompt]))[:PROMPTS]
    return {prompt: _evenly([*first_of[prompt].values()]) for prompt in chosen}


def _evenly(texts: list[Text]) -> list[Text]:
    if len(texts) <= TIMES:
        return texts
    return [texts[round(i * (len(texts) - 1) / (TIMES - 1))] for i in range(TIMES)]


def read_rollouts(path: Path) -> list[Text]:
    """The texts in a file, or none where it is not there.  A last line without its end is being written.

    Raises:
        DataError: a line is no text of a step.
    """
    try:
        lines = read_bytes(path, MOST_BYTES).rpartition(b"\n")[0].split(b"\n")
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as texts: {error}") from None
    return [_parse(path, number, line) for number, line in enumerate(lines, 1) if line]


def _parse(path: Path, number: int, line: bytes) -> Text:
    remedy = "The file is damaged: restore it, or delete that line to report the rest"
    try:
        found = parse_object(line)
    except ValueError as error:
        raise DataError(f"{path}, line {number} is not a text of a step: {error}. {remedy}") from None
    kinds = {"step": int, "prompt": str, "response": str}
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind) or isinstance(found.get(key), bool):
            raise DataError(f"{path}, line {number} is not a text of a step: it has no {key}. {remedy}")
    return found


def _table(texts: Sequence[Text]) -> str:
    rows = "".join(f"<tr><th>{text['step']:,}</th><td>{_score(text.get('score'))}</td>"
                   f"<td>{_shown(text['response'])}</td></tr>" for text in texts)
    return f"<table><thead><tr><th>step</th><th>score</th><th>response</th></tr></thead><tbody>{rows}</tbody></table>"


def _score(score: object) -> str:
    return f"{score:.3g}" if isinstance(score, int | float) else "–"


def _shown(text: str) -> str:
    return escape(text if len(text) <= LONGEST else text[:LONGEST] + "…").replace("\n", "<br>")
