"""A tape of allocations: what is taken and given back in one order, and so what is held and how much at most.

A forward pass leaves on its tape what the backward pass needs; the backward pass goes on with that and gives it back, a
little earlier or later than it takes its own.  The peak of a layer is not the sum of what it ever takes: it depends on
the order, which is why the order is written down instead of a formula (`engine.plan.layer`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping


class Tape:
    """Bytes held, by name; the most that was held at once, and what it was made of.

    >>> tape = Tape()
    >>> tape.take("x", 4); tape.take("y", 2); tape.drop("x")
    >>> tape.held, tape.peak
    (2, 6)
    """

    def __init__(self, start: Mapping[str, float] | None = None, pinned: Iterable[str] = ()) -> None:
        """`start`: what is held already; `pinned`: what somebody else holds too, so that dropping it frees nothing."""
        self.names: dict[str, float] = dict(start or {})
        self.pinned = frozenset(pinned)
        self.held = sum(self.names.values())
        self.peak, self.at_peak = self.held, dict(self.names)

    def take(self, name: str, num_bytes: float) -> None:
        """Something new; under a name that is held already, more of it."""
        if not num_bytes:
            return
        self.names[name] = self.names.get(name, 0.0) + num_bytes
        self.held += num_bytes
        if self.held > self.peak:
            self.peak, self.at_peak = self.held, dict(self.names)

    def drop(self, *names: str) -> None:
        """All of these; what was never taken is nothing."""
        for name in set(names) - self.pinned:
            self.held -= self.names.pop(name, 0.0)

    def passing(self, name: str, num_bytes: float) -> None:
        """Taken and given back."""
        self.take(name, num_bytes)
        if num_bytes:
            self.names[name] -= num_bytes
            self.held -= num_bytes
            if not self.names[name]:
                del self.names[name]

    def rename(self, old: str, new: str) -> None:
        """The same memory under another name."""
        if old in self.names:
            self.names[new] = self.names.get(new, 0.0) + self.names.pop(old)
