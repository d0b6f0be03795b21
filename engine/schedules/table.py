"""The schedules, by name: the one place where a schedule is added.

A pipeline schedule is data: for every rank the list of what it does, in order (`program.py`).  `build_schedule` looks
the name up in a table of pure functions (rank, P, M, V) → program.  Nothing else tells one schedule from another:
the configuration accepts the names of the table, the layout rules read from a row how many chunks it takes,
`validate` checks any of them, `lower` adds the messages, `simulate` keeps the time, and one executor runs them.  Plain
gradient accumulation is the one-stage case of each.

    gpipe         all forwards, then all backwards                                   classic.py
    1f1b          one forward, one backward in turns
    interleaved   the same with several chunks per rank
    zb-h1, zb-h2  weight gradients deferred into the gaps                            zero_bubble.py
    zb-v          the same with two chunks per rank, placed in a V
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType

from engine.errors import ConfigError
from engine.schedules.action import Kind
from engine.schedules.classic import gpipe, interleaved, one_f_one_b
from engine.schedules.program import Program, Schedule
from engine.schedules.zero_bubble import zb_h1, zb_h2, zb_v


@dataclass(frozen=True)
class Recipe:
    """A row of the table: how a schedule is made and which numbers of chunks per rank it can have."""

    program: Callable[[int, int, int, int], Program]       # (rank, P, M, V)
    default_chunks: int = 1
    any_chunks: bool = False                               # default_chunks and every larger number
    v_shaped: bool = False                                 # the second chunk goes back up the ranks

    def takes(self, num_chunks: int) -> bool:
        """Whether it can have so many chunks per rank."""
        return num_chunks == self.default_chunks or (self.any_chunks and num_chunks > self.default_chunks)

    @property
    def splits_backward(self) -> bool:
        """Whether weight gradients come apart from the input's, so that those of several microbatches mix."""
        return any(action.kind is Kind.W for action in self.program(0, 2, 2, self.default_chunks))


RECIPES: Mapping[str, Recipe] = MappingProxyType({
    "gpipe": Recipe(gpipe),
    "1f1b": Recipe(one_f_one_b),
    "interleaved": Recipe(interleaved, default_chunks=2, any_chunks=True),
    "zb-h1": Recipe(zb_h1),
    "zb-h2": Recipe(zb_h2),
    "zb-v": Recipe(zb_v, default_chunks=2, v_shaped=True),
})


def schedule_names() -> tuple[str, ...]:
    """Every schedule there is, in the table's order."""
    return tuple(RECIPES)


def recipe(name: str) -> Recipe:
    """The row of a schedule.

    Raises:
        ConfigError: no such schedule.
    """
    if name in RECIPES:
        return RECIPES[name]
    near = get_close_matches(name.lower().replace("_", "-"), RECIPES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"no schedule {name!r}{hint} (there are {', '.join(RECIPES)})")


def default_num_chunks(name: str) -> int:
    """Chunks per rank where nothing is asked for: 2 for interleaved and zb-v, otherwise 1.

    Raises:
        ConfigError: no such schedule.
    """
    return recipe(name).default_chunks


def build_schedule(name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The schedule `name` for P stages, M microbatches and V chunks per rank.

    Raises:
        ConfigError: no such schedule, a count below one, or a number of chunks the schedule cannot have.
    """
    made_by = recipe(name)
    for label, value in (("stages", num_stages), ("microbatches", num_microbatches), ("chunks per stage", num_chunks)):
        if value < 1:
            raise ConfigError(f"schedule {name}: {label} = {value}, must be at least 1")
    if problem := chunk_problem(name, num_chunks, "chunks per stage"):
        raise ConfigError(problem)
    placement = build_placement(name, num_stages, num_chunks)
    programs = tuple(made_by.program(rank, num_stages, num_microbatches, num_chunks) for rank in range(num_stages))
    return Schedule(name, num_stages, num_microbatches, num_chunks, placement, programs)


def build_placement(name: str, num_stages: int, num_chunks: int) -> tuple[int, ...]:
    """Chunk → stage.

    Raises:
        ConfigError: no such schedule.
    """
    down = tuple(range(num_stages))
    return down + down[::-1] if recipe(name).v_shaped else down * num_chunks


def chunk_problem(name: str, num_chunks: int, key: str) -> str | None:
    """What is wrong with V chunks per rank, with what would be right; `key` is what the number is called there."""
    row = recipe(name)
    if row.takes(num_chunks):
        return None
    others = [other for other, candidate in RECIPES.items() if candidate.takes(num_chunks)]
    return (f"the {name} schedule needs {key} {'≥' if row.any_chunks else '='} {row.default_chunks} (it is "
            f"{num_chunks})" + (f"; with {num_chunks} there is {', '.join(others)}" if others else ""))
