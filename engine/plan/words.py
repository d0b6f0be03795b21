"""An explanation as text for a person."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from engine.distributed.boxes import Box
from engine.distributed.topology import AXES
from engine.parallel.pipeline.timeline import timeline
from engine.plan.explain import Explanation, Part
from engine.plan.text import memory_size, table
from engine.schedules.action import Action, Kind

FIRST_ACTIONS = 12
DOES = {
    Kind.F: "forward through chunk {chunk}, microbatch {microbatch}",
    Kind.B: "gradient of chunk {chunk}'s input, microbatch {microbatch}",
    Kind.W: "gradients of chunk {chunk}'s weights, microbatch {microbatch}",
    Kind.BW: "backward through chunk {chunk}, microbatch {microbatch}",
    Kind.SEND_F: "start sending chunk {chunk}'s output to rank {other}",
    Kind.RECV_F: "start receiving chunk {chunk}'s input from rank {other}",
    Kind.SEND_B: "start sending the gradient of chunk {chunk}'s input to rank {other}",
    Kind.RECV_B: "start receiving the gradient of chunk {chunk}'s output from rank {other}",
    Kind.REDUCE_GRAD: "chunk {chunk} has all its gradients",
}
Rows = list[tuple[str, ...]]


def in_words(it: Explanation) -> str:
    """The whole text, without a trailing newline."""
    sections = {"It computes with": _slices(it), "It updates": _state(it), "Memory between steps": _memory(it),
                "It works with": _peers(it), "In a step": _step(it)}
    head = f"rank {it.rank} of {it.config.parallel.world_size:,}: " + ", ".join(
        f"{axis} {it.coordinates[axis]} of {len(it.axes[axis])}" for axis in AXES)
    return "\n\n".join([head, *("\n".join([title, *(f"  {line}".rstrip() for line in lines)])
                                for title, lines in sections.items())])


def _slices(it: Explanation) -> Iterator[str]:
    last = len(it.placement) - 1
    for chunk, layers in it.layers.items():
        span = f"layer {layers[0]}" if len(layers) == 1 else f"layers {layers[0]} to {layers[-1]}"
        yield f"chunk {chunk} of {last + 1}: " + ", ".join(["the embedding"] * (chunk == 0) + [span]
                                                           + ["final norm and output layer"] * (chunk == last))
    yield f"{it.elements:,} parameters, in slices [first:stop, …] of the whole"
    yield from table([(str(len(parts)), name, _box(parts[0].slice, parts[0].shape), "of",
                        " × ".join(map(str, parts[0].shape))) for name, parts in _kinds(it).items()], right=(0,))


def _state(it: Explanation) -> Iterator[str]:
    """Of what it computes with, the part whose masters and moments are here."""
    if _sharing(it) == 1:
        yield "all of it"
        return
    yield f"its share of the {it.num_buckets} buckets, in boxes of the whole parameters"
    yield from table([(name, *_boxes(parts)) for name, parts in _kinds(it).items()], right=(1,))


def _boxes(parts: Sequence[Part]) -> tuple[str, str, str]:
    boxes = [(box, part.shape) for part in parts for box in part.state]
    if not boxes:
        return "0", "", ""
    elements = sum(box.num_elements for box, _ in boxes)
    return (f"{elements:,}", "in 1 box" if len(boxes) == 1 else f"in {len(boxes)} boxes",
            _box(*boxes[0]) + " …" * (len(boxes) > 1))


def _memory(it: Explanation) -> Iterator[str]:
    parallel, sharing, bf16 = it.config.parallel, _sharing(it), it.config.precision.compute != "fp32"
    share, masters = f" / {sharing}" if sharing > 1 else "", bf16 and it.config.precision.masters == "fp32"
    yield (f"ZeRO {parallel.zero}, n = {it.elements:,} parameters"
           + (f", its state shared by {sharing} ranks" if share else ""))
    rows: Rows = [
        _size("parameters", "" if parallel.zero >= 3 and it.bytes.casts else
              f"{2 if bf16 else 4}·n" + share * (parallel.zero >= 3), it.bytes.parameters),
        *([_size("FP8 casts of weights", "", it.bytes.casts)] if it.bytes.casts else []),
        _size("gradients", "4·n" + share * (parallel.zero >= 2), it.bytes.gradients),
        _size("masters, moments" if masters else "moments", f"{12 if masters else 8}·n" + share, it.bytes.optimizer),
        _size("together", "", it.bytes.total)]
    yield from table(rows, right=(2, 3))
    held = timeline(it.config).peak_in_flight[it.coordinates["pipeline"]]
    yield (f"and within a step: activations of at most {held} microbatch{'es' * (held > 1)}"
           + (" of one chunk" if parallel.virtual_stages > 1 else "") + ", buckets on their way"
           + (", two units of gathered parameters" if parallel.zero >= 3 else ""))


def _size(name: str, formula: str, num_bytes: int) -> tuple[str, ...]:
    return name, formula, f"{num_bytes:,} bytes", memory_size(num_bytes)


def _peers(it: Explanation) -> Iterator[str]:
    parallel = it.config.parallel
    rows: Rows = []
    if parallel.tensor > 1:
        what = "parts of the sequence" if parallel.sequence else "sums over the hidden size"
        rows.append(("tensor", _ranks(it.axes["tensor"]), f"{what}, several times per layer"))
    if parallel.context > 1:
        rows.append(("context", _ranks(it.axes["context"]), "keys and values, in a ring, in every layer"))
    rows += [*_neighbours(it), *_replicas(it)]
    if parallel.world_size > 1:
        rows.append(("world", f"all {parallel.world_size:,}", "loss, gradient norm, requests to stop: once a step, one "
                                                              "axis after the other"))
    yield from table(rows) if rows else ["nobody"]


def _neighbours(it: Explanation) -> Iterator[tuple[str, str, str]]:
    home = {chunk: it.axes["pipeline"][stage] for chunk, stage in enumerate(it.placement)}
    for chunk in it.layers:
        if chunk - 1 in home and home[chunk - 1] != it.rank:
            yield ("pipeline", str(home[chunk - 1]), f"its chunk {chunk - 1} sends activations to chunk {chunk}, "
                                                     "and takes gradients back")
        if chunk + 1 in home and home[chunk + 1] != it.rank:
            yield ("pipeline", str(home[chunk + 1]), f"its chunk {chunk + 1} takes activations from chunk {chunk}, "
                                                     "and sends gradients back")
    ends = {home[0], home[len(home) - 1]}
    if it.config.model.tie_embeddings and it.rank in ends and len(ends) == 2:
        yield "ends", str(*ends - {it.rank}), "the other end of the tied embedding: its gradient, once a step"


def _replicas(it: Explanation) -> Iterator[tuple[str, str, str]]:
    parallel, gradient, shard = it.config.parallel, it.axes["gradient"], it.axes["shard"]
    when = "per microbatch" if parallel.zero >= 2 or parallel.reproducible else "once a step"
    if parallel.zero == 0:
        if len(gradient) > 1:
            yield "gradient", _ranks(gradient), f"the same parameters: gradients are summed {when}"
        return
    if len(shard) > 1:
        gathered = "around each use" if parallel.zero >= 3 else "after the update"
        yield "shard", _ranks(shard), f"one state: gradients are scattered {when}, parameters gathered {gathered}"
    if len(it.axes["replicate"]) > 1:
        yield "replicate", _ranks(it.axes["replicate"]), f"the same shard: its gradients are summed {when}"


def _step(it: Explanation) -> Iterator[str]:
    config = it.config
    yield (f"{config.num_microbatches} microbatches of {config.batch.micro} × {config.data.seq_len:,} tokens in the "
           f"order of {config.parallel.schedule}: {len(it.program):,} actions")
    rows: Rows = [(str(action), _does(it, action)) for action in it.program[:FIRST_ACTIONS]]
    yield from table(rows + [("…", "")] * (len(it.program) > FIRST_ACTIONS))
    yield "then the gradient norm, the update, and the new weights for everybody"


def _does(it: Explanation, action: Action) -> str:
    other = it.axes["pipeline"][it.placement[action.partner.chunk]] if action.kind.is_communication else ""
    return DOES[action.kind].format(chunk=action.chunk, microbatch=action.microbatch, other=other)


def _sharing(it: Explanation) -> int:
    """Ranks that share one copy of the optimizer state."""
    return len(it.axes["shard"]) if it.config.parallel.zero else 1


def _kinds(it: Explanation) -> dict[str, list[Part]]:
    """Parameters that differ only in their layer, together."""
    kinds: dict[str, list[Part]] = {}
    for part in it.parts:
        kinds.setdefault(re.sub(r"\.\d+\.", ".*.", part.name), []).append(part)
    return kinds


def _box(box: Box, shape: tuple[int, ...]) -> str:
    """As an index: `[8:16, :]`."""
    return "[" + ", ".join(":" if size == whole else f"{first}:{first + size}" for first, size, whole in
                           zip(box.offset, box.size, shape, strict=True)) + "]"


def _ranks(ranks: Sequence[int]) -> str:
    """`0 1 2 3`, or `1 9 17 … 249 (32 ranks)`."""
    if len(ranks) <= 8:
        return " ".join(map(str, ranks))
    return f"{ranks[0]} {ranks[1]} {ranks[2]} … {ranks[-1]} ({len(ranks)} ranks)"
