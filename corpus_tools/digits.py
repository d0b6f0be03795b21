"""A task made on the spot, on which alignment can be learned in minutes and its curves be known beforehand.

A prompt is six different digits, its right answer the same in ascending order:

    394170>013479

Whoever demonstrates it makes mistakes, as people do: every second answer has one pair of neighbours exchanged,
somewhere.  So a model that has learned all there is to learn about `n` digits and the end of an answer has the loss

    (ln 2 + ½·ln(n − 1)) / (n + 1)  per token                          `DEMONSTRATED`: 0.214 for six

which is the entropy of the demonstrations; answers rightly every second time; and of N of its answers at least one is
right with probability 1 − 2^−N.  Text to begin with has the digits in one of four orders, each as likely as the others.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from engine.writing import write_whole

DIGITS, NUMBER, SIGN = "0123456789", 6, ">"
MISTAKEN = 0.5                                       # share of demonstrations
DEMONSTRATED = (math.log(2) + MISTAKEN * math.log(NUMBER - 1)) / (NUMBER + 1)


def prompts(seed: int = 0) -> Iterator[str]:
    """Prompts without end, no two alike among the first 151,200: all there are."""
    dice, seen = random.Random(seed), set[str]()
    while True:
        prompt = "".join(dice.sample(DIGITS, NUMBER)) + SIGN
        if prompt not in seen:
            seen.add(prompt)
            yield prompt


def answer(prompt: str) -> str:
    """The right one."""
    return "".join(sorted(prompt.removesuffix(SIGN)))


def mistake(prompt: str, dice: random.Random) -> str:
    """The right answer with one pair of neighbours exchanged."""
    right, place = answer(prompt), dice.randrange(NUMBER - 1)
    return right[:place] + right[place + 1] + right[place] + right[place + 2:]


def is_right(prompt: str, text: str) -> bool:
    """Whether a text is the answer to a prompt, but for space around it."""
    return text.strip() == answer(prompt)


def text(asked: Iterable[str], seed: int = 0) -> Iterator[dict[str, str]]:
    """Prompts followed by their digits ascending, descending, as they are or from the back: what a base model reads."""
    dice = random.Random(seed)
    for prompt in asked:
        digits, right = prompt.removesuffix(SIGN), answer(prompt)
        yield {"text": prompt + dice.choice((right, right[::-1], digits, digits[::-1]))}


def demonstrations(asked: Iterable[str], seed: int = 0) -> Iterator[dict[str, str]]:
    """Conversations, every second of them with a mistake."""
    dice = random.Random(seed)
    for prompt in asked:
        wrong = dice.random() < MISTAKEN
        yield {"prompt": prompt, "completion": mistake(prompt, dice) if wrong else answer(prompt)}


def comparisons(asked: Iterable[str], seed: int = 0) -> Iterator[dict[str, str]]:
    """The right answer, and one with a mistake."""
    dice = random.Random(seed)
    for prompt in asked:
        yield {"prompt": prompt, "chosen": answer(prompt), "rejected": mistake(prompt, dice)}


def questions(asked: Iterable[str], _: int = 0) -> Iterator[dict[str, str]]:
    """Prompts with the right answer, for whoever checks what is written to them."""
    for prompt in asked:
        yield {"prompt": prompt, "answer": answer(prompt)}


def write(path: Path, records: Iterable[dict[str, str]]) -> None:
    """Records as JSON lines."""
    write_whole(path, "".join(json.dumps(record) + "\n" for record in records))
