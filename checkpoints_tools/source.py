"""The model inside one of our checkpoints: its section of the configuration, its tokenizer, its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from checkpoints_tools.names import PREFIX, Shape, parameter_shapes
from engine.checkpoint.read import CheckpointReader
from engine.config import ModelConfig
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.data.tokenizer_identity import recorded_tokenizer
from engine.errors import CheckpointError, DataError

NO_TOKENIZER = "none"


@dataclass(frozen=True)
class Source:
    """A checkpoint whose model was found to be all there."""

    reader: CheckpointReader
    config: ModelConfig

    @staticmethod
    def of(reader: CheckpointReader) -> Source:
        """
        Raises:
            CheckpointError: the checkpoint has no model section, or not exactly that model's parameters.
        """
        config = model_config(reader.metadata, reader.path)
        require_shapes(parameter_shapes(config), {key.removeprefix(PREFIX): reader.global_shape(key)
                                                  for key in reader.keys() if key.startswith(PREFIX)}, reader.path)
        return Source(reader, config)

    def read(self, parameter: str, dtype: torch.dtype) -> torch.Tensor:
        """A whole parameter, rounded to `dtype`."""
        return self.reader.read(PREFIX + parameter).to(dtype)


def model_config(metadata: dict[str, Any], path: Path) -> ModelConfig:
    """The model section that a checkpoint was saved with."""
    try:
        return ModelConfig.model_validate(metadata["config"]["model"])
    except (KeyError, TypeError, ValidationError) as error:
        raise CheckpointError(f"{path} does not say which model it holds: {error}") from None


def require_shapes(expected: dict[str, Shape], found: dict[str, Shape], where: Path) -> None:
    """Both sides must have the same tensors, of the same shapes.

    Raises:
        CheckpointError: the first few of each kind of difference, and how many there are.
    """
    problems = [_some("missing", [name for name in expected if name not in found]),
                _some("unknown to Octant", [name for name in found if name not in expected]),
                _some("of another shape", [f"{name} {list(found[name])} instead of {list(shape)}"
                                           for name, shape in expected.items() if found.get(name, shape) != shape])]
    if any(problems):
        raise CheckpointError(f"{where} does not hold the model that its configuration describes: "
                              + "; ".join(filter(None, problems)))


def _some(what: str, names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{len(names)} tensors {what}: {', '.join(names[:3])}{more}"


def tokenizer_of(source: Source, spec: str | None) -> Tokenizer | None:
    """The tokenizer the model was trained with.

    Args:
        spec: where it is now; None: where the checkpoint says; `none`: go without.

    Raises:
        DataError: it is not there, or is another than the run's, or has more ids than the model.
    """
    metadata = source.reader.metadata
    spec = spec or (metadata["config"].get("data") or {}).get("tokenizer")
    if spec is None or spec == NO_TOKENIZER:
        return None
    try:
        tokenizer = load_tokenizer(spec)
    except DataError as error:
        raise DataError(f"{error}\n  --tokenizer PATH says where it is now, --tokenizer none goes without") from None
    trained_with = recorded_tokenizer(metadata.get("data") or {})
    if trained_with is not None and (difference := tokenizer.info.difference(trained_with)):
        raise DataError(f"{spec} is not the tokenizer this model was trained with ({difference}): its ids mean "
                        "something else\n"
                        "  --tokenizer PATH names the right one, --tokenizer none goes without")
    require_ids(tokenizer, source.config, spec)
    return tokenizer


def require_ids(tokenizer: Tokenizer, config: ModelConfig, spec: object) -> None:
    """
    Raises:
        DataError: the tokenizer gives ids that the model has no embedding for.
    """
    if tokenizer.vocab_size > config.vocab_size:
        raise DataError(f"the tokenizer {spec} has {tokenizer.vocab_size:,} ids, the model {config.vocab_size:,}: it is"
                        " another model's, or the model's vocabulary was not extended with it (octant convert "
                        "extend-vocab)\n"
                        "  --tokenizer PATH names the right one, --tokenizer none goes without")
