"""A model whose vocabulary grows: rows for the pieces that were appended to its tokenizer.

    octant tokenizer extend llama.model --with chinese_sp.model --output merged.model
    octant convert extend-vocab RUN OUT --tokenizer merged.model
    octant train … checkpoint.load=OUT data.tokenizer=merged.model

A new row of the embedding, and of the output layer, starts as the mean of the rows of the pieces that the old tokenizer
cut the new piece into (Chinese-LLaMA: Cui et al. 2023, section 2.2; Hewitt 2021 on why a mean): the model goes on from
where it would have been.  Old rows keep their bits, and so does every other tensor.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.check import require_finite
from checkpoints_tools.from_hf import FILE_BYTES
from checkpoints_tools.names import PREFIX, parameter_shapes
from checkpoints_tools.output import committed, divide
from checkpoints_tools.source import Source, tokenizer_of
from corpus_tools.tokenizers.extend import NewRow, expanded_rows, rows_of_new_pieces
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import write_checkpoint
from engine.data.tokenizer import SentencePieceTokenizer, Tokenizer, load_tokenizer
from engine.distributed.boxes import Box
from engine.errors import CheckpointError, DataError
from engine.progress import Begin, quiet

TABLES = ("embedding.weight", "output_layer.weight")         # what has a row for each id


def extend_vocabulary(reader: CheckpointReader, output: Path, tokenizer: str, before: str | None = None,
                      begin: Begin = quiet) -> list[NewRow]:
    """Writes the model with a row for every piece of `tokenizer`, in fp32, as a start for `checkpoint.load`.

    Args:
        tokenizer: begins with the pieces of the model's own.
        before: where the model's own is now; None: where the checkpoint says.

    Returns:
        The new rows.

    Raises:
        CheckpointError: the model does not say which tokenizer it has, or one of both is no SentencePiece model, or the
            new one does not begin with the pieces of the old one; or `output` is there already or cannot be written.
        DataError: a tokenizer is not there, or the old one is not the model's.
    """
    source = Source.of(reader)
    try:
        old = _sentencepiece(tokenizer_of(source, before), "the model's tokenizer")
    except DataError as error:
        said, _, _ = str(error).partition("\n")
        raise DataError(f"{said}\n  --from-tokenizer PATH says where the model's own tokenizer is now") from None
    new = _sentencepiece(load_tokenizer(tokenizer), f"--tokenizer {tokenizer}")
    _require_extended(old, new)
    rows = rows_of_new_pieces(old.path, old.vocab_size, new.model.pieces[old.vocab_size:])
    config = source.config.model_copy(update={"vocab_size": new.vocab_size})
    entries = [Entry(PREFIX + name, shape, Box.whole(shape), torch.float32)
               for name, shape in parameter_shapes(config).items()]
    num_bytes = sum(entry.num_bytes for entry in entries)
    saved = reader.metadata
    metadata: dict[str, Any] = {key: value for key, value in saved.items() if key == "end_ids"} | {
        "config": saved["config"] | {"model": config.model_dump(mode="json"),
                                     "data": (saved["config"].get("data") or {}) | {"tokenizer": str(new.path)}},
        "data": (saved.get("data") or {}) | new.info.fingerprint(),
        "extended": {"of": str(reader.path), "content": reader.content, "from": old.vocab_size}}
    with committed(output, num_bytes) as place, begin("writing", num_bytes) as progress:
        def fetch(entry: Entry) -> Tensor:
            progress.advance(entry.num_bytes)
            values = require_finite(reader.read(entry.key), entry.key, reader.path).float()
            if entry.key.removeprefix(PREFIX) not in TABLES:
                return values
            table: Tensor = expanded_rows(values, old.vocab_size, rows)
            return table

        files = divide(entries, lambda entry: entry.num_bytes, FILE_BYTES)
        write_checkpoint(place, reader.step, metadata, files, fetch)
    return rows


def _sentencepiece(tokenizer: Tokenizer | None, what: str) -> SentencePieceTokenizer:
    if isinstance(tokenizer, SentencePieceTokenizer):
        return tokenizer
    is_none = "is not known: --from-tokenizer says where it is" if tokenizer is None else \
        f"is {tokenizer.name}, and no SentencePiece .model: pieces are compared one by one, in these"
    raise CheckpointError(f"{what} {is_none}")


def _require_extended(old: SentencePieceTokenizer, new: SentencePieceTokenizer) -> None:
    """The new tokenizer must give every old id the meaning that it had."""
    ours, theirs = old.model.pieces, new.model.pieces
    if len(theirs) <= len(ours):
        raise CheckpointError(f"{new.path} has {len(theirs):,} pieces, and the model's tokenizer {old.path} has "
                              f"{len(ours):,}: nothing was appended (octant tokenizer extend appends)")
    for number, (mine, its) in enumerate(zip(ours, theirs, strict=False)):
        if replace(mine, score=0.0) != replace(its, score=0.0):
            raise CheckpointError(f"{new.path} does not begin with the pieces of the model's tokenizer {old.path}: id "
                                  f"{number} is {its.text!r} there and {mine.text!r} here, so rows would change their "
                                  "meaning (octant tokenizer extend appends pieces and leaves ids alone)")
