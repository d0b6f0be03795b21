"""Whatever a text, a corpus or a tokenizer holds, it is read, or refused in a sentence that names the file."""

from __future__ import annotations

import base64
import gzip
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import strategies as st

from corpus_tools.inputs import expand_inputs
from corpus_tools.inspect import statistics
from corpus_tools.prepare import prepare
from corpus_tools.readers import read_blocks, read_texts, records_of
from corpus_tools.tokenizers.training import train_tokenizer
from corpus_tools.verify import verify
from engine.data.corpus import Corpus
from engine.data.tokenizer import load_tokenizer
from engine.errors import DataError
from tests.kit.fuzz import Reader, bent, damaged, fuzz, hostile
from tests.kit.texts import chinese_texts, english_texts

TEXTS = [f"document {index} " + "lorem ipsum dolor "[: index % 17] * 3 + "世界"[: index % 3] for index in range(30)]
RECORDS = [{"id": index, "text": text, "n": [index, {"a": 1.5}], "x": None} for index, text in enumerate(TEXTS)]
LINES = "".join(json.dumps(record, ensure_ascii=record["id"] % 2 == 0) + "\n" for record in RECORDS).encode()
LIST = json.dumps(RECORDS, ensure_ascii=False).encode()
INDENTED = json.dumps(RECORDS, indent=2).encode()


def parquet(compression: str, checksum: bool) -> bytes:
    pyarrow, writer = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    sink = io.BytesIO()
    table = pyarrow.table({"n": list(range(len(TEXTS))), "text": TEXTS})
    writer.write_table(table, sink, compression=compression, row_group_size=10, write_page_checksum=checksum)
    return sink.getvalue()


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").ZstdCompressor(write_checksum=True).compress(data)


INPUTS: dict[str, Callable[[], list[bytes]]] = {
    ".txt": lambda: ["\n".join(TEXTS).encode()],
    ".jsonl": lambda: [LINES],
    ".json": lambda: [LINES, LIST, INDENTED],
    ".jsonl.gz": lambda: [gzip.compress(LINES, mtime=0), gzip.compress(LINES, mtime=0) * 2],
    ".jsonl.zst": lambda: [zst(LINES), zst(LINES) + zst(LINES)],
    ".parquet": lambda: [parquet("none", False), parquet("snappy", True), parquet("zstd", False)],
}


def skipping(suffix: str) -> Callable[[Path], None]:
    """Reads as `--on-error skip` does, then as `stop` does: they agree on whether something is wrong."""

    def read(folder: Path) -> None:
        texts, bad = [], []
        [file] = expand_inputs([folder / f"a{suffix}"])
        for block in read_blocks(file, "text", join_texts=False):
            records = records_of(block, "text")
            texts += records.texts
            bad += records.bad
        assert all(text.encode() is not None for text in texts)
        assert all(record.count > 0 and str(record).isprintable() for record in bad), bad
        if not bad:
            assert list(read_texts([folder / f"a{suffix}"])) == texts
            return
        with pytest.raises(DataError):
            list(read_texts([folder / f"a{suffix}"]))
        raise DataError(str(bad[0]))

    return read


@pytest.mark.parametrize("suffix", INPUTS)
def test_inputs(suffix: str, request: pytest.FixtureRequest) -> None:
    good = INPUTS[suffix]()
    fuzz(Reader(f"prepare {suffix}", skipping(suffix)),
         st.fixed_dictionaries({f"a{suffix}": st.one_of(damaged(good), damaged(good, edits=1), hostile())}), request)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "a.jsonl").write_bytes(LINES)
    prepare([folder / "a.jsonl"], "bytes", folder / "web", workers=1)
    (folder / "a.jsonl").unlink()
    return folder


def documents(prefix: Path) -> list[bytes]:
    dataset = Corpus.open(prefix).dataset
    statistics(dataset)
    dataset.document_starts(0, dataset.num_tokens)
    return [dataset.document(index).tobytes() for index in range(dataset.num_documents)]


def opening(good: list[bytes]) -> Callable[[Path], None]:
    """Opens a corpus: what is accepted has the documents that were written; `verify` takes what opens, or says why."""

    def read(folder: Path) -> None:
        verify(str(folder / "web"))
        assert documents(folder / "web") == good, "other documents than were written"

    return read


def test_an_index(corpus: Path, request: pytest.FixtureRequest) -> None:
    good = (corpus / "web.idx").read_bytes()
    content = st.one_of(damaged(good), damaged(good, edits=1), hostile())
    fuzz(Reader("corpus .idx", opening(documents(corpus / "web")), corpus), st.fixed_dictionaries({"web.idx": content}),
         request)


def test_a_foreign_index(corpus: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Without a side file: only what contradicts itself can be seen, and nothing may break."""
    shutil.copytree(corpus, tmp_path / "foreign")
    (tmp_path / "foreign" / "web.json").unlink()
    good = (corpus / "web.idx").read_bytes()
    fuzz(Reader("foreign .idx", lambda folder: documents(folder / "web"), tmp_path / "foreign"),
         st.fixed_dictionaries({"web.idx": st.one_of(damaged(good), damaged(good, edits=1))}), request)


def test_a_side_file(corpus: Path, request: pytest.FixtureRequest) -> None:
    good = (corpus / "web.json").read_bytes()
    bent_values = bent(json.loads(good)).map(lambda value: json.dumps(value).encode())
    fuzz(Reader("corpus .json", opening(documents(corpus / "web")), corpus),
         st.fixed_dictionaries({"web.json": st.one_of(damaged(good), bent_values, hostile())}), request)


def encoding(folder: Path) -> None:
    """A tokenizer that is accepted gives ids of its own, and text back for them."""
    named = [folder / name for name in ("tok.model", "tok.tiktoken")]
    tokenizer = load_tokenizer(next((path for path in named if path.exists()), folder))
    for text in ("", "hello world, 世界 \n\n 1234  x", "\0", "é" * 50):
        ids = tokenizer.encode(text)
        assert all(0 <= token < tokenizer.vocab_size for token in ids), (ids, tokenizer.vocab_size)
        assert isinstance(tokenizer.decode(ids), str)
    assert 0 <= tokenizer.eod_id < tokenizer.vocab_size


def test_a_sentencepiece_model(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    good = train_tokenizer([*english_texts(5), *chinese_texts(3)], 600, tmp_path / "tok").read_bytes()
    content = st.one_of(damaged(good), damaged(good[-3000:], edits=2).map(lambda end: good[:-3000] + end), hostile())
    fuzz(Reader("tokenizer .model", encoding), st.fixed_dictionaries({"tok.model": content}), request)


def test_a_hugging_face_tokenizer(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.train_from_iterator(english_texts(3), tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<|begin|>", "<|end|>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()))
    good = backend.to_str(pretty=True).encode()
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "special": True}, "chat_template": "x"}
    as_json = [bent(json.loads(good), edits=2), bent(config)]
    bent_tokenizer, bent_config = (values.map(lambda value: json.dumps(value).encode()) for values in as_json)
    good_config = json.dumps(config).encode()
    fuzz(Reader("tokenizer.json", encoding), st.fixed_dictionaries({
        "tokenizer.json": st.one_of(st.just(good), damaged(good), bent_tokenizer, hostile()),
        "tokenizer_config.json": st.one_of(st.just(good_config), damaged(good_config), bent_config, hostile()),
    }), request)


def test_a_tiktoken_file(request: pytest.FixtureRequest) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), b"lo", b"hel", b"hello"]
    good = b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))
    config = {"pattern": r" ?\p{L}+|\p{N}{1,3}|\s+|.", "eos_token": "<|end|>",
              "added_tokens_decoder": {"300": {"content": "<|end|>", "special": True}}}
    good_config = json.dumps(config).encode()
    bent_config = bent(config).map(lambda value: json.dumps(value).encode())
    fuzz(Reader("tokenizer .tiktoken", encoding), st.fixed_dictionaries({
        "tok.tiktoken": st.one_of(st.just(good), damaged(good), hostile()),
        "tokenizer_config.json": st.one_of(st.just(good_config), damaged(good_config), bent_config, hostile()),
    }), request)
