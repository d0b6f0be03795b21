"""What other folders hold: taken as `transformers` takes it, or named for what it is."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from checkpoints_tools.check import check_hf
from checkpoints_tools.from_hf import convert_from_hf
from checkpoints_tools.hf_config import read_hf_config
from checkpoints_tools.megatron import convert_from_megatron, convert_to_megatron
from checkpoints_tools.source import Source
from checkpoints_tools.to_hf import convert_to_hf
from checkpoints_tools.torch_dist import TorchDistReader
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.shard import Entry
from engine.checkpoint.stream import write_checkpoint
from engine.distributed.boxes import Box
from engine.errors import CheckpointError, DataError, RequestError
from tests.kit.checkpoints import model, write_random
from tests.kit.hf_folders import edit, save_hf, tensors, transformers

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
UP = "model.layers.0.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "4d" * 32 + "\nsize 2471645608\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_hf(tmp_path / "theirs", "Llama", shard="1GB")


def put(folder: Path, weights: dict[str, torch.Tensor], name: str = "model.safetensors") -> None:
    save_file(weights, folder / name, metadata={"format": "pt"})


def write_index(folder: Path, weight_map: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def without_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    weights = tensors(folder)
    (folder / "model.safetensors").unlink()
    return weights


@torch.inference_mode()
def logits(folder: Path) -> torch.Tensor:
    made = transformers.AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32)
    return made(torch.arange(40)[None]).logits


def assert_taken(folder: Path, **options: Any) -> CheckpointReader:
    """It converts, and what comes back from it computes what `transformers` computes with the folder."""
    convert_from_hf(folder, folder.parent / "ours", **options)
    reader = CheckpointReader(folder.parent / "ours")
    convert_to_hf(reader, folder.parent / "back", check=False)
    expected = logits(folder)
    torch.testing.assert_close(logits(folder.parent / "back"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max())
    return reader


def assert_refused(folder: Path, message: str, **options: Any) -> None:
    """Without the check of the logits: nothing else may be needed to see it."""
    with pytest.raises(RequestError, match=message):
        convert_from_hf(folder, folder.parent / "ours", check=False, **options)
    assert not (folder.parent / "ours").exists()


def test_one_file_counts_beside_the_index_of_others(folder: Path) -> None:
    weights = tensors(folder)
    put(folder, {name: tensor + 1 for name, tensor in weights.items()}, "model-00001-of-00001.safetensors")
    write_index(folder, dict.fromkeys(weights, "model-00001-of-00001.safetensors"))
    assert torch.equal(assert_taken(folder).read("model.embedding.weight"), weights[EMBEDDING])


def test_a_matrix_that_serves_twice_may_bear_the_head_s_name(tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "theirs", "Llama", shard="1GB", tie_word_embeddings=True)
    weights = tensors(folder)
    put(folder, {HEAD if name == EMBEDDING else name: tensor for name, tensor in weights.items()})
    reader = assert_taken(folder)
    assert torch.equal(reader.read("model.embedding.weight"), weights[EMBEDDING])
    assert check_hf(Source.of(reader), folder, torch.float32, available=0).largest_difference == 0


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights_are_none_that_were_trained(dtype: torch.dtype, folder: Path) -> None:
    weights = tensors(folder)
    put(folder, weights | {UP: weights[UP].to(dtype)})
    assert_refused(folder, f"{UP} is {dtype}, as quantised weights are")


def test_an_index_that_names_pickles_needs_leave(folder: Path) -> None:
    weights = without_safetensors(folder)
    torch.save(weights, folder / "weights.bin")
    write_index(folder, dict.fromkeys(weights, "weights.bin"))
    assert_refused(folder, f"{INDEX} names 'weights.bin'; these are pickles.*--allow-pickle")
    assert_taken(folder, allow_pickle=True)


def test_the_old_serialisation_is_read(folder: Path) -> None:
    torch.save(without_safetensors(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert_taken(folder, allow_pickle=True)


def flip(path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, path)
    data = bytearray(path.read_bytes())
    data[data.index(bytes(weights[UP].numpy().data)) + 9] ^= 4
    path.write_bytes(data)


def compress(path: Path, weights: dict[str, torch.Tensor]) -> None:
    torch.save(weights, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in records.items():
            archive.writestr(name, data)


@pytest.mark.parametrize(("damage", "message"), [
    (flip, "Bad CRC-32"), (compress, "is compressed, which torch does not do"),
    (lambda path, weights: path.write_text(POINTER), "Git LFS pointer"),
    (lambda path, weights: torch.save({"state_dict": weights}, path), "under 'state_dict' it holds a dict"),
    (lambda path, weights: torch.save([*weights.values()], path), "it holds a list"),
    (lambda path, weights: torch.save(weights | {UP: torch.ones(1, 1).expand(10**6, 10**6)}, path), UP),
    (lambda path, weights: torch.save(weights | {UP: weights[UP].to_sparse()}, path), "torch.sparse_coo"),
    (lambda path, weights: torch.save(weights | {UP: weights[UP].to("meta")}, path), UP),
], ids=range(8))
def test_pickles_are_looked_through(damage: Callable[..., Any], message: str, folder: Path) -> None:
    damage(folder / "pytorch_model.bin", without_safetensors(folder))
    assert_refused(folder, message, allow_pickle=True)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "theirs", "Llama")
    first, second, *_ = sorted(folder.glob("*.safetensors"))
    put(folder, tensors(folder), first.name)
    assert_refused(folder, f"{second.name}: .* is in another of the folder's files")


def test_an_index_of_other_files_is_refused(tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "theirs", "Llama")
    listed = json.loads((folder / INDEX).read_text())["weight_map"]
    write_index(folder, listed | {UP: listed[HEAD], HEAD: listed[UP]})
    assert_refused(folder, "holds no .*, which the index says it does")


@pytest.mark.parametrize("map_", [None, [], {}, {"a": 1}, {"a": ""}, {"a": ".."}, {"a": "config.json"}, {"a": ["b"]},
                                  {"a": "../x.safetensors"}, {"a": "/etc/x.bin"}, {"a": "x\0.bin"}])
def test_indices_of_nothing_are_refused(map_: object, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    write_index(folder, map_)
    assert_refused(folder, f"{INDEX} (names|is not an index)")


@pytest.mark.parametrize(("files", "message"), [
    ({"config.json": POINTER}, "config.json .*a Git LFS pointer to a file of 2,471,645,608 bytes"),
    ({"model.safetensors": POINTER}, "model.safetensors: .*a Git LFS pointer"),
    ({"adapter_config.json": "{}"}, "holds a difference and no model; `octant convert from-peft`"),
    ({"config.json": None, "params.json": "{}", "consolidated.00.pth": ""}, "Meta's own format; convert_llama"),
    ({"config.json": None, "iter_0000010/mp_rank_00/model_optim_rng.pt": ""}, "Megatron-LM in its old format"),
    ({"config.json": None, "mp_rank_00_001/model_optim_rng.pt": ""}, "Megatron-LM in its old format"),
    ({"config.json": None, "metadata.json": "{}", ".metadata": ""}, "`octant convert from-megatron` reads it"),
    ({"config.json": None, "manifest.json": "{}"}, "a checkpoint of Octant; `octant convert to-hf`"),
    ({"model.safetensors": None, "model.gguf": ""}, "holds neither .*; it is a model for llama.cpp"),
    ({"model.safetensors": None, "tf_model.h5": ""}, "for TensorFlow"),
    ({"model.safetensors": None}, "holds neither model.safetensors nor"),
    ({"config.json": None}, "is not a Hugging Face folder: it holds no config.json"),
])
def test_what_is_no_model_is_named(files: dict[str, str | None], message: str, folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).unlink() if content is None else (folder / name).write_text(content)
    assert_refused(folder, message)


@pytest.mark.parametrize(("name", "message"), [
    ("meta-llama/Llama-3.2-1B", "there is no such folder; a model of the Hugging Face Hub is fetched first: hf "
                                "download meta-llama/Llama-3.2-1B --local-dir"),
    ("https://huggingface.co/Qwen/Qwen2.5-0.5B/tree/main", "hf download Qwen/Qwen2.5-0.5B --local-dir"),
    ("hf://Qwen/Qwen2.5-0.5B", "hf download Qwen/Qwen2.5-0.5B --local-dir"),
    ("/no/where", "there is no such folder$"),
    (__file__, "it is a file; give the folder that holds it"),
])
def test_what_is_no_folder_is_named(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(Path(name), tmp_path / "ours")


def test_old_megatron_is_named_where_torch_dist_was_expected(tmp_path: Path) -> None:
    (tmp_path / "iter_0000010" / "mp_rank_00").mkdir(parents=True)
    (tmp_path / "iter_0000010" / "mp_rank_00" / "model_optim_rng.pt").write_text("")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    with pytest.raises(CheckpointError, match=r"old format \(torch\); Megatron-LM itself loads it and saves"):
        TorchDistReader(tmp_path / "iter_0000010")
    with pytest.raises(CheckpointError, match="old format"):
        convert_from_megatron(tmp_path, tmp_path / "ours", model())


def test_a_tokenizer_larger_than_the_model_is_refused(folder: Path) -> None:
    reader = write_random(folder.parent / "bytes", model(vocab_size=257), "bytes")
    convert_to_hf(reader, folder.parent / "hf", check=False)
    edit(folder / "config.json", vocab_size=250)
    weights = tensors(folder)
    put(folder, weights | {name: weights[name][:250].clone() for name in (EMBEDDING, HEAD)})
    with pytest.raises(DataError, match=r"the tokenizer .*hf has 257 ids, the model 250"):
        convert_from_hf(folder, folder.parent / "ours", tokenizer=str(folder.parent / "hf"))
    assert_taken(folder)


@pytest.mark.parametrize("pad", [259, 10**20, "0", 1.0, -260])
def test_a_pad_id_beyond_the_vocabulary_is_refused(pad: object, folder: Path) -> None:
    edit(folder / "config.json", pad_token_id=pad)
    assert_refused(folder, "pad_token_id is .*, which is outside the vocabulary of 259 ids")


@pytest.mark.parametrize("pad", [None, 258, -1])
def test_pad_ids_within_it_mean_nothing_to_us(pad: int | None, folder: Path) -> None:
    edit(folder / "config.json", pad_token_id=pad)
    convert_from_hf(folder, folder.parent / "ours")


def test_values_that_are_no_numbers_are_named(folder: Path) -> None:
    weights = tensors(folder)
    weights[UP][3, 5] = float("nan")
    weights[UP][4, 5] = float("-inf")
    put(folder, weights)
    assert_refused(folder, rf"theirs: 2 of the 3,840 values of {UP} are no finite numbers, the first at 149")
    good = write_random(folder.parent / "good", model())
    shapes = {key: good.global_shape(key) for key in good.keys()}
    entries = [Entry(key, shape, Box.whole(shape), torch.float32) for key, shape in shapes.items()]
    values = {key: good.read(key) for key in shapes}
    values["model.final_layernorm.weight"][7] = float("nan")
    write_checkpoint(folder.parent / "broken", 7, good.metadata, [entries], lambda entry: values[entry.key])
    reader = CheckpointReader(folder.parent / "broken")
    for convert in (convert_to_hf, convert_to_megatron):
        with pytest.raises(CheckpointError, match=r"1 of the 48 values of final_layernorm.weight are no finite"):
            convert(reader, folder.parent / "out", check=False)


def test_every_default_is_that_of_transformers(tmp_path: Path) -> None:
    """With no key at all but the kind, and with every key null that may be."""
    for name in ("Llama", "Mistral", "Qwen2", "Qwen3", "Arcee"):
        theirs = getattr(transformers, name + "Config")()
        (tmp_path / "config.json").write_text(json.dumps({"model_type": theirs.model_type}))
        found, config = read_hf_config(tmp_path)
        assert config.window == (4096 if name == "Mistral" else None)
        assert found.name == name + "ForCausalLM"
        assert (config.num_layers, config.hidden_size, config.num_heads, config.num_kv_heads, config.ffn_hidden_size,
                config.vocab_size, config.max_seq_len, config.norm_eps, config.tie_embeddings, config.rope_theta) == (
            theirs.num_hidden_layers, theirs.hidden_size, theirs.num_attention_heads, theirs.num_key_value_heads,
            theirs.intermediate_size, theirs.vocab_size, theirs.max_position_embeddings, theirs.rms_norm_eps,
            theirs.tie_word_embeddings, theirs.rope_parameters["rope_theta"])
        assert config.head_dim == getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads


@pytest.mark.parametrize("keys", [("rms_norm_eps", "max_position_embeddings"), ("architectures",),
                                  ("rope_parameters", "tie_word_embeddings", "hidden_act", "num_key_value_heads")])
def test_left_out_keys_have_transformers_defaults(keys: tuple[str, ...], tmp_path: Path) -> None:
    settings = {"num_key_value_heads": 4} if "num_key_value_heads" in keys else {}
    folder = save_hf(tmp_path / "theirs", "Llama", **settings)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key not in keys}))
    assert_taken(folder)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "rope_theta": 5e5,
          "original_max_position_embeddings": 32}


@pytest.mark.parametrize("changes", [
    {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 1.0}, "rope_theta": 5e5},
    {"rope_parameters": {"rope_type": "linear", "factor": 1, "rope_theta": 5e5}},
    {"rope_parameters": {"type": "default", "rope_theta": 5e5}, "rope_theta": 1e4},
    {"rope_parameters": LLAMA3, "rope_theta": 1e4},
    {"rope_parameters": None, "rope_scaling": LLAMA3, "rope_theta": 1e4},
    {"rope_parameters": LLAMA3, "original_max_position_embeddings": 16},
    {"rope_parameters": {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}},
    {"rope_parameters": LLAMA3, "rope_scaling": LLAMA3},
    {"num_key_value_heads": 2, "head_dim": None, "model_type": "llama"},
    {"torch_dtype": "float16"}, {"dtype": "bfloat16"},
])
def test_settings_mean_what_they_mean_to_transformers(changes: dict[str, Any], folder: Path) -> None:
    edit(folder / "config.json", **changes)
    assert_taken(folder)


@pytest.mark.parametrize(("changes", "message"), [
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling is .*yarn.* and rope_parameters"),
    ({"rope_scaling": {"rope_type": "default", "rope_theta": 5.0}}, "remove the wrong one"),
    ({"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ({"rope_parameters": {"full_attention": {"rope_theta": 5.0}}}, "RoPE has the setting 'full_attention'"),
    ({"rope_parameters": {"rope_type": "default", "mrope_section": [1]}}, "mrope_section"),
    ({"rope_parameters": ["default"]}, "rope_parameters is .*, which is not an object"),
    ({"rope_parameters": {"rope_theta": "5"}}, "rope_theta is '5', which is not a number above 0"),
    ({"rope_parameters": LLAMA3 | {"low_freq_factor": None}}, "low_freq_factor is None"),
    ({"transformers_weights": "other.safetensors"}, "transformers_weights is 'other.safetensors'"),
    ({"hidden_size": "48"}, "hidden_size is '48', which is not a whole number"),
    ({"hidden_size": 48.0}, "hidden_size is 48.0"), ({"num_hidden_layers": True}, "num_hidden_layers is True"),
    ({"num_hidden_layers": -2}, "num_hidden_layers is -2"), ({"vocab_size": 10**30}, "vocab_size is 10"),
    ({"rms_norm_eps": 0}, "rms_norm_eps is 0"), ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf"),
    ({"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', which is not true or false"),
    ({"num_hidden_layers": 9999}, "describes 9,999 layers and .* parameters; the files beside it hold"),
    ({"vocab_size": 2**31 - 1}, "describes 2 layers and .* parameters"),
    ({"eos_token_id": 259}, "eos_token_id is 259, which is outside the vocabulary"),
], ids=str)
def test_settings_that_octant_has_not_are_refused_by_name(changes: dict[str, Any], message: str, folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", **changes)
    assert_refused(folder, message)


@pytest.mark.parametrize(("name", "changes", "taken"), [
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, True),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 2}, True),
    ("Qwen2", {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0}, True),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1, "layer_types": None}, False),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 8,
               "layer_types": ["full_attention", "sliding_attention"]}, False),
    ("Qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, False),
    ("Qwen2", {"layer_types": ["full_attention"]}, False), ("Qwen2", {"layer_types": "full_attention"}, False),
    ("Mistral", {"sliding_window": None}, True), ("Mistral", {"sliding_window": 128}, True),
    ("Mistral", {"sliding_window": 127}, True),
], ids=str)
def test_a_window_counts_where_a_layer_uses_it(name: str, changes: dict[str, Any], taken: bool, tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "theirs", name, **({"sliding_window": None} if name == "Mistral" else {}))
    edit(folder / "config.json", **({"max_window_layers": 2, "layer_types": None} if name == "Qwen2" else {}) | changes)
    if taken:
        assert_taken(folder)
    else:
        assert_refused(folder, "config.json: (sliding_window|layer_types) is")


def test_several_ends_of_text_survive(tmp_path: Path) -> None:
    convert_to_hf(write_random(tmp_path / "first", model(vocab_size=257), "bytes"), tmp_path / "theirs", check=False)
    for ids in ([256, 3], [5], [256]):
        (tmp_path / "theirs" / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
        convert_from_hf(tmp_path / "theirs", tmp_path / f"ours {ids}", check=False)
        reader = CheckpointReader(tmp_path / f"ours {ids}")
        assert reader.end_ids == (() if ids == [256] else tuple(ids))
        convert_to_hf(reader, tmp_path / f"back {ids}", check=False)
        made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / f"back {ids}")
        assert made.generation_config.eos_token_id == made.config.eos_token_id == (ids if len(ids) > 1 else ids[0])
