"""`octant generate` on one rank: prompts in, text out.

One text is printed as it grows: an incremental decoder holds back the bytes of an unfinished character.  Several
are printed in their order, each as soon as it and those before it are complete.  Rank 0 prints; the text goes to stdout
and everything about it to stderr, so the output of one can be piped on.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from engine.checkpoint.read import CheckpointReader
from engine.data.chat.conversation import USER, Turn
from engine.data.chat.tokens import ChatEncoder
from engine.data.tokenizer import Tokenizer
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.process import joined_mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.generate.beams import beam_search
from engine.generate.best_of import best_of
from engine.generate.generator import Generator, Made, check_prompts
from engine.generate.load import Wanted, inference_config, load_model, load_tokenizer_of, open_shared
from engine.generate.request import Limits, TextRequest
from engine.hints import hint


class TokenIds(Tokenizer):
    """Stands in for a tokenizer: a text is its ids, written as numbers with spaces between."""

    kind = name = sha256 = "ids"
    bos_id = pad_id = None
    eod_id = -1                                              # no id ends a text

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode_array(self, text: str, *, continues: bool = False) -> npt.NDArray[np.int32]:
        try:
            ids = np.array([int(word) for word in text.split()], np.int32)
        except (ValueError, OverflowError):
            ids = np.zeros(0, np.int32)
        if not ids.size:
            raise RequestError(f"prompt {text!r:.60}: with --token-ids it is numbers with spaces between")
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(map(str, ids))


class StopStrings:
    """Watches a text for strings; see `Limits.watch`."""

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str], prompt: Sequence[int]) -> None:
        self._decoder, self._strings, self._tail = tokenizer.stream(), strings, ""
        self._reach = max(map(len, strings)) - 1
        for token in prompt:
            self._decoder.push(token)                        # what a token is may depend on what is before it

    def __call__(self, token: int) -> bool:
        text = self._tail + self._decoder.push(token)
        self._tail = text[max(0, len(text) - self._reach) :]
        return any(string in text for string in self._strings)


@dataclass
class Timer:
    """How fast it went."""

    start: float
    first_token_seconds: float | None = None
    num_tokens: int = 0

    def add_one(self) -> None:
        """One more token; the first ends the pass over the prompt."""
        if self.first_token_seconds is None:
            self.first_token_seconds = time.perf_counter() - self.start
        self.num_tokens += 1

    def __str__(self) -> str:
        seconds = time.perf_counter() - self.start
        first = "" if self.first_token_seconds is None else f", the first after {self.first_token_seconds:.2f} s"
        return f"{self.num_tokens} tokens in {seconds:.2f} s ({self.num_tokens / seconds:.1f} tokens/s{first})"


Write = Callable[[str], None]


def generate_text(request: TextRequest, topology: Topology, launched: LaunchEnvironment | None) -> None:
    """One rank of the job, from joining it to leaving it.

    Raises:
        CheckpointError, DataError, ConfigError, RequestError: what was asked cannot be done.
    """
    with joined_mesh(launched, topology, request.device) as mesh:
        reader = open_shared(request.checkpoint, mesh, request.base)
        config = inference_config(reader, topology, Wanted(request.dtype))
        tokenizer = TokenIds(config.model.vocab_size) if request.token_ids else \
            load_tokenizer_of(reader, request.tokenizer)
        encoder = _encoder(request, reader, tokenizer)
        prompts = [encode(prompt, tokenizer, request.begin) if encoder is None else
                   encoder.prompt((Turn(USER, prompt),)).tolist() for prompt in request.prompts]
        check_prompts(prompts, config.model)
        generator = Generator(load_model(reader, config, mesh), tokenizer.vocab_size, rows=request.batch_size)
        limits = Limits(request.max_new_tokens, {tokenizer.eod_id, *(() if request.token_ids else reader.end_ids)},
                        partial(StopStrings, tokenizer, request.stop) if request.stop else None)
        say: Write = _print if mesh.rank == 0 else _keep_quiet
        timer = Timer(time.perf_counter())
        if request.best_of > 1:
            timer.num_tokens = best_of(request, generator, prompts, limits, tokenizer, encoder, topology, mesh, say)
        elif request.beams > 1:
            _beams(generator, prompts, tokenizer, request, limits, say, timer)
        elif len(prompts) * request.num_samples == 1 and not request.as_json:
            _stream(generator, prompts[0], tokenizer, request, limits, say, timer)
        else:
            _all(generator, prompts, tokenizer, request, limits, say, timer)
        if mesh.rank == 0:
            print(f"{reader.path}: {timer}\n{hint('checkpoint', 'inspect', request.checkpoint)}", file=sys.stderr)


def _encoder(request: TextRequest, reader: CheckpointReader, tokenizer: Tokenizer) -> ChatEncoder | None:
    """What makes conversations of prompts; None: they are texts to go on from."""
    if not request.chat:
        return None
    data = (reader.metadata.get("config") or {}).get("data") or {}
    return ChatEncoder(tokenizer, request.template or data.get("template") or "auto")


def encode(prompt: str, tokenizer: Tokenizer, begin: bool) -> list[int]:
    """Ids of a prompt.  An empty one begins a new document: behind the end of the one before, as in training."""
    try:
        ids = tokenizer.encode(prompt)
    except UnicodeEncodeError:
        raise RequestError(f"prompt {prompt!r:.60} is not valid text") from None
    if begin and tokenizer.bos_id is None:
        raise RequestError(f"--bos: tokenizer {tokenizer.name} has no beginning-of-text id")
    start = tokenizer.bos_id if begin else None if ids else tokenizer.eod_id
    return ids if start is None else [start, *ids]


def _stream(generator: Generator, prompt: list[int], tokenizer: Tokenizer, request: TextRequest, limits: Limits,
            say: Write, timer: Timer) -> None:
    """Prompt and text, as it is made."""
    decoder = tokenizer.stream()
    before = "".join(map(decoder.push, prompt))
    say("" if request.chat else before)
    for new in generator.stream([prompt], request.sampling, limits):
        timer.add_one()
        if not (request.chat and new.end == "eod"):
            say(decoder.push(new.token))
    say(decoder.flush() + "\n")


def _all(generator: Generator, prompts: list[list[int]], tokenizer: Tokenizer, request: TextRequest,
         limits: Limits, say: Write, timer: Timer) -> None:
    """All texts, each printed when it and those before it are complete."""
    count, printed = request.num_samples, 0
    texts = [Made([], [], "") for _ in range(len(prompts) * count)]
    for new in generator.stream(prompts, request.sampling, limits, samples=count):
        timer.add_one()
        texts[new.text].add(new)
        while printed < len(texts) and texts[printed].end:
            say(_said(request, *divmod(printed, count), prompts, texts[printed], tokenizer))
            printed += 1


def _beams(generator: Generator, prompts: list[list[int]], tokenizer: Tokenizer, request: TextRequest,
           limits: Limits, say: Write, timer: Timer) -> None:
    """The likeliest text of each prompt that beam search finds."""
    for number, made in enumerate(beam_search(generator, prompts, request.beams, request.sampling, limits)):
        timer.num_tokens += len(made.tokens)
        say(_said(request, number, 0, prompts, made, tokenizer))


def _said(request: TextRequest, prompt: int, sample: int, prompts: list[list[int]], made: Made,
          tokenizer: Tokenizer) -> str:
    """One text as it is printed."""
    said = made.tokens[:-1] if request.chat and made.end == "eod" else made.tokens
    text = tokenizer.decode(said if request.chat else [*prompts[prompt], *said])
    if request.as_json:
        numbered = {"sample": sample} if request.num_samples > 1 else {}
        return json.dumps({"prompt": request.prompts[prompt], **numbered, "text": text, "tokens": made.tokens,
                           "stop": made.end}, ensure_ascii=False) + "\n"
    number = f"{prompt + 1}" if request.num_samples == 1 else f"{prompt + 1}.{sample + 1}"
    return f"── {number} ──\n{text}\n"


def _print(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _keep_quiet(text: str) -> None:
    """For the ranks that do not print."""
