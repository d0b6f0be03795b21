"""Our tokenizer as a Hugging Face folder whose `AutoTokenizer` gives exactly the same ids.

SentencePiece BPE and the `tokenizers` library merge alike but store it differently: SentencePiece gives each piece a
score and joins, among all neighbours whose union is a piece, the best-scored and then leftmost; `tokenizers` ranks
*pairs*.  So every way to split a piece into two pieces becomes a pair, ranked by (-score, id) of the piece it makes.
Around that: unknown characters become bytes, `▁` stands for spaces and one is put in front, no other normalisation and
no splitting before the merges.

The folder says `split_special_tokens`: a text that contains `</s>` is text there too, as it is in SentencePiece.  Who
formats chats by hand and wants such words read as special tokens gives `from_pretrained` the argument
`split_special_tokens=False`.
"""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from engine.data.sentencepiece_model import (
    BPE,
    CONTROL,
    NORMAL,
    SPACE,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    SentencePieceModel,
)
from engine.data.tokenizer import (
    END_OF_DOCUMENT,
    ByteTokenizer,
    HuggingFaceTokenizer,
    SentencePieceTokenizer,
    TiktokenTokenizer,
    Tokenizer,
)
from engine.data.tokenizer_tiktoken import byte_names
from engine.errors import DataError

Json = dict[str, Any]
HF_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export_hf_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json for `AutoTokenizer.from_pretrained`.

    Raises:
        DataError: the SentencePiece model has no exact counterpart (unigram, spaces as suffixes, user symbols).
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if isinstance(tokenizer, SentencePieceTokenizer):
        _refuse_inexact(tokenizer.model, tokenizer.path)
        _write(directory, sentencepiece_json(tokenizer.model), _special_pieces(tokenizer))
    elif isinstance(tokenizer, ByteTokenizer):
        _write(directory, byte_json(), {"eos_token": END_OF_DOCUMENT})
    elif isinstance(tokenizer, TiktokenTokenizer):
        _write(directory, tokenizer.tokenizer_json, tokenizer.named_specials)
        _copy(tokenizer.path.parent, directory, ("chat_template.jinja",))
    elif isinstance(tokenizer, HuggingFaceTokenizer):
        _copy(tokenizer.path.parent, directory)


def _refuse_inexact(model: SentencePieceModel, path: Path) -> None:
    reasons = {
        "it is not a BPE model": model.model_type != BPE,
        "it puts spaces behind words": model.space_as_suffix,
        "it does not write spaces as ▁": not model.escape_spaces,
        "it has user-defined symbols": any(piece.type == USER_DEFINED for piece in model.pieces),
    }
    for reason, holds in reasons.items():
        if holds:
            raise DataError(f"{path} has no exact Hugging Face counterpart: {reason}")


def _special_pieces(tokenizer: SentencePieceTokenizer) -> dict[str, str]:
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eod_id, "pad_token": tokenizer.pad_id}
    named = {key: tokenizer.model.pieces[token_id].text for key, token_id in ids.items() if token_id is not None}
    unknown = next(piece.text for piece in tokenizer.model.pieces if piece.type == UNKNOWN)
    return {**named, "unk_token": unknown}


def sentencepiece_json(model: SentencePieceModel) -> Json:
    """`tokenizer.json` of a SentencePiece BPE model."""
    pieces = model.pieces
    unknown = next(piece.text for piece in pieces if piece.type == UNKNOWN)
    special = [(index, piece.text) for index, piece in enumerate(pieces) if piece.type in (CONTROL, UNKNOWN)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(index, text) for index, text in special],
        "normalizer": {"type": "Sequence", "normalizers": _normalizers(model)},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.dummy_prefix else []),
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": model.byte_fallback,
            "ignore_merges": False,
            "vocab": {piece.text: index for index, piece in enumerate(pieces)},
            "merges": ranked_merges(model),
        },
    }


def ranked_merges(model: SentencePieceModel) -> list[tuple[str, str]]:
    """Every pair of pieces whose union is a piece, best union first; of the splits of one piece, longest left first."""
    usable = {piece.text for piece in model.pieces if piece.type == NORMAL}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for index, piece in enumerate(model.pieces):
        if piece.type not in (NORMAL, UNUSED):
            continue
        for cut in range(len(piece.text) - 1, 0, -1):
            left, right = piece.text[:cut], piece.text[cut:]
            if left in usable and right in usable:
                ranked.append((-piece.score, index, len(ranked), (left, right)))
    return [pair for *_, pair in sorted(ranked)]


def _normalizers(model: SentencePieceModel) -> list[Json]:
    steps: list[Json] = []
    if model.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(model.charsmap).decode()})
    if model.remove_extra_spaces:  # spaces only: the library's own Strip would take line ends too
        steps.append({"type": "Replace", "pattern": {"Regex": r"\A +| +\z"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.dummy_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def byte_json() -> Json:
    """`tokenizer.json` of the byte tokenizer: GPT-2's printable stand-ins for bytes, and no merges."""
    names = {name: byte for byte, name in enumerate(byte_names())}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added_token(256, END_OF_DOCUMENT)],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
        "model": {"type": "BPE", "vocab": {**names, END_OF_DOCUMENT: 256}, "merges": []},
    }


def _added_token(index: int, text: str) -> Json:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **plain, "special": True}


def _write(directory: Path, tokenizer_json: Json, special: dict[str, str]) -> None:
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**30,
    }
    _dump(directory / "tokenizer.json", tokenizer_json)
    _dump(directory / "tokenizer_config.json", config)
    _dump(directory / "special_tokens_map.json", special)


def _copy(source: Path, directory: Path, names: tuple[str, ...] = HF_FILES) -> None:
    for name in names:
        if (source / name).exists() and (source / name).resolve() != (directory / name).resolve():
            shutil.copyfile(source / name, directory / name)


def _dump(path: Path, value: Json) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1), encoding="utf-8")
