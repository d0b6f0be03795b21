"""Whatever a Hugging Face folder holds, it is read as `transformers` and safetensors read it, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from checkpoints_tools.archives import read_tensors
from checkpoints_tools.hf_config import read_end_ids, read_hf_config
from checkpoints_tools.hf_files import INDEX, HFWeights
from tests.kit.fuzz import WEIRD, Files, Reader, bent, damaged, fuzz, hostile
from tests.kit.hf_folders import save_hf, tensors, transformers

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
          "original_max_position_embeddings": 32}
SAME = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 259, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False, "hidden_act": "silu", "pad_token_id": 0, "eos_token_id": [1, 2]}
CONFIGS: list[dict[str, Any]] = [
    SAME | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_parameters": LLAMA3, "head_dim": 12},
    SAME | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "rope_theta": 1e4,
            "rope_scaling": {"type": "linear", "factor": 1.0}, "attention_bias": False, "mlp_bias": False},
    SAME | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None, "head_dim": 16},
    SAME | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True,
            "sliding_window": 64, "max_window_layers": 2, "layer_types": ["full_attention"] * 2},
]
KEYS = sorted({key for config in CONFIGS for key in config} | {
    "original_max_position_embeddings", "partial_rotary_factor", "quantization_config", "transformers_weights"})


def as_json(value: object) -> bytes:
    return json.dumps(value, default=str).encode("utf-8", "surrogatepass")


def read_config(folder: Path) -> None:
    """What is accepted means the same to `transformers`, where that takes it at all."""
    name, config = read_hf_config(folder)
    read_end_ids(folder, config)
    try:
        theirs = getattr(transformers, name.removesuffix("ForCausalLM") + "Config").from_pretrained(folder)
    except Exception:                                        # of another package: settings that mean nothing here
        return
    rope = theirs.rope_parameters
    heads = theirs.num_attention_heads
    expected = (theirs.hidden_size, theirs.intermediate_size, theirs.num_hidden_layers, heads,
                theirs.num_key_value_heads, theirs.vocab_size, theirs.max_position_embeddings, theirs.rms_norm_eps,
                bool(theirs.tie_word_embeddings), getattr(theirs, "head_dim", None) or theirs.hidden_size // heads,
                float(rope["rope_theta"]))
    assert expected == (
        config.hidden_size, config.ffn_hidden_size, config.num_layers, config.num_heads, config.num_kv_heads,
        config.vocab_size, config.max_seq_len, config.norm_eps, config.tie_embeddings, config.head_dim,
        config.rope_theta), (expected, config)
    if config.rope_scaling is None:
        assert rope["rope_type"] == "default" or rope["factor"] == 1, rope
    else:
        scaling = config.rope_scaling
        assert (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor, scaling.original_max_seq_len) == (
            rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"],
            rope["original_max_position_embeddings"]), rope


def test_damaged_configurations(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    whole = st.sampled_from(CONFIGS)
    other = st.builds(lambda config, key, value: config | {key: value}, whole, st.sampled_from(KEYS), WEIRD)
    swapped = st.builds(lambda a, b, key: a | {key: b.get(key)}, whole, whole, st.sampled_from(KEYS))
    one = st.one_of(whole.flatmap(bent).map(as_json), other.map(as_json), swapped.map(as_json),
                    damaged([as_json(config) for config in CONFIGS]), hostile())
    files = st.fixed_dictionaries({"config.json": one}, optional={"generation_config.json": st.one_of(
        bent({"eos_token_id": [1, 2], "temperature": 0.6}).map(as_json), hostile())})
    fuzz(Reader("config.json", read_config, limit_bytes=1 << 29), files, request)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hf(tmp_path_factory.mktemp("template") / "model", "Llama", vocab_size=40, intermediate_size=16)


def read_weights(folder: Path) -> None:
    """What is accepted is what safetensors reads of the same files, bit for bit."""
    weights = HFWeights(folder)
    expected = tensors(folder)
    assert weights.names() <= expected.keys()
    for name in weights.names():
        read = weights.read(name)
        assert read.shape == weights.shape(name) and same_bits(read, expected[name]), name


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8), b.contiguous().reshape(-1).view(torch.uint8))


@st.composite
def with_bent_header(draw: st.DrawFn, good: bytes) -> bytes:
    """A safetensors file whose header says something else, in as many bytes as that takes."""
    length = int.from_bytes(good[:8], "little")
    header = as_json(draw(bent(json.loads(good[8:8 + length]))))
    stated = draw(st.sampled_from((len(header),) * 8 + (0, 1, length, 2**31, 2**63 - 1, 2**64 - 1)))
    return stated.to_bytes(8, "little") + header + good[8 + length:]


def test_damaged_weights(template: Path, request: pytest.FixtureRequest) -> None:
    paths = sorted(template.glob("*.safetensors"))
    index = json.loads((template / INDEX).read_text())
    any_file = {path.name: st.one_of(with_bent_header(path.read_bytes()), damaged(path.read_bytes()),
                                     damaged(path.read_bytes()[:200]), hostile()) for path in paths}
    any_index = st.one_of(bent(index).map(as_json), damaged((template / INDEX).read_bytes()), hostile())
    files: st.SearchStrategy[Files] = st.one_of(
        st.fixed_dictionaries({}, optional=any_file), st.fixed_dictionaries({INDEX: any_index}),
        st.fixed_dictionaries({"model.safetensors": any_file[paths[0].name]}))
    fuzz(Reader("safetensors", read_weights, template), files, request)


def test_damaged_pickles(template: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    weights = dict(list(tensors(template).items())[:6])
    for name, as_zip in (("new", True), ("old", False)):
        torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=as_zip)

    def read(folder: Path) -> None:
        """The zip has checksums, so what is accepted of it is what was written; the old format has none."""
        read = read_tensors(folder / "pytorch_model.bin")
        size = (folder / "pytorch_model.bin").stat().st_size
        assert all(tensor.nbytes <= size for tensor in read.values())
        if zipped(folder / "pytorch_model.bin"):
            assert read.keys() == weights.keys() and all(same_bits(read[name], weights[name]) for name in read)

    one = st.one_of(damaged([(tmp_path / "new").read_bytes(), (tmp_path / "old").read_bytes()]), hostile())
    fuzz(Reader("pytorch_model.bin", read), st.fixed_dictionaries({"pytorch_model.bin": one}), request)


def zipped(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"
