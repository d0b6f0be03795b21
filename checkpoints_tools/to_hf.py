"""One of our checkpoints as a Hugging Face model: `from_pretrained` and nothing else.

Peak memory is a few copies of the largest parameter: parameters are read one at a time, in the order in which the files
hold them.  The result appears under its name after it was checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from checkpoints_tools.check import Checked, check_hf, require_finite
from checkpoints_tools.families import family_of
from checkpoints_tools.hf_config import CONFIG, GENERATION, generation_config, hf_config, special_ids
from checkpoints_tools.hf_files import SHARD_BYTES, Whole, write_hf_weights
from checkpoints_tools.names import Part, hf_parts, hf_shapes
from checkpoints_tools.output import committed
from checkpoints_tools.source import Source, tokenizer_of
from corpus_tools.tokenizers.export import export_hf_tokenizer
from engine.checkpoint.metadata import SCALE
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.progress import Advance, Begin, quiet


def convert_to_hf(reader: CheckpointReader, output: Path, dtype: torch.dtype = torch.float32, *,
                  tokenizer: str | None = None, check: bool = True, begin: Begin = quiet,
                  shard_bytes: int = SHARD_BYTES) -> Checked | None:
    """Writes `config.json`, `generation_config.json`, the weights and the tokenizer to `output`.

    Args:
        dtype: of the weights written.
        tokenizer: where the run's tokenizer is now; None: where the checkpoint says; `none`: write none.
        check: compare the result with the checkpoint before it is put in place.
        begin: told what is going on, and how far it has come.

    Returns:
        What was compared.

    Raises:
        CheckpointError: the checkpoint holds another model than it says, the check fails, `output` is there already, or
            cannot be written.  DataError: the tokenizer is not there, or is another one.
    """
    source = Source.of(reader)
    text = tokenizer_of(source, tokenizer)
    parts = [part for parts in hf_parts(source.config, family_of(source.config)).values() for part in parts]
    entries = [Whole.of(name, shape, dtype) for name, shape in hf_shapes(parts).items()]
    num_bytes = sum(entry.num_bytes for entry in entries)
    with committed(output, num_bytes) as folder:
        folder.mkdir()
        ids = special_ids(text, source.reader.end_ids)
        scale = {SCALE: reader.metadata[SCALE]} if SCALE in reader.metadata else {}          # of a reward model
        _dump(folder / CONFIG, hf_config(source.config, str(dtype).removeprefix("torch."), ids) | scale)
        _dump(folder / GENERATION, generation_config(ids))
        if text is not None:
            export_hf_tokenizer(text, folder)
        with begin("writing", num_bytes) as progress:
            write_hf_weights(folder, entries, _Cutter(source, parts, dtype, progress.advance).fetch, shard_bytes)
        return check_hf(source, folder, dtype, begin=begin) if check else None


class _Cutter:
    """Cuts foreign tensors out of ours, keeping the parameter at hand: q, k and v come out of the same one."""

    def __init__(self, source: Source, parts: Iterable[Part], dtype: torch.dtype, advance: Advance) -> None:
        self._source, self._dtype, self._advance = source, dtype, advance
        self._parts: dict[str, list[Part]] = {}
        for part in parts:
            self._parts.setdefault(part.name, []).append(part)
        self._name, self._tensor = "", torch.empty(0)

    def fetch(self, entry: Entry) -> torch.Tensor:
        self._advance(entry.num_bytes)
        parts = self._parts[entry.key]
        blocks = [self._block(part) for part in parts]
        tensor = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
        return tensor.T.contiguous() if parts[0].transposed else tensor

    def _block(self, part: Part) -> torch.Tensor:
        if part.ours != self._name:
            self._name, self._tensor = part.ours, torch.empty(0)        # let go before the next is read
            read = self._source.read(part.ours, self._dtype)
            self._tensor = require_finite(read, part.ours, self._source.reader.path)
        return self._tensor[part.box.slices].reshape(part.shape)


def _dump(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
