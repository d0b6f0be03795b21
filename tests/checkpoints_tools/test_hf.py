"""Checkpoints as Hugging Face models and back: same logits, same bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file

from checkpoints_tools.check import check_hf, octant_logits
from checkpoints_tools.from_hf import convert_from_hf
from checkpoints_tools.hf_config import read_hf_config
from checkpoints_tools.names import PREFIX, parameter_shapes
from checkpoints_tools.source import Source
from checkpoints_tools.to_hf import convert_to_hf
from engine import cli
from engine.checkpoint.read import CheckpointReader
from engine.data.tokenizer import load_tokenizer
from engine.errors import CheckpointError, DataError
from tests.kit.checkpoints import KINDS, LLAMA3, model, write_random
from tests.kit.hf_folders import edit, save_hf, tensors

transformers = pytest.importorskip("transformers")

TOKENS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(3))
TEXTS = ("The quick brown fox\njumps  over 12,345 dogs.", "def f(x):\n    return x  # naïve", "今天天气很好。\t😀")


def ours(reader: CheckpointReader) -> torch.Tensor:
    source = Source.of(reader)
    return octant_logits(source.config, lambda name: reader.read(PREFIX + name).float(), TOKENS)


@torch.inference_mode()
def theirs(folder: Path) -> torch.Tensor:
    return transformers.AutoModelForCausalLM.from_pretrained(folder).float()(TOKENS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained_gives_our_logits(kind: str, tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model(**KINDS[kind]))
    checked = convert_to_hf(reader, tmp_path / "hf")
    assert checked is not None and "random tokens" in checked.what and checked.largest_difference <= checked.allowed
    expected = ours(reader)
    torch.testing.assert_close(theirs(tmp_path / "hf"), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_ours_to_theirs_and_back_is_the_same_bits(kind: str, tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model(**KINDS[kind]))
    convert_to_hf(reader, tmp_path / "hf", check=False, shard_bytes=20_000)
    convert_from_hf(tmp_path / "hf", tmp_path / "back", check=False)
    back = CheckpointReader(tmp_path / "back")
    assert back.metadata["config"]["model"] == reader.metadata["config"]["model"]
    assert back.step == 0 and back.verify() == []
    assert all(torch.equal(back.read(key), reader.read(key)) for key in reader.keys())


@pytest.mark.parametrize(("name", "dtype", "settings"), [
    ("Llama", torch.float32, {}),
    ("Llama", torch.bfloat16, {"head_dim": 16, "tie_word_embeddings": True}),
    ("Llama", torch.float32, {"rope_theta": 5e5, "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}}),
    ("Llama", torch.float32, {"max_position_embeddings": 24, "rope_scaling": {"rope_type": "dynamic", "factor": 2.5}}),
    ("Mistral", torch.bfloat16, {"sliding_window": None}),
    ("Qwen2", torch.float32, {"tie_word_embeddings": True, "rope_theta": 1e6}),
    ("Qwen2", torch.bfloat16, {}),
    ("Llama", torch.float32, {"attention_bias": True, "mlp_bias": True}),
    ("Qwen3", torch.bfloat16, {"head_dim": 16}),
    ("Qwen3", torch.float32, {"head_dim": 24, "attention_bias": True, "tie_word_embeddings": True}),
    ("Arcee", torch.float32, {"mlp_bias": True, "bos_token_id": 1, "eos_token_id": 2}),
    ("Arcee", torch.bfloat16, {"hidden_act": "gelu", "bos_token_id": 1, "eos_token_id": 2}),
])
def test_theirs_to_ours_and_back_is_the_same_bits(name: str, dtype: torch.dtype, settings: dict[str, Any],
                                                  tmp_path: Path) -> None:
    source = save_hf(tmp_path / "source", name, dtype, **settings)
    checked = convert_from_hf(source, tmp_path / "ours")
    assert checked is not None and checked.largest_difference <= checked.allowed
    convert_to_hf(CheckpointReader(tmp_path / "ours"), tmp_path / "back", dtype)
    before, after = tensors(source), tensors(tmp_path / "back")
    assert len(list(source.glob("*.safetensors"))) > 1
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    torch.testing.assert_close(theirs(tmp_path / "back"), theirs(source), rtol=1e-6, atol=1e-6)


def test_several_files_have_an_index_and_one_has_none(tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model())
    convert_to_hf(reader, tmp_path / "one", check=False)
    convert_to_hf(reader, tmp_path / "several", check=False, shard_bytes=50_000)
    assert [p.name for p in (tmp_path / "one").glob("model*")] == ["model.safetensors"]
    files = sorted((tmp_path / "several").glob("*.safetensors"))
    assert len(files) > 2 and all(file.stat().st_size < 60_000 for file in files)
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    assert {name: files[0].parent / file for name, file in index["weight_map"].items()} == \
        {name: file for file in files for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors(tmp_path / "several").values())
    assert torch.equal(theirs(tmp_path / "one"), theirs(tmp_path / "several"))


def test_bf16_is_our_model_rounded(tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model())
    checked = convert_to_hf(reader, tmp_path / "hf", torch.bfloat16)
    assert checked is not None and checked.largest_difference <= checked.allowed
    assert {t.dtype for t in tensors(tmp_path / "hf").values()} == {torch.bfloat16}
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", torch_dtype="auto")
    assert made.dtype == torch.bfloat16


@pytest.mark.parametrize("spec", ["bytes", "folder"])
def test_the_tokenizer_goes_along_and_gives_the_same_ids(spec: str, tmp_path: Path) -> None:
    first = write_random(tmp_path / "ours", model(vocab_size=259), "bytes")
    convert_to_hf(first, tmp_path / "folder", check=False)
    if spec == "folder":                                    # a run that uses a Hugging Face tokenizer
        convert_from_hf(tmp_path / "folder", tmp_path / "again", check=False)
        convert_to_hf(CheckpointReader(tmp_path / "again"), tmp_path / "out", check=False)
    folder = tmp_path / ("out" if spec == "folder" else "folder")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == list(text.encode())
    made = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert made.config.eos_token_id == made.generation_config.eos_token_id == tokenizer.eos_token_id == 256
    assert made.config.bos_token_id is None
    out = made.generate(torch.tensor([[72]]), max_new_tokens=3, do_sample=False, pad_token_id=256)
    assert out.shape[1] <= 4


@pytest.mark.parametrize(("tokenizer", "spec"), [(None, "hf"), ("bytes", "bytes"), ("none", None)])
def test_a_checkpoint_from_theirs_names_its_tokenizer(tokenizer: str | None, spec: str | None, tmp_path: Path) -> None:
    convert_to_hf(write_random(tmp_path / "first", model(vocab_size=257), "bytes"), tmp_path / "hf", check=False)
    convert_from_hf(tmp_path / "hf", tmp_path / "ours", tokenizer=tokenizer, check=False)
    metadata = CheckpointReader(tmp_path / "ours").metadata
    place = str(tmp_path / "hf") if spec == "hf" else spec
    assert metadata["config"]["data"]["tokenizer"] == place
    assert metadata["data"].get("tokenizer") == (load_tokenizer(place).sha256 if place else None)


def test_generation_stops_nowhere_by_accident_without_a_tokenizer(tmp_path: Path) -> None:
    convert_to_hf(write_random(tmp_path / "ours", model()), tmp_path / "hf", check=False)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert made.config.eos_token_id is None and made.generation_config.eos_token_id is None
    assert not (tmp_path / "hf" / "tokenizer.json").exists()


def test_a_sentencepiece_model_becomes_a_tokenizer_with_the_same_ids(tmp_path: Path) -> None:
    texts = [text * 3 for text in TEXTS] + ["and then the dog went home", "the quick dog sleeps"]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts * 20), model_prefix=str(tmp_path / "tok"), vocab_size=330, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2)
    config = model(vocab_size=336)
    reader = write_random(tmp_path / "ours", config, str(tmp_path / "tok.model"))
    convert_to_hf(reader, tmp_path / "hf", check=False)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(tmp_path / "tok.model")
    for text in TEXTS:
        assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (written["bos_token_id"], written["eos_token_id"]) == (ours.bos_id, ours.eod_id) == (1, 2)


@pytest.mark.parametrize(("tokenizer", "data", "message"), [
    ("nowhere.model", {}, "--tokenizer PATH says where it is now"),
    ("bytes", {"tokenizer": "0" * 64}, "not the tokenizer this model was trained with"),
    ("bytes", {}, "the tokenizer bytes has 257 ids, the model 256"),
])
def test_a_wrong_tokenizer_is_refused(tokenizer: str, data: dict[str, Any], message: str, tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model(), tokenizer, data=data)
    with pytest.raises(DataError, match=message):
        convert_to_hf(reader, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()
    convert_to_hf(reader, tmp_path / "hf", tokenizer="none", check=False)


@pytest.mark.parametrize(("name", "settings", "changes", "message"), [
    ("Llama", {}, {"architectures": ["FalconForCausalLM"]}, "Octant converts LlamaForCausalLM, MistralForCausalLM"),
    ("Llama", {}, {"architectures": None, "model_type": None}, "Octant converts"),
    ("Llama", {}, {"architectures": ["LlamaModel"]}, "Octant converts"),
    ("Llama", {}, {"model_type": "mistral"}, "architectures is .'LlamaForCausalLM'., but model_type 'mistral'"),
    ("Llama", {}, {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("Llama", {}, {"attention_bias": 1}, "attention_bias is 1, which is not true or false"),
    ("Llama", {}, {"quantization_config": {"bits": 4}}, "quantization_config"),
    ("Mistral", {}, {"sliding_window": 0}, "sliding_window is 0, which is not a whole number from 1"),
    ("Qwen2", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}, {}, "sliding_window is 64"),
    ("Llama", {}, {"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "RoPE is of the kind 'longrope'"),
    ("Llama", {}, {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}},
     "original_max_position_embeddings is 64 and max_position_embeddings 128"),
    ("Llama", {}, {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": -2.0}}, "factor is -2.0"),
    ("Llama", {}, {"hidden_size": None}, "hidden_size is None, which is not a whole number from 1"),
    ("Llama", {}, {"vocab_size": 300}, "of another shape: model.embed_tokens.weight .259, 48. instead of .300, 48."),
    ("Llama", {}, {"num_hidden_layers": 3}, "9 tensors missing: model.layers.2.input_layernorm.weight"),
    ("Llama", {}, {"num_hidden_layers": 1}, "9 tensors unknown to Octant"),
    ("Llama", {}, {"tie_word_embeddings": True}, "tie_word_embeddings, but lm_head.weight is not"),
    ("Llama", {}, {"num_attention_heads": 0}, "num_attention_heads is 0, which is not"),
])
def test_other_models_are_refused(name: str, settings: dict[str, Any], changes: dict[str, Any], message: str,
                                  tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "source", name, **settings)
    edit(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(folder, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_a_window_no_shorter_than_the_longest_sequence_is_no_window(tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "source", "Mistral", sliding_window=128)
    assert convert_from_hf(folder, tmp_path / "ours") is not None
    folder = save_hf(tmp_path / "second", "Qwen2", sliding_window=64)
    assert convert_from_hf(folder, tmp_path / "other") is not None


def test_older_spellings_of_config_json_are_read(tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "source", "Llama")
    scaling = {"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 32}
    edit(folder / "config.json", rope_parameters=None, rope_theta=5e5, rope_scaling=scaling, num_key_value_heads=None,
         head_dim=None)
    family, config = read_hf_config(folder)
    assert (family.name, config.rope_theta, config.num_kv_heads, config.head_dim) == ("LlamaForCausalLM", 5e5, 4, 12)
    assert config.rope_scaling is not None and config.rope_scaling.model_dump(exclude_none=True) == LLAMA3


def test_buffers_of_old_files_and_tied_heads_are_no_weights(tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "source", "Llama", tie_word_embeddings=True)
    weights = tensors(folder)
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"].clone(),
             "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(weights | extra, folder / "pytorch_model.bin")
    convert_from_hf(folder, tmp_path / "ours", allow_pickle=True, check=False)
    read = CheckpointReader(tmp_path / "ours").read("model.embedding.weight")
    assert torch.equal(read, weights["model.embed_tokens.weight"])


def test_pickles_are_read_by_request_only_and_run_nothing(tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "source", "Llama")
    weights = tensors(folder)
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model.bin: these are pickles.*--allow-pickle"):
        convert_from_hf(folder, tmp_path / "ours")
    convert_from_hf(folder, tmp_path / "ours", allow_pickle=True)
    torch.save({"weight": _Bomb(tmp_path / "ran")}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="not a file of tensors alone"):
        convert_from_hf(folder, tmp_path / "other", allow_pickle=True)
    assert not (tmp_path / "ran").exists()


class _Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["truncate", "remove", "outside"])
def test_damaged_folders_are_refused(damage: str, tmp_path: Path) -> None:
    folder = save_hf(tmp_path / "source", "Llama")
    file = sorted(folder.glob("*.safetensors"))[1]
    if damage == "truncate":
        file.write_bytes(file.read_bytes()[:-100])
    elif damage == "remove":
        file.unlink()
    else:
        index = folder / "model.safetensors.index.json"
        index.write_text(index.read_text().replace(file.name, "../" + file.name))
    with pytest.raises(CheckpointError):
        convert_from_hf(folder, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_wrong_conversion_is_noticed_and_not_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check by logits finds a wrong arrangement; the check by tensors a wrong byte, and needs no transformers."""
    config = model(num_kv_heads=2, max_seq_len=128)
    right = write_random(tmp_path / "right", config)
    convert_to_hf(right, tmp_path / "hf", check=False)
    source = Source.of(right)
    edit(tmp_path / "hf" / "config.json", rope_theta=500.0)
    with pytest.raises(CheckpointError, match="the conversion is wrong"):
        check_hf(source, tmp_path / "hf", torch.float32)
    assert check_hf(source, tmp_path / "hf", torch.float32, available=0).largest_difference == 0
    data = bytearray((tmp_path / "hf" / "model.safetensors").read_bytes())
    data[-2] ^= 1
    (tmp_path / "hf" / "model.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"comparing logits would take .* instead of logits"):
        check_hf(source, tmp_path / "hf", torch.float32, available=0)
    monkeypatch.setattr("checkpoints_tools.check.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip install 'octant\[hf\]'"):
        check_hf(source, tmp_path / "hf", torch.float32)
    monkeypatch.setattr("checkpoints_tools.to_hf.check_hf", lambda *a, **k: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        convert_to_hf(right, tmp_path / "unchecked")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "right"]


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model())
    (tmp_path / "empty").mkdir()
    convert_to_hf(reader, tmp_path / "empty", check=False)
    before = tensors(tmp_path / "empty")
    for convert in (lambda out: convert_to_hf(reader, out), lambda out: convert_from_hf(tmp_path / "empty", out)):
        with pytest.raises(CheckpointError, match="is there already"):
            convert(tmp_path / "empty")
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(tmp_path / "empty").items())


def test_a_checkpoint_without_its_model_is_refused(tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model())
    reader.metadata["config"]["model"]["num_layers"] = 3
    with pytest.raises(CheckpointError, match=r"tensors missing: layers\.2"):
        convert_to_hf(reader, tmp_path / "hf")
    del reader.metadata["config"]["model"]
    with pytest.raises(CheckpointError, match="does not say which model"):
        convert_to_hf(reader, tmp_path / "hf")


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_random(tmp_path / "run" / "checkpoints" / "step-00000007", model(vocab_size=257), "bytes")
    assert cli.run(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert "of 128 random tokens" in out and "checked: logits" in out and "next: python -c" in out.splitlines()[-1]
    assert cli.run(["convert", "from-hf", str(tmp_path / "hf"), str(tmp_path / "ours"), "--skip-check"]) == 0
    out = capsys.readouterr().out
    assert "not checked" in out and out.splitlines()[-1].startswith("next: octant generate")
    assert {PREFIX + name for name in parameter_shapes(model())} == set(CheckpointReader(tmp_path / "ours").keys())
    assert cli.run(["convert", "from-hf", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2
    assert "there is no such folder" in capsys.readouterr().err


SCORING = [{}, {"num_kv_heads": 2, "qkv_bias": True}, {"num_heads": 5, "num_kv_heads": 5, "head_dim": 10}]


@pytest.mark.parametrize("changes", SCORING, ids=str)
def test_a_reward_model_is_a_classifier_of_one_label(changes: dict[str, Any], tmp_path: Path) -> None:
    reader = write_random(tmp_path / "ours", model(head="score", **changes))
    checked = convert_to_hf(reader, tmp_path / "hf")
    assert checked is not None and "scores (up to" in checked.what and "ForSequenceClassification" in checked.what
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf").float().eval()
    assert theirs.config.num_labels == 1
    with torch.no_grad():
        got = torch.cat([theirs(row.unsqueeze(0)).logits for row in TOKENS])
    want = ours(reader)[:, -1:]
    assert (got - want).abs().max() < 1e-5 * want.abs().max()
    convert_from_hf(tmp_path / "hf", tmp_path / "back")
    back = CheckpointReader(tmp_path / "back")
    assert back.metadata["config"]["model"] == reader.metadata["config"]["model"]
    assert all(torch.equal(back.read(key), reader.read(key)) for key in reader.keys())


def test_a_classifier_of_several_labels_is_refused(tmp_path: Path) -> None:
    convert_to_hf(write_random(tmp_path / "ours", model(head="score")), tmp_path / "hf", check=False)
    edit(tmp_path / "hf" / "config.json", id2label={"0": "a", "1": "b"})
    with pytest.raises(CheckpointError, match="has one label"):
        convert_from_hf(tmp_path / "hf", tmp_path / "back")


def test_a_reward_model_has_no_place_in_torch_dist(tmp_path: Path) -> None:
    write_random(tmp_path / "ours", model(head="score"))
    assert cli.run(["convert", "to-megatron", str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
