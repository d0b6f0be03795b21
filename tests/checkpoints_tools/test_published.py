"""Published configurations in small: logits and every gradient as `transformers` computes them, and the same bits back.

Each is the `config.json` of a published model, key by key, with sizes that a test can afford.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from checkpoints_tools.from_hf import convert_from_hf
from checkpoints_tools.hf_config import read_hf_config
from checkpoints_tools.names import PREFIX, hf_parts
from checkpoints_tools.to_hf import convert_to_hf
from engine.checkpoint.read import CheckpointReader
from engine.errors import CheckpointError
from engine.model.context import Batch
from engine.model.parameters import spec_of
from engine.model.transformer import Transformer
from tests.kit.hf_folders import edit, tensors

transformers = pytest.importorskip("transformers")

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
         "intermediate_size": 96, "vocab_size": 131, "max_position_embeddings": 64, "pad_token_id": None,
         "bos_token_id": 1, "eos_token_id": 2}
ALL_HEADS = SIZES | {"num_key_value_heads": 4}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 131, "bos_token_id": 1,
        "eos_token_id": 2}

GEMMA = {"head_dim": 32, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}

PUBLISHED: dict[str, dict[str, Any]] = {
    "Llama-2-7B": {**ALL_HEADS, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
                   "rope_scaling": None, "tie_word_embeddings": False, "pretraining_tp": 1},
    "Llama-3.2-1B": {**SIZES, "model_type": "llama", "hidden_act": "silu", "head_dim": 16, "rms_norm_eps": 1e-5,
                     "attention_bias": False, "mlp_bias": False, "rope_theta": 500000.0, "tie_word_embeddings": True,
                     "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                                      "original_max_position_embeddings": 32, "rope_type": "llama3"}},
    "Yi-6B": {**SIZES, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 5000000.0},
    "DeepSeek-LLM-7B": {**ALL_HEADS, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6,
                        "rope_theta": 10000.0, "attention_bias": False},
    "SmolLM2-135M": {**SIZES, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
                     "rope_theta": 100000, "tie_word_embeddings": True, "rope_interleaved": False},
    "TinyLlama-1.1B": {**SIZES, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5},
    "LongChat-7B-16k": {**ALL_HEADS, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-6,
                        "rope_scaling": {"factor": 8.0, "type": "linear"}},
    "Qwen2.5-7B with YaRN": {**SIZES, "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
                             "rope_theta": 1000000.0, "use_sliding_window": False,
                             "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"}},
    "Yarn-Llama-2-7B-64k": {**ALL_HEADS, "model_type": "llama", "hidden_act": "silu", "rms_norm_eps": 1e-5,
                            "rope_scaling": {"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn",
                                             "beta_fast": 24, "attention_factor": 1.25}},
    "Mistral-7B-v0.3": {**SIZES, "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
                        "rope_theta": 1000000.0, "sliding_window": None},
    "Mistral-7B-v0.1": {**SIZES, "model_type": "mistral", "hidden_act": "silu", "rms_norm_eps": 1e-5,
                        "rope_theta": 10000.0, "sliding_window": 8, "tie_word_embeddings": False},
    "Phi-3-mini-4k": {**ALL_HEADS, "model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5,
                      "rope_theta": 10000.0, "rope_scaling": None, "sliding_window": 23, "attention_dropout": 0.0},
    "StarCoder2-7B": {**SIZES, "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5,
                      "rope_theta": 1000000, "sliding_window": 16, "use_bias": True, "tie_word_embeddings": False},
    "Qwen2.5-0.5B": {**SIZES, "model_type": "qwen2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
                     "rope_theta": 1000000.0, "tie_word_embeddings": True, "use_sliding_window": False,
                     "sliding_window": 32, "max_window_layers": 2},
    "Qwen3-0.6B": {**SIZES, "model_type": "qwen3", "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6,
                   "attention_bias": False, "rope_theta": 1000000, "tie_word_embeddings": True,
                   "use_sliding_window": False, "sliding_window": None},
    "AFM-4.5B": {**SIZES, "model_type": "arcee", "hidden_act": "relu2", "head_dim": 16, "rms_norm_eps": 1e-5,
                 "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0},
    "Phi-4": {**SIZES, "model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5, "rope_theta": 250000,
              "rope_scaling": None, "sliding_window": None, "attention_bias": False},
    "Phi-4-mini, without longrope": {**SIZES, "model_type": "phi3", "hidden_act": "silu", "rms_norm_eps": 1e-5,
                                     "partial_rotary_factor": 0.75, "tie_word_embeddings": True,
                                     "sliding_window": 262144},
    "Gemma-2B": {**SIZES, "model_type": "gemma", "head_dim": 32, "num_key_value_heads": 1, "hidden_act": "gelu",
                 "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    # published are 50 and 30, in which models of this size never come near
    "Gemma-2-27B": {**SIZES, **GEMMA, "model_type": "gemma2", "attn_logit_softcapping": 5.0, "attention_bias": False,
                    "final_logit_softcapping": 3.0, "num_hidden_layers": 4, "query_pre_attn_scalar": 144,
                    "sliding_window": 8, "rope_theta": 10000.0, "hidden_act": "gelu_pytorch_tanh"},
    "Gemma-3-1B": {**SIZES, **GEMMA, "model_type": "gemma3_text", "num_key_value_heads": 1, "num_hidden_layers": 7,
                   "attention_bias": False, "attn_logit_softcapping": None, "final_logit_softcapping": None,
                   "query_pre_attn_scalar": 256, "rope_local_base_freq": 10000, "rope_theta": 1000000,
                   "sliding_window": 8, "sliding_window_pattern": 6, "rope_scaling": None},
    "Gemma-3-27B's text model": {**SIZES, **GEMMA, "model_type": "gemma3_text", "num_hidden_layers": 6,
                                 "query_pre_attn_scalar": 168, "sliding_window": 8,
                                 "layer_types": [*["sliding_attention"] * 5, "full_attention"], "rope_parameters": {
                                     "full_attention": {"factor": 8.0, "rope_theta": 1e6, "rope_type": "linear"},
                                     "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"}}},
    "OLMo-2-7B": {**ALL_HEADS, "model_type": "olmo2", "hidden_act": "silu", "rms_norm_eps": 1e-6,
                  "rope_theta": 500000, "attention_bias": False, "tie_word_embeddings": False},
    "OLMo-2-32B": {**SIZES, "model_type": "olmo2", "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 500000},
    "StarCoder2-3B": {**SIZES, "model_type": "starcoder2", "hidden_act": "gelu_pytorch_tanh", "norm_epsilon": 1e-5,
                      "norm_type": "layer_norm", "mlp_type": "default", "rope_theta": 999999.4420358813,
                      "sliding_window": 64, "use_bias": True, "tie_word_embeddings": True},
    "Pythia-160M": {**ALL_HEADS, "model_type": "gpt_neox", "hidden_act": "gelu", "layer_norm_eps": 1e-5,
                    "rotary_emb_base": 10000, "rotary_pct": 0.25, "use_parallel_residual": True},
    "GPT-NeoX-20B": {**ALL_HEADS, "model_type": "gpt_neox", "hidden_act": "gelu_fast", "layer_norm_eps": 1e-5,
                     "rotary_emb_base": 10000, "rotary_pct": 0.25, "attention_bias": True},
    "GPT-2": {**GPT2, "model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5,
              "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "n_ctx": 64},
    "BLOOM-560M": {"model_type": "bloom", "n_embed": 64, "n_layer": 2, "num_attention_heads": 4, "vocab_size": 131,
                   "hidden_dropout": 0.0, "attention_dropout": 0.0, "layer_norm_epsilon": 1e-5, "offset_alibi": 100,
                   "pretraining_tp": 1, "seq_length": 64, "skip_bias_add": True, "bos_token_id": 1, "eos_token_id": 2,
                   "apply_residual_connection_post_layernorm": False, "masked_softmax_fusion": True},
    "BLOOM-176B, heads no power of two": {
        "model_type": "bloom", "hidden_size": 48, "n_layer": 2, "n_head": 6, "vocab_size": 131,
        "layer_norm_epsilon": 1e-5, "bos_token_id": 1, "eos_token_id": 2},
    "OPT-125M": {**ALL_HEADS, "model_type": "opt", "ffn_dim": 96, "activation_function": "relu", "pad_token_id": 1,
                 "do_layer_norm_before": True, "word_embed_proj_dim": 64, "_remove_final_layer_norm": False,
                 "prefix": "</s>"},
}
TOKENS = torch.randint(3, 131, (2, 41), generator=torch.Generator().manual_seed(3))


def published(folder: Path, name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model with random weights, saved with the configuration as it was published; itself in fp32."""
    config = transformers.AutoConfig.for_model(**PUBLISHED[name])
    made = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.float32)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in made.parameters():
            parameter.normal_(0.0, 0.2, generator=generator).copy_(parameter.to(dtype))
    made.to(dtype).save_pretrained(folder, max_shard_size="40KB")
    (folder / "config.json").write_text(json.dumps(
        PUBLISHED[name] | {"architectures": [type(made).__name__], "torch_dtype": str(dtype).removeprefix("torch.")}))
    return made.float().eval()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return torch.allclose(ours, theirs, rtol=0, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_and_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    twin = published(tmp_path / "hf", name)
    convert_from_hf(tmp_path / "hf", tmp_path / "ours", check=False)
    family, config = read_hf_config(tmp_path / "hf")
    reader, model = CheckpointReader(tmp_path / "ours"), Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(reader.read(PREFIX + spec_of(parameter).name))
    inputs, labels = TOKENS[:, :-1], TOKENS[:, 1:]
    logits = model(inputs.T, Batch(inputs.T, torch.arange(inputs.shape[1]).unsqueeze(1))).transpose(0, 1)
    expected = twin(inputs).logits
    assert close(logits, expected)
    for each in (logits, expected):
        F.cross_entropy(each.flatten(0, 1), labels.flatten()).backward()
    gradients = {spec_of(parameter).name: parameter.grad for parameter in model.parameters()}
    theirs = {**dict(twin.named_parameters()), "embed_out.weight": twin.get_output_embeddings().weight}
    for ours, parts in hf_parts(config, family).items():
        for part in parts:
            gradient, own = theirs[part.name].grad, gradients[ours]
            assert gradient is not None and own is not None
            turned = gradient.T if part.transposed else gradient
            block = turned[part.first : part.first + part.shape[0]]
            # the gradient of a key's bias without RoPE is zero and comes out as rounding: the scale is the whole bias's
            difference = (own[part.box.slices].reshape(part.shape) - block).abs().max()
            assert difference <= 1e-5 * own.abs().max(), part.name


@pytest.mark.parametrize("name", PUBLISHED)
def test_theirs_to_ours_and_back_is_the_same_model(name: str, tmp_path: Path) -> None:
    """The same bits under the same names, or as Llama or Mistral, which some of them are by other names."""
    published(tmp_path / "hf", name, torch.bfloat16)
    checked = convert_from_hf(tmp_path / "hf", tmp_path / "ours")
    assert checked is not None and checked.largest_difference <= checked.allowed
    convert_to_hf(CheckpointReader(tmp_path / "ours"), tmp_path / "back", torch.bfloat16)
    (family, config), (written, again) = read_hf_config(tmp_path / "hf"), read_hf_config(tmp_path / "back")
    assert again == config and written.name in (family.name, "LlamaForCausalLM", "MistralForCausalLM")
    if written is family:
        before, after = tensors(tmp_path / "hf"), tensors(tmp_path / "back")
        assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    else:
        assert name in ("Mistral-7B-v0.3", "Phi-4", "Phi-3-mini-4k")
    with torch.inference_mode():
        first, second = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / place, torch_dtype=torch.float32)
                         .eval()(TOKENS).logits for place in ("hf", "back"))
    assert close(second, first)


def test_files_saved_without_the_head_and_with_masks(tmp_path: Path) -> None:
    """As the first GPT-2 was: names without their first word, and a causal mask in every layer."""
    published(tmp_path / "hf", "GPT-2")
    from safetensors.torch import save_file

    weights = {name.removeprefix("transformer."): tensor for name, tensor in tensors(tmp_path / "hf").items()}
    weights |= {f"h.{layer}.attn.bias": torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril() for layer in range(2)}
    for path in (tmp_path / "hf").glob("model*"):
        path.unlink()
    save_file(weights, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    checked = convert_from_hf(tmp_path / "hf", tmp_path / "ours")
    assert checked is not None and checked.largest_difference <= checked.allowed


@pytest.mark.parametrize(("name", "key", "value"), [
    ("Phi-4", "sliding_window", 0), ("Phi-4", "hidden_act", "gelu"), ("StarCoder2-3B", "use_bias", False),
    ("StarCoder2-3B", "norm_epsilon", None), ("Pythia-160M", "use_parallel_residual", False),
    ("Pythia-160M", "attention_bias", False), ("Pythia-160M", "rotary_pct", 1.5),
    ("GPT-2", "scale_attn_by_inverse_layer_idx", True), ("GPT-2", "add_cross_attention", True),
    ("GPT-2", "n_head", 0), ("OPT-125M", "do_layer_norm_before", False), ("OPT-125M", "word_embed_proj_dim", 32),
    ("OPT-125M", "enable_bias", False), ("Gemma-2B", "use_bidirectional_attention", True),
    ("Yi-6B", "partial_rotary_factor", 0.5),
    ("Yi-6B", "architectures", ["InternLM2ForCausalLM"]), ("Yi-6B", "architectures", ["BaichuanForCausalLM"]),
    ("BLOOM-560M", "apply_residual_connection_post_layernorm", True), ("Gemma-2-27B", "layer_types", ["x"]),
    ("OLMo-2-7B", "hidden_act", "gelu"), ("Gemma-3-1B", "use_bidirectional_attention", True),
])
def test_what_octant_does_not_compute_is_refused_by_its_key(name: str, key: str, value: Any, tmp_path: Path) -> None:
    published(tmp_path / "hf", name)
    edit(tmp_path / "hf" / "config.json", **{key: value})
    with pytest.raises(CheckpointError, match=f"config.json: {key} is "):
        convert_from_hf(tmp_path / "hf", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "conversion.md").read_text()
    listed = page.partition("| published configuration |")[2].partition("\n\n")[0]
    assert len(PUBLISHED) >= 12 and [name for name in PUBLISHED if name not in listed] == []
