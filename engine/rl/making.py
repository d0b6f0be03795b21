"""Making texts with the role `rollout`: the actor's weights in a layout of their own.

    take_over     the actor's pieces → rollout's, where the two layouts overlap (`engine.distributed.reshard`)
    make          every copy of the model continues its part of the prompts

Random numbers are named by (seed, step, number of the prompt, sample, position), so that a text is the same whichever
copy makes it and whichever others share its batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from engine.config import Config
from engine.config.placement import ACTOR, ROLLOUT
from engine.distributed.mesh import Job
from engine.distributed.reshard import Reshard
from engine.distributed.topology import Topology
from engine.generate.generator import Generator
from engine.generate.request import Limits, Sampling
from engine.rl.cast import Cast
from engine.rl.rollouts import Prompt, Response


class RoleMaker:
    """See `engine.rl.rollouts.Maker`."""

    def __init__(self, cast: Cast, config: Config, job: Job, num_ids: int, stop_ids: Collection[int]) -> None:
        """Every rank of the job must make one.

        Args:
            num_ids: ids of the tokenizer; no others are chosen.
            stop_ids: what ends a text.
        """
        self._actor, self._role, self._config = cast[ACTOR], cast[ROLLOUT], config
        self._limits = Limits(config.rollout.max_new_tokens, frozenset(stop_ids))
        world = job.mesh(Topology(data=job.size))
        with self._actor.state.at_work(), self._role.state.at_work(learning=True):
            self._way = Reshard.plan(self._actor.state.weights(), self._role.state.weights(), world,
                                     delta=config.rollout.delta)
        model = self._role.state.model
        self._generator = None if model is None else Generator(model, num_ids, rows=config.rollout.batch)

    def take_over(self) -> int:
        with self._actor.state.at_work():
            return self._way.run(self._actor.state.weights(), self._role.state.weights())

    def make(self, step: int, prompts: Sequence[Prompt], samples: int) -> Mapping[int, Response]:
        mesh, rollout = self._role.state.mesh, self._config.rollout
        if self._generator is None or mesh is None:
            return {}
        count, copies = len(prompts), mesh.data.size
        own = range(count * mesh.data.index // copies, count * (mesh.data.index + 1) // copies)
        if not own:
            return {}
        sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p, self._config.run.seed)
        made = self._generator.own([prompts[place].tokens for place in own], sampling, self._limits, samples=samples,
                                   step=step, numbers=[prompts[place].number for place in own])
        if mesh.tensor.index or not mesh.is_last_stage:
            return {}
        return {row: Response(tuple(text.tokens), text.end == "eod", tuple(text.log_probs))
                for row, text in enumerate(made, own.start * samples)}
