"""The operations table: what a model computes with, and who computes it.

Each operation has a reference in plain torch and implementations in order of preference (`kernels/operation.py`).  They
are chosen once, when a run starts: for every operation the first implementation that is available on the run's device
and in its dtype, or the one that the configuration's `kernels` names.  The choice is a value, `Operations`, handed to
whatever is built with it; nothing is chosen again later, and no module remembers a choice.

To add an implementation, add an entry to the tuple in its operation's file; to add an operation, a row here and a field
in `Operations`.  The tests in tests/kernels compare every entry with its reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.errors import ConfigError
from engine.kernels.adamw import ADAMW, adamw_reference
from engine.kernels.attention import ATTENTION, attention
from engine.kernels.attention_block import ATTENTION_BLOCK, REFERENCE_BLOCK, AttentionBlock
from engine.kernels.cross_entropy import CROSS_ENTROPY, cross_entropy
from engine.kernels.fp8 import FP8_PRODUCT, Scaled, emulated
from engine.kernels.layer_norm import LAYER_NORM, layer_norm
from engine.kernels.log_probs import LOG_PROBS, log_probs_and_entropy
from engine.kernels.matmul import LINEAR, WEIGHT_GRADIENT, add_product, linear
from engine.kernels.operation import Implementation, Operation, Place, Unavailable, short_name
from engine.kernels.relu2 import RELU2, relu2
from engine.kernels.rms_norm import RMS_NORM, add_rms_norm
from engine.kernels.rope import ROPE, split_and_rotate
from engine.kernels.swiglu import SWIGLU, swiglu

TABLE: tuple[Operation, ...] = (ATTENTION, ATTENTION_BLOCK, RMS_NORM, LAYER_NORM, ROPE, SWIGLU, RELU2, CROSS_ENTROPY,
                                LOG_PROBS, LINEAR, WEIGHT_GRADIENT, FP8_PRODUCT, ADAMW)


@dataclass(frozen=True)
class Chosen:
    """An operation's implementation, and why those before it in the order of preference were passed over."""

    operation: str
    implementation: str
    passed_over: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Operations:
    """The functions a model computes with, each as its file describes it; as they stand here they run anywhere."""

    attention: Callable[..., Tensor] = attention
    attention_block: AttentionBlock = REFERENCE_BLOCK
    rms_norm: Callable[..., tuple[Tensor, Tensor]] = add_rms_norm
    layer_norm: Callable[..., Tensor] = layer_norm
    rope: Callable[..., tuple[Tensor, Tensor, Tensor]] = split_and_rotate
    swiglu: Callable[[Tensor], Tensor] = swiglu
    relu2: Callable[[Tensor], Tensor] = relu2
    cross_entropy: Callable[..., tuple[Tensor, Tensor]] = cross_entropy
    log_probs: Callable[..., tuple[Tensor, Tensor]] = log_probs_and_entropy
    linear: Callable[..., Tensor] = linear
    weight_gradient: Callable[..., None] = add_product
    fp8_product: Callable[[Scaled, Scaled, torch.dtype], Tensor] = emulated
    adamw: Callable[..., None] = adamw_reference
    chosen: tuple[Chosen, ...] = ()


# What a model computes with that nobody chose anything for.
PORTABLE = Operations()


def choose(place: Place, wanted: Mapping[str, str] | None = None, table: Sequence[Operation] = TABLE) -> Operations:
    """The operations of a run.

    Args:
        place: where it computes.
        wanted: an implementation's name, or `auto`, by operation; `auto` where an operation is missing.
        table: what there is to choose from.

    Raises:
        ConfigError: an operation or implementation that is asked for does not exist, or cannot be used here.
    """
    wanted = wanted or {}
    if unknown := sorted(wanted.keys() - {operation.name for operation in table}):
        raise ConfigError(f"kernels.{unknown[0]}: there is no such operation; there are "
                          + ", ".join(operation.name for operation in table))
    functions: dict[str, Any] = {}
    rows = []
    for operation in table:
        functions[operation.name], row = _choose_one(operation, place, wanted.get(operation.name, "auto"))
        rows.append(row)
    return Operations(**functions, chosen=tuple(rows))


def _choose_one(operation: Operation, place: Place, wanted: str) -> tuple[Any, Chosen]:
    if wanted != "auto":
        entry = _named(operation, wanted)
        try:
            return entry.find(place), Chosen(operation.name, entry.name)
        except Unavailable as reason:
            raise ConfigError(f"kernels.{operation.name}: {wanted} cannot be used on {place.device.type} in "
                              f"{short_name(place.dtype)} ({reason}): use auto, or another of {_names(operation)}"
                              ) from None
    passed_over: list[tuple[str, str]] = []
    for entry in operation.implementations:
        try:
            return entry.find(place), Chosen(operation.name, entry.name, tuple(passed_over))
        except Unavailable as reason:
            passed_over.append((entry.name, str(reason)))
    raise AssertionError(f"the reference of {operation.name} is not available: {passed_over}")


def _named(operation: Operation, name: str) -> Implementation:
    for entry in operation.implementations:
        if entry.name == name:
            return entry
    raise ConfigError(f"kernels.{operation.name}: there is no implementation {name!r}; there are auto, "
                      f"{_names(operation)}")


def _names(operation: Operation) -> str:
    return ", ".join(entry.name for entry in operation.implementations)


def describe(operations: Operations) -> Iterator[str]:
    """A line for each operation: what was chosen, and why nothing that comes before it."""
    for row in operations.chosen:
        yield _line(row.operation, [row.implementation], row.passed_over)


def describe_options(place: Place, table: Sequence[Operation] = TABLE) -> Iterator[str]:
    """A line for each operation: what `auto` means at this place, what else could be chosen, and why not the rest."""
    for operation in table:
        available, others = [], []
        for entry in operation.implementations:
            try:
                entry.find(place)
                available.append(entry.name)
            except Unavailable as reason:
                others.append((entry.name, str(reason)))
        yield _line(operation.name, available, others)


def _line(operation: str, names: Sequence[str], others: Sequence[tuple[str, str]]) -> str:
    also = f"; or {', '.join(names[1:])}" if len(names) > 1 else ""
    reasons = "".join(f"; not {name} ({reason})" for name, reason in others)
    return f"{operation:<20} {names[0]}{also}{reasons}"
