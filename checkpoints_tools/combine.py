"""Several checkpoints of one model as one: the mean of a run's last few, or a merge of two.

    average   the mean, which smooths what the last steps did (Izmailov et al. 2018, arXiv:1803.05407)
    linear    (1 - share)·A + share·B                        (model soups: Wortsman et al. 2022, arXiv:2203.05482)
    slerp     along the arc between A and B, each tensor a vector (Shoemake 1985): where a straight line would make
              the tensor shorter than both, the arc does not
    ties      base + what both changed: of each difference the largest `density` of its values stay; of each value the
              sign whose differences are the larger in sum is elected, and those of that sign are averaged
              (Yadav et al. 2023, arXiv:2306.01708, section 3, tensor by tensor)

Tensors come one at a time and are combined in fp64, so memory follows the largest of them and not the model.  The
result has fp32 weights and no optimizer: a start for `checkpoint.load`, and a source for all that reads a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.check import require_finite
from checkpoints_tools.from_hf import FILE_BYTES
from checkpoints_tools.names import PREFIX, parameter_shapes
from checkpoints_tools.output import committed, divide
from checkpoints_tools.source import Source
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import write_checkpoint
from engine.data.tokenizer_identity import recorded_tokenizer
from engine.distributed.boxes import Box
from engine.errors import CheckpointError
from engine.progress import Begin, quiet

Read = Callable[[CheckpointReader], Tensor]                  # the tensor of the moment, in fp64
Blend = Callable[[Sequence[CheckpointReader], Read], Tensor]
NEARLY_PARALLEL = 1e-6                                       # of 1 - cosine: the arc is a straight line in fp64


def average(readers: Sequence[CheckpointReader], read: Read) -> Tensor:
    """The mean; holds two tensors, however many checkpoints there are."""
    return reduce(lambda total, reader: total.add_(read(reader)), readers[1:], read(readers[0])).div_(len(readers))


def linear(share: float) -> Blend:
    return lambda readers, read: torch.lerp(read(readers[0]), read(readers[1]), share)


def slerp(share: float) -> Blend:
    def blend(readers: Sequence[CheckpointReader], read: Read) -> Tensor:
        a, b = read(readers[0]), read(readers[1])
        lengths = float(a.norm() * b.norm())
        cosine = float((a * b).sum()) / lengths if lengths else 1.0
        if abs(cosine) > 1 - NEARLY_PARALLEL:
            return torch.lerp(a, b, share)
        angle = math.acos(cosine)
        return (math.sin((1 - share) * angle) * a + math.sin(share * angle) * b) / math.sin(angle)
    return blend


def ties(base: CheckpointReader, density: float) -> Blend:
    def blend(readers: Sequence[CheckpointReader], read: Read) -> Tensor:
        start = read(base)
        changes = torch.stack([_largest(read(reader) - start, density) for reader in readers])
        elected = torch.where(changes.sum(0) < 0, -1.0, 1.0)
        agreeing = changes * elected > 0
        return start + (changes * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    return blend


def _largest(values: Tensor, density: float) -> Tensor:
    """Zeros but for the share `density` of values that are largest in size."""
    kept = torch.zeros_like(values).flatten()
    most = values.abs().flatten().topk(max(1, int(density * values.numel()))).indices
    kept[most] = values.flatten()[most]
    return kept.view_as(values)


def blend_of(method: str, share: float, density: float, base: CheckpointReader | None) -> Blend:
    """What merges two models.

    Raises:
        CheckpointError: `share` or `density` is none, or `ties` lacks its base, or another method has one.
    """
    for name, value in (("share", share), ("density", density)):
        if not 0 <= value <= 1:
            raise CheckpointError(f"--{name} {value:g} is not between 0 and 1")
    if (base is None) == (method == "ties"):
        raise CheckpointError("ties merges what two models changed of a third: --base says which" if base is None else
                              f"{method} has no base; --method ties has")
    return ties(base, density) if base is not None else {"linear": linear, "slerp": slerp}[method](share)


def combine(readers: Sequence[CheckpointReader], output: Path, blend: Blend, what: dict[str, Any],
            others: Sequence[CheckpointReader] = (), begin: Begin = quiet) -> None:
    """Writes one checkpoint made of several, at the step of the last of them.

    Args:
        readers: what `blend` combines; configuration and tokenizer are the first one's.
        what: recorded in the metadata, under `combined`.
        others: further ones that `blend` reads.

    Raises:
        CheckpointError: they are of other shapes or tokenizers, hold values that are not finite, or `output` is there
            already or cannot be written.
    """
    first, *rest = [Source.of(reader) for reader in (*readers, *others)]
    for source in rest:
        _require_alike(first, source)
    entries = [Entry(PREFIX + name, shape, Box.whole(shape), torch.float32)
               for name, shape in parameter_shapes(first.config).items()]
    num_bytes = sum(entry.num_bytes for entry in entries)
    metadata = {key: value for key, value in first.reader.metadata.items() if key in ("config", "data", "end_ids")}
    metadata["combined"] = what | {"of": [{"path": str(reader.path), "content": reader.content} for reader in readers]}
    with committed(output, num_bytes) as place, begin("writing", num_bytes) as progress:
        def fetch(entry: Entry) -> Tensor:
            progress.advance(entry.num_bytes)
            return blend(readers, lambda reader: require_finite(reader.read(entry.key), entry.key, reader.path).double()
                         ).float()

        write_checkpoint(place, max(reader.step for reader in readers), metadata,
                         divide(entries, lambda entry: entry.num_bytes, FILE_BYTES), fetch)


def _require_alike(first: Source, other: Source) -> None:
    ours, theirs = (source.config.model_dump(mode="json", exclude={"max_seq_len"}) for source in (first, other))
    differences = [f"{key} {ours[key]} and {theirs[key]}" for key in ours if ours[key] != theirs[key]]
    if differences:
        raise CheckpointError(f"{first.reader.path} and {other.reader.path} are not of one shape: "
                              + ", ".join(differences))
    known = [recorded_tokenizer(source.reader.metadata.get("data") or {}) for source in (first, other)]
    if known[0] and known[1] and (difference := known[0].difference(known[1])):
        raise CheckpointError(f"{first.reader.path} and {other.reader.path} were trained with other tokenizers "
                              f"({difference}): their embeddings mean something else")
