"""What somebody gave us instead: formats that look like a model to a person, and the way from each to one we read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import CheckpointError

HUB = re.compile(r"(?:(?:(?:https?:/+)?(?:huggingface|hf)\.co/|hf:/+)([\w.-]+/[\w.-]+).*|([A-Za-z0-9][\w.-]*/[\w.-]+))")


@dataclass(frozen=True)
class Format:
    """A folder that holds all of `marks`, each a glob pattern, is `what`; `way` leads on from there."""

    marks: tuple[str, ...]
    what: str
    way: str


HUGGING_FACE = Format(("config.json",), "a Hugging Face folder", "`octant convert from-hf` reads it")
TORCH_DIST = Format(("metadata.json", ".metadata"), "a torch_dist checkpoint of megatron-core",
                    "`octant convert from-megatron` reads it")
MEGATRON_TOOL = "Megatron-LM itself loads it and saves torch_dist with --ckpt-convert-format torch_dist"
ADAPTER = Format(("adapter_config.json",), "an adapter of PEFT, which holds a difference and no model",
                 "`octant convert from-peft` reads it, with --base CHECKPOINT for the model under it")
FORMATS = (
    ADAPTER,
    Format(("manifest.json", "*.safetensors"), "a checkpoint of Octant",
           "`octant convert to-hf` or to-megatron reads it"),
    Format(("checkpoints", "config.yaml"), "the folder of a run of Octant", "`octant convert to-hf` or to-megatron "
                                                                            "reads its newest checkpoint"),
    TORCH_DIST,
    Format(("mp_rank_*/model_optim_rng.pt",), "a checkpoint of Megatron-LM in its old format (torch)", MEGATRON_TOOL),
    Format(("mp_rank_*/*/model_optim_rng.pt",), "a checkpoint of Megatron-LM in its old format (torch)", MEGATRON_TOOL),
    Format(("*/mp_rank_*/model_optim_rng.pt",), "checkpoints of Megatron-LM in its old format (torch)", MEGATRON_TOOL),
    Format(("latest_checkpointed_iteration.txt",), "a folder of Megatron-LM's checkpoints",
           "`octant convert from-megatron` reads it, or one of its iterations"),
    Format(("consolidated.*.pth", "params.json"), "a model in Meta's own format",
           "convert_llama_weights_to_hf.py of transformers makes a Hugging Face folder of it"),
    Format(("consolidated*.safetensors", "params.json"), "a model in Mistral's own format",
           "its folder on the Hugging Face Hub has a config.json and model*.safetensors beside it"),
    Format(("zero_to_fp32.py",), "a checkpoint of DeepSpeed", "its zero_to_fp32.py makes a file of weights of it"),
    Format(("mp_rank_*_model_states.pt",), "a checkpoint of DeepSpeed",
           "zero_to_fp32.py in the folder above makes a file of weights of it"),
    Format((".metadata", "*.distcp"), "a distributed checkpoint of torch that megatron-core did not write",
           "save the model with the program that wrote it, as a Hugging Face folder"),
    Format(("*.gguf",), "a model for llama.cpp", "take the Hugging Face folder it was made from"),
    Format(("*.nemo",), "a model of NeMo", "NeMo's exporters make a Hugging Face folder of it"),
    Format(("tf_model.h5",), "a model for TensorFlow", "transformers 4 loads it with from_tf=True; save it again"),
    Format(("flax_model.msgpack",), "a model for Flax", "transformers 4 loads it with from_flax=True; save it again"),
    HUGGING_FACE,
)


def require_format(path: Path, wanted: Format) -> None:
    """
    Raises:
        CheckpointError: `path` is something else.  An adapter may have its base model's configuration beside it.
    """
    found = list(formats_in(path)) if path.is_dir() else []
    if wanted not in found or ADAPTER in found:
        raise CheckpointError(f"{path} is not {wanted.what}: {instead(path, wanted)}")


def instead(path: Path, wanted: Format) -> str:
    """What is at `path`, where it is not `wanted`, and what to do, as the end of a sentence."""
    if not path.exists():
        hub = HUB.fullmatch(str(path))
        name = (hub[1] or hub[2]) if hub else ""
        fetch = f"; a model of the Hugging Face Hub is fetched first: hf download {name} --local-dir {name}"
        return "there is no such folder" + fetch * bool(name)
    if not path.is_dir():
        return "it is a file; give the folder that holds it"
    found = next((known for known in formats_in(path) if known is not wanted), None)
    return f"it is {found.what}; {found.way}" if found else f"it holds no {' and no '.join(wanted.marks)}"


def formats_in(folder: Path) -> Iterator[Format]:
    """The formats of which a folder has all marks."""
    return (known for known in FORMATS if all(any(folder.glob(mark)) for mark in known.marks))
