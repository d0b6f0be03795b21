"""What a text is made of: letters by script, digits, punctuation, symbols; and its words.

A text of any length has few distinct characters, so they are counted first (one pass in C) and each kind is looked up
once per distinct character.  A language is told by its script, which needs no model and no list of words: Chinese is
Han letters without kana among them.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
_TOKEN = re.compile(rf"[{HAN}]|[^\W_{HAN}]+")

# First character of each block, and the script of its letters ("" for a block of anything else).
_BLOCKS = (
    (0x0000, "latin"), (0x0250, ""), (0x0370, "greek"), (0x0400, "cyrillic"), (0x0530, ""), (0x0590, "hebrew"),
    (0x0600, "arabic"), (0x0700, ""), (0x0750, "arabic"), (0x0780, ""), (0x0900, "devanagari"), (0x0980, ""),
    (0x0E00, "thai"), (0x0E80, ""), (0x1100, "hangul"), (0x1200, ""), (0x1E00, "latin"), (0x1F00, "greek"),
    (0x2000, ""), (0x3005, "han"), (0x3008, ""), (0x3040, "kana"), (0x3100, ""), (0x3130, "hangul"), (0x3190, ""),
    (0x31F0, "kana"), (0x3200, ""), (0x3400, "han"), (0x4DC0, ""), (0x4E00, "han"), (0xA000, ""), (0xAC00, "hangul"),
    (0xD7B0, ""), (0xF900, "han"), (0xFB00, "latin"), (0xFB07, ""), (0xFF21, "latin"), (0xFF5B, ""), (0xFF66, "kana"),
    (0xFFA0, ""), (0x20000, "han"), (0x323B0, ""),
)  # fmt: skip
_STARTS = tuple(start for start, _ in _BLOCKS)
SCRIPTS = tuple(sorted({script for _, script in _BLOCKS if script}))


@dataclass
class Profile:
    """How many characters of each kind a text has."""

    visible: int = 0  # all but blanks
    letters: int = 0
    upper_case: int = 0
    digits: int = 0
    punctuation: int = 0
    symbols: int = 0  # mathematics, currency, arrows, box drawing, emoji
    scripts: Counter[str] = field(default_factory=Counter)  # letters of each script

    def script_share(self, scripts: Iterable[str]) -> float:
        """Share of the letters that belong to the scripts; 0 for a text without letters."""
        return sum(self.scripts[script] for script in scripts) / max(1, self.letters)


@functools.lru_cache(maxsize=1 << 16)
def _kind(character: str) -> tuple[str, str]:
    """Unicode category, and the script where it is a letter."""
    category = unicodedata.category(character)
    return category, _BLOCKS[bisect_right(_STARTS, ord(character)) - 1][1] if category[0] == "L" else ""


def profile(text: str) -> Profile:
    """Count the characters of a text by kind."""
    result = Profile()
    for character, count in Counter(text).items():
        category, script = _kind(character)
        major = category[0]
        if major in "ZC":  # blanks and control characters
            continue
        result.visible += count
        if major == "L":
            result.letters += count
            result.upper_case += count * (category == "Lu")
            result.scripts[script] += count
        elif major == "N":
            result.digits += count
        elif major == "P":
            result.punctuation += count
        elif major == "S":
            result.symbols += count
    return result


class Text:
    """A text, with what rules ask of it counted once."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._contains: dict[str, bool] = {}

    def contains(self, expression: str) -> bool:
        """Whether a regular expression is found anywhere."""
        if expression not in self._contains:
            self._contains[expression] = re.search(expression, self.text) is not None
        return self._contains[expression]

    @functools.cached_property
    def lower(self) -> str:
        return self.text.lower()

    @functools.cached_property
    def profile(self) -> Profile:
        return profile(self.text)

    @functools.cached_property
    def tokens(self) -> list[str]:
        return tokens(self.text)


def tokens(text: str) -> list[str]:
    """Words of a text for comparing it with others: each Han character, each run of other letters and digits.

    Compatibility forms and case are folded and punctuation is left out, so that reformatting doesn't hide a copy.
    """
    return _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
