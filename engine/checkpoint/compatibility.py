"""May this run go on from that checkpoint?  What differs, and whether it changes the meaning.

Another layout, learning rate, batch or corpus is the user's right: it is noted.  Another model shape cannot be loaded;
another RoPE base or tokenizer loads and quietly means something else.  So every key of the model is refused but the few
that are known to be harmless: one that is added to the configuration tomorrow is guarded today.  The tokenizer is
compared by the fingerprint of its content where both sides have one, because a path says nothing.

Both sides are the `metadata` of a checkpoint: `{"config": {section: {key: value}}, "data": {"tokenizer": fingerprint,
…}}`. Sections or keys that one side does not have are not compared: a converted model has no optimizer settings.  A key
of the model that a checkpoint does not have is one that its version did not know, and means the default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.config import ModelConfig
from engine.data.tokenizer_identity import END_OF_DOCUMENT, TOKENIZER
from engine.errors import CheckpointError
from engine.reading import shown

HARMLESS = frozenset({"model.max_seq_len", "model.init_std", "model.init_output"})
# What a run that takes the weights and nothing else may change.
STRETCHABLE = HARMLESS | {"model.rope_theta", "model.rope_scaling", "model.norm_eps"}
# A score in place of the language model's head is new; what is left out with that may have been the embedding.
HEAD, NEW_SCORE = "model.head", frozenset({"model.head", "model.tie_embeddings"})
# What an adapter's numbers mean; the rest of it is how it is trained.
ADAPTER = frozenset({"adapter.rank", "adapter.alpha", "adapter.targets"})
VOCABULARY = "model.vocab_size"
EXTENDED = "\nwhere the tokenizer is the model's own and more pieces: octant convert extend-vocab gives them rows first"
UNKNOWN = "a key that this version does not know"
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
        return f"{self.key}: {shown(self.saved)} in the checkpoint, {shown(self.current)} now"


def differences(saved: Mapping[str, Any], current: Mapping[str, Any], weights_only: bool = False) -> list[Difference]:
    """What differs between a checkpoint's metadata and the run's.

    Args:
        weights_only: the run takes the weights and nothing else, so it may stretch RoPE, end texts with another
            token, as chats do, and give a language model a score for its head; another model otherwise, or another
            tokenizer, is refused.  An adapter is part of the weights then.
    """
    allowed = STRETCHABLE if weights_only else HARMLESS
    identity = {TOKENIZER} if weights_only else {TOKENIZER, END_OF_DOCUMENT}
    before, now = _flat(saved.get("config") or {}), _flat(current.get("config") or {})
    if weights_only:
        before = {key: value for key, value in before.items() if not key.startswith("adapter")}
        if (before.get(HEAD, "language_model"), now.get(HEAD)) == ("language_model", "score"):
            allowed |= NEW_SCORE
    if any(key.startswith("model.") for key in before) and any(key.startswith("model.") for key in now):
        before, now = _whole_model(before, now), _whole_model(now, before)
    refusable = ADAPTER | {key for key in before if key.startswith("model.")}
    found = [Difference(key, before[key], now[key], key in refusable and key not in allowed)
             for key in before if key in now and before[key] != now[key] and not key.startswith(IRRELEVANT)]
    old, new = (side.get("data") or {} for side in (saved, current))
    if old.get(TOKENIZER) is None or new.get(TOKENIZER) is None:
        return found
    found = [difference for difference in found if difference.key != TOKENIZER_PATH]
    found += [Difference(f"data fingerprint, {key}", old[key], new[key], key in identity)
              for key in old if key in new and old[key] != new[key]]
    return found


def require_compatible(saved: Mapping[str, Any], current: Mapping[str, Any], where: Path,
                       weights_only: bool = False) -> list[Difference]:
    """The differences that are allowed, to be noted; the checkpoint is at `where`.

    Raises:
        CheckpointError: there are others; all are listed.
    """
    found = differences(saved, current, weights_only)
    refused = [difference for difference in found if difference.refused]
    if refused:
        larger = any(each.key in (VOCABULARY, f"data fingerprint, {TOKENIZER}") for each in refused)
        raise CheckpointError(f"{where} is of another model, or of another tokenizer; use its values, or start a new "
                              "run:\n  " + "\n  ".join(map(str, refused)) + EXTENDED * larger)
    return found


def _whole_model(flat: dict[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """With every key of the model that `other` has: the default where it is not there, if there is one."""
    added: dict[str, Any] = {}
    for key in other:
        if key.startswith("model.") and key not in flat:
            known = ModelConfig.model_fields.get(key.removeprefix("model."))
            if known is None:
                added[key] = UNKNOWN
            elif not known.is_required() and known.default_factory is None:
                added[key] = known.default
    return flat | added


def _flat(config: Mapping[str, Any]) -> dict[str, Any]:
    """`{"model": {"num_layers": 2}, "steps": 10}` → `{"model.num_layers": 2, "steps": 10}`: two levels, no deeper."""
    flat: dict[str, Any] = {}
    for section, values in config.items():
        if isinstance(values, Mapping):
            flat |= {f"{section}.{key}": value for key, value in values.items()}
        else:
            flat[section] = values
    return flat
