"""What several tests of corpora use."""

from __future__ import annotations

import pytest

from corpus_tools.tokenizers.training import train_tokenizer
from tests.kit.texts import chinese_texts, english_texts


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(train_tokenizer([*english_texts(), *chinese_texts()], 1000, tmp_path_factory.mktemp("prepare") / "tok"))
