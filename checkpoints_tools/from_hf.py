"""A Hugging Face model, of a class in `families`, as one of our checkpoints: weights in fp32, at step 0.

Every value of the folder lands in the checkpoint unchanged (bf16 and fp16 fit into fp32), so converting back gives the
same bits.  What the folder holds and we have no place for is refused, except what is known to be no weight.
"""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.check import Checked, check_hf, require_finite
from checkpoints_tools.families import Family
from checkpoints_tools.hf_config import CONFIG, read_end_ids, read_hf_config
from checkpoints_tools.hf_files import EMBEDDING, NO_WEIGHT, HFWeights, head_name
from checkpoints_tools.names import PREFIX, Part, hf_shapes, parameter_shapes
from checkpoints_tools.output import committed, divide
from checkpoints_tools.recognise import HUGGING_FACE, require_format
from checkpoints_tools.source import NO_TOKENIZER, Source, require_ids, require_shapes
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import write_checkpoint
from engine.config import ModelConfig
from engine.config.vocabulary import tokenizer_file
from engine.data.tokenizer import load_tokenizer
from engine.distributed.boxes import Box
from engine.errors import CheckpointError
from engine.model.flops import count_parameters
from engine.progress import Advance, Begin, quiet

FILE_BYTES = 5 * 10**9
MOST_DESCRIBED = 100                    # times what the files hold; below, what is missing is named


def convert_from_hf(folder: Path, output: Path, *, tokenizer: str | None = None, allow_pickle: bool = False,
                    check: bool = True, begin: Begin = quiet) -> Checked | None:
    """Writes the model of a Hugging Face folder as a checkpoint at `output`.

    Args:
        tokenizer: what runs from this checkpoint will use; None: the folder's, if it has one; `none`: leave it open.
            Another tokenizer is refused when the checkpoint is loaded.
        allow_pickle: read `.bin` files where there are no safetensors.
        check: compare both before the checkpoint is put in place.
        begin: told what is going on, and how far it has come.

    Returns:
        What was compared.

    Raises:
        CheckpointError: the model is none that Octant has, its weights are incomplete or damaged, the check fails, or
            `output` is there already or cannot be written.
    """
    require_format(folder, HUGGING_FACE)
    family, config = read_hf_config(folder)
    weights = HFWeights(folder, allow_pickle)
    _require_size(config, weights)
    parts = weights.parts(config, family)
    _require_weights(config, family, weights, parts)
    entries = [Entry(PREFIX + name, shape, Box.whole(shape), torch.float32)
               for name, shape in parameter_shapes(config).items()]
    num_bytes = sum(entry.num_bytes for entry in entries)
    files = divide(entries, lambda entry: entry.num_bytes, FILE_BYTES)
    metadata = _metadata(config, folder, tokenizer)
    with committed(output, num_bytes) as place:
        with begin("writing", num_bytes) as progress:
            write_checkpoint(place, 0, metadata, files,
                             lambda entry: _assemble(entry, parts, weights, progress.advance))
        source = Source.of(CheckpointReader(place))
        return check_hf(source, folder, torch.float32, allow_pickle, begin) if check else None


def _assemble(entry: Entry, parts: dict[str, list[Part]], weights: HFWeights, advance: Advance) -> torch.Tensor:
    """One of our parameters from the foreign tensors that are cut out of it."""
    advance(entry.num_bytes)
    own = parts[entry.key.removeprefix(PREFIX)]
    if len(own) == 1:                                       # the largest ones, the embedding and the head: no copy
        return _read(weights, own[0]).to(entry.dtype).reshape(entry.global_shape)
    tensor = torch.empty(entry.global_shape, dtype=entry.dtype)
    for part in own:
        tensor[part.box.slices] = _read(weights, part)
    return tensor


def _read(weights: HFWeights, part: Part) -> torch.Tensor:
    return require_finite(weights.block(part), part.name, weights.folder)


def _require_size(config: ModelConfig, weights: HFWeights) -> None:
    """A configuration is no reason to build a model of any size: the files must hold about as much."""
    sizes = [prod(weights.shape(name)) for name in weights.names()]
    described = count_parameters(config).total
    if config.num_layers > len(sizes) or described > MOST_DESCRIBED * sum(sizes):
        raise CheckpointError(f"{weights.folder / CONFIG} describes {config.num_layers:,} layers and {described:,} "
                              f"parameters; the files beside it hold {sum(sizes):,} in {len(sizes):,} tensors")


def _require_weights(config: ModelConfig, family: Family, weights: HFWeights, parts: dict[str, list[Part]]) -> None:
    found = {name: weights.shape(name) for name in weights.names() if not name.endswith(NO_WEIGHT)}
    embedding, head = parts[EMBEDDING][0].name, head_name(family)
    if config.tie_embeddings and head in found and embedding in found and head != embedding:
        if not torch.equal(weights.read(head).float(), weights.read(embedding).float()):
            raise CheckpointError(f"{weights.folder}: config.json says tie_word_embeddings, but {head} is not "
                                  f"{embedding}; set it to false to keep both")
        del found[head]
    require_shapes(hf_shapes([part for of_one in parts.values() for part in of_one]), found, weights.folder)


def _metadata(config: ModelConfig, folder: Path, tokenizer: str | None) -> dict[str, Any]:
    """What a run would have saved, as far as a foreign model can know it."""
    if tokenizer is None and tokenizer_file(folder) != folder:
        tokenizer = str(folder.resolve())
    spec = None if tokenizer == NO_TOKENIZER else tokenizer
    loaded = None if spec is None else load_tokenizer(spec)
    if loaded is not None:
        require_ids(loaded, config, spec)
    end_ids = read_end_ids(folder, config)
    beyond = end_ids if loaded is None or end_ids != [loaded.eod_id] else []
    return {"config": {"model": config.model_dump(mode="json"), "data": {"tokenizer": spec}}, "end_ids": beyond,
            "data": loaded.info.fingerprint() if loaded else {}}
