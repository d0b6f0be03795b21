"""Our checkpoints to and from megatron-core: the same parameters, layers stacked.

A layer is one chunk of the stacked tensor, so a parameter of ours is read or written as one piece.  Only weights move:
moments, random state and data position mean something to the program that wrote them.

A run of Megatron-LM pads the vocabulary; the rows beyond the model's are left out.  Where the checkpoint has the fp32
masters of weights that it stores in bf16, the masters are taken: that is what our checkpoints hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.check import Checked, compare, require_finite
from checkpoints_tools.names import PREFIX, Part, megatron_parts, parameter_shapes
from checkpoints_tools.output import committed, divide
from checkpoints_tools.source import Source, require_shapes
from checkpoints_tools.torch_dist import FILE_BYTES, FORMAT_FILE, TorchDistReader, write_torch_dist
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import write_checkpoint
from engine.config import ModelConfig
from engine.distributed.boxes import Box
from engine.errors import CheckpointError
from engine.progress import Advance, Begin, quiet
from engine.reading import read_bytes, shown

TRACKER = "latest_checkpointed_iteration.txt"
MASTER = "optimizer.state.fp32_param."
STACK = "decoder.layers."
# Modules whose state beside the weights (FP8 scales) megatron-core asks for, per layer, even where they have none.
WITH_EXTRA_STATE = ("self_attention.linear_qkv", "self_attention.linear_proj", "self_attention.core_attention",
                    "mlp.linear_fc1", "mlp.linear_fc2")
MOST_TRACKER = 64                       # bytes of the file that names an iteration
# Keys of the model section, and the value that is known here.
ELSEWHERE = {"head": "language_model", "norm": "rmsnorm", "residual": "sequential", "position": "rope",
             "rope_share": 1.0, "embedding_scale": 1.0, "window": None, "embedding_norm": False, "norm_place": "pre",
             "query_pre_attn_scalar": None, "attention_softcap": None, "logit_softcap": None}
PADDED = ("embedding.weight", "output_layer.weight")


def convert_to_megatron(reader: CheckpointReader, output: Path, dtype: torch.dtype = torch.float32, *,
                        check: bool = True, begin: Begin = quiet, file_bytes: int = FILE_BYTES) -> Checked | None:
    """Writes `output/iter_0000500/`, and the file in which Megatron-LM looks for the newest iteration.

    A model at step 0 goes to `output/release/`: Megatron-LM takes no iteration 0.

    Args:
        dtype: of the weights written.
        check: read everything back and compare it, before it is put in place.
        begin: told what is going on, and how far it has come.

    Returns:
        What was compared.

    Raises:
        CheckpointError: the checkpoint holds another model than it says, the check fails, `output` is there already, or
            cannot be written.
    """
    source = Source.of(reader)
    _require_known(source.config, reader.path)
    parts = {_entry(part, source.config, dtype).name: part for part in megatron_parts(source.config).values()}
    entries = [_entry(part, source.config, dtype) for part in parts.values()]
    num_bytes = sum(entry.num_bytes for entry in entries)
    with committed(output, num_bytes) as root:
        newest = str(reader.step) if reader.step else "release"
        folder = _folder_of(root, newest)
        with begin("writing", num_bytes) as progress:
            write_torch_dist(folder, entries, lambda entry: _fetch(source, parts[entry.name], entry, progress.advance),
                             _extra_states(source.config), {"checkpoint_version": 3.0, "iteration": reader.step},
                             file_bytes)
        (root / TRACKER).write_text(newest, encoding="utf-8")
        return _compare(source, TorchDistReader(folder), dtype, begin) if check else None


def convert_from_megatron(folder: Path, output: Path, config: ModelConfig, *, check: bool = True,
                          begin: Begin = quiet) -> Checked | None:
    """Writes the model of a `torch_dist` checkpoint as one of ours, at step 0.

    Args:
        folder: an iteration's folder, or the one above it, of which the newest iteration is taken.
        config: the model's shape, which the checkpoint does not state.

    Returns, Raises: as `convert_to_megatron`.
    """
    _require_known(config, folder)
    theirs = TorchDistReader(_newest(folder))
    parts = megatron_parts(config)
    _require_tensors(theirs, config, parts)
    entries = [Entry(PREFIX + name, shape, Box.whole(shape), torch.float32)
               for name, shape in parameter_shapes(config).items()]
    num_bytes = sum(entry.num_bytes for entry in entries)
    metadata: dict[str, Any] = {"config": {"model": config.model_dump(mode="json"), "data": {"tokenizer": None}}}
    with committed(output, num_bytes) as place:
        with begin("writing", num_bytes) as progress:
            write_checkpoint(place, 0, metadata, divide(entries, lambda entry: entry.num_bytes, FILE_BYTES),
                             lambda entry: _assemble(theirs, parts[entry.key.removeprefix(PREFIX)], entry,
                                                     progress.advance))
        return _compare(Source.of(CheckpointReader(place)), theirs, torch.float32, begin) if check else None


def _require_known(config: ModelConfig, where: Path) -> None:
    """
    Raises:
        CheckpointError: the model has something that only the conversion from and to Hugging Face knows.
    """
    heads = {"qk_norm": True} if config.qk_norm else {}              # each by itself
    for key, value in {**ELSEWHERE, **heads}.items():
        if getattr(config, key) != value:
            raise CheckpointError(f"{where} is a model with {key}: {getattr(config, key)}; converted from and to "
                                  f"torch_dist are models with {key}: {value}; `octant convert to-hf` writes it")


def _entry(part: Part, config: ModelConfig, dtype: torch.dtype) -> Entry:
    """The chunk that a part is."""
    whole = Box.whole(part.shape)
    if part.layer is None:
        return Entry(part.name, part.shape, whole, dtype)
    return Entry(part.name, (config.num_layers, *part.shape), Box((part.layer, *whole.offset), (1, *part.shape)), dtype)


def _extra_states(config: ModelConfig) -> list[str]:
    return [f"{STACK}{module}._extra_state/shard_{layer}_{config.num_layers}"
            for module in WITH_EXTRA_STATE for layer in range(config.num_layers)]


def _fetch(source: Source, part: Part, entry: Entry, advance: Advance) -> torch.Tensor:
    advance(entry.num_bytes)
    return require_finite(source.read(part.ours, entry.dtype), part.ours, source.reader.path).reshape(entry.box.size)


def _assemble(theirs: TorchDistReader, part: Part, entry: Entry, advance: Advance) -> torch.Tensor:
    advance(entry.num_bytes)
    read = require_finite(_read(theirs, part), part.name, theirs.folder)
    return read.to(entry.dtype).reshape(entry.global_shape)


def _read(theirs: TorchDistReader, part: Part) -> torch.Tensor:
    """The values of a part, from the tensor of all layers or from one of its own; masters first."""
    whole = Box.whole(part.shape)
    for prefix in (MASTER, ""):
        if part.layer is not None and prefix + part.name in theirs.tensors:
            return theirs.read(prefix + part.name, Box((part.layer, *whole.offset), (1, *part.shape)))
        if prefix + _own_name(part) in theirs.tensors:
            return theirs.read(prefix + _own_name(part), whole)
    raise CheckpointError(f"{theirs.folder} holds no {part.name}")


def _own_name(part: Part) -> str:
    """The name of a layer's own tensor: newer versions can write each layer by itself."""
    return part.name if part.layer is None else part.name.replace(STACK, f"{STACK}{part.layer}.", 1)


def _require_tensors(theirs: TorchDistReader, config: ModelConfig, parts: dict[str, Part]) -> None:
    """The model's tensors must be there, and no others: a bias or an expert left behind would be another model."""
    found = {name: stored.shape for name, stored in theirs.tensors.items() if "optimizer." not in name}
    stacked = any(part.layer is not None and part.name in found for part in parts.values())
    expected = {}
    for part in parts.values():
        name = part.name if stacked else _own_name(part)
        expected[name] = (config.num_layers, *part.shape) if stacked and part.layer is not None else part.shape
        if part.ours in PADDED and name in found and found[name][0] > config.vocab_size:
            found[name] = part.shape if found[name][1:] == part.shape[1:] else found[name]
    require_shapes(expected, found, theirs.folder)


def _newest(folder: Path) -> Path:
    tracker = folder / TRACKER
    if (folder / FORMAT_FILE).exists() or not tracker.exists():
        return folder
    try:
        newest = read_bytes(tracker, MOST_TRACKER).decode("ascii").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{tracker} cannot be read as the number of an iteration: {error}") from None
    if not re.fullmatch(r"\d{1,18}|release", newest):
        raise CheckpointError(f"{tracker} cannot be read as the number of an iteration: it holds {shown(newest)}")
    return _folder_of(folder, newest)


def _folder_of(root: Path, newest: str) -> Path:
    return root / (newest if newest == "release" else f"iter_{int(newest):07d}")


def _compare(source: Source, theirs: TorchDistReader, dtype: torch.dtype, begin: Begin) -> Checked:
    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for part in megatron_parts(source.config).values():
            yield source.read(part.ours, dtype), _read(theirs, part).to(dtype).reshape(part.box.size)

    return compare(pairs(), source, dtype, "", begin).require()
