"""`octant eval` on one rank: how well a model predicts a corpus.

The corpus is a stream of tokens t₀ t₁ …, read in the same windows as in training, one after the other: window w
predicts t_{ws+1} … t_{ws+s}, each from what comes before it in the window, t_{ws} on.  The last window may be shorter:
every token but the first is predicted once.  With a stride k < s windows begin every k tokens, and of each but the
first only the last k tokens count: again each once, from at least s − k tokens before it.  A model that was trained
with `data.document_mask` is evaluated with it: then nothing is predicted across documents, and the first token of a
document not at all.

    loss            mean of −ln p(token)                             nats per token; depends on the tokenizer
    perplexity      e^loss
    bits per byte   Σ −log₂ p(token) / bytes of the text             does not: the measure to compare models by
    … per character the same over characters, which languages differ less in

Bytes and characters are those of the text that the predicted tokens stand for, found by decoding each document; the
end of a document is predicted, and has none.  The forward pass is that of the evaluation in training
(`ParallelModel.evaluate`), under any layout; data-parallel ranks take windows in turn.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
from torch import Tensor

from engine.checkpoint.read import CheckpointReader
from engine.config import Config, SourceConfig
from engine.data.indexed import IndexedDataset
from engine.data.sample import Sample
from engine.data.sources import CorpusSource, open_corpus
from engine.data.tokenizer import Tokenizer
from engine.data.tokenizer_identity import TokenizerInfo, recorded_tokenizer
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.process import joined_mesh
from engine.distributed.topology import Topology
from engine.errors import DataError, RequestError
from engine.generate.load import Wanted, inference_config, load_model, load_tokenizer_of, open_shared
from engine.generate.positions import doubling, lines_of, stretches, sums_by_position, write_positions
from engine.generate.request import EvalRequest
from engine.hints import hint
from engine.parallel.parallelize import ParallelModel
from engine.progress import Progress
from engine.train.corpora import require_labels
from engine.train.evaluation import sums_over


@dataclass(frozen=True)
class Summed:
    """Summed loss in nats, and of how many predicted tokens."""

    loss: float
    num_tokens: int


@dataclass(frozen=True)
class Scores:
    """What came out.

    Attributes:
        loss: nats per token.
        bits_per_byte, bits_per_character, text_bytes, text_characters: None without a tokenizer.
        num_tokens: predicted ones.
        windows: of `seq_len` tokens each, every `stride` tokens one, the last may have fewer; `of_windows` are in the
            corpus.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    bits_per_character: float | None
    num_tokens: int
    text_bytes: int | None
    text_characters: int | None
    windows: int
    of_windows: int
    seq_len: int
    stride: int
    seconds: float

    @staticmethod
    def of(summed: Summed, windows: int, of_windows: int, seq_len: int, stride: int, text: TextSize | None,
           seconds: float) -> Scores:
        """From the summed loss, in nats."""
        loss, bits = summed.loss / summed.num_tokens, summed.loss / math.log(2)
        return Scores(loss, math.exp(loss) if loss < 700 else math.inf,
                      bits / text.bytes if text and text.bytes else None,
                      bits / text.characters if text and text.characters else None, summed.num_tokens,
                      text.bytes if text else None, text.characters if text else None, windows, of_windows, seq_len,
                      stride, seconds)

    def lines(self) -> str:
        """For people."""
        bits, per_character = ("n/a" if number is None else f"{number:.4f}"
                               for number in (self.bits_per_byte, self.bits_per_character))
        every = "" if self.stride == self.seq_len else f", one every {self.stride}"
        part = "all" if self.windows == self.of_windows else f"the first {self.windows:,} of {self.of_windows:,}"
        return (f"loss {self.loss:.4f} │ perplexity {self.perplexity:.5g} │ bits per byte {bits}, per character "
                f"{per_character}\n"
                f"{self.num_tokens:,} tokens ({part} windows of {self.seq_len}{every}) in {self.seconds:.1f} s, "
                f"{self.num_tokens / self.seconds:,.0f} tokens/s")


def evaluate_corpus(request: EvalRequest, topology: Topology, launched: LaunchEnvironment | None) -> None:
    """One rank of the job, from joining it to leaving it; rank 0 prints.

    Raises:
        CheckpointError, DataError, ConfigError: what was asked cannot be done.
    """
    with joined_mesh(launched, topology, request.device) as mesh:
        reader = open_shared(request.checkpoint, mesh, request.base)
        fill = 1 if topology.pipeline == 1 else 2 * topology.pipeline          # microbatches that keep the stages busy
        config = inference_config(reader, topology, Wanted(request.dtype, request.seq_len, request.batch_size, fill))
        tokenizer, reason = _tokenizer(reader, request)
        config = fitted(config, request.data)
        data = open_whole(request.data, config, recorded_tokenizer(reader.metadata.get("data") or {}))
        stride = request.stride or config.data.seq_len
        if stride > config.data.seq_len:
            raise RequestError(f"--stride {stride} is more than the {config.data.seq_len} tokens of a window: some "
                               "would be in none")
        of_windows = windows_of(data, stride)
        windows = min(of_windows, (request.batches or of_windows) * request.batch_size)
        if config.data.document_mask:
            require_labels(data.path, (strided(data, stride, index) for index in range(windows)), windows)
        model = load_model(reader, config, mesh)
        start = time.perf_counter()
        by_position = None
        if request.positions:
            by_position = sums_by_position(model, lambda index: strided(data, stride, index), windows, mesh.rank == 0)
            summed = Summed(float(by_position[0].sum()), int(by_position[1].sum()))
        else:
            summed = sum_of_losses(model, data, windows, stride, shown=mesh.rank == 0)
        seconds = time.perf_counter() - start
        if mesh.rank != 0:
            return
        seq_len, corpus = config.data.seq_len, data.dataset
        read = min(seq_len + (windows - 1) * stride, corpus.num_tokens - 1)
        text = None if tokenizer is None else text_size(corpus, read, tokenizer, config.data.document_mask)
        scores = Scores.of(summed, windows, of_windows, seq_len, stride, text, seconds)
        found = [] if by_position is None else stretches(by_position, doubling(seq_len))
        if request.as_json:
            told = asdict(scores) | ({"by_position": [asdict(one) for one in found]} if request.positions else {})
            print(json.dumps(told), flush=True)
        else:
            print("\n".join([scores.lines(), *([lines_of(found)] if found else [])]), flush=True)
        if request.svg is not None and by_position is not None:
            write_positions(Path(request.svg), by_position)
        if reason:
            print(f"bits per byte: n/a, for {reason}", file=sys.stderr)
        following = ("checkpoint", "inspect") if tokenizer is None else ("generate", "--prompt", "The")
        print(f"{reader.path}\n{hint(*following, request.checkpoint)}", file=sys.stderr)


def fitted(config: Config, prefix: str) -> Config:
    """With windows as long as the corpus where that is shorter."""
    with contextlib.closing(IndexedDataset(prefix)) as corpus:
        length = corpus.num_tokens - 1
    return config.with_changes(data={"seq_len": length}) if 0 < length < config.data.seq_len else config


def open_whole(prefix: str, config: Config, tokenizer: TokenizerInfo | None) -> CorpusSource:
    """A corpus, in its own order."""
    corpus = open_corpus(SourceConfig(path=prefix), config.data.seq_len, config.model.vocab_size, tokenizer,
                         config.data.document_mask)
    corpus.window(0, 0)
    return corpus


def windows_of(data: CorpusSource, stride: int) -> int:
    """Windows, one every `stride` tokens, that hold every token, the shorter one at the end included."""
    return 1 - (-max(0, data.dataset.num_tokens - 1 - data.seq_len) // stride)


def strided(data: CorpusSource, stride: int, index: int) -> Sample:
    """The window that begins at token index · stride: made of the two, one behind the other, that it lies in."""
    size, start = data.seq_len, index * stride
    number, first = divmod(start, size)
    window = data.window(number, 0)
    if first and number + 1 < data.windows_and_rest:
        window = _shifted(window, data.window(number + 1, 0), first)
    elif first:
        window = _shifted(window, replace(window, loss_mask=np.zeros(size, bool)), first)
    if index and stride < size:
        mask = np.ones(size, bool) if window.loss_mask is None else window.loss_mask.copy()
        mask[: size - stride] = False
        window = replace(window, loss_mask=mask)
    return window


def _shifted(window: Sample, following: Sample, first: int) -> Sample:
    """From position `first` of a window on, as long as it is."""
    size = len(window.tokens) - 1
    masks = [np.ones(size, bool) if each.loss_mask is None else each.loss_mask for each in (window, following)]
    ids = None
    if window.document_ids is not None and following.document_ids is not None:
        begins = not masks[0][-1]                          # a label that does not count begins a document
        ids = np.concatenate((window.document_ids, following.document_ids + window.document_ids[-1] + begins
                              - following.document_ids[0]))[first : first + size]
        ids = ids - ids[0]
    return replace(window, tokens=np.concatenate((window.tokens, following.tokens[1:]))[first : first + size + 1],
                   loss_mask=np.concatenate(masks)[first : first + size], document_ids=ids)


def sum_of_losses(model: ParallelModel, data: CorpusSource, windows: int, stride: int | None = None,
                  shown: bool = False) -> Summed:
    """The loss over the first so many windows, the same on every rank."""
    def window(index: int) -> Sample:
        return strided(data, stride or data.seq_len, index)

    def heard(done: int, totals: Tensor) -> None:
        progress.reach(done, note=lambda: f"loss {totals[0].item() / max(1, totals[1].item()):.4f}")

    with Progress("evaluating", windows, "windows", shown) as progress:
        masked = (stride or data.seq_len) < data.seq_len or windows > data.num_windows
        total, num_tokens = sums_over(model, window, windows, masked, heard).tolist()
    return Summed(total, int(num_tokens))


@dataclass(frozen=True)
class TextSize:
    """Of a text, in UTF-8 and as Unicode."""

    bytes: int
    characters: int


def text_size(corpus: IndexedDataset, num_tokens: int, tokenizer: Tokenizer, document_mask: bool = False) -> TextSize:
    """Of the text that the predicted ones of tokens 1 … num_tokens of the corpus stand for.

    Document by document, as they were encoded; the tokens that nothing predicts are taken off: the corpus's first, and
    with a document mask that of every document.
    """
    def size(ids: np.ndarray) -> np.ndarray:
        text = tokenizer.decode(ids.tolist())
        return np.array((len(text.encode(errors="replace")), len(text)))

    def size_of_first(ids: np.ndarray) -> np.ndarray:
        """A token may be a byte of a character, which decodes to a replacement of three, and is no character."""
        text = tokenizer.decode(ids.tolist())
        return np.array((len(text.replace("\ufffd", "?").encode(errors="replace")), len(text.replace("\ufffd", ""))))

    edges = [0, *corpus.document_starts(0, num_tokens + 1).tolist(), num_tokens + 1]
    unpredicted = edges[:-1] if document_mask else edges[:1]
    whole = sum((size(corpus.tokens(a, b)) for a, b in pairwise(edges)), np.zeros(2, int))
    less = sum((size_of_first(corpus.tokens(first, first + 1)) for first in unpredicted), np.zeros(2, int))
    return TextSize(*(whole - less).tolist())


def _tokenizer(reader: CheckpointReader, request: EvalRequest) -> tuple[Tokenizer | None, str]:
    """The model's tokenizer, or why there is none; one that was asked for must be there."""
    try:
        return load_tokenizer_of(reader, request.tokenizer), ""
    except DataError as error:
        if request.tokenizer is not None:
            raise
        return None, str(error)
