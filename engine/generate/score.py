"""`octant score` on one rank: what a reward model says of texts.

A text's score is read at its last token.  Texts are padded on the right to the longest of all, which changes nothing:
attention is causal.  Where the run that trained the model held samples back, scores are also given in standard
deviations from the mean over those, as rewards are used; both numbers lie in the checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from engine.checkpoint.metadata import SCALE
from engine.checkpoint.read import CheckpointReader
from engine.data.tokenizer import Tokenizer
from engine.distributed.collectives import broadcast
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.process import joined_mesh
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.generate.load import Wanted, inference_config, load_model, load_tokenizer_of, open_shared
from engine.generate.request import ScoreRequest
from engine.model.context import Batch
from engine.model.fields import END
from engine.model.objective import Head, Measure
from engine.parallel.parallelize import ParallelModel
from engine.progress import Progress

Ids = Sequence[int]
Row = TypeVar("Row")
MakeBatch = Callable[[Sequence[Row], int, torch.device], Batch]              # rows, width, device
# A tokenizer and a template's name → the texts of every record, best first where there are several.
Encode = Callable[[Tokenizer, str], list[list[Ids]]]


@dataclass(frozen=True)
class Scale:
    """Mean and standard deviation of a reward model's scores on the samples its run held back."""

    mean: float
    std: float

    @staticmethod
    def of(reader: CheckpointReader) -> Scale | None:
        saved = reader.metadata.get(SCALE)
        return Scale(saved["mean"], saved["std"]) if saved else None

    def __call__(self, score: float) -> float:
        return (score - self.mean) / self.std


def score_texts(request: ScoreRequest, encode: Encode, topology: Topology, launched: LaunchEnvironment | None) -> None:
    """One rank of the job, from joining it to leaving it; rank 0 prints.

    Raises:
        RequestError: the model gives no scores, or a text is longer than it can be.
        CheckpointError, DataError, ConfigError: what was asked cannot be done.
    """
    with joined_mesh(launched, topology, request.device) as mesh:
        reader = open_shared(request.checkpoint, mesh, request.base)
        require_scores(reader)
        data = (reader.metadata.get("config") or {}).get("data") or {}
        records = encode(load_tokenizer_of(reader, request.tokenizer),
                         request.template or data.get("template") or "auto")
        texts = [text for record in records for text in record]
        fill = 1 if topology.pipeline == 1 else 2 * topology.pipeline
        wanted = Wanted(request.dtype, max(map(len, texts)), request.batch_size, fill)
        model = load_model(reader, inference_config(reader, topology, wanted), mesh)
        scores = iter(scores_of(model, texts, shown=mesh.rank == 0))
        if mesh.rank == 0:
            _print([[next(scores) for _ in record] for record in records], Scale.of(reader), request.as_json)


def require_scores(reader: CheckpointReader) -> None:
    """
    Raises:
        RequestError: it is no reward model.
    """
    if ((reader.metadata.get("config") or {}).get("model") or {}).get("head") != "score":
        raise RequestError(f"{reader.path} is a language model and gives no scores; run.objective: reward trains one "
                           "that does, with model.head: score")


def scores_of(model: ParallelModel, texts: Sequence[Ids], shown: bool = False) -> list[float]:
    """The score of every text, on every rank; all ranks of one copy of the model call this alike.

    Args:
        model: made without training, for sequences at least as long as the longest text.
        shown: this rank shows how far it has come.
    """
    return [score for score, in each_row(model, texts, _batch, at_the_end, "scoring", shown)]


def each_row(model: ParallelModel, texts: Sequence[Row], make_batch: MakeBatch[Row], measure: Measure, doing: str,
             shown: bool = False, numbers: int = 1) -> list[tuple[float, ...]]:
    """What `measure` says of every text, so many numbers each, on every rank; arguments as of `scores_of`."""
    config, found = model.config, []
    rows, part = config.batch.micro, config.batch.micro * config.num_microbatches
    with Progress(doing, len(texts), "texts", shown) as progress:
        for first in range(0, len(texts), part):
            now = list(texts[first : first + part])
            batches = [make_batch(now[i : i + rows], rows, model.mesh.device) for i in range(0, len(now), rows)]
            measured = model.evaluate(batches, measure)
            scores = measured if measured is not None else \
                torch.empty(len(batches), numbers, rows, device=model.mesh.device)
            broadcast(scores, model.mesh.pipeline, model.mesh.pipeline.size - 1)
            found += [tuple(row) for row in scores.transpose(1, 2).flatten(0, 1).tolist()][: len(now)]
            progress.reach(len(found))
    return found


def at_the_end(x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """A `Measure`: the score at the last token of every row."""
    return [head.sum_over_sequence((head.scores(x_SBH) * batch.extra[END]).sum(0))]


def _batch(texts: Sequence[Ids], rows: int, device: torch.device) -> Batch:
    seq_len = max(len(text) for text in texts)
    tokens, ends = np.zeros((seq_len, rows), np.int64), np.zeros((seq_len, rows), bool)
    for row, text in enumerate(texts):
        tokens[: len(text), row] = text
        ends[len(text) - 1, row] = True
    return Batch(torch.from_numpy(tokens).to(device), torch.arange(seq_len, device=device).unsqueeze(1),
                 extra={END: torch.from_numpy(ends).to(device)},
                 seq_len=torch.tensor([[*map(len, texts), *[seq_len] * (rows - len(texts))]], device=device))


def _print(records: list[list[float]], scale: Scale | None, as_json: bool) -> None:
    """A line for each record, and what follows from all."""
    for index, scores in enumerate(records):
        print(json.dumps({"index": index, **_named(scores, scale)}) if as_json else
              f"{index:>6}  " + "  ".join(f"{score:+.4f}" for score in scores))
    texts = [score for scores in records for score in scores]
    about: dict[str, float | int] = {"texts": len(texts), "mean": fmean(texts), "std": float(np.std(texts))}
    pairs = [(scores[i], scores[j]) for scores in records for i in range(len(scores))
             for j in range(i + 1, len(scores))]
    if pairs:
        about |= {"pairs": len(pairs), "accuracy": fmean(better > worse for better, worse in pairs),
                  "mean_margin": fmean(better - worse for better, worse in pairs)}
    if as_json:
        print(json.dumps({"summary": about}), flush=True)
    else:
        print("│ ".join(f"{name.replace('_', ' ')} {value:,}" if isinstance(value, int) else
                        f"{name.replace('_', ' ')} {value:.4f} " for name, value in about.items()), flush=True)


def _named(scores: list[float], scale: Scale | None) -> dict[str, Any]:
    own: dict[str, Any] = {"scores": scores}
    if len(scores) == 1:
        own = {"score": scores[0]}
    elif len(scores) == 2:
        own = {"chosen": scores[0], "rejected": scores[1], "margin": scores[0] - scores[1]}
    return own if scale is None else own | {"normalised": [scale(score) for score in scores]}
