"""Making texts with the role `rollout`: the actor's weights in a layout of their own.

    take_over     the actor's pieces → rollout's, where the two layouts overlap (`engine.distributed.reshard`)
    make          every copy of the model continues its part of the rows, a batch at a time

Random numbers are named by (seed, step, number of the prompt, sample, position), so that a text is the same whichever
copy makes it and whichever others share its batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

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
        sampling = Sampling(rollout.temperature, rollout.top_k, rollout.top_p,
                            seed_for(self._config.run.seed, "rollout", step))
        found: dict[int, Response] = {}
        for first in range(own.start, own.stop, rollout.batch):
            rows = range(first, min(first + rollout.batch, own.stop))
            names = [f"{prompts[row // samples].number}/{row % samples}" for row in rows]
            found |= zip(rows, self._continued([prompts[row // samples].tokens for row in rows], names, sampling),
                         strict=True)
        return found if mesh.tensor.index == 0 and mesh.is_last_stage else {}

    def _continued(self, prompts: Sequence[Sequence[int]], names: Sequence[str], sampling: Sampling) -> list[Response]:
        """A text for each prompt; log-probabilities where the last stage is."""
        assert self._generator is not None
        said: list[Tensor] = []

        def hear(logits_BV: Tensor, chosen_B: Tensor) -> None:
            log_probs = (logits_BV.float() / sampling.temperature).log_softmax(-1)
            said.append(log_probs.gather(1, chosen_B.unsqueeze(1)).squeeze(1))

        texts: list[list[int]] = [[] for _ in prompts]
        for step in self._generator.stream(prompts, sampling, self._limits, names=names, heard=hear):
            for text, token in zip(texts, step, strict=True):
                if token is not None:
                    text.append(token)
        by_row = torch.stack(said, 1).tolist() if said else [[] for _ in prompts]
        return [Response(tuple(text), text[-1] in self._limits.stop_ids, tuple(numbers[: len(text)]))
                for text, numbers in zip(texts, by_row, strict=True)]
