"""Who is fed when: which texts are under way, in which blocks, and who comes next.

Texts wait in line.  A lane is a number of places whose texts pass through the model together; a place that falls free
is taken by the next in line, so a long text keeps nobody waiting.  With several lanes each stage of a pipeline works on
another one.

*A beginning is computed once.*  A prompt's keys and values but for its last token are the same for all its samples: the
first one computes them, the others name the same blocks.  Every text then goes on from the last token of its prompt,
so that in a pass each text under way has exactly one token that is followed by a choice.

*Memory.*  Texts take blocks as they grow.  When there are none, beginnings go that are kept for samples in line, then
the youngest text of the lane goes back to the head of the line with what it has; it comes in again when all blocks that
it can need are free, and takes them.  So everybody comes to an end, and nobody is sent back twice.

All ranks of a copy of the model see the same choices, so they plan alike and say nothing to each other.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from engine.generate.blocks import BLOCK_TOKENS, Blocks, blocks_for
from engine.generate.sampling import Name

PREFILL_TOKENS = 8192        # of beginnings in one pass; a single one may be longer


@dataclass(eq=False)
class Beginning:
    """What the samples of a prompt have in common.

    Attributes:
        tokens: the prompt without its last token.
        wanted: samples that still wait for it.
        table: its blocks while it is kept for them.
    """

    tokens: Sequence[int]
    wanted: int
    table: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Text:
    """One text.

    Attributes:
        number: its place among all that were asked for.
        tokens: the prompt and what is new.
        num_prompt: tokens of the prompt.
        longest: tokens that it may come to have, the last of which is never fed.
        beginning: of its prompt.
        table: its blocks while it is under way.
        alone: it shares nothing, and takes all blocks that it can need when it comes in.
        waited: its beginning need not be kept for it any more.
    """

    number: int
    name: Name
    tokens: list[int]
    num_prompt: int
    longest: int
    beginning: Beginning
    table: list[int] = field(default_factory=list)
    alone: bool = False
    waited: bool = False


@dataclass(frozen=True)
class Plan:
    """One pass.

    Attributes:
        beginnings: tokens to be stored, the tables of where, and how many tokens the prompts have.
        copies: pairs of blocks, from and to.
        texts: who goes on, from the last token of each.
    """

    beginnings: list[tuple[Sequence[int], list[int], int]]
    copies: list[tuple[int, int]]
    texts: list[Text]


class Scheduler:
    """See the module docstring."""

    def __init__(self, texts: Iterable[Text], blocks: Blocks, lanes: int, rows: int) -> None:
        """`rows`: places in each lane.  `blocks` must have room for the longest text alone."""
        self._waiting, self._blocks, self._rows = deque(texts), blocks, rows
        self._lanes: list[list[Text]] = [[] for _ in range(lanes)]
        self._kept: list[Beginning] = []

    @property
    def busy(self) -> bool:
        """Whether somebody waits or is under way."""
        return bool(self._waiting) or any(self._lanes)

    def plan(self, lane: int) -> Plan:
        """The next pass of a lane whose last one is over; without texts where there is nobody for it."""
        own = self._lanes[lane]
        for text in list(own):
            while text in own and not self._has_place(text):
                if self._make_room(1):
                    text.table.append(self._blocks.take())
                else:
                    self._send_back(own)
        plan = Plan([], [], own)
        self._admit(plan)
        return Plan(plan.beginnings, plan.copies, list(own))

    def end(self, lane: int, text: Text) -> None:
        """A text of the lane is complete."""
        self._lanes[lane].remove(text)
        self._drop(text)

    def _drop(self, holder: Text | Beginning) -> None:
        self._blocks.drop(holder.table)
        holder.table = []

    def _send_back(self, own: list[Text]) -> None:
        """The youngest of a lane to the head of the line."""
        text = own.pop()
        self._drop(text)
        text.alone = True
        self._waiting.appendleft(text)

    def _has_place(self, text: Text) -> bool:
        """Whether the token that it goes on from can be stored."""
        number = (len(text.tokens) - 1) // BLOCK_TOKENS
        return number < len(text.table) and not self._blocks.is_shared(text.table[number])

    def _make_room(self, count: int, but: Beginning | None = None) -> bool:
        """Whether so many blocks are free, if need be after giving up beginnings that are kept; all except `but`."""
        for beginning in [each for each in self._kept if each is not but]:
            if self._blocks.num_free >= count:
                break
            self._forget(beginning)
        return self._blocks.num_free >= count

    def _forget(self, beginning: Beginning) -> None:
        if beginning in self._kept:
            self._kept.remove(beginning)
        self._drop(beginning)

    def _admit(self, plan: Plan) -> None:
        """Fills the lane's free places from the line, while there is memory, and room in the pass."""
        fed = 0
        while self._waiting and len(plan.texts) < self._rows:
            text = self._waiting[0]
            new = text.tokens[:-1] if text.alone else () if text.beginning.table else text.beginning.tokens
            if fed and fed + len(new) > PREFILL_TOKENS:
                return
            if not self._has_room_for(text, bool(plan.copies)):
                if any(self._lanes):
                    return
                self._forget(text.beginning)                  # there is nobody to wait for
                text.alone = True
                continue
            self._waiting.popleft()
            self._come_in(text, plan)
            fed += len(new)

    def _has_room_for(self, text: Text, fixed: bool) -> bool:
        """Whether a text can come in, with a block to grow for everybody under way.

        `fixed`: what is kept stays, for this pass is about to copy from it.
        """
        spare = sum(map(len, self._lanes))
        if text.alone:
            count = blocks_for(text.longest - 1) + spare
        else:
            count = 1 + spare + (0 if text.beginning.table else blocks_for(len(text.beginning.tokens)))
        return self._blocks.num_free >= count if fixed else self._make_room(count, text.beginning)

    def _come_in(self, text: Text, plan: Plan) -> None:
        plan.texts.append(text)
        beginning, blocks = text.beginning, self._blocks
        if not text.alone:
            if beginning.tokens and not beginning.table:
                beginning.table = [blocks.take() for _ in range(blocks_for(len(beginning.tokens)))]
                self._kept.append(beginning)
                plan.beginnings.append((beginning.tokens, beginning.table, text.num_prompt))
            text.table = list(beginning.table)
            blocks.share(text.table)
        else:
            text.table = [blocks.take() for _ in range(blocks_for(text.longest - 1))]
            if len(text.tokens) > 1:
                plan.beginnings.append((text.tokens[:-1], text.table, text.num_prompt))
        beginning.wanted -= not text.waited
        text.waited = True
        if not beginning.wanted:
            self._forget(beginning)
        if self._has_place(text):
            return
        block, number = blocks.take(), (len(text.tokens) - 1) // BLOCK_TOKENS
        if number < len(text.table):                          # others name it too: copy on write
            plan.copies.append((text.table[number], block))
            blocks.drop([text.table[number]])
            text.table[number:] = [block]
        else:
            text.table.append(block)
