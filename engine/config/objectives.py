"""What a run can be trained to do: the names of `run.objective`, a row each.

A row says what makes the objective of a configuration, as `module:function`, and what its samples are made of: text, or
the records of conversation files (a kind of `engine.data.chat.kinds`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from engine.config.fields import nearest

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
    """

    made_by: str
    records: str | None = None
    begun_by: str | None = None


OBJECTIVES: dict[str, Row] = {
    "pretrain": Row("engine.model.objective:next_token"),
    "sft": Row("engine.align.sft:supervised", "conversations"),
    "reward": Row("engine.align.reward:reward_model", PAIRS),
    "dpo": Row("engine.align.preference:dpo", PAIRS),
    "orpo": Row("engine.align.preference:orpo", PAIRS),
    "ppo": Row("engine.rl.objectives:policy", PROMPTS, "engine.rl.start:begin"),
    "grpo": Row("engine.rl.objectives:policy", PROMPTS, "engine.rl.start:begin"),
    "rloo": Row("engine.rl.objectives:policy", PROMPTS, "engine.rl.start:begin"),
}


def _row_of(name: str) -> str:
    if name not in OBJECTIVES:
        raise ValueError(f"there is no objective {name!r}; {nearest(name, (*OBJECTIVES,))}")
    return name


def _enumerate(schema: dict[str, Any]) -> None:
    schema.update(enum=[*OBJECTIVES])


ObjectiveName = Annotated[str, AfterValidator(_row_of), Field(json_schema_extra=_enumerate)]
