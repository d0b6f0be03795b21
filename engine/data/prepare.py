"""From text to `PREFIX.bin`, `PREFIX.idx` and the side file `PREFIX.json`.

    reader (one process)  ->  tokenizing workers  ->  writer (the same process), in the reader's order

The reader cuts the corpus into blocks by content alone and the writer takes them back in order, so the output is the same
byte for byte with one worker or sixty.  What is written goes to *parts*, `PREFIX.parts/part-00000.*`: every `part_seconds` the
open part is finished and named with a key made of everything its tokens depend on: tokenizer, options, and the files it and
the parts before it read (path, size, time of change).  After a kill the same command keeps the parts whose key still
holds, goes on behind the last of them, and at the end joins all parts and renames the result into place.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from engine.data.indexed import IndexedWriter, best_dtype, merge
from engine.data.ordered_map import available_cores, ordered_map
from engine.data.progress import Progress
from engine.data.readers import BadRecord, Block, InputFile, expand_inputs, parse_lines, read_blocks
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.errors import DataError, RequestError

PART_SECONDS = 20.0
FORMAT_VERSION = 1  # part of every key: raised when the meaning of parts changes
NUM_EXAMPLES = 10  # of unusable records, kept for the report
BYTES_PER_WORKER = 2 << 20  # less text than this isn't worth starting another process


@dataclass(frozen=True, order=True)
class Position:
    """Where in the corpus the next block is: file index, block index within it."""

    file: int = 0
    block: int = 0


@dataclass
class Counts:
    """What went through, added up over parts."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    skipped_records: int = 0
    skipped_examples: list[str] = field(default_factory=list)

    def add(self, other: Counts) -> None:
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.empty_documents += other.empty_documents
        self.skipped_records += other.skipped_records
        self.skipped_examples = (self.skipped_examples + other.skipped_examples)[:NUM_EXAMPLES]


@dataclass(frozen=True)
class Task:
    """A block, where it stands, and where the one after it does."""

    block: Block
    start: Position
    end: Position


@dataclass(frozen=True)
class Tokens:
    """A block's documents as tokens: end to end, and the length of each.  `task.block` has lost its text on the way."""

    task: Task
    tokens: npt.NDArray[Any]
    lengths: list[int]
    text_bytes: int
    num_empty: int
    bad: tuple[BadRecord, ...]


@dataclass(frozen=True)
class Encoder:
    """What a worker does with a block: parse, encode, end each document with `eod_id`.  Empty documents are dropped."""

    tokenizer: Tokenizer
    text_field: str
    append_eod: bool
    dtype: npt.DTypeLike

    def __call__(self, task: Task) -> Tokens:
        block = task.block
        texts, bad = parse_lines(block, self.text_field) if block.lines else (list(block.texts), [])
        end = np.array([self.tokenizer.eod_id] if self.append_eod else [], self.dtype)
        arrays: list[npt.NDArray[Any]] = []
        lengths: list[int] = []
        for index, text in enumerate(texts):
            if not text:
                continue
            arrays.append(self.tokenizer.encode_array(text, continues=block.continues and index == 0))
            lengths.append(len(arrays[-1]))
            if block.ends or index < len(texts) - 1:
                arrays.append(end)
                lengths[-1] += len(end)
        return Tokens(
            task=replace(task, block=replace(block, lines=b"", texts=(), bad=())),
            tokens=np.concatenate(arrays).astype(self.dtype) if arrays else np.empty(0, self.dtype),
            lengths=lengths,
            text_bytes=sum(len(text.encode()) for text in texts),
            num_empty=texts.count(""),
            bad=(*block.bad, *bad),
        )


def _encoder(spec: str, text_field: str, append_eod: bool, dtype: str) -> Encoder:
    """An Encoder built inside its worker, so that only these few words travel."""
    return Encoder(load_tokenizer(spec), text_field, append_eod, dtype)


@dataclass(frozen=True)
class Part:
    """A finished piece of the output, as recorded in `part-NNNNN.json` when its `.bin` and `.idx` are whole."""

    key: str
    end: Position
    counts: Counts
    num_bytes: int  # of the .bin

    def save(self, path: Path) -> None:
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path) -> Part | None:
        """The part, or None where it isn't there or isn't whole."""
        try:
            record = json.loads(path.read_text())
            part = Part(record["key"], Position(**record["end"]), Counts(**record["counts"]), record["num_bytes"])
            whole = path.with_suffix(".bin").stat().st_size == part.num_bytes and path.with_suffix(".idx").exists()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return part if whole else None


class Parts:
    """The folder of parts: keeps the finished ones that still hold, writes new ones, joins them all."""

    def __init__(self, folder: Path, key_of: Callable[[Position], str], dtype: npt.DTypeLike, seconds: float) -> None:
        self._folder = folder
        self._key_of = key_of
        self._dtype = dtype
        self._seconds = seconds
        self.finished: list[Part] = []
        self._writer: IndexedWriter | None = None
        self._opened = 0.0
        self._counts = Counts()
        self._boundary = Position()  # behind the last block that ended its document
        self._document: list[npt.NDArray[Any]] = []  # the fragments so far of a document that goes on
        self._document_bytes = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._keep_finished()

    @property
    def end(self) -> Position:
        """Where the next block to tokenize is, after opening."""
        return self.finished[-1].end if self.finished else Position()

    def _path(self, index: int) -> Path:
        return self._folder / f"part-{index:05d}.json"

    def _keep_finished(self) -> None:
        while (part := Part.load(self._path(len(self.finished)))) and part.key == self._key_of(part.end):
            self.finished.append(part)
        kept = {self._path(index).stem for index in range(len(self.finished))}
        for path in self._folder.iterdir():
            if path.stem not in kept:
                path.unlink()
        self._boundary = self.end

    def add(self, block: Tokens) -> None:
        """Write a block's documents; finishes the part when its time is up and no document is under way."""
        if self._writer is None:
            self._writer = IndexedWriter(self._path(len(self.finished)).with_suffix(""), self._dtype)
            self._opened, self._counts = time.monotonic(), Counts()
        flags = block.task.block
        if flags.abandon or not flags.continues:
            self._document, self._document_bytes = [], 0
        self._write_documents(block)
        self._document_bytes += block.text_bytes
        self._counts.add(Counts(empty_documents=block.num_empty, skipped_records=len(block.bad),
                                skipped_examples=[str(record) for record in block.bad[:NUM_EXAMPLES]]))  # fmt: skip
        if self._document:
            return
        self._counts.text_bytes += self._document_bytes
        self._document_bytes = 0
        self._boundary = block.task.end
        if time.monotonic() - self._opened >= self._seconds:
            self.close()

    def _write_documents(self, block: Tokens) -> None:
        assert self._writer is not None
        flags = block.task.block
        if flags.continues or not flags.ends:  # a fragment: such blocks hold nothing else
            self._document.append(block.tokens)
            if not flags.ends:
                return
            tokens, lengths, self._document = np.concatenate(self._document), [sum(map(len, self._document))], []
        else:
            tokens, lengths = block.tokens, block.lengths
        self._writer.add_documents(tokens, lengths)
        self._counts.documents += len(lengths)
        self._counts.tokens += len(tokens)

    def close(self) -> None:
        """Finish the open part: it holds every document that ended, and the next block is the one behind the last."""
        if self._writer is None:
            return
        end = self._boundary
        self._writer.finalize()
        self._writer = None
        path = self._path(len(self.finished))
        part = Part(self._key_of(end), end, self._counts, path.with_suffix(".bin").stat().st_size)
        part.save(path)
        self.finished.append(part)

    def join(self, prefix: Path) -> Counts:
        """All parts -> `prefix.bin` and `.idx`, renamed into place whole; the folder is removed."""
        merged = self._folder / "merged"
        merge([self._path(index).with_suffix("") for index in range(len(self.finished))], merged)
        prefix.with_name(prefix.name + ".json").unlink(missing_ok=True)  # it described the old files
        for suffix in (".bin", ".idx"):
            os.replace(merged.with_suffix(suffix), prefix.with_name(prefix.name + suffix))
        total = Counts()
        for part in self.finished:
            total.add(part.counts)
        return total

    def remove(self) -> None:
        shutil.rmtree(self._folder)


def prepare(
    files: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    workers: int | None = None,
    text_field: str = "text",
    on_error: str = "stop",
    append_eod: bool = True,
    part_seconds: float = PART_SECONDS,
    say: Callable[[str], None] = print,
) -> Counts:
    """Tokenize `files` (see `readers`) into `output`.bin, .idx and .json.  Returns what went through.

    `workers`: processes, by default one per core; with more than one, a script that calls this needs the usual
    `if __name__ == "__main__"`.  `on_error`: `stop` at the first unusable record or `skip` it and count.  Raises DataError
    for the corpus (file and line), RequestError for the request.
    """
    if on_error not in ("stop", "skip"):
        raise RequestError(f"--on-error {on_error}: use stop or skip")
    inputs = expand_inputs(files)
    loaded = load_tokenizer(tokenizer)
    dtype = best_dtype(loaded.vocab_size)
    prefix = Path(output)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    key_of = functools.partial(_key, (FORMAT_VERSION, loaded.sha256, text_field, on_error, append_eod), inputs)
    parts = Parts(prefix.with_name(prefix.name + ".parts"), key_of, dtype, part_seconds)
    if parts.finished:
        say(f"kept {len(parts.finished)} finished part(s) of {prefix}, going on from there")
    encoder = functools.partial(_encoder, str(tokenizer), text_field, append_eod, np.dtype(dtype).name)
    tasks = _tasks(inputs, parts.end, text_field, loaded.joins_at_newline)
    num_workers = _useful_workers(workers or available_cores(), inputs)
    try:
        with Progress(inputs) as progress:
            for block in ordered_map(encoder, tasks, num_workers):
                if block.bad and on_error == "stop":
                    raise DataError(f"{block.bad[0]} (--on-error skip leaves such records out)")
                parts.add(block)
                progress.update(block.task.start.file, block.task.block.file_position, block.text_bytes)
    finally:
        parts.close()
    counts = parts.join(prefix)
    if counts.documents == 0:
        raise DataError(f"no documents: {counts.empty_documents} empty, {counts.skipped_records} unusable")
    parts.remove()
    return counts


def _key(options: tuple[Any, ...], inputs: Sequence[InputFile], end: Position) -> str:
    """Everything the tokens before `end` depend on, as one hash."""
    touched = [asdict(file) for file in inputs[: end.file + (end.block > 0)]]
    return hashlib.sha256(json.dumps([options, touched, asdict(end)]).encode()).hexdigest()


def _tasks(inputs: Sequence[InputFile], start: Position, text_field: str, join_texts: bool) -> Iterator[Task]:
    """The blocks of the corpus from `start` on.  A file that was begun is read again up to there."""
    for file_index in range(start.file, len(inputs)):
        blocks = read_blocks(inputs[file_index], text_field, join_texts)
        for block_index, block in enumerate(blocks):
            here = Position(file_index, block_index)
            if here >= start:
                yield Task(block, here, Position(file_index, block_index + 1))


def _useful_workers(wanted: int, inputs: Sequence[InputFile]) -> int:
    """No more workers than there is work for; standard input may be long."""
    if any(file.path == "-" for file in inputs):
        return wanted
    unpacked_bytes = sum(file.num_bytes * (4 if file.compression or file.format == ".parquet" else 1) for file in inputs)
    return max(1, min(wanted, unpacked_bytes // BYTES_PER_WORKER))
