"""`octant eval` on one rank: how well a model predicts a corpus.

The corpus is a stream of tokens t₀ t₁ …, read in the same windows as in training, one after the other: window w
predicts t_{ws+1} … t_{ws+s}, each from what comes before it in the window, t_{ws} on.  The last window may be shorter:
every token but the first is predicted once.  A model that was trained with `data.document_mask` is evaluated with it:
then nothing is predicted across documents, and the first token of a document not at all.

    loss            mean of −ln p(token)                             nats per token; depends on the tokenizer
    perplexity      e^loss
    bits per byte   Σ −log₂ p(token) / bytes of the text             does not: the measure to compare models by

The bytes are those of the text that the predicted tokens stand for, found by decoding each document; the end of a
document is predicted, and has no bytes.  The forward pass is that of the evaluation in training
(`ParallelModel.evaluate`), under any layout; data-parallel ranks take windows in turn.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from itertools import pairwise

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
from engine.errors import DataError
from engine.generate.load import Wanted, inference_config, load_model, load_tokenizer_of, open_shared
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
        bits_per_byte, text_bytes: None without a tokenizer.
        num_tokens: predicted ones.
        windows: of `seq_len` tokens each, the last may have fewer; `of_windows` are in the corpus.
    """

    loss: float
    perplexity: float
    bits_per_byte: float | None
    num_tokens: int
    text_bytes: int | None
    windows: int
    of_windows: int
    seq_len: int
    seconds: float

    @staticmethod
    def of(summed: Summed, windows: int, of_windows: int, seq_len: int, text_bytes: int | None,
           seconds: float) -> Scores:
        """From the summed loss, in nats."""
        loss = summed.loss / summed.num_tokens
        return Scores(loss, math.exp(loss) if loss < 700 else math.inf,
                      summed.loss / math.log(2) / text_bytes if text_bytes else None, summed.num_tokens, text_bytes,
                      windows, of_windows, seq_len, seconds)

    def lines(self) -> str:
        """For people."""
        bits = "n/a" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"
        part = "all" if self.windows == self.of_windows else f"the first {self.windows:,} of {self.of_windows:,}"
        return (f"loss {self.loss:.4f} │ perplexity {self.perplexity:.5g} │ bits per byte {bits}\n"
                f"{self.num_tokens:,} tokens ({part} windows of {self.seq_len}) in {self.seconds:.1f} s, "
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
        of_windows = data.windows_and_rest
        windows = min(of_windows, (request.batches or of_windows) * request.batch_size)
        if config.data.document_mask:
            require_labels(data.path, (data.window(index, 0) for index in range(windows)), windows)
        model = load_model(reader, config, mesh)
        start = time.perf_counter()
        summed = sum_of_losses(model, data, windows, shown=mesh.rank == 0)
        seconds = time.perf_counter() - start
        if mesh.rank != 0:
            return
        seq_len, corpus = config.data.seq_len, data.dataset
        read = min(windows * seq_len, corpus.num_tokens - 1)
        num_bytes = None if tokenizer is None else text_bytes(corpus, read, tokenizer, config.data.document_mask)
        scores = Scores.of(summed, windows, of_windows, seq_len, num_bytes, seconds)
        print(json.dumps(asdict(scores)) if request.as_json else scores.lines(), flush=True)
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


def sum_of_losses(model: ParallelModel, data: CorpusSource, windows: int, shown: bool = False) -> Summed:
    """The loss over the first so many windows, the same on every rank."""
    def window(index: int) -> Sample:
        return data.window(index, 0)

    def heard(done: int, totals: Tensor) -> None:
        progress.reach(done, note=lambda: f"loss {totals[0].item() / max(1, totals[1].item()):.4f}")

    with Progress("evaluating", windows, "windows", shown) as progress:
        total, num_tokens = sums_over(model, window, windows, windows > data.num_windows, heard).tolist()
    return Summed(total, int(num_tokens))


def text_bytes(corpus: IndexedDataset, num_tokens: int, tokenizer: Tokenizer, document_mask: bool = False) -> int:
    """Bytes of UTF-8 that the predicted ones of tokens 1 … num_tokens of the corpus stand for.

    Document by document, as they were encoded; the tokens that nothing predicts are taken off: the corpus's first, and
    with a document mask that of every document.
    """
    def count(ids: np.ndarray) -> int:
        return len(tokenizer.decode(ids.tolist()).encode(errors="replace"))

    def count_first(ids: np.ndarray) -> int:
        """A token may be a byte of a character, which decodes to a replacement of three."""
        return len(tokenizer.decode(ids.tolist()).replace("\ufffd", "?").encode(errors="replace"))

    edges = [0, *corpus.document_starts(0, num_tokens + 1).tolist(), num_tokens + 1]
    unpredicted = edges[:-1] if document_mask else edges[:1]
    return sum(count(corpus.tokens(a, b)) for a, b in pairwise(edges)) - \
        sum(count_first(corpus.tokens(first, first + 1)) for first in unpredicted)


def _tokenizer(reader: CheckpointReader, request: EvalRequest) -> tuple[Tokenizer | None, str]:
    """The model's tokenizer, or why there is none; one that was asked for must be there."""
    try:
        return load_tokenizer_of(reader, request.tokenizer), ""
    except DataError as error:
        if request.tokenizer is not None:
            raise
        return None, str(error)
