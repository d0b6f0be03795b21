"""From text to `PREFIX.bin`, `PREFIX.idx` and the side file `PREFIX.json`.

    reader (this process)  ->  workers: parse and encode  ->  writer (this process), in the reader's order

The reader cuts the corpus into blocks by content alone and the writer takes them back in order, so the output is the
same byte for byte with one worker or sixty.  A few blocks per worker are under way at a time, so memory doesn't grow
with the corpus.  What is written goes to parts (`corpus_tools.parts`): after a kill the same command keeps the finished
ones, as long as the tokenizer, the options and the files they were made of (path, size, time of change) are what they
were.  A corpus that is there already is kept (`corpus_tools.outputs`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpus_tools.holdout import VALID, Holdout
from corpus_tools.inputs import InputFile, bytes_before, expand_inputs
from corpus_tools.ordered_map import ordered_map
from corpus_tools.outputs import files_of, finish_commit, is_made, output_prefix, recipe
from corpus_tools.parts import HELD, MERGED, NUM_EXAMPLES, Counts, Documents, Parts, Position, remove_parts
from corpus_tools.readers import Block, read_blocks, records_of
from corpus_tools.records import BadRecord
from corpus_tools.shards import shard_of
from corpus_tools.tokenizers.fast_backend import FastTokenizer, accelerated
from engine.data.indexed import best_dtype
from engine.data.sidecar import Sidecar
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.distributed.environment import available_cores
from engine.errors import DataError, RequestError
from engine.progress import Progress
from engine.writing import write_errors

PART_SECONDS = 20.0  # how much work a kill may cost
VERSION = 1  # part of every key: raised when the same input gives other tokens
BYTES_PER_WORKER = 2 << 20  # less text than this isn't worth starting another process


@dataclass(frozen=True)
class Task:
    """A block of the corpus and where it stands."""

    block: Block
    position: Position


@dataclass(frozen=True)
class Answer:
    """What a worker made of a block; of `task`'s block only the file and the reader's position are left."""

    task: Task
    documents: Documents
    bad: tuple[BadRecord, ...]


@dataclass(frozen=True)
class Encoder:
    """What a worker does with a block: parse, encode, end each document with `eod_id`.  Empty documents are dropped."""

    tokenizer: Tokenizer
    text_field: str
    append_eod: bool
    dtype: npt.DTypeLike

    def __call__(self, task: Task) -> Answer:
        block = task.block
        records = records_of(block, self.text_field)
        texts, bad = records.texts, records.bad
        if isinstance(self.tokenizer, FastTokenizer) and texts:
            self.tokenizer.check(texts[0])
        tokens, lengths = self._encode(texts, block)
        counts = Counts(
            text_bytes=sum(len(text.encode()) for text in texts),
            empty_documents=sum(not text for text in texts),
            skipped_records=sum(record.count for record in bad),
            skipped_examples=[str(record) for record in bad[:NUM_EXAMPLES]],
        )
        documents = Documents(tokens, lengths, counts, task.position.behind, block.continues, block.ends, block.abandon)
        task = replace(task, block=replace(block, lines=b"", texts=(), places=(), bad=()))
        return Answer(task, documents, tuple(bad))

    def _encode(self, texts: Sequence[str], block: Block) -> tuple[npt.NDArray[Any], list[int]]:
        end = np.array([self.tokenizer.eod_id] if self.append_eod and block.ends else [], np.int32)
        arrays: list[npt.NDArray[np.int32]] = []
        lengths: list[int] = []
        for text in filter(None, texts):
            ids = self.tokenizer.encode_array(text, continues=block.continues)
            arrays += (ids, end)
            lengths.append(len(ids) + len(end))
        return np.concatenate(arrays or [end[:0]]).astype(self.dtype), lengths


def _encoder(spec: str, backend: str, text_field: str, append_eod: bool, dtype: str) -> Encoder:
    """An Encoder built where it works, so that only these few words travel to a worker."""
    tokenizer = load_tokenizer(spec)
    return Encoder(accelerated(tokenizer) if backend == "auto" else tokenizer, text_field, append_eod, dtype)


def prepare(
    files: Sequence[str | Path],
    tokenizer: str | Path,
    output: str | Path,
    *,
    workers: int | None = None,
    text_field: str = "text",
    on_error: str = "stop",
    append_eod: bool = True,
    backend: str = "auto",
    shard: tuple[int, int] | None = None,
    holdout: Holdout | None = None,
    overwrite: bool = False,
    part_seconds: float = PART_SECONDS,
    say: Callable[[str], None] = print,
) -> Counts:
    """Tokenize `files` (see `readers`) into `output`.bin, .idx and .json.  Returns what went through.

    Args:
        workers: processes, by default one per core.
        on_error: `stop` at the first unusable record, or `skip` it and count.
        backend: `auto` uses gigatoken where it is installed and agrees (`fast_backend`), `reference` never does.
        shard: `(k, n)`: only the k-th of n runs of files, into `output`-0000k-of-0000n; merged in order (`shards`) they
            are what one run would have written.
        holdout: documents that go to `output`-valid instead, chosen by content (`holdout`).
        overwrite: replace what is there under these names; else the same corpus is left as it is and any other refused.

    Raises:
        DataError: something is wrong with the corpus (file and line).
        RequestError: something is wrong with the request.
    """
    if on_error not in ("stop", "skip"):
        raise RequestError(f"--on-error {on_error}: use stop or skip")
    if backend not in ("auto", "reference"):
        raise RequestError(f"--backend {backend}: use auto or reference")
    if workers is not None and workers < 1:
        raise RequestError(f"--workers {workers}: at least one process is needed")
    inputs = expand_inputs(files)
    prefix = output_prefix(output, shard)
    if shard is not None:
        inputs = shard_of(inputs, *shard)
    if holdout is not None and shard is not None and not holdout.is_share:
        raise RequestError(f"--holdout {holdout.amount:g} with --shard: each would hold out as many; give a share")
    read = {Path(file.path).resolve() for file in inputs if file.path != "-"}
    output_files, held_files = files_of(prefix, read), files_of(held_prefix(output, shard), read)
    loaded = load_tokenizer(tokenizer)
    dtype = best_dtype(loaded.vocab_size)
    options = (VERSION, loaded.sha256, loaded.eod_id, text_field, on_error, append_eod)
    made_from = recipe("prepare", options, [asdict(file) for file in inputs], *([holdout.amount] if holdout else []))
    folder = Path(f"{prefix}.parts")
    wanted = [(HELD, held_files)] * (holdout is not None) + [(MERGED, output_files)]
    ready = [finish_commit(folder / staged, files, made_from) or is_made(files, made_from, overwrite)
             for staged, files in wanted]
    if all(ready):
        remove_parts(folder)
        say(f"nothing to do: {prefix} is there, made from these files with this tokenizer and these options")
        return _counts_of(prefix)
    key_of = functools.partial(_key, options, inputs)
    encoder = functools.partial(_encoder, str(tokenizer), backend, text_field, append_eod, dtype.name)
    num_workers = useful_workers(workers or available_cores(), inputs)
    with write_errors(prefix, "nothing that was finished is lost"), Parts(folder, key_of, dtype, part_seconds) as parts:
        if parts.finished:
            megabytes = parts.total().text_bytes / 1e6
            say(f"{prefix}: {len(parts.finished)} finished part(s) kept, {megabytes:,.0f} MB of text")
        tasks = _tasks(inputs, parts.end, text_field, loaded.joins_at_newline)
        try:
            before = bytes_before(inputs)
            with Progress("reading", before[-1]) as progress:
                for answer in ordered_map(encoder, tasks, num_workers):
                    if answer.bad and on_error == "stop":
                        raise DataError(f"{answer.bad[0]} (--on-error skip leaves such records out)")
                    parts.add(answer.documents)
                    done = before[answer.task.position.file] + answer.task.block.file_position
                    progress.reach(done, answer.documents.counts.text_bytes)
        finally:
            parts.finish()  # also after an error: what came before it needn't be done again
        counts = parts.total()
        _require_documents(counts)
        counts.held_out = parts.join(output_files, loaded.info, made_from, holdout, held_files)
        return counts


def held_prefix(output: str | Path, shard: tuple[int, int] | None = None) -> Path:
    """Where the documents that are held out go: `PREFIX-valid`, of a shard `PREFIX-valid-0000k-of-0000n`."""
    whole = output_prefix(output)
    return output_prefix(whole.with_name(whole.name + VALID), shard)


def _counts_of(prefix: Path) -> Counts:
    sidecar = Sidecar.read(prefix)
    assert sidecar is not None
    return Counts(sidecar.num_documents, sidecar.num_tokens, was_there=True)


def _require_documents(counts: Counts) -> None:
    if counts.documents:
        return
    examples = "".join(f"\n  {example}" for example in counts.skipped_examples)
    such_as = f", such as:{examples}" if examples else ""
    raise DataError(f"no documents: {counts.empty_documents} empty, {counts.skipped_records} unusable{such_as}")


def _key(options: tuple[Any, ...], inputs: Sequence[InputFile], end: Position) -> str:
    """Everything the tokens before `end` depend on, as one hash."""
    read = [asdict(file) for file in inputs[: end.file + (end.block > 0)]]
    return recipe(options, read, asdict(end))


def _tasks(inputs: Sequence[InputFile], start: Position, text_field: str, join_texts: bool) -> Iterator[Task]:
    """The blocks of the corpus from `start` on.  A file that was begun is read again up to there."""
    for file in range(start.file, len(inputs)):
        for index, block in enumerate(read_blocks(inputs[file], text_field, join_texts)):
            position = Position(file, index)
            if position >= start:
                yield Task(block, position)


def useful_workers(wanted: int, inputs: Sequence[InputFile]) -> int:
    """No more workers than there is work for; packed files hold about four times their size."""
    if any(file.path == "-" for file in inputs):
        return wanted
    packed = [file.num_bytes for file in inputs if file.compression or file.format == ".parquet"]
    text_bytes = sum(file.num_bytes for file in inputs) + 3 * sum(packed)
    return max(1, min(wanted, text_bytes // BYTES_PER_WORKER))
