"""How many tokens a tokenizer knows, read off its file: what `model.vocab_size` is when nobody gives it."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece

from engine.config.tiktoken import is_tiktoken, read_tiktoken
from engine.errors import ConfigError

BYTE_VOCABULARY = 257                                        # 256 bytes and the end of a document


def tokenizer_vocab_size(spec: str) -> int | None:
    """The size of a `.model`, `.tiktoken` or `tokenizer.json`, of their folder or `bytes`; None where there is none.

    Raises:
        ConfigError: the file is there and is no tokenizer.
    """
    if spec == "bytes":
        return BYTE_VOCABULARY
    try:
        path = tokenizer_file(Path(spec))
        if not path.is_file():
            return None
        if is_tiktoken(path):
            return read_tiktoken(path).vocab_size
        return _json_size(path) if path.suffix == ".json" else _sentencepiece_size(path)
    except RecursionError:
        raise ConfigError(f"data.tokenizer {spec} cannot be read as a tokenizer: nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ConfigError(f"data.tokenizer {spec} cannot be read as a tokenizer: {error!s:.300}") from None


def tokenizer_file(path: Path) -> Path:
    """What a folder's tokenizer is read from; any other path as it is."""
    if not path.is_dir():
        return path
    names = (*(path / name for name in ("tokenizer.json", "tokenizer.model")), *sorted(path.glob("*.tiktoken")))
    return next((name for name in names if name.exists()), path)


def _sentencepiece_size(path: Path) -> int:
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


def _json_size(path: Path) -> int:
    """Largest id + 1; added tokens may lie behind the model's own, or leave gaps."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]                 # BPE: piece -> id; unigram: a list of (piece, score)
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*ids, *(token["id"] for token in tokenizer.get("added_tokens", []))])
