"""The part of SentencePiece's `.model` file we need, read and written without protobuf.

A `.model` is one protobuf message.  On the wire a message is a list of fields: a varint key `number << 3 | wire`, then
a varint (wire 0), eight bytes (1), a length and that many bytes (2), or four bytes (5).  Repeated fields are simply
repeated, wherever they stand; for a scalar the last one wins.  Two useful things follow: reading takes twenty lines,
and *appending an encoded piece to the bytes appends it to the vocabulary*, which is how one model's pieces are added to
another's (`tokenizer_extend`).

Field numbers and defaults: sentencepiece_model.proto (github.com/google/sentencepiece, Apache-2.0).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from engine.errors import DataError
from engine.reading import read_bytes

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types
BPE = 2  # model types: 1 unigram, 2 BPE, 3 word, 4 character
SPACE = "\u2581"  # ▁, SentencePiece's mark for a space

LONGEST_VARINT_BITS = 70

WireValue = int | bytes


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its index is its id.  Scores of a BPE model are minus the rank of the merge."""

    text: str
    score: float
    type: int = NORMAL


@dataclass(frozen=True)
class SentencePieceModel:
    """What decides how a text is cut, as stored in the file."""

    pieces: tuple[Piece, ...]
    model_type: int
    byte_fallback: bool
    space_as_suffix: bool
    charsmap: bytes  # compiled character normalisation; empty: identity
    dummy_prefix: bool
    remove_extra_spaces: bool
    escape_spaces: bool

    @property
    def normalises_nothing(self) -> bool:
        """True when the only change to the text is `▁` for each space and one `▁` in front, as in LLaMA."""
        return not self.charsmap and self.dummy_prefix and not self.remove_extra_spaces and self.escape_spaces


def read_model(path: str | Path) -> SentencePieceModel:
    """Read a `.model` file.

    Raises:
        DataError: it is missing, damaged or no SentencePiece model.
    """
    return open_model(path).model


@dataclass(frozen=True)
class OpenedModel:
    """A `.model` file that SentencePiece has accepted: its bytes, what they say, and what cuts texts with them."""

    data: bytes
    model: SentencePieceModel
    processor: sentencepiece.SentencePieceProcessor


def open_model(path: str | Path) -> OpenedModel:
    """Read a `.model` file once and hand it to SentencePiece.

    Raises:
        DataError: it is missing, damaged or no SentencePiece model.
    """
    path = Path(path)
    try:
        data = read_bytes(path)
        model = parse_model(data)
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
        if processor.get_piece_size() != len(model.pieces):
            raise ValueError(f"{len(model.pieces)} pieces, of which SentencePiece reads {processor.get_piece_size()}")
    except OSError as error:
        raise DataError(f"cannot read tokenizer {path}: {error.strerror or error}") from error
    except (ValueError, IndexError, struct.error, RuntimeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path} is not a SentencePiece model, or is damaged ({reason})") from error
    return OpenedModel(data, model, processor)


def parse_model(data: bytes) -> SentencePieceModel:
    """Bytes of a `.model` -> its pieces and settings (see `SentencePieceModel`)."""
    pieces: list[Piece] = []
    trainer: dict[int, WireValue] = {}
    normalizer: dict[int, WireValue] = {}
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_parse_piece(_bytes(value)))
        elif number == 2:
            trainer.update(_fields(_bytes(value)))
        elif number == 3:
            normalizer.update(_fields(_bytes(value)))
    if not pieces:
        raise ValueError("no pieces")
    return SentencePieceModel(
        pieces=tuple(pieces),
        model_type=_number(trainer.get(3, 1)),
        byte_fallback=bool(_number(trainer.get(35, 0))),
        space_as_suffix=bool(_number(trainer.get(24, 0))),
        charsmap=_bytes(normalizer.get(2, b"")),
        dummy_prefix=bool(_number(normalizer.get(3, 1))),
        remove_extra_spaces=bool(_number(normalizer.get(4, 1))),
        escape_spaces=bool(_number(normalizer.get(5, 1))),
    )


def parse_cut(data: bytes) -> list[tuple[int, int]]:
    """A text in pieces, as the library serializes it: (id, the byte of the text at which it ends)."""
    pieces = (dict(_fields(_bytes(value))) for number, value in _fields(data) if number == 2)
    return [(_number(piece.get(2, 0)), _number(piece.get(5, 0))) for piece in pieces]


def encode_piece(piece: Piece) -> bytes:
    """One `pieces` entry as it stands in the file; appended to a model's bytes it becomes the next id."""
    text = piece.text.encode()
    body = b"\x0a" + _varint(len(text)) + text + b"\x15" + struct.pack("<f", piece.score)
    if piece.type != NORMAL:
        body += b"\x18" + _varint(piece.type)
    return _nested(1, body)


def with_settings(data: bytes, *, vocab_size: int | None = None, dummy_prefix: bool | None = None) -> bytes:
    """A model's bytes with settings replaced: added at the end of the message they belong to, where they win."""
    added = {
        2: b"" if vocab_size is None else b"\x20" + _varint(vocab_size),  # trainer_spec.vocab_size
        3: b"" if dummy_prefix is None else b"\x18" + _varint(dummy_prefix),  # normalizer_spec.add_dummy_prefix
    }
    out, start = bytearray(), 0
    for number, value, end in _fields_until(data):
        if added.get(number):
            out += _nested(number, _bytes(value) + added[number])
        else:
            out += data[start:end]
        start = end
    return bytes(out)


def _nested(number: int, body: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def _parse_piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = struct.unpack("<f", _bytes(fields.get(2, b"\0\0\0\0")))[0]
    piece = Piece(_bytes(fields.get(1, b"")).decode(), score, _number(fields.get(3, NORMAL)))
    if not piece.text or not math.isfinite(score) or not NORMAL <= piece.type <= BYTE:
        raise ValueError(f"{piece} is no piece")
    return piece


def _bytes(value: WireValue) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("a number where bytes were expected")
    return value


def _number(value: WireValue) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes where a number was expected")
    return value


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[position]
        position += 1
        if shift >= LONGEST_VARINT_BITS:
            raise ValueError("a number of more than ten bytes")
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def _fields(data: bytes) -> Iterator[tuple[int, WireValue]]:
    """Each field of a message as (number, value): an int for varints, the raw bytes for everything else."""
    return ((number, value) for number, value, _ in _fields_until(data))


def _fields_until(data: bytes) -> Iterator[tuple[int, WireValue, int]]:
    """`_fields`, and the offset at which each ends."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, position = _read_varint(data, position)
            yield number, value, position
            continue
        if wire == 2:
            size, position = _read_varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        position += size
        if position > len(data):
            raise ValueError("the file ends inside a field")
        yield number, data[position - size : position], position
