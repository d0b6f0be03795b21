"""A checkpoint as a model to use: weights only, in any layout, and the tokenizer they were trained with.

Of the run's configuration only what the weights mean is taken over: the model, the arithmetic, the tokenizer.  How the
run was cut, optimized and fed does not matter here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from engine.checkpoint.adapted import open_model
from engine.checkpoint.read import CheckpointReader
from engine.config import Config, resolve_layout
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.data.tokenizer_identity import recorded_tokenizer
from engine.distributed.mesh import Mesh
from engine.distributed.topology import Topology
from engine.errors import CheckpointError, DataError
from engine.model.flops import count_parameters
from engine.parallel.parallelize import ParallelModel, parallelize

NORM = "model.final_layernorm.weight"                # every model has one, so its dtype stands for all


@dataclass(frozen=True)
class Wanted:
    """What of the configuration is the reader's choice.

    Attributes:
        dtype: of weights and activations, `fp32` or `bf16`; None: as in training, or as stored where nothing says.
        seq_len: tokens per sequence when evaluating; None: as in training.
        micro, num_microbatches: sequences at a time, and how often, per step of an evaluation.
    """

    dtype: str | None = None
    seq_len: int | None = None
    micro: int = 1
    num_microbatches: int = 1


def open_shared(path: str | Path, mesh: Mesh, base: str | None = None) -> CheckpointReader:
    """The checkpoint at `path`, or a run's newest, with what lies under its adapter; the same one on every rank.

    Args:
        base: where the model under the adapter is now; None: where it was.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    return open_model(Path(path), mesh.world.group, base=None if base is None else Path(base))


def inference_config(reader: CheckpointReader, topology: Topology, wanted: Wanted = Wanted()) -> Config:
    """The configuration under which the checkpoint's model runs in this layout.

    Raises:
        CheckpointError: the checkpoint does not say which model it holds.
        ConfigError: the layout or the sequence length is impossible for this model.
    """
    saved: Mapping[str, Any] = reader.metadata.get("config") or {}
    if "model" not in saved:
        raise CheckpointError(f"{reader.path} does not say which model it holds: its metadata have no config.model")
    data = saved.get("data") or {}
    stored = "bf16" if NORM in reader and reader.dtype(NORM) == torch.bfloat16 else "fp32"
    trained = (saved.get("precision") or {}).get("compute")
    seq_len = wanted.seq_len or data.get("seq_len") or saved["model"].get("max_seq_len", 1)
    sizes = {"micro": wanted.micro, "global": wanted.micro * wanted.num_microbatches * topology.data}
    try:
        config = Config.model_validate({
            "model": saved["model"], "steps": 1, "batch": sizes,
            "precision": {"compute": wanted.dtype or trained or stored},
            "parallel": {"tensor": topology.tensor, "pipeline": topology.pipeline, "data": topology.data, "zero": 0,
                         "sequence": False},
            "data": {"tokenizer": data.get("tokenizer"), "seq_len": seq_len,
                     "document_mask": data.get("document_mask", False)},
        })
    except ValidationError as error:
        problems = "; ".join(str(problem["msg"]).removeprefix("Value error, ") for problem in error.errors())
        raise CheckpointError(f"{reader.path} cannot be used as asked: {problems}") from None
    return resolve_layout(config, topology.world_size)


def load_model(reader: CheckpointReader, config: Config, mesh: Mesh) -> ParallelModel:
    """This rank's part of the model with the checkpoint's weights, whatever layout wrote them.

    Raises:
        CheckpointError: they are another model's.
    """
    _require_size(reader, config)
    model = parallelize(config, mesh, training=False)
    reader.load_into(model.weights(), convert=True)
    return model


def _require_size(reader: CheckpointReader, config: Config) -> None:
    """Before memory is taken for a model that is far larger than what is stored; its shapes are compared later.

    A head that scores is smaller than the one that is counted, but no larger than the embedding.
    """
    described = count_parameters(config.model).total
    stored = sum(math.prod(reader.global_shape(key)) for key in reader.keys() if key.startswith("model."))
    if described > 2 * stored:
        raise CheckpointError(f"{reader.path} describes a model of {described:,} parameters and holds {stored:,}")


def load_tokenizer_of(reader: CheckpointReader, spec: str | None = None) -> Tokenizer:
    """The tokenizer the model was trained with.

    Args:
        spec: where it is now; None: where the run found it.

    Raises:
        DataError: it is not there, or is another one.
    """
    metadata = reader.metadata
    spec = spec or _where_it_was(reader)
    try:
        tokenizer = load_tokenizer(spec)
    except DataError as error:
        raise DataError(f"{error}; {reader.path} was trained with it. --tokenizer T says where it is now") from None
    trained_with = recorded_tokenizer(metadata.get("data") or {})
    if trained_with is not None and (difference := tokenizer.info.difference(trained_with)):
        raise DataError(f"{spec} is not the tokenizer this model was trained with ({difference}): its ids mean "
                        "something else; --tokenizer T names the right one")
    return tokenizer


def _where_it_was(reader: CheckpointReader) -> str:
    """The path in the run's configuration, from here or from the folder in which the run was started."""
    config = reader.metadata.get("config") or {}
    spec = (config.get("data") or {}).get("tokenizer")
    if spec is None:
        raise DataError(f"{reader.path}: the run names no tokenizer (data.tokenizer: null); --tokenizer T gives one")
    run_dir = Path((config.get("run") or {}).get("dir", ""))
    run = reader.path.resolve().parent.parent                          # RUN_DIR/checkpoints/step-…
    depth = len(run_dir.parts)
    if spec == "bytes" or Path(spec).exists() or not depth or run.parts[-depth:] != run_dir.parts:
        return str(spec)
    there = Path(*run.parts[:-depth]) / spec
    return str(there if there.exists() else spec)
