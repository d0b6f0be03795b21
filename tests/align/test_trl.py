"""Beside TRL 1.x, an independent implementation: the same model, conversations and order give the same 20 losses.

TRL renders, cuts and masks the conversations by itself, and trains `transformers`' Llama with its own trainer and
torch's AdamW.  The test is skipped where TRL is not installed (`pip install 'trl>=1,<2'`).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.from_hf import convert_from_hf
from corpus_tools.conversations.start import open_corpora
from engine.config import Config
from engine.data.chat.templates import BUILT_IN
from tests.align.test_comparisons import write_pairs
from tests.align.test_sft import chat_config, write_chats
from tests.kit.chats import hf_tokenizer
from tests.kit.hf_folders import save_hf
from tests.kit.runs import metrics, train

STEPS, BATCH = 20, 4
RATE, BETAS, EPS, CLIP = 1e-3, (0.9, 0.95), 1e-8, 1.0
SHAPE = {"num_layers": 2, "hidden_size": 48, "num_heads": 4, "num_kv_heads": 2, "ffn_hidden_size": 80,
         "norm_eps": 1e-6, "max_seq_len": 128}

# Answers end with their end token: TRL compares whatever stands behind the prompt, a line break after it too.
TURNS = ("{% for turn in messages %}<|im_start|>{{ turn.role }}\n{{ turn.content }}<|im_end|>{% endfor %}"
         "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")

trl = pytest.importorskip("trl")


def our_config(folder: Path, vocab_size: int) -> Config:
    return chat_config(
        folder, steps=STEPS, model=SHAPE | {"vocab_size": vocab_size},
        data={"tokenizer": str(folder / "tokenizer"), "template": "chatml", "seq_len": 96, "pack": False, "valid": []},
        batch={"micro": 2, "global": BATCH}, checkpoint={"load": str(folder / "ours"), "every": 0},
        optim={"lr": RATE, "decay": "constant", "warmup_steps": 0, "betas": list(BETAS), "eps": EPS,
               "weight_decay": 0.0, "grad_clip": CLIP})


def their_losses(folder: Path, conversations: list[dict[str, Any]]) -> list[float]:
    """TRL's losses over the conversations in the order given."""
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.chat_template, tokenizer.pad_token = BUILT_IN["chatml"], "<s>"
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf", dtype="float32")
    arguments = trl.SFTConfig(
        output_dir=str(folder / "trl"), max_steps=STEPS, per_device_train_batch_size=BATCH, logging_steps=1,
        learning_rate=RATE, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], adam_epsilon=EPS, max_grad_norm=CLIP, optim="adamw_torch", max_length=97, packing=False,
        assistant_only_loss=True, shuffle_dataset=False, train_sampling_strategy="sequential", use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to=[], save_strategy="no", disable_tqdm=True, dataset_num_proc=None)
    trainer = trl.SFTTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_list(conversations),
                             processing_class=tokenizer)
    trainer.train()
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_twenty_losses_of_dpo_are_those_of_trl(tmp_path: Path) -> None:
    """TRL renders prompt and answers by itself, and holds a second model as the reference."""
    datasets, transformers = pytest.importorskip("datasets"), pytest.importorskip("transformers")
    (tmp_path / "turns.jinja").write_text(TURNS)
    hf_tokenizer(tmp_path / "tokenizer", vocab_size=600)
    write_pairs(tmp_path / "pairs.jsonl", number=STEPS * BATCH, margins=False)
    save_hf(tmp_path / "hf", "Llama", vocab_size=640, rms_norm_eps=1e-6)
    convert_from_hf(tmp_path / "hf", tmp_path / "ours", check=False)
    config = our_config(tmp_path, 640).with_changes(
        run={"objective": "dpo"}, optim={"lr": 2e-3},
        data={"train": [{"path": str(tmp_path / "pairs.jsonl")}], "template": str(tmp_path / "turns.jinja")})
    [source] = (corpora := open_corpora(config, say=lambda line: None)).comparisons
    order = [source.records[corpora.train.sample(index).window] for index in range(STEPS * BATCH)]
    train(config)
    records = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    asked = [{"prompt": [{"role": "user", "content": record["prompt"]}],
              **{key: [{"role": "assistant", "content": record[key]}] for key in ("chosen", "rejected")}}
             for record in (records[number] for number in order)]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    tokenizer.chat_template, tokenizer.pad_token = TURNS, "<s>"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="float32")
    arguments = trl.DPOConfig(
        output_dir=str(tmp_path / "trl"), max_steps=STEPS, per_device_train_batch_size=BATCH, logging_steps=1,
        learning_rate=2e-3, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0, adam_beta1=BETAS[0],
        adam_beta2=BETAS[1], adam_epsilon=EPS, max_grad_norm=CLIP, optim="adamw_torch", max_length=96, beta=0.1,
        train_sampling_strategy="sequential", use_cpu=True, bf16=False, gradient_checkpointing=False, report_to=[],
        save_strategy="no", disable_tqdm=True)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=datasets.Dataset.from_list(asked),
                             processing_class=tokenizer)
    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    ours = metrics(config)
    assert len(ours) == len(theirs) == STEPS and ours[-1]["loss"] < 0.4
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["loss"] == pytest.approx(other["loss"], rel=1e-4, abs=1e-5)
        for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
            assert mine[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


@pytest.mark.timeout(600)
def test_twenty_losses_are_those_of_trl(tmp_path: Path) -> None:
    hf_tokenizer(tmp_path / "tokenizer", vocab_size=600)
    write_chats(tmp_path / "train.jsonl", number=STEPS * BATCH)
    size = 640
    save_hf(tmp_path / "hf", "Llama", vocab_size=size, rms_norm_eps=1e-6)
    convert_from_hf(tmp_path / "hf", tmp_path / "ours", check=False)
    config = our_config(tmp_path, size)
    corpora = open_corpora(config, say=lambda line: None)
    [source] = corpora.conversations
    order = [source.rows[corpora.train.sample(index).window][0] for index in range(STEPS * BATCH)]
    records = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    train(config)
    ours = [row["loss"] for row in metrics(config)]
    theirs = their_losses(tmp_path, [records[number] for number in order])
    assert len(ours) == len(theirs) == STEPS and ours[-1] < 0.9 * ours[0]
    assert ours == pytest.approx(theirs, rel=1e-4)
