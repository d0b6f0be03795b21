"""Tokenizers: ids equal SentencePiece's, decoding gives the text back, streams print what decoding prints."""

from __future__ import annotations

import base64
import json
import random
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus_tools.tokenizers.training import train_tokenizer
from engine.config.tiktoken import CL100K, KNOWN, parse_ranks
from engine.config.vocabulary import tokenizer_vocab_size
from engine.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, Tokenizer, load_tokenizer
from engine.data.tokenizer_tiktoken import byte_names
from engine.errors import DataError, RequestError
from tests.kit.texts import chinese_texts, english_texts

ODD_TEXTS = [
    "", " ", "  ", "a", " a", "a ", "a  b", "\n", "\n\n", " \n ", "a\n b\n\n\nc", "\r\n\tx", "▁", "▁▁ x▁y ▁",
    "\0", "a\0b", "汉字", "汉字 汉字\n汉字", "😀👩‍👩‍👧", "1234567890", "</s><s><unk>", "\ufeff", "é e\u0301",
    "x" * 200, " " * 50 + "y", "<0x0A>",
]  # fmt: skip

OWN_CL100K = (r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|"
              r"\s*[\r\n]|\s+(?!\S)|\s")  # of tiktoken 0.14, which reads it as CL100K

TIKTOKEN_TEXTS = [*ODD_TEXTS, *english_texts(4), *chinese_texts(8), "aaaaa" * 7, "I'LL 123456 \r\n\n  x \n y", "e\n "]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    return train_tokenizer([*english_texts(), *chinese_texts()], 1500, folder / "tok")


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as Llama 3 and Qwen have, with special tokens in the text's reach."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("hf")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(english_texts(10), trainer)
    backend.enable_truncation(8)  # as some published files have it; a corpus must not be truncated
    backend.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def tiktoken_file(hf_folder: Path) -> Path:
    """The same tokens as a list of ranks; how words are cut and the special tokens stand beside it, with a gap."""
    folder = hf_folder.parent / f"{hf_folder.name}-tiktoken"
    folder.mkdir()
    vocabulary = json.loads((hf_folder / "tokenizer.json").read_text())["model"]["vocab"]
    byte_of = {name: byte for byte, name in enumerate(byte_names())}
    tokens = [bytes(map(byte_of.__getitem__, text)) for text in vocabulary if not text.startswith("<|")]
    tokens.sort(key=lambda token: vocabulary["".join(byte_names()[byte] for byte in token)])
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tiny.tiktoken").write_text("".join(lines))
    added = {"1001": {"content": "<|begin|>", "special": True}, "1005": {"content": "<|end|>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({
        "pattern": CL100K, "added_tokens_decoder": added, "bos_token": "<|begin|>", "eos_token": "<|end|>"}))
    return folder / "tiny.tiktoken"


@pytest.fixture(params=["bytes", "model", "hf_folder", "tiktoken_file"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    spec = request.param
    return load_tokenizer(spec if spec == "bytes" else request.getfixturevalue(spec))


def test_byte_tokenizer() -> None:
    tokenizer = load_tokenizer("bytes")
    assert isinstance(tokenizer, ByteTokenizer)
    assert (tokenizer.vocab_size, tokenizer.eod_id, tokenizer.bos_id, tokenizer.pad_id) == (257, 256, None, None)
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert tokenizer.decode([97, 195, 169, 256]) == "aé"
    assert tokenizer.decode([195]) == "\ufffd"


def test_sentencepiece_attributes(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert (tokenizer.kind, tokenizer.name, tokenizer.vocab_size) == ("sentencepiece", "tok.model", 1500)
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.pad_id) == (1, 2, None)
    assert len(tokenizer.sha256) == 64
    assert tokenizer.joins_at_newline


def test_training_follows_llama(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    pieces = [piece.text for piece in tokenizer.model.pieces]
    assert pieces[:3] == ["<unk>", "<s>", "</s>"]
    assert pieces[3:259] == [f"<0x{byte:02X}>" for byte in range(256)]
    assert not any(len(piece) > 1 and any(c.isdigit() for c in piece) for piece in pieces[259:]), "digits stand alone"
    assert [tokenizer.decode([i]) for i in tokenizer.encode("x2024")][-4:] == ["2", "0", "2", "4"]


def test_words_are_cut_as_sentencepiece_cuts_the_whole(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(model))
    for text in [*ODD_TEXTS, *english_texts(12), *chinese_texts(20, seed=1)]:
        assert tokenizer.encode(text) == reference.encode(text), text[:50]


@settings(max_examples=300, deadline=None)
@given(text=st.text(alphabet=st.sampled_from(list(" \n▁\tab世界1é😀.<>/s\0")), max_size=40))
def test_any_text_is_cut_as_sentencepiece_cuts_it(text: str, model: Path) -> None:
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.encode(text) == tokenizer.processor.encode(text)


def test_a_model_without_word_boundaries_is_handed_the_whole_text(tmp_path: Path) -> None:
    """Pieces across words, a normalising model, and a unigram model: none may be cut into words."""
    text = tmp_path / "text.txt"
    text.write_text("\n".join("\n".join(english_texts(8)).split("\n")), encoding="utf-8")
    options = {"across": {"split_by_whitespace": False, "model_type": "bpe"}, "normalising": {"model_type": "bpe"},
               "unigram": {"model_type": "unigram", "normalization_rule_name": "identity"}}  # fmt: skip
    for name, option in options.items():
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=str(tmp_path / name), vocab_size=600, byte_fallback=True, minloglevel=2,
            **option,
        )  # fmt: skip
        tokenizer = load_tokenizer(tmp_path / f"{name}.model")
        assert isinstance(tokenizer, SentencePieceTokenizer)
        assert not tokenizer.joins_at_newline
        for sample in [*ODD_TEXTS, *english_texts(2)]:
            assert tokenizer.encode(sample) == tokenizer.processor.encode(sample), (name, sample[:50])


@pytest.mark.parametrize("spec", ["bytes", "model"])
def test_a_text_encoded_in_parts_gives_the_same_ids(spec: str, request: pytest.FixtureRequest) -> None:
    tokenizer = load_tokenizer(spec if spec == "bytes" else request.getfixturevalue(spec))
    draw = random.Random(0)
    for text in [*english_texts(5), *chinese_texts(10), "a\n\n\n b\n  c\n", "\n", "x\n"]:
        ends = [i for i, character in enumerate(text) if character == "\n" and i > 0]
        cuts = sorted({0, len(text), *draw.sample(ends, min(4, len(ends)))})
        parts = [text[a:b] for a, b in pairwise(cuts)]
        ids = [tokenizer.encode_array(part, continues=index > 0) for index, part in enumerate(parts)]
        assert np.concatenate(ids).tolist() == tokenizer.encode(text)


def test_the_word_cache_stays_bounded(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.tokenizer_sentencepiece.LARGEST_CACHE", 50)
    tokenizer = load_tokenizer(model)
    assert isinstance(tokenizer, SentencePieceTokenizer)
    for text in english_texts(3):
        assert tokenizer.encode(text) == tokenizer.processor.encode(text)
        assert len(tokenizer._cache) <= 50


def test_decoding_gives_the_text_back(tokenizer: Tokenizer) -> None:
    for text in [*ODD_TEXTS, *english_texts(3), *chinese_texts(5)]:
        if "▁" not in text or tokenizer.kind != "sentencepiece":  # SentencePiece cannot tell ▁ from a space
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_plain_text_cannot_forge_special_ids(tokenizer: Tokenizer) -> None:
    text = "a</s>b<s>c<|end|>d<|begin|>e<|endoftext|>f<unk>"
    assert not {tokenizer.eod_id, tokenizer.bos_id} & set(tokenizer.encode(text))
    assert tokenizer.decode([*tokenizer.encode(text), tokenizer.eod_id]) == text


def test_streaming_prints_what_decoding_prints(tokenizer: Tokenizer) -> None:
    for text in [*ODD_TEXTS, english_texts(1)[0][:3000], chinese_texts(1)[0]]:
        ids = tokenizer.encode(text)
        stream = tokenizer.stream()
        assert "".join(map(stream.push, ids)) + stream.flush() == tokenizer.decode(ids)


def test_streaming_random_ids(tokenizer: Tokenizer) -> None:
    """A model says anything, broken UTF-8 included; nothing may be lost or printed twice."""
    draw = random.Random(0)
    for _ in range(50):
        ids = [draw.randrange(3, tokenizer.vocab_size) for _ in range(draw.randint(1, 30))]
        stream = tokenizer.stream()
        printed = "".join(map(stream.push, ids)) + stream.flush()
        assert printed.replace("\ufffd", "") == tokenizer.decode(ids).replace("\ufffd", "")


def test_stream_holds_back_half_a_character() -> None:
    stream = load_tokenizer("bytes").stream()
    assert [stream.push(byte) for byte in "aé".encode()] == ["a", "", "é"]
    assert stream.push(0xC3) == "" and stream.flush() == "\ufffd"


def test_arrays_are_the_lists(tokenizer: Tokenizer) -> None:
    for text in english_texts(2):
        assert tokenizer.encode_array(text).tolist() == tokenizer.encode(text)


def test_hugging_face_folder(hf_folder: Path) -> None:
    tokenizer = load_tokenizer(hf_folder)
    assert (tokenizer.kind, tokenizer.bos_id, tokenizer.eod_id, tokenizer.vocab_size) == ("hf", 0, 1, 1000)
    assert load_tokenizer(hf_folder / "tokenizer.json").sha256 == tokenizer.sha256
    assert len(tokenizer.encode("word " * 100)) > 50, "the file's truncation is turned off"


def test_an_end_of_document_token_is_needed(hf_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes((hf_folder / "tokenizer.json").read_bytes())
    with pytest.raises(DataError, match=r"no end-of-document token.*eos_token.*tokenizer_config\.json"):
        load_tokenizer(tmp_path)


def test_messages(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(tmp_path / "missing.model")
    (tmp_path / "broken.model").write_bytes(b"not a model at all")
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "broken.model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"is not a tokenizer\.json"):
        load_tokenizer(tmp_path / "tokenizer.json")
    with pytest.raises(RequestError, match="259 ids are taken"):
        train_tokenizer(["some text"], 259, tmp_path / "small")
    with pytest.raises(DataError, match="no text to train"):
        train_tokenizer(["", ""], 1000, tmp_path / "none")
    with pytest.raises(RequestError, match="smaller --vocab-size"):
        train_tokenizer(["too little text"], 5000, tmp_path / "large")


def test_a_truncated_model_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.model").write_bytes(model.read_bytes()[:-7])
    with pytest.raises(DataError, match="is not a SentencePiece model"):
        load_tokenizer(tmp_path / "cut.model")


def ranked(word: bytes, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule, spelled out: join the two neighbours whose union has the lowest rank, the leftmost first."""
    parts = [word] if word in ranks else [bytes([byte]) for byte in word]
    while len(parts) > 1:
        best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], len(ranks)))
        if parts[best] + parts[best + 1] not in ranks:
            break
        parts[best:best + 2] = [parts[best] + parts[best + 1]]
    return [ranks[part] for part in parts]


def test_a_tiktoken_file_gives_the_ids_of_its_ranks(tiktoken_file: Path) -> None:
    """Word by word by the rule itself."""
    regex = pytest.importorskip("regex", reason="comes with transformers")
    tokenizer, ranks = load_tokenizer(tiktoken_file), parse_ranks(tiktoken_file.read_bytes())
    assert load_tokenizer(tiktoken_file.parent).sha256 == tokenizer.sha256
    assert tokenizer_vocab_size(str(tiktoken_file)) == tokenizer.vocab_size == 1006
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.kind) == (1001, 1005, "tiktoken")
    for text in TIKTOKEN_TEXTS:
        words = regex.findall(CL100K.replace(r"\z", r"\Z"), text)
        assert "".join(words) == text
        assert tokenizer.encode(text) == [token for word in words for token in ranked(word.encode(), ranks)], text[:50]
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("aBs19  \n\n\r\t!汉é'", k=draw.randint(1, 9))) + draw.choice(["", "'LL", "\n "])
        assert regex.findall(CL100K.replace(r"\z", r"\Z"), text) == regex.findall(OWN_CL100K, text), text


def test_tiktoken_gives_the_same_ids(tiktoken_file: Path) -> None:
    """The package, with its own spelling of the expression."""
    tiktoken = pytest.importorskip("tiktoken", reason="pip install tiktoken")
    tokenizer, ranks = load_tokenizer(tiktoken_file), parse_ranks(tiktoken_file.read_bytes())
    theirs = tiktoken.Encoding("t", pat_str=OWN_CL100K, mergeable_ranks=ranks, special_tokens={"<|end|>": 1005})
    for text in TIKTOKEN_TEXTS:
        assert theirs.encode_ordinary(text) == tokenizer.encode(text), text[:50]


def test_published_tiktoken_vocabularies(tmp_path: Path) -> None:
    """Known by their number of lines; Llama 3's is called tokenizer.model.  Ids as in Llama's and Qwen's code."""
    lines = [f"{base64.b64encode(bytes([rank])).decode()} {rank}\n" for rank in range(256)]
    lines += [f"{base64.b64encode(b'%06x' % rank).decode()} {rank}\n" for rank in range(256, 128_000)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eod_id, tokenizer.vocab_size) == (128_000, 128_001, 128_256)
    assert [tokenizer.specials[name] for name in ("<|eot_id|>", "<|reserved_special_token_250|>")] == [128_009, 128_255]
    assert tokenizer_vocab_size(str(tmp_path)) == 128_256
    assert tokenizer.encode("1234a 0x") == [ord(byte) for byte in "1234a 0x"]
    assert {size: 1 + max(known.specials.values()) for size, known in KNOWN.items()} == {
        50_256: 50_257, 100_256: 100_277, 128_000: 128_256, 151_643: 151_851, 199_998: 200_019}


def test_a_tiktoken_file_that_says_too_little_is_refused(tiktoken_file: Path, tmp_path: Path) -> None:
    file, config = tmp_path / "t.tiktoken", tmp_path / "tokenizer_config.json"
    file.write_bytes(tiktoken_file.read_bytes())
    with pytest.raises(DataError, match=r"998 tokens.*as `pattern`"):
        load_tokenizer(file)
    for pattern in (OWN_CL100K, r"\s+$|."):
        config.write_text(json.dumps({"pattern": pattern, "added_tokens_decoder": {"998": {"content": "<|end|>"}}}))
        with pytest.raises(DataError, match="read differently"):
            load_tokenizer(file)
    config.write_text(json.dumps({"pattern": CL100K, "added_tokens_decoder": {"3": {"content": "<|end|>"}}}))
    with pytest.raises(DataError, match="have ids or texts that other tokens have"):
        load_tokenizer(file)
    for line, why in ((b"YQ== x\n", "line 1 is no base64"), (b"!!! 3\n", "line 1"), (b"", "of the 256 bytes")):
        file.write_bytes(line + b"".join(tiktoken_file.read_bytes().splitlines(keepends=True)[200:]))
        with pytest.raises(DataError, match=why):
            load_tokenizer(file)
