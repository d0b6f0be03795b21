"""Making texts with the role `rollout`: the actor's weights in a layout of their own.

    take_over     the actor's pieces → rollout's, where the two layouts overlap (`engine.distributed.reshard`)
    make          every copy of the model continues its part of the rows, a batch at a time

Random numbers are named by (seed, step, number of the prompt, sample, position), so that a text is the same whichever
copy makes it and whichever others share its batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from engine.config import Config
from engine.config.placement import ACTOR, ROLLOUT
from engine.distributed.mesh import Job
from engine.distributed.random import seed_for
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
        self._way = Reshard.plan(self._actor.state.weights(), self._role.state.weights(), world)
        model = self._role.state.model
        self._generator = None if model is None else Generator(model, num_ids)

    def take_over(self) -> int:
        self._way.run(self._actor.state.weights(), self._role.state.weights())
        return self._way.bytes_received

    def make(self, step: int, prompts: Sequence[Prompt], samples: int) -> Mapping[int, Response]:
        mesh, rollout = self._role.state.mesh, self._config.rollout
        if self._generator is None or mesh is None:
            return {}
        num_rows, copies = len(prompts) * samples, mesh.data.size
        own = range(num_rows * mesh.data.index // copies, num_rows * (mesh.data.index + 1) // copies)
        found: dict[int, Response] = {}
        for row in own:
            prompt, sample = prompts[row // samples], row % samples
            sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p,
                                seed_for(self._config.run.seed, "rollout", step, prompt.number))
            [tokens] = self._generator.generate([prompt.tokens], sampling, self._limits, sample)
            found[row] = Response(tuple(tokens), tokens[-1] in self._limits.stop_ids)
        return found if mesh.tensor.index == mesh.pipeline.index == 0 else {}
