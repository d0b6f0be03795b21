"""Adapters in PEFT's format and back: `adapter_config.json` and `adapter_model.safetensors`.

PEFT has an A [rank, in] and a B [out, rank] for each projection, under the name of the Hugging Face module; ours are
the same numbers with the A's of one layer in one tensor, and B in the shape of its rows of the weight
(`engine.model.adapter`):

    base_model.model.model.layers.3.self_attn.q_proj.lora_A.weight    layers.3.self_attention.linear_qkv.lora_a  [0]
    base_model.model.model.layers.3.self_attn.q_proj.lora_B.weight    layers.3.self_attention.linear_qkv.lora_b.q_proj

Both multiply by alpha / rank.  PEFT's `use_rslora`, which divides by the root of the rank, is another alpha.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from checkpoints_tools.check import require_finite
from checkpoints_tools.hf_files import SafetensorsFile, Whole
from checkpoints_tools.hf_values import Settings
from checkpoints_tools.names import PREFIX, Part, Shape, hf_parts
from checkpoints_tools.output import committed
from checkpoints_tools.recognise import ADAPTER, instead
from checkpoints_tools.source import model_config, require_shapes
from engine.checkpoint.adapted import BASE, Base, adapter_config
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry, write_shard
from engine.checkpoint.stream import write_checkpoint
from engine.config import AdapterConfig, ModelConfig
from engine.distributed.boxes import Box
from engine.errors import CheckpointError
from engine.model.adapter import SCORE, attach_adapters
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from engine.reading import read_object

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What PEFT saves beside an adapter of the head: the model's own weights, as they were.
COPIES = {"base_model.model.lm_head.base_layer.weight": "output_layer.weight", "base_model.model.lm_head.weight":
          "output_layer.weight", "base_model.model.model.embed_tokens.weight": "embedding.weight"}
MODULE, THEIR_SCORE = "base_model.model.", "base_model.model.score.weight"
# What changes the meaning of the numbers, and that we do not have.
REFUSED = ("use_dora", "fan_in_fan_out", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
           "trainable_token_indices", "target_parameters", "alora_invocation_tokens")


@dataclass(frozen=True)
class Pair:
    """A and B of one projection, under both names.

    Attributes:
        index: of its A among those of the layer.
        rows: shape of B here.
    """

    a: str
    index: int
    b: str
    rows: Shape
    module: str
    outputs: int
    inputs: int

    def theirs(self, rank: int) -> dict[str, Shape]:
        return {f"{self.module}.lora_A.weight": (rank, self.inputs), f"{self.module}.lora_B.weight":
                (self.outputs, rank)}


def pairs_of(config: ModelConfig, adapter: AdapterConfig) -> list[Pair]:
    """Every adapted projection of a model, layer by layer."""
    parts = {ours: {part.name.split(".")[-2]: part for part in found} for ours, found in hf_parts(config).items()}
    with torch.device("meta"):
        model = Transformer(config)
    attach_adapters(model, adapter)
    specs = [spec_of(parameter) for parameter in model.parameters() if parameter.requires_grad]
    found: list[Pair] = []
    for spec in specs:
        layer, is_b, name = spec.name.partition(".lora_b.")
        if is_b:
            part: Part = parts[f"{layer}.weight"][name]
            index = sum(pair.a == f"{layer}.lora_a" for pair in found)
            found.append(Pair(f"{layer}.lora_a", index, spec.name, spec.shape,
                              MODULE + part.name.removesuffix(".weight"), part.shape[0], part.shape[1]))
    return found


def convert_to_peft(reader: CheckpointReader, output: Path, base_name: str | None = None) -> int:
    """Writes the adapter of a checkpoint as a folder that PEFT reads.

    Args:
        reader: of the adapter alone.
        base_name: the model under it as `transformers` will find it; None: whoever loads it gives the model.

    Returns:
        How many projections have an adapter.

    Raises:
        CheckpointError: it has none, or `output` is there already or cannot be written.
    """
    if BASE not in reader.metadata:
        raise CheckpointError(f"{reader.path} holds a whole model and no adapter; `octant convert to-hf` writes it")
    config, adapter = model_config(reader.metadata, reader.path), adapter_config(reader.metadata, reader.path)
    tensors: dict[str, torch.Tensor] = {}
    pairs = pairs_of(config, adapter)
    for pair in pairs:
        a, b = (reader.read(PREFIX + name).float() for name in (pair.a, pair.b))
        tensors |= zip(pair.theirs(adapter.rank), (a[pair.index], b.flatten(0, -2)), strict=True)
    if config.head == "score":
        tensors[THEIR_SCORE] = reader.read(PREFIX + SCORE).float()
    entries = [Whole.of(name, tensor.shape, torch.float32) for name, tensor in tensors.items()]
    with committed(output, sum(entry.num_bytes for entry in entries)) as folder, ThreadPoolExecutor(2) as pool:
        folder.mkdir()
        text = json.dumps(_their_config(config, adapter, pairs, base_name), indent=2)
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        write_shard(folder / WEIGHTS, entries, lambda entry: require_finite(tensors[entry.key], entry.key, reader.path),
                    pool, lambda _: None)
    return len(pairs)


def _their_config(config: ModelConfig, adapter: AdapterConfig, pairs: Sequence[Pair],
                  base_name: str | None) -> dict[str, Any]:
    alpha = int(adapter.alpha) if adapter.alpha.is_integer() else adapter.alpha
    score = config.head == "score"
    return {"peft_type": "LORA", "task_type": "SEQ_CLS" if score else "CAUSAL_LM", "base_model_name_or_path": base_name,
            "r": adapter.rank, "lora_alpha": alpha, "lora_dropout": adapter.dropout, "bias": "none",
            "target_modules": sorted({pair.module.rpartition(".")[2] for pair in pairs}), "fan_in_fan_out": False,
            "modules_to_save": ["score"] if score else None, "inference_mode": True}


def convert_from_peft(folder: Path, base: CheckpointReader, output: Path) -> AdapterConfig:
    """Writes an adapter of PEFT as a checkpoint, at step 0, on top of one of ours.

    Args:
        base: the model that it was trained on.

    Raises:
        CheckpointError: it is no adapter, one of another kind or for another model, damaged, or `output` is there
            already or cannot be written.
    """
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is not {ADAPTER.what}: {instead(folder, ADAPTER)}")
    file = SafetensorsFile(_weights_in(folder))
    model = model_config(base.metadata, base.path)
    adapter = _our_config(folder, file)
    if THEIR_SCORE in file.tensors:
        model = model.model_copy(update={"head": "score", "tie_embeddings": False})
    pairs = pairs_of(model, adapter)
    expected = {name: shape for pair in pairs for name, shape in pair.theirs(adapter.rank).items()}
    expected |= {THEIR_SCORE: (1, model.hidden_size)} if model.head == "score" else {}
    require_shapes(expected, {name: shape for name, (_, shape) in file.tensors.items() if name not in COPIES}, folder)
    _require_same(file, base, folder)
    tensors = {name: require_finite(file.read(name).float(), name, folder) for name in expected}
    ours = dict(_joined(pairs, tensors))
    if model.head == "score":
        ours[SCORE] = tensors[THEIR_SCORE]
    entries = [Entry(PREFIX + name, tuple(tensor.shape), Box.whole(tuple(tensor.shape)), torch.float32)
               for name, tensor in ours.items()]
    below = base.metadata.get("config") or {}
    metadata = {"config": {"model": model.model_dump(mode="json"), "adapter": adapter.model_dump(mode="json"),
                           "data": {"tokenizer": (below.get("data") or {}).get("tokenizer")}},
                "data": base.metadata.get("data") or {}, "end_ids": list(base.end_ids), BASE: Base.of(base).metadata()}
    with committed(output, sum(entry.num_bytes for entry in entries)) as place:
        write_checkpoint(place, 0, metadata, [entries], lambda entry: ours[entry.key.removeprefix(PREFIX)])
    return adapter


def _require_same(file: SafetensorsFile, base: CheckpointReader, folder: Path) -> None:
    """
    Raises:
        CheckpointError: the adapter brings weights of the model along, and they are not those of `base`.
    """
    for name in file.tensors.keys() & COPIES.keys():
        theirs = file.read(name)
        below = base.read(PREFIX + COPIES[name]).to(theirs.dtype)
        if not torch.equal(theirs, below):
            raise CheckpointError(f"{folder} holds another {name.removeprefix(MODULE)} than {base.path}: the model was "
                                  "changed before the adapter was trained; merge both with PEFT (merge_and_unload) and "
                                  "convert what save_pretrained writes")


def _joined(pairs: Sequence[Pair], tensors: dict[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    for name in dict.fromkeys(pair.a for pair in pairs):
        yield name, torch.stack([tensors[f"{pair.module}.lora_A.weight"] for pair in pairs if pair.a == name])
    for pair in pairs:
        yield pair.b, tensors[f"{pair.module}.lora_B.weight"].reshape(pair.rows)


def _weights_in(folder: Path) -> Path:
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}: load it with PEFT and save it again with save_pretrained")
    return folder / WEIGHTS


def _our_config(folder: Path, file: SafetensorsFile) -> AdapterConfig:
    """Rank and alpha as the configuration says, targets as the tensors are called."""
    path = folder / CONFIG
    found = Settings(path, read_object(path, "the configuration of an adapter", CheckpointError))
    if found.get("peft_type") != "LORA":
        raise found.refuse("peft_type", "and Octant's adapters are LORA")
    if found.get("bias") not in (None, "none"):
        raise found.refuse("bias", "and Octant's adapters leave biases alone")
    for key in REFUSED:
        if found.get(key):
            raise found.refuse(key, "which Octant's adapters do not have")
    rank, alpha = found.count("r"), found.number("lora_alpha")
    if found.flag("use_rslora"):
        alpha *= rank ** 0.5
    targets = sorted({name.split(".")[-3] for name in file.tensors if name.endswith(".lora_A.weight")})
    try:
        return AdapterConfig(rank=rank, alpha=alpha, dropout=found.get("lora_dropout") or 0.0, targets=tuple(targets))
    except ValidationError as error:
        problems = "; ".join(f"{e['loc'][0]}: {e['msg'].removeprefix('Value error, ')}" for e in error.errors())
        raise CheckpointError(f"{folder} is no adapter that Octant has: {problems}") from None
