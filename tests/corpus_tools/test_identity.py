"""A tokenizer is what gives the ids: corpora with different end ids do not meet in a merge, a mixture or a run."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from corpus_tools.prepare import prepare
from corpus_tools.shards import merge_corpora
from engine.data.indexed import IndexedDataset
from engine.data.sidecar import Sidecar, sidecar_path
from engine.data.sources import open_sources
from engine.data.tokenizer import load_tokenizer
from engine.data.tokenizer_identity import TokenizerInfo, recorded_tokenizer
from engine.errors import DataError
from tests.kit.made import Made

SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]
OTHER_END = r"eos_token in tokenizer_config\.json is (1 in one and 2|2 in one and 1) in the other"
TEXT = '{"text": "hello world, the cat sat"}\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `tokenizer.json`, and its end named beside it."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("base")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(["hello world, the cat sat"], trainer)
    backend.save(str(folder / "tokenizer.json"))
    name_ends(folder)
    return folder


def name_ends(folder: Path, eos: str = "<|end|>", bos: str = "<|begin|>", **others: str) -> Path:
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": bos, "eos_token": eos, **others}))
    return folder


def like(base: Path, folder: Path, **ends: str) -> Path:
    """The same tokenizer.json beside another configuration."""
    shutil.copytree(base, folder)
    return name_ends(folder, **ends)


@pytest.fixture
def corpora(base: Path, tmp_path: Path) -> tuple[str, str]:
    """One text prepared with each of two ends."""
    (tmp_path / "a.jsonl").write_text(TEXT * 4)
    other = like(base, tmp_path / "chat", eos="<|turn|>")
    for name, tokenizer in (("one", base), ("two", other)):
        prepare([tmp_path / "a.jsonl"], tokenizer, tmp_path / name, workers=1)
    return str(tmp_path / "one"), str(tmp_path / "two")


def test_the_end_counts_and_the_chat_template_does_not(base: Path, tmp_path: Path) -> None:
    mine = load_tokenizer(base).info
    assert mine.difference(load_tokenizer(like(base, tmp_path / "t", chat_template="{{ messages }}")).info) is None
    for key, ends in (("eos_token", {"eos": "<|turn|>"}), ("bos_token", {"bos": "<|turn|>"})):
        difference = mine.difference(load_tokenizer(like(base, tmp_path / key, **ends)).info)
        assert difference is not None and f"{key} in tokenizer_config.json" in difference


def test_corpora_with_different_ends_are_not_merged(corpora: tuple[str, str], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=OTHER_END):
        merge_corpora(corpora, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("named", [True, False])
def test_corpora_with_different_ends_are_not_mixed(corpora: tuple[str, str], base: Path, named: bool) -> None:
    tokenizer = load_tokenizer(base).info if named else None
    open_sources([Made(corpora[0])], 4, 300, tokenizer)
    with pytest.raises(DataError, match=OTHER_END):
        open_sources([Made(path) for path in corpora], 4, 300, tokenizer)


def test_a_side_file_of_an_earlier_version_is_still_good(corpora: tuple[str, str], base: Path, tmp_path: Path) -> None:
    """It lacks the beginning of text; the end it has, so that is compared."""
    for prefix in corpora:
        fields = json.loads(sidecar_path(prefix).read_text())
        del fields["tokenizer"]["bos_id"], fields["made_from"]
        sidecar_path(prefix).write_text(json.dumps(fields))
    open_sources([Made(corpora[0])], 4, 300, load_tokenizer(base).info)
    with pytest.raises(DataError, match="made with another tokenizer"):
        open_sources([Made(corpora[1])], 4, 300, load_tokenizer(base).info)
    prepare([tmp_path / "a.jsonl"], base, tmp_path / "new", workers=1)
    merge_corpora([corpora[0], tmp_path / "new"], tmp_path / "out")
    assert Sidecar.read(tmp_path / "out") is not None


def test_an_interrupted_prepare_does_not_go_on_with_another_end(base: Path, tmp_path: Path) -> None:
    tokenizer = like(base, tmp_path / "t")
    (tmp_path / "1.jsonl").write_text(TEXT * 3)
    (tmp_path / "2.jsonl").write_text(TEXT + '{"text": bad}\n')
    files = [tmp_path / "1.jsonl", tmp_path / "2.jsonl"]
    with pytest.raises(DataError, match="line 2"):
        prepare(files, tokenizer, tmp_path / "out", workers=1, part_seconds=0)
    assert os.listdir(tmp_path / "out.parts")
    name_ends(tokenizer, eos="<|turn|>")
    files[1].write_text(TEXT)
    prepare(files, tokenizer, tmp_path / "out", workers=1)
    dataset = IndexedDataset(tmp_path / "out")
    assert [int(dataset.document(i)[-1]) for i in range(dataset.num_documents)] == [2] * 4


def test_what_a_checkpoint_records() -> None:
    mine = TokenizerInfo("hf", "t", "a" * 64, 300, 2, 0)
    recorded = recorded_tokenizer(mine.fingerprint())
    assert recorded is not None and mine.difference(recorded) is None
    assert recorded_tokenizer({"tokenizer": None}) is None
    earlier = recorded_tokenizer({"tokenizer": "a" * 64})
    assert earlier is not None and mine.difference(earlier) is None
    for other in ({"tokenizer": "b" * 64}, {"tokenizer": "a" * 64, "end_of_document": 1}):
        different = recorded_tokenizer(other)
        assert different is not None and mine.difference(different)
