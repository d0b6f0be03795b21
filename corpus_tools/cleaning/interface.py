"""Lines that belong to a page and not to its text, told by what they are made of.

A list of whole phrases removes what is on it.  Menus, forms, bylines and counters say the same things in ever new
orders, but with a small vocabulary: *sign*, *account*, *comments*, *share*; 登录, 评论, 来源.  So a short line goes
where most of its words are of that vocabulary.  Three things are looked at:

    share      words of the vocabulary among all that say something: numbers, and small words that any text has, count
               neither way
    end        a line that ends as a sentence does must be nothing but such words, and two at least; one that ends in a
               colon leads over to what follows, and must be nothing but such words too
    label      `Label: value`, where the label is of the vocabulary and the value short and no sentence

A Han character counts as a word; a run of them is cut into the longest words known, from the left.  What counts things
(年, 页, 条) is a filler behind a number only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Annotated, Literal

from pydantic import Field

from corpus_tools.cleaning.characters import HAN, Text
from corpus_tools.cleaning.rule import Rule, Share

RUN = re.compile(rf"[{HAN}]+|[^\W\d_{HAN}]+(?:['’-][^\W\d_{HAN}]+)*")
SENTENCE_END = re.compile(r"[.!?。！？…;；,，][\"'”’)）」]*\s*\Z")
LABEL = re.compile(r"\W*([^:：|｜]{1,40})[:：|｜](?!//)(.{0,60})\Z", re.DOTALL)
FEWEST_OF_A_SENTENCE = 2
CODE = re.compile(r"[={}$\\]|\(\)|->")
UNITS = frozenset("年月日时分秒天周人位篇页楼条号次个")
IS_HAN = re.compile(f"[{HAN}]")


class Interface(Rule):
    """A short line made of the words of buttons, menus, forms and bylines."""

    rule: Literal["interface"]
    words: tuple[str, ...]
    fillers: tuple[str, ...] = ()
    max_words: Annotated[int, Field(ge=1)] = 10
    min_share: Share = 0.7

    def removes(self, text: Text) -> bool:
        line = text.lower.strip()
        if len(line) > 12 * self.max_words or CODE.search(line):
            return False
        known, others = self._count(line)
        if known and known + others <= self.max_words:
            if SENTENCE_END.search(line):
                return not others and known >= FEWEST_OF_A_SENTENCE
            if line[-1] in ":：":
                return not others
            if known >= self.min_share * (known + others):
                return True
        found = LABEL.match(line)
        if found is None or SENTENCE_END.search(found[2]):
            return False
        known, others = self._count(found[1])
        return known > 0 and not others

    def _count(self, line: str) -> tuple[int, int]:
        """Words of the vocabulary, and others that are no fillers."""
        known = others = 0
        for piece, weight in self._pieces(line):
            if piece in self._words:
                known += weight
            elif piece not in self._fillers:
                others += weight
                if others > self.max_words:
                    break
        return known, others

    def _pieces(self, line: str) -> Iterator[tuple[str, int]]:
        """What is looked up, and how many words it counts as."""
        runs = [match[0] for match in RUN.finditer(line)]
        place = 0
        while place < len(runs):
            run = runs[place]
            if IS_HAN.match(run):
                yield from self._cut(run)
            else:
                for count in (3, 2):
                    phrase = " ".join(runs[place : place + count])
                    if phrase in self._words and place + count <= len(runs):
                        yield phrase, count
                        place += count - 1
                        break
                else:
                    yield run, 1
            place += 1

    def _cut(self, run: str) -> Iterator[tuple[str, int]]:
        start = 0
        while start < len(run):
            length = next((n for n in range(min(self._longest, len(run) - start), 1, -1)
                           if run[start : start + n] in self._either), 1)
            piece = run[start : start + length]
            yield (piece if start == 0 or piece not in UNITS else ""), length
            start += length

    @cached_property
    def _words(self) -> frozenset[str]:
        return _lowered(self.words)

    @cached_property
    def _fillers(self) -> frozenset[str]:
        return _lowered(self.fillers)

    @cached_property
    def _either(self) -> frozenset[str]:
        return self._words | self._fillers

    @cached_property
    def _longest(self) -> int:
        return max((len(word) for word in self._either if IS_HAN.match(word)), default=1)


def _lowered(words: Iterable[str]) -> frozenset[str]:
    return frozenset(" ".join(word.lower().split()) for word in words)
