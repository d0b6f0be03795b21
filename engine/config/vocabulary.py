"""How many tokens a tokenizer knows, read off its file: what `model.vocab_size` is when nobody gives it."""

from __future__ import annotations

import json
from pathlib import Path

import sentencepiece

from engine.errors import ConfigError

BYTE_VOCABULARY = 257                                        # 256 bytes and the end of a document


def tokenizer_vocab_size(spec: str) -> int | None:
    """The size of a `.model`, a `tokenizer.json` (or its folder) or `bytes`; None where there is no such file here.

    Raises:
        ConfigError: the file is there and is no tokenizer.
    """
    if spec == "bytes":
        return BYTE_VOCABULARY
    path = Path(spec)
    try:
        if path.is_dir():
            path = next((path / name for name in ("tokenizer.json", "tokenizer.model") if (path / name).exists()), path)
        if not path.is_file():
            return None
        return _json_size(path) if path.suffix == ".json" else _sentencepiece_size(path)
    except RecursionError:
        raise ConfigError(f"data.tokenizer {spec} cannot be read as a tokenizer: nested too deeply") from None
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OSError) as error:
        raise ConfigError(f"data.tokenizer {spec} cannot be read as a tokenizer: {error!s:.300}") from None


def _sentencepiece_size(path: Path) -> int:
    return sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size()


def _json_size(path: Path) -> int:
    """Largest id + 1; added tokens may lie behind the model's own, or leave gaps."""
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]                 # BPE: piece -> id; unigram: a list of (piece, score)
    ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
    return 1 + max([*ids, *(token["id"] for token in tokenizer.get("added_tokens", []))])
