"""Beam search: of all continuations of K beginnings, go on with the K likeliest (as `transformers` has it).

Of each prompt K beams are fed together.  The best (1 + stop ids) · K continuations of all of them are looked at, so
that K are left to go on with however many end.  One that ends and is among the best K joins the finished ones, of which
the best K by log-probability per new token stay.  A prompt is done when K have finished and the best beam, at its
present length, is no better than the worst of them, or at the limit.

Beams that go on from the same one name its blocks; each copies what it is about to write into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine.errors import RequestError
from engine.generate.blocks import BLOCK_TOKENS, Blocks, blocks_for
from engine.generate.cache import Cache
from engine.generate.generator import Generator, Made
from engine.generate.request import Limits, Sampling
from engine.generate.sampling import Name, penalise, put
from engine.generate.scheduler import Beginning, Plan, Text


@dataclass(eq=False)
class Beam:
    """A continuation: the log-probability of all its new tokens, and of each."""

    text: Text
    score: float = 0.0
    log_probs: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Search:
    """One prompt: the beams that go on, and by score per token those that have ended."""

    num_beams: int
    limits: Limits
    running: list[Beam]
    finished: list[tuple[float, Made]] = field(default_factory=list)
    done: bool = False

    def hear(self, candidates: Sequence[tuple[float, int, int]]) -> list[tuple[Beam, int, float]]:
        """Score, beam and token of the best continuations; those to go on with."""
        going: list[tuple[Beam, int, float]] = []
        for place, (score, beam, token) in enumerate(candidates):
            origin = self.running[beam]
            length = len(origin.log_probs) + 1
            end = "eod" if token in self.limits.stop_ids else \
                "length" if len(origin.text.tokens) + 1 == origin.text.longest else ""
            if not end:
                going.append((origin, token, score))
            elif place < self.num_beams:
                made = Made([*origin.text.tokens[origin.text.num_prompt :], token],
                            [*origin.log_probs, score - origin.score], end)
                self.finished.append((score / length, made))
        self.finished = sorted(self.finished, key=lambda pair: -pair[0])[: self.num_beams]
        going = going[: self.num_beams]
        length = len(self.running[0].log_probs) + 1
        self.done = not going or (len(self.finished) == self.num_beams
                                  and going[0][2] / length <= self.finished[-1][0])
        return going


def beam_search(generator: Generator, prompts: Sequence[Sequence[int]], num_beams: int, sampling: Sampling,
                limits: Limits) -> list[Made]:
    """The best text of every prompt; every rank of the model calls it alike.

    Args:
        sampling: only its `repetition_penalty` counts.

    Raises:
        RequestError: see `Generator.stream`; or there are fewer ids than continuations to look at.
    """
    keep = (1 + max(1, len(limits.stop_ids))) * num_beams
    if keep > generator.num_ids:
        raise RequestError(f"--beams {num_beams} with {len(limits.stop_ids)} stop ids looks at {keep} continuations; "
                           f"there are {generator.num_ids} ids")
    at_a_time = max(1, generator.rows // num_beams)
    made: list[Made] = []
    for first in range(0, len(prompts), at_a_time):
        made += _search(generator, prompts[first : first + at_a_time], num_beams, keep, sampling, limits)
    return made


def _search(generator: Generator, prompts: Sequence[Sequence[int]], num_beams: int, keep: int, sampling: Sampling,
            limits: Limits) -> list[Made]:
    """Some prompts together."""
    searches = [Search(num_beams, limits, [Beam(text)]) for text in generator.texts(prompts, limits)]
    needs = [blocks_for(search.running[0].text.longest - 1) for search in searches for _ in range(num_beams)]
    blocks = Blocks(generator.num_blocks(needs, len(needs)))
    cache = generator.new_cache(blocks.total)
    plan = Plan([], [], [search.running[0].text for search in searches])
    for text in plan.texts:
        text.table = [blocks.take() for _ in range(blocks_for(len(text.tokens)))]
        if len(text.tokens) > 1:
            plan.beginnings.append((text.tokens[:-1], text.table, text.num_prompt))
    while live := [search for search in searches if not search.done]:
        chosen = _best(generator, plan, cache, live, keep, sampling.repetition_penalty)
        plan = Plan([], [], [])
        for search, scores, places in zip(live, *chosen.tolist(), strict=True):
            going = search.hear([(score, *divmod(int(place), generator.num_ids))
                                 for score, place in zip(scores, places, strict=True)])
            _go_on(search, going, blocks, plan)
    return [search.finished[0][1] for search in searches]


@torch.inference_mode()
def _best(generator: Generator, plan: Plan, cache: Cache, live: Sequence[Search], keep: int, penalty: float) -> Tensor:
    """Scores and places (beam · ids + id) of every prompt's best continuations, fp64 [2, prompts, keep]."""
    logits = generator.next_logits(plan, cache)
    best = None
    if logits is not None:
        log_probs = logits.float().log_softmax(-1)
        if penalty != 1:
            log_probs = penalise(log_probs, [text.tokens for text in plan.texts], penalty)
        scores = put(torch.tensor([beam.score for search in live for beam in search.running]), log_probs.device)
        values, places = (log_probs + scores.unsqueeze(1)).view(len(live), -1).topk(keep)
        best = torch.stack((values.double(), places.double()))
    best, work = generator.share(best, (2, len(live), keep))
    work.wait()
    return best


def _go_on(search: Search, going: Sequence[tuple[Beam, int, float]], blocks: Blocks, plan: Plan) -> None:
    """Replaces a prompt's beams by what is gone on with, each with a block for its newest token."""
    before = search.running
    if search.done:
        for beam in before:
            blocks.drop(beam.text.table)
        return
    search.running = []
    for origin, token, score in going:
        text = origin.text
        blocks.share(text.table)
        search.running.append(Beam(
            Text(text.number, Name(0, 0, 0), [*text.tokens, token], text.num_prompt, text.longest, Beginning((), 0),
                 list(text.table)), score, [*origin.log_probs, score - origin.score]))
    for beam in before:
        blocks.drop(beam.text.table)
    for beam in search.running:
        table, number = beam.text.table, (len(beam.text.tokens) - 1) // BLOCK_TOKENS
        if number == len(table):
            table.append(blocks.take())
        elif blocks.is_shared(table[number]):
            block = blocks.take()
            plan.copies.append((table[number], block))
            blocks.drop([table[number]])
            table[number] = block
        plan.texts.append(beam.text)
