"""`octant eval --tasks` on one rank: multiple choice, by the log-probability of every answer.

An answer is a continuation of its question; its log-probability is the sum over its tokens, each predicted from all
that stands before it.  Which answer the model gives is the likeliest:

    acc        the share of questions where that is a right one, by log p
    acc_norm   by log p per byte, which does not favour short answers
    mc1, mc2   of TruthfulQA (Lin et al. 2022): as acc over one right and several wrong answers; and the share of the
               probability of all answers that falls to the right ones

Records of a file (JSON lines, or one list) are told apart by their keys:

    question, choices (or A, B, C, D), answer    MMLU, C-Eval: the choices are listed, and the letters are the answers
    context, choices, answer                     each choice as it stands, behind the context
    question, mc1_targets, mc2_targets           TruthfulQA
    sentence_good, sentence_bad                  BLiMP: which of two texts is likelier

A text of its own begins behind the end of another document, or with `--bos` behind the beginning of text.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.config import Config
from engine.data.sample import Sample
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.process import joined_mesh
from engine.distributed.topology import Topology
from engine.errors import DataError, RequestError
from engine.generate.load import Wanted, inference_config, load_model, load_tokenizer_of, open_shared
from engine.generate.request import TaskRequest
from engine.generate.score import each_row
from engine.generate.text import encode
from engine.model.context import Batch
from engine.model.objective import NEXT_TOKEN, Head
from engine.parallel.parallelize import ParallelModel
from engine.reading import shown
from engine.train.each_sample import each_sample

LETTERS = "ABCDEFGHIJ"


@dataclass(frozen=True)
class Question:
    """Answers to choose from; `right` says of each whether it is, `kind` how they are counted: choice, mc1 or mc2."""

    context: str
    answers: tuple[str, ...]
    right: tuple[bool, ...]
    kind: str = "choice"

    def numbers(self, log_probs: Sequence[float]) -> dict[str, float]:
        """What the log-probabilities of the answers say."""
        if self.kind == "mc2":
            most = max(log_probs)
            shares = [math.exp(x - most) for x in log_probs]
            return {"mc2": sum(p for p, right in zip(shares, self.right, strict=True) if right) / sum(shares)}
        likeliest = float(self.right[_largest(log_probs)])
        if self.kind == "mc1":
            return {"mc1": likeliest}
        per_byte = [x / max(1, len(answer.encode())) for x, answer in zip(log_probs, self.answers, strict=True)]
        return {"acc": likeliest, "acc_norm": float(self.right[_largest(per_byte)])}


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def read_questions(path: str) -> list[Question]:
    """All questions of a file.

    Raises:
        DataError: it cannot be read, or a record is of no kind that is known.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        records = json.loads(text) if text.lstrip().startswith("[") else \
            [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON lines or a list of records: {error}") from None
    if not records:
        raise DataError(f"{path} holds no record")
    found: list[Question] = []
    for number, record in enumerate(records, 1):
        try:
            found += questions_of(record)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
            raise DataError(f"{path}, record {number}: {shown(record)} is no question ({error}); its keys are "
                            "question, choices, answer; context, choices, answer; question, mc1_targets, mc2_targets; "
                            "or sentence_good, sentence_bad") from None
    return found


def questions_of(record: dict[str, Any]) -> Iterator[Question]:
    """The questions of a record: one, and of TruthfulQA's two."""
    if "sentence_good" in record:
        yield Question("", (str(record["sentence_good"]), str(record["sentence_bad"])), (True, False))
    elif "mc1_targets" in record:
        for kind in ("mc1", "mc2"):
            if targets := record.get(f"{kind}_targets"):
                right = tuple(bool(label) for label in targets["labels"])
                if len(right) != len(targets["choices"]) or not any(right):
                    raise ValueError(f"{kind}_targets has no label for each choice, or none that is right")
                yield Question(f"Q: {record['question']}\nA:", tuple(f" {x}" for x in targets["choices"]), right, kind)
    else:
        choices = [str(choice) for choice in
                   record.get("choices") or [record[letter] for letter in LETTERS if letter in record]]
        answer = _answer(record["answer"], len(choices))
        right = tuple(number == answer for number in range(len(choices)))
        if "context" in record:
            yield Question(str(record["context"]), tuple(choices), right)
        else:
            listed = "".join(f"{letter}. {x}\n" for letter, x in zip(LETTERS, choices, strict=False))
            letters = tuple(f" {letter}" for letter in LETTERS[: len(choices)])
            yield Question(f"{record['question']}\n{listed}Answer:", letters, right)


def _answer(value: Any, choices: int) -> int:
    """The number of the right one, which is given from 0, or as a letter."""
    number = LETTERS.index(value) if isinstance(value, str) and not value.isdigit() else int(value)
    if not 0 <= number < choices or choices > len(LETTERS):
        raise ValueError(f"answer {value!r} of {choices} choices")
    return number


@dataclass(frozen=True)
class Row:
    """A question and one answer in tokens, of which those from `start` on are the answer's."""

    tokens: list[int]
    start: int


def row_of(context: str, answer: str, tokenizer: Tokenizer, begin: bool) -> Row:
    """Cut in tokens as one text; what the context alone has too is the question."""
    if not context:
        first = encode("", tokenizer, begin)
        return Row([*first, *tokenizer.encode(answer)], len(first))
    whole, start = encode(context + answer, tokenizer, begin), len(encode(context, tokenizer, begin))
    return Row(whole, min(start, len(whole) - 1))


def log_probs_of(model: ParallelModel, rows: Sequence[Row], shown: bool = False) -> list[float]:
    """log p(answer) of every row, on every rank; all ranks of one copy of the model call this alike."""
    return [log_p for log_p, in each_row(model, rows, batch_of, of_the_answer, "answering", shown)]


def of_the_answer(x_SBH: Tensor, head: Head, batch: Batch) -> Sequence[Tensor]:
    """A `Measure`: log p of the labels that count, of every row."""
    assert batch.labels_SB is not None and batch.loss_mask_SB is not None
    return [head.sum_over_sequence(-(head.token_losses(x_SBH, batch.labels_SB) * batch.loss_mask_SB).sum(0))]


def batch_of(rows: Sequence[Row], width: int, device: torch.device) -> Batch:
    """Rows padded on the right, so many columns wide, whose answers alone count."""
    seq_len = max(len(row.tokens) for row in rows) - 1
    tokens, labels = np.zeros((seq_len, width), np.int64), np.zeros((seq_len, width), np.int64)
    counts = np.zeros((seq_len, width), bool)
    for place, row in enumerate(rows):
        length = len(row.tokens) - 1
        tokens[:length, place], labels[:length, place] = row.tokens[:-1], row.tokens[1:]
        counts[row.start - 1 : length, place] = True
    put = [torch.from_numpy(array).to(device) for array in (tokens, labels, counts)]
    lengths = [len(row.tokens) - 1 for row in rows] + [seq_len] * (width - len(rows))
    return Batch(put[0], torch.arange(seq_len, device=device).unsqueeze(1), put[1], put[2],
                 seq_len=torch.tensor([lengths], device=device))


def answer_tasks(request: TaskRequest, topology: Topology, launched: LaunchEnvironment | None) -> None:
    """One rank of the job, from joining it to leaving it; rank 0 prints.

    Raises:
        RequestError: a question is longer than the model can read.
        CheckpointError, DataError, ConfigError: what was asked cannot be done.
    """
    with joined_mesh(launched, topology, request.device) as mesh:
        reader = open_shared(request.checkpoint, mesh, request.base)
        tokenizer = load_tokenizer_of(reader, request.tokenizer)
        tasks = {path: read_questions(path) for path in request.tasks}
        rows = [row_of(question.context, answer, tokenizer, request.begin)
                for questions in tasks.values() for question in questions for answer in question.answers]
        longest, most = max(len(row.tokens) for row in rows) - 1, reader.metadata["config"]["model"]["max_seq_len"]
        if longest > most:
            raise RequestError(f"a question with its answer has {longest:,} tokens, and the model reads {most:,} "
                               "(model.max_seq_len): leave it out")
        fill = 1 if topology.pipeline == 1 else 2 * topology.pipeline
        config = inference_config(reader, topology, Wanted(request.dtype, longest, request.batch_size, fill))
        log_probs = iter(log_probs_of(load_model(reader, config, mesh), rows, mesh.rank == 0))
        for path, questions in tasks.items():
            found = [question.numbers([next(log_probs) for _ in question.answers]) for question in questions]
            if mesh.rank == 0:
                _print(path, found, request.as_json)


@dataclass(frozen=True)
class Exam:
    """The questions of a run's `eval.tasks`, asked of the model as it is, in the layout that trains it.

    The answers are samples of the run's own length, which its own loader deals to the ranks.
    """

    tasks: dict[str, list[Question]]
    rows: list[Row]
    seq_len: int

    @staticmethod
    def of(config: Config) -> Exam:
        """Reads them.

        Raises:
            RequestError: two have one name, or an answer is too long.  DataError: a file cannot be read.
        """
        names = [Path(path).name.partition(".")[0] for path in config.eval.tasks]
        if len({*names}) < len(names):
            raise RequestError(f"eval.tasks {', '.join(config.eval.tasks)}: metrics are named by the files, and two "
                               "have the same name")
        tokenizer, seq_len = load_tokenizer(str(config.data.tokenizer)), config.data.seq_len
        tasks = {name: read_questions(path) for name, path in zip(names, config.eval.tasks, strict=True)}
        rows = [row_of(question.context, answer, tokenizer, False)
                for questions in tasks.values() for question in questions for answer in question.answers]
        if (longest := max(len(row.tokens) for row in rows) - 1) > seq_len:
            raise RequestError(f"eval.tasks: a question with its answer has {longest:,} tokens, and data.seq_len is "
                               f"{seq_len:,}: leave it out")
        return Exam(tasks, rows, seq_len)

    def __call__(self, model: ParallelModel) -> dict[str, float]:
        """`tasks/NAME/acc` and the like, on every rank; all ranks call this alike."""
        log_probs = iter(each_sample(model, self._sample, len(self.rows), of_the_answer, NEXT_TOKEN)[:, 0].tolist())
        return {f"tasks/{name}/{what}": mean for name, questions in self.tasks.items() for what, mean in means_of(
            [question.numbers([next(log_probs) for _ in question.answers]) for question in questions]).items()}

    def _sample(self, index: int) -> Sample:
        row, used = self.rows[index], len(self.rows[index].tokens) - 1
        tokens, mask = np.zeros(self.seq_len + 1, np.int64), np.zeros(self.seq_len, bool)
        tokens[: used + 1], mask[row.start - 1 : used] = row.tokens, True
        return Sample(tokens, mask, None, 0, index, used=used)


def means_of(found: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each number over the questions that have it."""
    return {name: fmean(numbers[name] for numbers in found if name in numbers)
            for name in ("acc", "acc_norm", "mc1", "mc2") if any(name in numbers for numbers in found)}


def _print(path: str, found: Sequence[dict[str, float]], as_json: bool) -> None:
    means = means_of(found)
    count = max(sum(name in numbers for numbers in found) for name in means)
    if as_json:
        print(json.dumps({"task": path, "questions": count, **means}), flush=True)
    else:
        print(f"{path}: " + " │ ".join(f"{name} {value:.4f}" for name, value in means.items())
              + f" │ {count:,} questions", flush=True)
