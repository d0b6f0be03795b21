"""The loop of PPO, GRPO and RLOO: the same on every rank, whoever lives there.

    reshard         the actor's weights go where texts are made
    gen, reward     texts, and what is said of them                               engine.rl.texts
    old_log_prob    the actor, the reference and the critic say what they think of each token; the numbers move to
    ref, values     the ranks that learn from them                                engine.rl.passes
    adv             rewards, advantages, returns                                  engine.rl.experience
    update_critic   epochs × minibatches                                          engine.rl.updates
    update_actor    the same, until the policy has moved too far

A role's part of a phase does nothing where it does not live, so roles on the same ranks work one after the other, and
roles on disjoint ranks at the same time.  Everything that decides what comes next is a number that all have alike: sums
over all ranks of the job, or over all of a role.

Saved is what lies between two steps: the roles that learn, the number of the next prompt, the price of divergence, the
scale of the scores.  A step that was interrupted, in whichever phase, is done again from there; as all of its random
numbers are named, it is the same step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import torch

from engine.checkpoint.metadata import CARRIED
from engine.config.phases import OF_OWN_TEXTS
from engine.config.placement import ACTOR, CRITIC, REFERENCE, ROLLOUT
from engine.config.rl import CRITIC_OBJECTIVES
from engine.distributed.mesh import Axis
from engine.distributed.pieces import Piece
from engine.errors import WorkerError
from engine.kernels.table import Operations
from engine.metrics.phases import Taken
from engine.optim.schedule import LearningRates
from engine.rl import objectives
from engine.rl.ahead import pieces_of
from engine.rl.cast import Cast
from engine.rl.coefficients import KLCoefficient, RunningMoments
from engine.rl.experience import LOG_PROBS, VALUES, Experience, gather
from engine.rl.experience import REFERENCE as REFERENCE_NUMBERS
from engine.rl.metrics import of_texts, of_updates, over_job, record
from engine.rl.passes import Ways, measured_tokens
from engine.rl.pretraining import Pretraining
from engine.rl.rollouts import Maker, Response, Rollouts
from engine.rl.scores import Numbers, shaped
from engine.rl.texts import Made, Texts
from engine.rl.updates import Update, minibatches, order_of, update
from engine.train.batches import HostBatch
from engine.train.hooks import Hook
from engine.train.journal import peak_memory_bytes
from engine.train.running import Running
from engine.train.tally import Verdict

KL_SUM = objectives.Policy.sums.index("ppo_kl")
MOST_KL = 1.5                                                # times `target_kl`: no further update


@dataclass(frozen=True)
class Carried:
    """What goes from step to step besides the roles.

    Attributes:
        next_prompt: number of the first prompt that no step has taken.
        contents: hashes of what the roles' weights were read from at the start of the run.
        ahead: the texts of the next step, where they are made a step ahead (`engine.rl.ahead`).
    """

    coefficient: KLCoefficient
    scores: RunningMoments = field(default_factory=RunningMoments)
    next_prompt: int = 0
    contents: dict[str, str] = field(default_factory=dict)
    ahead: tuple[Response, ...] = ()

    def state(self) -> dict[str, Any]:
        """As JSON."""
        return {"kl_coef": self.coefficient.value, "scores": self.scores.state(), "next_prompt": self.next_prompt,
                "contents": self.contents, "phase": "between steps"}

    def restored(self, state: dict[str, Any], ahead: tuple[Response, ...]) -> Carried:
        """As it was when `state` and `ahead` were saved; target and horizon of the coefficient are those of now."""
        now = self.coefficient
        value = float(state["kl_coef"]) if now.target is not None else now.value
        return Carried(KLCoefficient(value, now.target, now.horizon), RunningMoments.of(state["scores"]),
                       int(state["next_prompt"]), self.contents, ahead)


@dataclass(frozen=True)
class Lesson:
    """What a step taught this rank.

    Attributes:
        updates: by role, what became of all its updates, and how many changed the weights; of those that live here.
        scores: moments of all scores so far.
        shaped: this step's, as they are learned from.
    """

    experience: Experience
    updates: Mapping[str, tuple[list[Update], int]]
    scores: RunningMoments
    shaped: Numbers = field(default_factory=lambda: np.empty(0))


@dataclass(kw_only=True)
class Learner(Running):
    """A run that learns from its own texts.

    Attributes:
        learning: the ranks that learn; None: this is none of them, and makes texts a step ahead.
        told: hears of every step's texts and their scores, on rank 0.
        pretraining: what is learned besides.
    """

    cast: Cast
    learning: Axis | None
    texts: Texts
    maker: Maker
    carried: Carried
    fingerprint: dict[str, Any]
    told: Callable[[Rollouts], None] = lambda _: None
    pretraining: Pretraining | None = None
    _tokens: int = 0

    def __post_init__(self) -> None:
        self.hooks = (Hook("log", self._log, when=lambda _: bool(self.row)),
                      Hook("anomaly", self._give_up, when=lambda _: self._hopeless()),
                      *self._saving_hooks())
        self.rates = {name: LearningRates.of(self.cast[name].config) for name in (ACTOR, CRITIC) if name in self.cast}

    @property
    def operations(self) -> Operations:
        return next(member.state.model.operations for member in self.cast.members.values()
                    if member.state.model is not None)

    @property
    def world(self) -> Axis:
        return self.mesh.world

    def _step(self) -> None:
        step, before = self.state.step + 1, self.verdict
        with self.cast[ROLLOUT].state.at_work(learning=True):
            with self.phases("reshard"):
                received = self.maker.take_over()
            made, own = self._texts_of(step)
        lesson = Lesson(Experience.nothing(), {}, self.carried.scores) if made is None else self._lesson(step, made)
        ahead = () if own is None else tuple(self.texts.shared(own, self.config.rollout.prompts))
        with self.phases("read"):
            job = self._hear(step, lesson, received)
        next_prompt = self.carried.next_prompt + self.config.rollout.prompts if made is None else made.next_prompt
        coefficient, num_texts = self.carried.coefficient, self.config.texts_per_step
        self.carried = Carried(coefficient.after(job["kl"] / num_texts, num_texts), lesson.scores, next_prompt,
                               self.carried.contents, ahead)
        self.state.step, self.state.consumed_samples = step, next_prompt
        self.state.updates = self.state.num_updates + round(job["actor/updates"])
        if step in (1, self.config.steps) or step % self.config.log.every == 0:       # all ranks, to compare their pace
            self.row = {"step": step, "lr": 0.0} if made is None else self._record(made, lesson, job, coefficient.value)
        if made is not None:
            for line in made.complaints:
                self.journal.incident("score", step, {"what": line}, line)
            if self.mesh.rank == 0:
                self.told(made.rollouts)
        self._tell(before, self.verdict)

    def _texts_of(self, step: int) -> tuple[Made | None, Mapping[int, Response] | None]:
        """The texts of a step, where this rank learns from them; and those of the next that this rank has made, where
        texts are made a step ahead."""
        texts, first, count = self.texts, self.carried.next_prompt, self.config.rollout.prompts
        if not self.config.rollout.async_steps:
            return texts.make(step, first), None
        responses = self.carried.ahead or texts.shared(texts.begun(step, first, count), count)
        own = texts.begun(step + 1, first + count, count) if step < self.config.steps else None
        return None if self.learning is None else texts.scored(step, first, responses), own

    def _lesson(self, step: int, made: Made) -> Lesson:
        """What is learned from a step's texts."""
        assert self.learning is not None
        rollouts, config = made.rollouts, self.config
        scores, moments = shaped(rollouts.scores, rollouts.ended, rollouts.lengths, config.rollout.max_new_tokens,
                                 config.learning, self.carried.scores)
        order = order_of(config.run.seed, step, 0, rollouts.num_rows)
        ways = Ways(self.cast, rollouts, order, config.run.seed, config.learning.epochs, self.learning)
        tables = self._tables(rollouts, order, ways)
        with self.phases("adv"):
            experience = gather(rollouts, scores, tables, ways.home, self.carried.coefficient.value, config,
                                self.learning)
        return Lesson(experience, self._learn(step, rollouts, experience), moments, scores)

    def close(self) -> None:
        self.texts.close()
        super().close()

    def _tables(self, rollouts: Rollouts, order: Sequence[int], ways: Ways) -> dict[str, dict[int, torch.Tensor]]:
        """What actor, reference and critic think of each token, on the ranks that learn from it."""
        policy = self.cast[ACTOR].state.role.objective
        assert isinstance(policy, objectives.Policy)
        log_probs = objectives.log_probs_at(policy.temperature, policy.num_ids)
        found: dict[str, dict[int, torch.Tensor]] = {}
        for phase, name, role, measure in (("old_log_prob", LOG_PROBS, ACTOR, log_probs),
                                           ("ref", REFERENCE_NUMBERS, REFERENCE, log_probs),
                                           ("values", VALUES, CRITIC, objectives.values)):
            with self.phases(phase):
                if role in self.cast:
                    found[name] = measured_tokens(self.cast[role], rollouts, order, measure)
        with self.phases("adv"):
            roles = {LOG_PROBS: ACTOR, REFERENCE_NUMBERS: REFERENCE, VALUES: CRITIC}
            return {name: ways(self.cast[roles[name]], table) for name, table in found.items()}

    def _learn(self, step: int, rollouts: Rollouts, experience: Experience) -> dict[str, tuple[list[Update], int]]:
        """All updates of a step; by role, what became of them, and how many changed the weights."""
        frozen = {ACTOR} if self._only_critic(step) else set()
        found: dict[str, tuple[list[Update], int]] = {}
        for name in (CRITIC, ACTOR):
            with self.phases(f"update_{name}"):
                learns = name in self.cast and name not in frozen
                found[name] = self._updates(name, step, rollouts, experience) if learns else ([], 0)
        return found

    def _only_critic(self, step: int) -> bool:
        """Whether the actor does not learn yet."""
        return self.config.run.objective in CRITIC_OBJECTIVES and step <= self.config.ppo.critic_warmup_steps

    def _updates(self, name: str, step: int, rollouts: Rollouts, experience: Experience) -> tuple[list[Update], int]:
        """Those of a role."""
        config, learning, member = self.config, self.config.learning, self.cast[name]
        done: list[Update] = []
        with member.state.at_work(learning=True):
            batches = minibatches(config.run.seed, step, learning.epochs, learning.minibatch, rollouts.num_rows)
            for number, rows in enumerate(batches):
                result = update(member, rows, lambda row: experience.sample(rollouts, row, config.data.seq_len),
                                self._rate(name, step), self._near if name == ACTOR else lambda _: True,
                                self._besides(step, number) if name == ACTOR else None)
                if result is None:
                    break
                done.append(result[0])
                if not result[1]:
                    return done, len(done) - 1
        return done, len(done)

    def _besides(self, step: int, number: int) -> Callable[[float], list[HostBatch]] | None:
        """The pretraining data of an update of a step, where there is such."""
        if self.pretraining is None:
            return None
        config, actor = self.config, self.cast[ACTOR]
        each = config.learning.epochs * (config.texts_per_step // config.learning.minibatch)
        place, pretraining = (step - 1) * each + number, self.pretraining
        return lambda divisor: pretraining.batches(actor, place, divisor)

    def _rate(self, name: str, step: int) -> float:
        return self.rates[name](step, 0)

    def _near(self, done: Update) -> bool:
        """Whether the policy is near enough to the old one to go on, by what all its ranks have alike."""
        target = self.config.learning.target_kl
        if target is None:
            return True
        return float(done.totals.sums[KL_SUM] / done.divisor.clamp(min=1)) <= MOST_KL * target

    def _hear(self, step: int, lesson: Lesson, received: int) -> dict[str, float]:
        """Sums over the job, and the verdict that follows."""
        rank, experience = self.mesh.rank, lesson.experience
        sums = dict(experience.sums) | {"flag": self._flag(), "reshard_bytes": float(received)}
        sums.setdefault("probs_diff", 0.0)
        for name in self.rates:
            sums |= of_updates(self.cast[name], *lesson.updates.get(name, ([], 0)), rank, f"{name}/")
        known = float("probs_diff" in experience.sums)
        job = over_job(sums, {"probs_diff_max": experience.largest, "probs_known": known}, self.world)
        skipped = not self._only_critic(step) and job["actor/updates"] == 0 and job["actor/made"] == 0
        before, flag = self.verdict, job["flag"]
        self.verdict = Verdict(step, math.floor(flag) > 0, (before.skips_in_a_row + 1) if skipped else 0,
                               job["learned"] > 0, before.skips + skipped, 0,
                               before.saves + (round((flag % 1) * 2) > 0))
        return job

    def _record(self, made: Made, lesson: Lesson, job: dict[str, float], coef: float) -> dict[str, Any]:
        """The metrics of the step just done, but for those of time."""
        rollouts, step = made.rollouts, self.state.step
        texts = of_texts(made, lesson.shaped, self.config.rollout.max_new_tokens)
        means = record(job, rollouts.num_rows, self.config, CRITIC in self.cast, coef)
        rates = {"lr": self._rate(ACTOR, step)} | (
            {"critic/lr": self._rate(CRITIC, step)} if CRITIC in self.cast else {})
        self._tokens = sum(rollouts.lengths) + sum(len(rollouts.prompt_of(row).tokens)
                                                   for row in range(rollouts.num_rows))
        return {"step": step, "loss": means["actor/loss"], **texts, **means, "grad_norm": means["actor/grad_norm"],
                **rates, "consumed_samples": self.state.consumed_samples, "reshard_bytes": job["reshard_bytes"],
                "memory_bytes": peak_memory_bytes(self.mesh.device), "skipped": self.verdict.skips}

    def _speed(self, taken: Taken) -> dict[str, Any]:
        seconds = taken.in_steps / taken.steps
        split = OF_OWN_TEXTS.timing(taken.by_phase, taken.steps)
        return {"step_seconds": seconds, "timing_s/step": seconds, "tokens_per_second": self._tokens / seconds, **split}

    def _pieces(self) -> list[Piece]:
        return [*self.state.pieces(), *(pieces_of(self.carried.ahead) if self.mesh.rank == 0 else ())]

    def _metadata(self) -> dict[str, Any]:
        return self.state.metadata(self.config, self.fingerprint) | {CARRIED: self.carried.state()}

    def _hopeless(self) -> bool:
        limits = self.config.reliability
        most = 1 if limits.on_nonfinite == "stop" else limits.max_skips
        return 0 < most <= self.verdict.skips_in_a_row

    def _give_up(self) -> NoReturn:
        """Ends the run on every rank, with weights and checkpoints as they are."""
        self._report_saves(self.writer.wait())
        why = "a gradient that is not finite" if self.verdict.counts else "not one token to learn from"
        raise WorkerError(f"gave up after step {self.state.step}: {self.verdict.skips_in_a_row} steps in a row had "
                          f"{why} and changed nothing (reliability.max_skips: {self.config.reliability.max_skips}); "
                          "look at rollouts.jsonl, lower optim.lr, or see that some texts come to an end")
