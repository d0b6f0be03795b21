"""Conversations for the tests: a tokenizer with everybody's special tokens, and records of every format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.kit.texts import chinese_texts, english_texts

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]


def hf_tokenizer(folder: Path, template: str | None = None, vocab_size: int = 1200, **config: Any) -> Path:
    """A byte-level BPE as Llama 3 and Qwen have, in a folder."""
    tokenizers = pytest.importorskip("tokenizers")
    folder.mkdir(parents=True, exist_ok=True)
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                             show_progress=False)
    backend.train_from_iterator([*english_texts(4), *chinese_texts(30)], trainer)
    backend.save(str(folder / "tokenizer.json"))
    fields = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"} | config
    if template is not None:
        fields["chat_template"] = template
    (folder / "tokenizer_config.json").write_text(json.dumps(fields))
    return folder


# Every format, with the answers that are in it (of pairs and ranks: of the best).
RECORDS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "alpaca": ({"instruction": "Say hello.", "input": "in English", "output": "Hello there!"}, ["Hello there!"]),
    "alpaca with history": (
        {"instruction": "and now?", "output": "现在很好 😀", "system": "You are kind.",
         "history": [["how are you?", "well, thank you"], ["你好吗？", "很好，谢谢。"]]},
        ["well, thank you", "很好，谢谢。", "现在很好 😀"]),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "你好！我能帮你什么？"},
                           {"from": "human", "value": "bye 👋"}, {"from": "gpt", "value": "Good bye 👩‍👩‍👧!"}],
         "system": "是的"},
        ["你好！我能帮你什么？", "Good bye 👩‍👩‍👧!"]),
    "openai": (
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1+1?"},
                      {"role": "assistant", "content": "2"}, {"role": "user", "content": ""},
                      {"role": "assistant", "content": "Did you want to ask something?"}]},
        ["2", "Did you want to ask something?"]),
    "completion": ({"prompt": "The capital of France is", "completion": " Paris."}, [" Paris."]),
    "completion of turns": (
        {"prompt": [{"role": "user", "content": "count"}],
         "completion": [{"role": "assistant", "content": "1\n2\n\n3"}]},
        ["1\n2\n\n3"]),
    "pair of texts": ({"prompt": "Which is better?", "chosen": "this one", "rejected": "no idea", "margin": 0.5},
                      ["this one"]),
    "pair of turns": (
        {"chosen": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "好"}],
         "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "坏"}]}, ["好"]),
    "hh-rlhf": ({"chosen": "\n\nHuman: hi\n\nAssistant: hello, human\n\nHuman: more\n\nAssistant: no more",
                 "rejected": "\n\nHuman: hi\n\nAssistant: hello, human\n\nHuman: more\n\nAssistant: go away"},
                ["hello, human", "no more"]),
    "llama-factory pair": (
        {"conversations": [{"from": "human", "value": "写一首诗"}], "chosen": {"from": "gpt", "value": "床前明月光"},
         "rejected": {"from": "gpt", "value": "不会"}}, ["床前明月光"]),
    "ranked": ({"prompt": "rate", "responses": ["worst", "best", "middle"], "ranks": [3, 1, 2]}, ["best"]),
    "gsm8k": ({"question": "How many is 48/2?", "answer": "48/2 = <<48/2=24>>24\n#### 24"},
              ["48/2 = <<48/2=24>>24\n#### 24"]),
}
