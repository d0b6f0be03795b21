"""Texts of the step to come, which `rollout.async_steps: 1` makes while the one before is learned from.

    step n     texts of step n are there, made with the weights after step n − 2
    reshard    the weights after step n − 1 → those who make texts
    then       those who make texts: texts of step n + 1         all others: scores, passes, updates of step n
    border     all hear of each other: texts, sums; the next step begins

The first step of a run has no step before it and makes its own texts first, with the weights that it begins with.  The
last one makes none.  Nobody can make the texts of step n + 1 again from a checkpoint of step n, as that has not the
weights after step n − 1 any more: so they are in it, as tensors, and a run that goes on learns from the very same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from engine.checkpoint.read import CheckpointReader
from engine.config import Config
from engine.config.placement import ROLLOUT, roles_asked
from engine.distributed.boxes import Box
from engine.distributed.mesh import Axis, Job
from engine.distributed.pieces import Piece
from engine.distributed.topology import Topology
from engine.errors import CheckpointError
from engine.rl.rollouts import Response

TOKENS, LENGTHS, ENDED, LOG_PROBS = "ahead.tokens", "ahead.lengths", "ahead.ended", "ahead.log_probs"
OF_TEXTS = ("prompts", "samples", "max_new_tokens", "temperature", "top_k", "top_p")     # of `rollout`: what they are


def learners(config: Config, job: Job) -> Axis | None:
    """All ranks but those that make texts a step ahead; None on these.  Every rank of the job must call this."""
    if not config.rollout.async_steps:
        return job.mesh(Topology(data=job.size)).world
    size = next(role.ranks.start for role in roles_asked(config, job.size) if role.name == ROLLOUT)
    mesh = job.mesh_on(range(size), Topology(data=size))
    return None if mesh is None else mesh.world


def pieces_of(responses: Sequence[Response]) -> list[Piece]:
    """Texts as whole tensors, for a checkpoint."""
    numbers = {TOKENS: torch.tensor([token for each in responses for token in each.tokens], dtype=torch.int64),
               LENGTHS: torch.tensor([len(each.tokens) for each in responses], dtype=torch.int64),
               ENDED: torch.tensor([each.ended for each in responses], dtype=torch.int64),
               LOG_PROBS: torch.tensor([x for each in responses for x in each.log_probs], dtype=torch.float64)}
    return [Piece(key, tuple(values.shape), Box.whole(tuple(values.shape)), values)
            for key, values in numbers.items() if responses]


def responses_in(reader: CheckpointReader, config: Config) -> tuple[tuple[Response, ...], str]:
    """The texts that a checkpoint holds for the step after it, and why they cannot be used where they cannot.

    Raises:
        CheckpointError: they contradict each other.
    """
    if not config.rollout.async_steps or TOKENS not in reader:
        return (), ""
    saved: Mapping[str, Any] = reader.metadata.get("config", {})
    now = config.to_dict()
    differing = [f"rollout.{key}" for key in OF_TEXTS if saved.get("rollout", {}).get(key) != now["rollout"][key]]
    differing += ["grpo.group"] * (saved.get("grpo", {}).get("group") != now["grpo"]["group"])
    differing += ["run.seed"] * (saved.get("run", {}).get("seed") != now["run"]["seed"])
    if differing:
        return (), f"texts that were made a step ahead are made anew, as {', '.join(differing)} changed"
    tokens, lengths, ended, log_probs = (reader.read(key) for key in (TOKENS, LENGTHS, ENDED, LOG_PROBS))
    sizes = lengths.tolist()
    if (any(each.dim() != 1 for each in (tokens, lengths, ended, log_probs)) or len(sizes) != config.texts_per_step
            or len(ended) != len(sizes) or min(sizes) < 1 or sum(sizes) != len(tokens)
            or len(log_probs) not in (0, len(tokens)) or max(sizes) > config.rollout.max_new_tokens
            or not 0 <= int(tokens.min()) <= int(tokens.max()) < config.model.vocab_size):
        raise CheckpointError(f"{reader.path}: the texts of the step to come contradict each other")
    said = log_probs.split(sizes) if len(log_probs) else [log_probs] * len(sizes)
    return tuple(Response(tuple(text.tolist()), bool(end), tuple(numbers.tolist()))
                 for text, end, numbers in zip(tokens.split(sizes), ended, said, strict=True)), ""
