"""Training a SentencePiece BPE the way LLaMA's was trained.

BPE starts from characters and keeps joining the most frequent neighbours until the vocabulary is full.  LLaMA's
choices, kept here: characters outside the vocabulary fall back to their UTF-8 bytes, so nothing is ever unknown; every
digit stands alone, so numbers are spelled; the text is not normalised and runs of spaces are kept, so decoding gives
back what was encoded.  Ids: 0 `<unk>`, 1 `<s>`, 2 `</s>`, 3..258 the bytes, then the pieces by rank.
"""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import sentencepiece

from engine.data.sentencepiece_model import parse_model
from engine.errors import DataError, RequestError, WorkerError
from engine.writing import named_file, refuse_existing, write_errors, write_whole

NUM_RESERVED = 259  # <unk>, <s>, </s> and 256 bytes
MOST_PIECES = 1 << 24
MODEL = b"model\n"  # begins the answer of the process that trains
START = "import sys; sys.path[:] = {path!r}; from corpus_tools.tokenizers.training import serve; serve()"
LONGEST_LINE_BYTES = 4192  # SentencePiece skips longer ones, so longer ones are cut


def train_tokenizer(
    texts: Iterable[str],
    vocab_size: int,
    output: str | Path,
    *,
    overwrite: bool = False,
    character_coverage: float = 0.9995,
    max_lines: int = 2_000_000,
    num_threads: int = 4,
) -> Path:
    """Train on documents and write `<output>.model` (and `.vocab`: pieces and scores); returns the model's path.

    Args:
        overwrite: replace what is there under these names.
        character_coverage: the share of characters that get a piece of their own, the rest being bytes.
        max_lines: so many lines, drawn evenly, bound memory.

    Raises:
        RequestError: the vocabulary is too small, or too large for the text, or the files cannot be written.
    """
    if vocab_size <= NUM_RESERVED:
        raise RequestError(
            f"--vocab-size {vocab_size} is too small: {NUM_RESERVED} ids are taken by <unk>, <s>, </s> and 256 bytes"
        )
    if vocab_size > MOST_PIECES:
        raise RequestError(f"--vocab-size {vocab_size}: at most {MOST_PIECES:,} pieces can be trained")
    path = model_path(output)
    refuse_existing((path, path.with_suffix(".vocab")), overwrite)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass  # a folder that takes no files should be known before the work, not after it
    settings = {
        "vocab_size": vocab_size,
        "character_coverage": character_coverage,
        "input_sentence_size": max_lines,
        "num_threads": num_threads,
    }
    model = _trained(texts, settings)
    with write_errors(path):
        vocab = "".join(f"{piece.text}\t{piece.score:g}\n" for piece in parse_model(model).pieces)
        write_whole(path.with_suffix(".vocab"), vocab)
        write_whole(path, model)
    return path


def model_path(output: str | Path) -> Path:
    """The `.model` file that a user means, also without the ending.

    Raises:
        RequestError: it is a folder.
    """
    path = named_file(output, "tok.model")
    return path.with_name(path.name.removesuffix(".model") + ".model")


def _trained(texts: Iterable[str], settings: dict[str, Any]) -> bytes:
    """The bytes of a model.

    SentencePiece works in a process of its own, which is fed with lines: so an interrupt ends the work at once, while
    in this process it would wait until the library is done, minutes or hours later.
    """
    start = START.format(path=sys.path)
    process = subprocess.Popen([sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    num_bytes = 0
    try:
        try:
            process.stdin.write(json.dumps(settings).encode() + b"\n")
            for line in _lines(texts):
                process.stdin.write(line + b"\n")
                num_bytes += len(line)
            process.stdin.close()
        except BrokenPipeError:
            pass  # it has left; why is read below
        answer = process.stdout.read()
        code = process.wait()
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()
    if code:
        how = f"was killed by signal {-code} (out of memory?)" if code < 0 else f"left with exit code {code}"
        raise WorkerError(f"the process that trains the tokenizer {how}; with less text it needs less memory")
    if not answer.startswith(MODEL):
        raise _explained(answer.decode(errors="replace"), settings["vocab_size"], num_bytes)
    return answer.removeprefix(MODEL)


def serve() -> None:
    """The process that trains: settings and lines on standard input, the model or what is wrong on standard output."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's business
    settings = json.loads(sys.stdin.buffer.readline())
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line[:-1].decode() for line in sys.stdin.buffer),
            model_writer=model,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            shuffle_input_sentence=True,
            minloglevel=2,
            **settings,
        )
        answer = MODEL + model.getvalue()
    except RuntimeError as error:
        answer = str(error).encode()
    with suppress(BrokenPipeError):
        sys.stdout.buffer.write(answer)
        sys.stdout.buffer.flush()


def _lines(texts: Iterable[str]) -> Iterator[bytes]:
    """The non-empty lines of documents, cut to what the trainer takes."""
    longest = LONGEST_LINE_BYTES // 4  # characters: at most four bytes each
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), longest):
                part = line[start : start + longest].replace("\0", "")  # the trainer refuses NUL
                if part:
                    yield part.encode()


def _explained(reason: str, vocab_size: int, num_bytes: int) -> DataError | RequestError:
    if num_bytes == 0:
        return DataError("there is no text to train a tokenizer on: every document is empty")
    return RequestError(
        f"a vocabulary of {vocab_size} could not be trained on {num_bytes:,} bytes of text; "
        f"give more text or a smaller --vocab-size (SentencePiece: {reason.strip().splitlines()[-1]})"
    )
