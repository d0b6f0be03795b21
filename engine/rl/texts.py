"""The texts of a step: prompts from the stream, continued, scored, and made anew where a group has no signal.

Which prompts a step takes is a number: that of the first.  With dynamic sampling (Yu et al. 2025, section 3.2) groups
whose texts all score the same are replaced by groups of the prompts that follow, up to so many times; what is left over
then is learned from as it is, which is not at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from engine.config import Config
from engine.config.rl import GROUP_OBJECTIVES
from engine.distributed.mesh import Axis
from engine.errors import RequestError
from engine.metrics.phases import Phases
from engine.rl.advantages import without_signal
from engine.rl.cast import Cast
from engine.rl.move import shared_responses
from engine.rl.passes import model_scores
from engine.rl.rollouts import Maker, Prompt, PromptSource, Response, Rollouts, Scorer
from engine.rl.scores import Numbers, weighted_sum


@dataclass(frozen=True)
class Made:
    """The texts of a step, scored.

    Attributes:
        next_prompt: number of the first prompt that no step has taken.
        refilled: groups that were replaced.
        not_finite: scores that were no numbers.
        complaints: about texts without a score, for people.
    """

    rollouts: Rollouts
    next_prompt: int
    refilled: int = 0
    not_finite: int = 0
    complaints: tuple[str, ...] = ()


class Texts:
    """Makes the texts of steps; every rank of the job calls it alike."""

    def __init__(self, config: Config, cast: Cast, source: PromptSource, maker: Maker, scorers: Sequence[Scorer],
                 world: Axis, learning: Axis | None, phases: Phases) -> None:
        """
        Args:
            world: all ranks of the job, which hear of all texts.
            learning: those that hear of scores; None: this is none of them.
        """
        self._config, self._cast, self._source, self._maker = config, cast, source, maker
        self._scorers, self._world, self._learning, self._phases = scorers, world, learning, phases

    def prompts(self, first: int, count: int) -> list[Prompt]:
        """Prompts of the stream.

        Raises:
            RequestError: one is too long.
        """
        config = self._config
        room = config.data.seq_len - config.rollout.max_new_tokens
        found = [self._source.prompt(number) for number in range(first, first + count)]
        for prompt in found:
            if not 0 < len(prompt.tokens) <= room:
                raise RequestError(f"prompt {prompt.number} has {len(prompt.tokens)} tokens; with data.seq_len("
                                   f"{config.data.seq_len}) and rollout.max_new_tokens({config.rollout.max_new_tokens})"
                                   f" it takes 1 to {room}")
        return found

    def close(self) -> None:
        """Ends what scores."""
        for scorer in self._scorers:
            scorer.close()

    def make(self, step: int, first: int) -> Made:
        """Those of `step`, from prompt `first` on."""
        config = self._config
        made = self._round(step, first, config.rollout.prompts)
        if config.run.objective not in GROUP_OBJECTIVES:
            return made
        for _ in range(config.grpo.dynamic_sampling):
            empty = _groups_without_signal(made.rollouts)
            if not empty:
                break
            more = self._round(step, made.next_prompt, len(empty))
            made = _with_groups(made, more, empty)
        return made

    def _round(self, step: int, first: int, count: int) -> Made:
        responses = self.shared(self.begun(step, first, count), count)
        return self.scored(step, first, responses)

    def begun(self, step: int, first: int, count: int) -> Mapping[int, Response]:
        """The texts of so many prompts that this rank makes, by row; those who make none are done at once."""
        prompts = self.prompts(first, count)
        with self._phases("gen"):
            return self._maker.make(step, prompts, self._config.samples_per_prompt)

    def shared(self, own: Mapping[int, Response], count: int) -> list[Response]:
        """Those of all ranks, on every one of the job, which must all call this."""
        with self._phases("gen"):
            return shared_responses(own, count * self._config.samples_per_prompt, self._world)

    def scored(self, step: int, first: int, responses: Sequence[Response]) -> Made:
        """The texts of the prompts from `first` on, with what all sources of scores say of them.

        Every rank that learns must call this, and no other.
        """
        assert self._learning is not None
        samples = self._config.samples_per_prompt
        prompts = self.prompts(first, len(responses) // samples)
        texts = tuple(self._source.decode(each.tokens) for each in responses)
        rollouts = Rollouts(step, tuple(prompts), samples, tuple(responses), texts)
        with self._phases("reward"):
            parts: dict[str, Numbers] = {}
            weights: list[float] = []
            for name, weight in self._cast.scoring(self._config):
                scores = model_scores(self._cast[name], rollouts, self._learning)
                scale = self._cast.scales.get(name)
                parts[name] = scores if scale is None else (scores - scale.mean) / scale.std
                weights.append(weight)
            for scorer in self._scorers:
                parts[scorer.name] = checked(scorer(rollouts), rollouts.num_rows, scorer.name)
                weights.append(scorer.weight)
        scores, not_finite = weighted_sum([*parts.values()], weights)
        complaints = tuple(line for scorer in self._scorers for line in scorer.complaints)
        return Made(replace(rollouts, scores=scores, parts=parts), prompts[-1].number + 1, 0, not_finite, complaints)


def checked(scores: Numbers, num_rows: int, name: str) -> Numbers:
    """The scores, if there is one for each row.

    Raises:
        RequestError: there are more or fewer.
    """
    if len(scores) != num_rows:
        raise RequestError(f"the reward function {name} gave {len(scores)} scores for {num_rows} texts: one for each "
                           "is needed, in their order")
    return scores


def _groups_without_signal(rollouts: Rollouts) -> list[int]:
    groups = torch.from_numpy(rollouts.scores).view(-1, rollouts.samples)
    found: list[int] = without_signal(groups).nonzero().flatten().tolist()
    return found


def _with_groups(made: Made, more: Made, places: Sequence[int]) -> Made:
    """The groups at these places replaced by others, in order."""
    old, new, samples = made.rollouts, more.rollouts, made.rollouts.samples
    prompts, responses, texts = list(old.prompts), list(old.responses), list(old.texts)
    scores, parts = old.scores.copy(), {name: part.copy() for name, part in old.parts.items()}
    for place, group in zip(places, range(len(new.prompts)), strict=True):
        there, here = slice(place * samples, (place + 1) * samples), slice(group * samples, (group + 1) * samples)
        prompts[place] = new.prompts[group]
        responses[there], texts[there] = new.responses[here], new.texts[here]
        scores[there] = new.scores[here]
        for name, part in parts.items():
            part[there] = new.parts[name][here]
    rollouts = replace(old, prompts=tuple(prompts), responses=tuple(responses), texts=tuple(texts),
                       scores=np.asarray(scores), parts=parts)
    return Made(rollouts, more.next_prompt, made.refilled + len(places), made.not_finite + more.not_finite,
                made.complaints + more.complaints)
