"""Personal data replaced by placeholders: e-mail addresses, phone numbers, identity and card numbers.

A pattern alone calls every long number a card number, so kinds that carry a check digit are checked: Luhn's for cards,
ISO 7064 MOD 11-2 for Chinese identity numbers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cached_property
from typing import Literal

from pydantic import field_validator

from corpus_tools.cleaning.rule import Strict, check_pattern


def luhn(text: str) -> bool:
    """Do the digits of a card number end in the right check digit?"""
    digits = [int(c) for c in text if c.isdigit()]
    doubled = [2 * d - 9 * (d > 4) for d in digits[-2::-2]]
    return (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def chinese_id(text: str) -> bool:
    """GB 11643: 17 digits holding a date, and the check character of ISO 7064 MOD 11-2 (`X` is 10)."""
    digits = [10 if c in "xX" else int(c) for c in text]
    weights = [2 ** (17 - i) % 11 for i in range(18)]
    dated = 1 <= int(text[10:12]) <= 12 and 1 <= int(text[12:14]) <= 31
    return dated and sum(d * w for d, w in zip(digits, weights, strict=True)) % 11 == 1


def phone_length(text: str) -> bool:
    """Does an international number have the 8 to 15 digits of E.164?"""
    return 8 <= sum(c.isdigit() for c in text) <= 15


CHECKS: dict[str, Callable[[str], bool]] = {
    "luhn": luhn,
    "chinese_id": chinese_id,
    "phone_length": phone_length,
    "none": lambda text: True,
}


class Mask(Strict):
    """Every match of `pattern` that passes `check` becomes `replacement`."""

    name: str
    pattern: str
    replacement: str
    check: Literal["luhn", "chinese_id", "phone_length", "none"] = "none"
    requires: str = ""  # found in every text that has something to mask; looked for first, as most texts haven't

    @field_validator("pattern", "requires")
    @classmethod
    def _usable(cls, pattern: str) -> str:
        return check_pattern(pattern)

    @cached_property
    def _compiled(self) -> re.Pattern[str]:
        return re.compile(self.pattern)

    def apply(self, text: str) -> tuple[str, list[str]]:
        """The masked text, and what was masked."""
        found: list[str] = []

        def replace(match: re.Match[str]) -> str:
            if not CHECKS[self.check](match.group()):
                return match.group()
            found.append(match.group())
            return self.replacement

        return self._compiled.sub(replace, text), found
