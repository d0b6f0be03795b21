"""The schedules, by name.

A pipeline schedule is data: for every rank the list of what it does, in order (`program.py`).  `build_schedule` looks
the name up in a table of pure functions (rank, P, M, V) → program.  Nothing else tells one schedule from another:
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
from engine.parallel.pipeline.classic import gpipe, interleaved, one_f_one_b
from engine.parallel.pipeline.program import Program, Schedule
from engine.parallel.pipeline.validate import validate
from engine.parallel.pipeline.zero_bubble import zb_h1, zb_h2, zb_v

__all__ = ["RECIPES", "Recipe", "Schedule", "build_schedule", "default_num_chunks", "validate"]


@dataclass(frozen=True)
class Recipe:
    """A row of the table: how a schedule is made and which numbers of chunks per rank it can have."""

    program: Callable[[int, int, int, int], Program]       # (rank, P, M, V)
    default_chunks: int = 1
    any_chunks: bool = False                               # default_chunks and every larger number
    v_shaped: bool = False                                 # the second chunk goes back up the ranks


RECIPES: Mapping[str, Recipe] = MappingProxyType({
    "gpipe": Recipe(gpipe),
    "1f1b": Recipe(one_f_one_b),
    "interleaved": Recipe(interleaved, default_chunks=2, any_chunks=True),
    "zb-h1": Recipe(zb_h1),
    "zb-h2": Recipe(zb_h2),
    "zb-v": Recipe(zb_v, default_chunks=2, v_shaped=True),
})


def build_schedule(name: str, num_stages: int, num_microbatches: int, num_chunks: int = 1) -> Schedule:
    """The schedule `name` for P stages, M microbatches and V chunks per rank.

    Raises:
        ConfigError: no such schedule, a count below one, or a number of chunks the schedule cannot have.
    """
    recipe = _recipe(name)
    for label, value in (("stages", num_stages), ("microbatches", num_microbatches), ("chunks per stage", num_chunks)):
        if value < 1:
            raise ConfigError(f"schedule {name}: {label} = {value}, must be at least 1")
    _check_chunks(name, recipe, num_chunks)
    down = tuple(range(num_stages))
    placement = down + down[::-1] if recipe.v_shaped else down * num_chunks
    programs = tuple(recipe.program(rank, num_stages, num_microbatches, num_chunks) for rank in down)
    return Schedule(name, num_stages, num_microbatches, num_chunks, placement, programs)


def default_num_chunks(name: str) -> int:
    """Chunks per rank where nothing is asked for: 2 for interleaved and zb-v, otherwise 1.

    Raises:
        ConfigError: no such schedule.
    """
    return _recipe(name).default_chunks


def _recipe(name: str) -> Recipe:
    if name in RECIPES:
        return RECIPES[name]
    near = get_close_matches(name.lower().replace("_", "-"), RECIPES, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ConfigError(f"no schedule {name!r}{hint} (there are {', '.join(RECIPES)})")


def _check_chunks(name: str, recipe: Recipe, num_chunks: int) -> None:
    default = recipe.default_chunks
    if num_chunks == default or (recipe.any_chunks and num_chunks > default):
        return
    remedy = f"set chunks to {default}" + (" or more" if recipe.any_chunks else "")
    other = "1f1b" if recipe.default_chunks > num_chunks else "interleaved"
    raise ConfigError(f"schedule {name} has {default}{' or more' if recipe.any_chunks else ''} chunk(s) per stage, "
                      f"not {num_chunks}: {remedy}, or use {other}")
