"""ZeRO 3: parameters are there only around their use (Rajbhandari et al. 2020, section 5.3).

A chunk is a row of units (embedding, each layer, output).  When one is entered, forward or backward, its buckets are
waited for, the next unit's are already being gathered underneath, and what neither needs is freed.  So at most two
units are whole at any time.  Entering is noticed by hooks: in the forward pass before the unit's first module runs, in
the backward pass when the gradient of the unit's output is known, which is just before the unit's own backward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from engine.model.transformer import Transformer
from engine.parallel.data.build import units_of
from engine.parallel.data.flat import FlatParameters


class ParameterStream:
    """Gathers and frees the buckets of all of this rank's chunks."""

    def __init__(self, chunks: Iterable[Transformer], buckets: Sequence[FlatParameters]) -> None:
        home = {entry.parameter: bucket for bucket in buckets for entry in bucket.entries}
        self._held: set[FlatParameters] = set()
        for chunk in chunks:
            units = units_of(chunk)
            needed = [{home[p] for module in unit for p in module.parameters()} for unit in units]
            for index, unit in enumerate(units):
                self._watch(unit, needed, index)

    def _watch(self, unit: Sequence[nn.Module], needed: Sequence[set[FlatParameters]], index: int) -> None:
        before = needed[index - 1] if index > 0 else set()
        after = needed[index + 1] if index + 1 < len(needed) else set()

        def forward_begins(*_: Any) -> None:
            self._enter(needed[index], after)

        def forward_ends(module: nn.Module, inputs: Any, output: Tensor | tuple[Tensor, ...]) -> None:
            for each in output if isinstance(output, tuple) else (output,):
                if each.requires_grad:
                    each.register_hook(backward_begins)

        def backward_begins(_: Tensor) -> None:
            self._enter(needed[index], before, backward=True)

        unit[0].register_forward_pre_hook(forward_begins)
        unit[-1].register_forward_hook(forward_ends)

    def _enter(self, now: set[FlatParameters], soon: set[FlatParameters], backward: bool = False) -> None:
        for bucket in self._held - now - soon:
            bucket.release()
        for bucket in [*_in_order(now), *_in_order(soon)]:
            bucket.start_gather(backward)
        for bucket in now:
            bucket.wait_gather()
        self._held = now | soon


def _in_order(buckets: set[FlatParameters]) -> list[FlatParameters]:
    """Collectives must start in the same order on every rank; sets have none."""
    return sorted(buckets, key=lambda bucket: bucket.entries[0].spec.name)
