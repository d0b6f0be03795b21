"""What a run can be trained to do: the names of `run.objective`, a row each.

A row says what makes the objective of a configuration, as `module:function`, and what its samples are made of: text, or
the records of conversation files (a kind of `engine.data.chat.kinds`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from engine.config.fields import NameOf

PAIRS, PROMPTS = "pairs", "prompts"


@dataclass(frozen=True)
class Row:
    """An objective.

    Attributes:
        made_by: `module:function`, of the configuration.
        records: the kind of conversation records it learns from; None: it learns from text.
        begun_by: `module:function`, of the configuration, a question whether to stop and whether lines are stamped; it
            opens what the run learns from and returns what makes the run of the job and its phases.  None: the run
            learns from corpora (`engine.train.loop.Trainer`).
        weighted_sum: its loss is a weighted sum of tokens' losses (`Head.weighted_losses`).
    """

    made_by: str
    records: str | None = None
    begun_by: str | None = None
    weighted_sum: bool = False


OBJECTIVES: dict[str, Row] = {
    "pretrain": Row("engine.model.objective:next_token", weighted_sum=True),
    "sft": Row("engine.align.sft:supervised", "conversations", weighted_sum=True),
    "reward": Row("engine.align.reward:reward_model", PAIRS),
    "dpo": Row("engine.align.preference:dpo", PAIRS),
    "orpo": Row("engine.align.preference:orpo", PAIRS),
    "ppo": Row("engine.rl.objectives:policy", PROMPTS, "engine.rl.start:begin"),
    "grpo": Row("engine.rl.objectives:policy", PROMPTS, "engine.rl.start:begin"),
    "rloo": Row("engine.rl.objectives:policy", PROMPTS, "engine.rl.start:begin"),
}

ObjectiveName = Annotated[str, NameOf("objective", OBJECTIVES)]
