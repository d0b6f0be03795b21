"""Vocabulary expansion: another model's pieces appended to ours, old ids and old English segmentation unchanged.

A LLaMA vocabulary spells a Chinese character as three bytes.  Chinese-LLaMA's cure (Cui et al. 2023): append the
pieces of a Chinese SentencePiece model that are missing.  BPE joins the best-scored pair first, so the new pieces get
scores below every old one, each lower than the one before; equal scores would be broken by position in SentencePiece
and by id in `tokenizers`, and the two would disagree.  Even so a new piece of Latin letters can change how English is
cut, since letters that found no old union now may: pieces *with a Han character* cannot touch a text that has none,
and are the default.

A new embedding row starts as the mean of the rows of the pieces it replaces, those the old model cut the new piece
into; the plan lists them, and `expanded_rows` applies it to any weight with one row per id (`octant convert
extend-vocab` to a checkpoint's).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from corpus_tools.tokenizers.training import model_path
from engine.data.sentencepiece_model import (
    BPE,
    NORMAL,
    SPACE,
    Piece,
    SentencePieceModel,
    encode_piece,
    read_model,
    with_settings,
)
from engine.errors import RequestError
from engine.writing import refuse_existing, write_errors, write_whole

HAN = re.compile("[\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af]")


@dataclass(frozen=True)
class NewRow:
    """One appended piece: its id, and the old ids whose rows it is the mean of."""

    id: int
    piece: str
    replaces: list[int]


@dataclass(frozen=True)
class ExpansionPlan:
    """How a weight with `old_vocab_size` rows becomes one with `vocab_size`."""

    base_sha256: str
    sha256: str  # of the extended model
    old_vocab_size: int
    vocab_size: int
    rows: list[NewRow]
    unreachable: list[int]  # new ids that no two pieces join to, so that no text is ever cut into them

    @property
    def num_new(self) -> int:
        return len(self.rows)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_json(record: dict[str, Any]) -> ExpansionPlan:
        """The inverse of `to_json`."""
        return ExpansionPlan(**{**record, "rows": [NewRow(**row) for row in record["rows"]]})


def extend_tokenizer(
    base: str | Path, other: str | Path, output: str | Path, *, only: str = "han", overwrite: bool = False
) -> ExpansionPlan:
    """Append `other`'s pieces that `base` lacks (`only`: those with Han characters, or all) and write `output`.

    The plan goes to a `.plan.json` beside it.  `overwrite`: replace what is there under these names.

    Raises:
        RequestError: `base` isn't a BPE model, or the files cannot be written.
        DataError: a file is no model.
    """
    base, output = Path(base), model_path(output)
    if output.resolve() in (base.resolve(), Path(other).resolve()):
        raise RequestError(f"--output {output} would replace one of the models it is made from: give another name")
    refuse_existing((output, plan_path(output)), overwrite)
    old = read_model(base)
    if old.model_type != BPE:
        raise RequestError(f"{base} is not a BPE model; the scores of other kinds cannot be extended")
    if only not in ("han", "all"):
        raise RequestError(f"--only {only}: use han or all")
    new = _new_pieces(old, read_model(other), only)
    data = base.read_bytes() + b"".join(map(encode_piece, new))
    data = with_settings(data, vocab_size=len(old.pieces) + len(new))
    plan = ExpansionPlan(
        base_sha256=hashlib.sha256(base.read_bytes()).hexdigest(),
        sha256=hashlib.sha256(data).hexdigest(),
        old_vocab_size=len(old.pieces),
        vocab_size=len(old.pieces) + len(new),
        rows=rows_of_new_pieces(base, len(old.pieces), new),
        unreachable=_unreachable(old, new),
    )
    with write_errors(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(plan_path(output), json.dumps(plan.to_json(), ensure_ascii=False))
        write_whole(output, data)
    return plan


def plan_path(model: Path) -> Path:
    """Where the plan of an extended model is."""
    return model.with_suffix(".plan.json")


def _new_pieces(old: SentencePieceModel, other: SentencePieceModel, only: str) -> list[Piece]:
    known = {piece.text for piece in old.pieces}
    wanted = dict.fromkeys(
        piece.text
        for piece in other.pieces
        if piece.type == NORMAL and piece.text not in known and (only == "all" or HAN.search(piece.text))
    )
    lowest = int(min(piece.score for piece in old.pieces)) - 1
    return [Piece(text, float(lowest - index)) for index, text in enumerate(wanted)]


def rows_of_new_pieces(base: Path, first_id: int, new: Sequence[Piece]) -> list[NewRow]:
    """What the old model cuts each new piece into, without the `▁` it would put in front."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=with_settings(base.read_bytes(), dummy_prefix=False))
    cut = [processor.encode(piece.text.replace(SPACE, " ")) for piece in new]
    return [NewRow(first_id + index, piece.text, ids) for index, (piece, ids) in enumerate(zip(new, cut, strict=True))]


def _unreachable(old: SentencePieceModel, new: list[Piece]) -> list[int]:
    """BPE makes a piece by joining two, so one longer than a character needs two halves that are made themselves."""
    reachable = {piece.text for piece in old.pieces if piece.type == NORMAL}
    missing = []
    for index in sorted(range(len(new)), key=lambda index: len(new[index].text)):
        text = new[index].text
        halves = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        if len(text) == 1 or any(left in reachable and right in reachable for left, right in halves):
            reachable.add(text)
        else:
            missing.append(len(old.pieces) + index)
    return sorted(missing)


def expanded_rows(old_weight: Any, old_vocab_size: int, rows: Sequence[NewRow]) -> Any:
    """A weight [old_vocab_size, …] (numpy or torch) with further rows: old ones copied, new ones means of old ones.

    Rows behind `old_vocab_size` (padding) are dropped.

    Raises:
        RequestError: there are too few.
    """
    if old_weight.shape[0] < old_vocab_size:
        raise RequestError(f"a weight of {old_weight.shape[0]} rows cannot hold the {old_vocab_size} old pieces")
    shape = (old_vocab_size + len(rows), *old_weight.shape[1:])
    torch_like = hasattr(old_weight, "new_empty")
    weight = old_weight.new_empty(shape) if torch_like else np.empty(shape, old_weight.dtype)
    weight[:old_vocab_size] = old_weight[:old_vocab_size]
    for row in rows:
        weight[row.id] = old_weight[row.replaces].mean(0)
    return weight
