"""What a run does besides stepping: a table of hooks, asked after every step in its order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


def never(_: int) -> bool:
    """The default of `Hook.when`."""
    return False


@dataclass(frozen=True)
class Hook:
    """Something that is due after some steps.

    Attributes:
        phase: the name under which it runs (`engine.metrics.phases`).
        run: does it; every rank calls it after the same steps.
        every: due after each multiple of so many steps; 0: not for that.
        when: whether it is due after a step for another reason; all ranks must answer alike.
    """

    phase: str
    run: Callable[[], None]
    every: int = 0
    when: Callable[[int], bool] = never

    def due(self, step: int) -> bool:
        """Whether it runs after `step`, counted from 1."""
        return (self.every > 0 and step % self.every == 0) or self.when(step)
