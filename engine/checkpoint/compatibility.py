"""May this run go on from that checkpoint?  What differs, and whether it changes the meaning.

Another layout, learning rate, batch or corpus is the user's right: it is noted.  Another model shape cannot be loaded;
another RoPE base or tokenizer loads and quietly means something else, so both are refused.  The tokenizer is compared
by the fingerprint of its content where both sides have one, because a path says nothing.

Both sides are the `metadata` of a checkpoint: `{"config": {section: {key: value}}, "data": {"tokenizer": fingerprint,
…}}`. Sections or keys that one side does not have are not compared: a converted model has no optimizer settings.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.data.tokenizer_identity import END_OF_DOCUMENT, TOKENIZER
from engine.errors import CheckpointError

SHAPE_KEYS = frozenset(f"model.{name}" for name in (
    "num_layers", "hidden_size", "num_heads", "num_kv_heads", "head_dim", "ffn_hidden_size", "vocab_size",
    "tie_embeddings", "qkv_bias"))
MEANING_KEYS = SHAPE_KEYS | {"model.rope_theta", "model.rope_scaling", "model.norm_eps"}
TOKENIZER_PATH = "data.tokenizer"
IRRELEVANT = ("run.dir", "run.name", "run.device", "checkpoint.", "log.", "eval.", "reliability.")


@dataclass(frozen=True)
class Difference:
    """One value that is not the same in the checkpoint and in the run."""

    key: str
    saved: Any
    current: Any
    refused: bool

    def __str__(self) -> str:
        return f"{self.key}: {self.saved!r} in the checkpoint, {self.current!r} now"


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], weights_only: bool = False) -> list[Difference]:
    """What differs between a checkpoint's metadata and the run's.

    Args:
        weights_only: the run takes the weights and nothing else, so it may stretch RoPE, and end texts with
            another token, as chats do; only shapes and another tokenizer are refused.
    """
    refused = SHAPE_KEYS if weights_only else MEANING_KEYS
    identity = {TOKENIZER} if weights_only else {TOKENIZER, END_OF_DOCUMENT}
    before, now = _flat(saved.get("config") or {}), _flat(current.get("config") or {})
    found = [Difference(key, before[key], now[key], key in refused)
             for key in before if key in now and before[key] != now[key] and not key.startswith(IRRELEVANT)]
    old, new = (side.get("data") or {} for side in (saved, current))
    if old.get(TOKENIZER) is None or new.get(TOKENIZER) is None:
        return found
    found = [difference for difference in found if difference.key != TOKENIZER_PATH]
    found += [Difference(f"data fingerprint, {key}", old[key], new[key], key in identity)
              for key in old if key in new and old[key] != new[key]]
    return found


def require_compatible(saved: Mapping[str, Any], current: Mapping[str, Any], weights_only: bool = False,
                       ) -> list[Difference]:
    """The differences that are allowed, to be noted.

    Raises:
        CheckpointError: there are others; all are listed.
    """
    found = differences(saved, current, weights_only)
    refused = [difference for difference in found if difference.refused]
    if refused:
        raise CheckpointError("the checkpoint is of another model, or of another tokenizer; use its values, or start a "
                              "new run:\n  " + "\n  ".join(map(str, refused)))
    return found


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model": {"num_layers": 2}, "steps": 10}` → `{"model.num_layers": 2, "steps": 10}`: two levels, no deeper."""
    flat: dict[str, Any] = {}
    for section, values in config.items():
        if isinstance(values, Mapping):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat
