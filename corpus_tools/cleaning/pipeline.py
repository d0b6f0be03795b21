"""Cleaning a corpus: parallel over documents, in one pass, in order.

    reader  ->  workers: rules, masks, contamination, fingerprint  ->  this process: duplicates, output, report

The output are shards of JSON lines, gzip, `{"text": …, "source": "file, line"}`: what `octant prepare` reads.  Only
the index of documents already kept grows with the corpus (see `duplicates`).
"""

from __future__ import annotations

import functools
import gzip
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from corpus_tools.cleaning.contamination import EvaluationIndex, evaluation_index
from corpus_tools.cleaning.document import DOCUMENT, Removal, clean_document
from corpus_tools.cleaning.duplicates import Deduplicator, Fingerprint, fingerprint
from corpus_tools.cleaning.output import UNFINISHED, begin, finish
from corpus_tools.cleaning.report import Report
from corpus_tools.cleaning.rules import Rules
from corpus_tools.inputs import InputFile, bytes_before, expand_inputs
from corpus_tools.ordered_map import ordered_map
from corpus_tools.outputs import recipe
from corpus_tools.readers import Block, read_blocks, records_of
from corpus_tools.records import BadRecord
from engine.distributed.environment import available_cores
from engine.errors import DataError, RequestError
from engine.progress import Progress
from engine.writing import write_errors

SHARD_BYTES = 1 << 28  # of text per output file
GZIP_LEVEL = 3  # three times as fast as the default, 10 % larger


@dataclass(frozen=True)
class Candidate:
    """A document that passed the rules; it stays unless it is a duplicate."""

    text: str
    source: str
    fingerprint: Fingerprint


@dataclass(frozen=True)
class Task:
    """A block, and which file it is from."""

    block: Block
    file: int


@dataclass(frozen=True)
class Cleaned:
    """A worker's answer for one block."""

    candidates: list[Candidate]
    report: Report
    bad: Sequence[BadRecord]
    file: int
    file_position: int


@dataclass(frozen=True)
class Cleaner:
    """What a worker does with a block."""

    rules: Rules
    evaluation: EvaluationIndex
    text_field: str
    num_examples: int

    def __call__(self, task: Task) -> Cleaned:
        records = records_of(task.block, self.text_field)
        report = Report(self.num_examples, documents_in=len(records.texts))
        report.unusable_records = sum(record.count for record in records.bad)
        report.unusable_examples = [str(record) for record in records.bad]
        candidates = []
        for text, place in zip(records.texts, records.places, strict=True):
            source = f"{task.block.path}, {place}" if place else task.block.path
            report.bytes_in += len(text.encode())
            kept, removals = clean_document(text, self.rules, self.evaluation)
            report.count(removals, source)
            if kept is not None:
                sketch = fingerprint(kept.text, kept.words, self.rules.duplicates)
                candidates.append(Candidate(kept.text, source, sketch))
        return Cleaned(candidates, report, records.bad, task.file, task.block.file_position)


def _cleaner(cleaner: Cleaner) -> Cleaner:
    return cleaner


def clean(
    files: Sequence[str | Path],
    output: str | Path,
    rules: Rules,
    *,
    evaluation_files: Sequence[str | Path] = (),
    workers: int | None = None,
    text_field: str = "text",
    on_error: str = "stop",
    num_examples: int = 5,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> Report:
    """Clean `files` into the folder `output`: `clean-00000.jsonl.gz` …, `report.md`, `_report.json`.

    Args:
        evaluation_files: texts that must not be in the result.
        num_examples: shown per rule.
        overwrite: replace what was cleaned into this folder before.

    Raises:
        RequestError: the output folder holds anything else.
        DataError: a record cannot be read (with `on_error="stop"`).
    """
    if on_error not in ("stop", "skip"):
        raise RequestError(f"--on-error {on_error}: use stop or skip")
    if workers is not None and workers < 1:
        raise RequestError(f"--workers {workers}: at least one process is needed")
    inputs = expand_inputs(files)
    held_out = [asdict(file) for file in (expand_inputs(evaluation_files) if evaluation_files else ())]
    options = (rules.model_dump(mode="json"), text_field, on_error, num_examples)
    made_from = recipe("clean", [asdict(file) for file in inputs], held_out, options)
    folder = Path(output)
    with write_errors(output):
        done = begin(folder, inputs, made_from, overwrite)
    if done is not None:
        say(f"nothing to do: {folder} is there, cleaned from these files with these rules")
        return done
    evaluation = evaluation_index(evaluation_files, rules.contamination)
    deduplicator = Deduplicator(rules.duplicates)
    report = Report(num_examples, made_from=made_from)
    setup = functools.partial(_cleaner, Cleaner(rules, evaluation, text_field, num_examples))
    before = bytes_before(inputs)
    with (write_errors(output), _removed_on_error(folder / UNFINISHED) as unfinished,
          Progress("reading", before[-1]) as progress):
        shards = _Shards(unfinished)
        for cleaned in ordered_map(setup, _tasks(inputs, text_field), workers or available_cores()):
            if cleaned.bad and on_error == "stop":
                raise DataError(f"{cleaned.bad[0]} (--on-error skip leaves such records out)")
            report.merge(cleaned.report)
            _keep_new(cleaned.candidates, deduplicator, shards, report)
            progress.reach(before[cleaned.file] + cleaned.file_position, cleaned.report.bytes_in)
        shards.finish()
        report.write(unfinished)
    with write_errors(output):
        finish(folder)
    return report


@contextmanager
def _removed_on_error(folder: Path) -> Iterator[Path]:
    try:
        yield folder
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _keep_new(candidates: Sequence[Candidate], deduplicator: Deduplicator, shards: _Shards, report: Report) -> None:
    for candidate in candidates:
        copy = deduplicator.seen(candidate.fingerprint, candidate.source)
        if copy is not None:
            label, first = copy
            report.count([Removal(label, DOCUMENT, candidate.text, f"copy of {first}")], candidate.source)
            continue
        shards.write(candidate)
        report.documents_out += 1
        report.bytes_out += len(candidate.text.encode())


def _tasks(inputs: Sequence[InputFile], text_field: str) -> Iterator[Task]:
    for index, file in enumerate(inputs):
        for block in read_blocks(file, text_field, join_texts=False):
            yield Task(block, index)


class _Shards:
    """The output files: each is called `.partial` until it is whole."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._num_shards = 0
        self._raw: BinaryIO | None = None
        self._file: gzip.GzipFile | None = None
        self._text_bytes = 0

    def write(self, candidate: Candidate) -> None:
        if self._file is None:
            self._raw = open(self._path(".partial"), "wb")
            self._file = gzip.GzipFile("", "wb", GZIP_LEVEL, self._raw, mtime=0)  # no name, no time: same bytes again
        record = {"text": candidate.text, "source": candidate.source}
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._text_bytes += len(candidate.text)
        if self._text_bytes >= SHARD_BYTES:
            self.finish()

    def _path(self, suffix: str) -> Path:
        return self._folder / f"clean-{self._num_shards:05d}.jsonl.gz{suffix}"

    def finish(self) -> None:
        """Close the open shard and give it its name."""
        if self._file is None or self._raw is None:
            return
        self._file.close()
        self._raw.close()
        self._path(".partial").rename(self._path(""))
        self._file = self._raw = None
        self._text_bytes, self._num_shards = 0, self._num_shards + 1
