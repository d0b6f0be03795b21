"""A finished run in a folder: one checkpoint of a small model over bytes, and a corpus it can be evaluated on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.checkpoint.write import save
from engine.config import Config
from engine.data.indexed import IndexedWriter
from engine.data.tokenizer import ByteTokenizer
from tests.kit.models import inference_model, model_config

DOCUMENTS = ["a first document, in English, that is short", "zweites Stück, mit Umlauten: äöüß", "",
             "第三篇文章，全是中文。" * 4, "and one more to end it all\n" * 3]
STEP = 3


def run_config(**model: Any) -> Config:
    """The run's configuration; 8 heads, 4 groups and 4 layers suit tensor and pipeline degrees up to 4."""
    return model_config(vocab_size=257, **model).with_changes(data={"tokenizer": "bytes", "seq_len": 16})


def make_run(folder: Path, config: Config, metadata: dict[str, Any] | None = None) -> Path:
    """`folder` becomes a run's folder."""
    metadata = {"config": config.to_dict(), "data": {"tokenizer": ByteTokenizer.sha256}} | (metadata or {})
    save(folder / "checkpoints", STEP, inference_model(config).weights(), metadata, keep=None)
    return folder


def make_corpus(prefix: Path) -> str:
    """The documents as bytes, each ended."""
    tokenizer = ByteTokenizer()
    with IndexedWriter(prefix, "uint16") as writer:
        for text in DOCUMENTS:
            writer.add_document([*tokenizer.encode(text), tokenizer.eod_id])
    return str(prefix)
