"""From conversation files to conversations in tokens on disk (`engine.data.chat.corpus`).

    reader (this process)  ->  workers: template, tokens, mask  ->  writer (this process), in the reader's order

Everything is made in a hidden folder beside its name and renamed into place, the side file last, which is the sign
that it is whole: a kill leaves nothing that could be taken for a corpus.  What it was made from is hashed into the side
file, and the same again is nothing to do.  One process makes it while others that want the same wait.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from corpus_tools.conversations.files import UNITS, Found, examples
from corpus_tools.inputs import InputFile, bytes_before
from corpus_tools.ordered_map import ordered_map
from corpus_tools.outputs import recipe
from corpus_tools.parts import NUM_EXAMPLES
from corpus_tools.prepare import useful_workers
from corpus_tools.records import BadRecord
from corpus_tools.remote import is_remote
from engine.data.chat.conversation import Example
from engine.data.chat.corpus import BEGINS, LEARNED, MASK, RECORD, RECORDS
from engine.data.chat.kinds import KINDS, Kind
from engine.data.chat.tokens import ChatEncoder
from engine.data.indexed import IndexedWriter, best_dtype
from engine.data.sidecar import Sidecar, describe_file, make_sidecar
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.distributed.environment import available_cores
from engine.errors import DataError, RequestError
from engine.progress import Progress
from engine.writing import sync_directory, write_errors

VERSION = 1                              # part of every hash: raised when the same files give other tokens
BATCH = 256                              # records handed to a worker at a time
SUFFIXES = (f"{MASK}.bin", f"{MASK}.idx", RECORDS, ".bin", ".idx", ".json")       # in the order of their renames


@dataclass(frozen=True)
class Wanted:
    """What is made of which files.

    Attributes:
        tokenizer: as `load_tokenizer` takes it; template: as `open_template`.
        kind: one of `KINDS`.
        columns: names of keys that differ.
        on_error: `stop` at the first record that cannot be used, or `skip` it and count.
    """

    files: tuple[InputFile, ...]
    tokenizer: str
    template: str
    kind: str
    columns: Mapping[str, str] = field(default_factory=dict)
    on_error: str = "stop"


@dataclass
class Counts:
    """What went through."""

    records: int = 0
    tokens: int = 0
    learned: int = 0
    skipped: int = 0
    skipped_examples: list[str] = field(default_factory=list)
    end_ids: set[int] = field(default_factory=set)

    def add(self, other: Counts) -> None:
        """Adds another count; of the examples the first few are kept."""
        self.records += other.records
        self.tokens += other.tokens
        self.learned += other.learned
        self.skipped += other.skipped
        self.skipped_examples = (self.skipped_examples + other.skipped_examples)[:NUM_EXAMPLES]
        self.end_ids |= other.end_ids


@dataclass(frozen=True)
class Task:
    """Some records of one file."""

    file: int
    found: tuple[Found, ...]


@dataclass(frozen=True)
class Answer:
    """What a worker made of a task."""

    file: int
    position: int
    tokens: npt.NDArray[np.int32]
    mask: npt.NDArray[np.uint8]
    lengths: list[int]
    records: npt.NDArray[Any]
    counts: Counts
    bad: tuple[BadRecord, ...]


class Encoder:
    """What a worker does with records."""

    def __init__(self, chat: ChatEncoder, kind: Kind, files: Sequence[InputFile]) -> None:
        self._chat, self._kind, self._files = chat, kind, files
        self._specials = np.array([*chat.tokenizer.specials.values(), chat.tokenizer.eod_id], np.int32)

    def __call__(self, task: Task) -> Answer:
        tokens: list[npt.NDArray[np.int32]] = []
        masks: list[npt.NDArray[np.uint8]] = []
        lengths: list[int] = []
        numbers: list[tuple[int, int, float]] = []
        bad: list[BadRecord] = []
        file = self._files[task.file]
        for found in task.found:
            if isinstance(found.value, BadRecord):
                bad.append(found.value)
                continue
            try:
                own, bits = self._encoded(found.value)
            except DataError as error:
                bad.append(BadRecord(file.path, f"{UNITS[file.format]} {found.number}", str(error)))
                continue
            tokens.append(own)
            masks.append(bits)
            lengths.append(len(own))
            numbers.append((task.file, found.number, np.nan if found.value.margin is None else found.value.margin))
        joined = np.concatenate([*tokens, np.zeros(0, np.int32)])
        mask = np.concatenate([*masks, np.zeros(0, np.uint8)])
        counts = Counts(len(lengths), len(joined), int((mask & LEARNED).sum()), sum(record.count for record in bad),
                        [str(record) for record in bad[:NUM_EXAMPLES]], self._ends(joined, mask))
        return Answer(task.file, task.found[-1].position, joined, mask, lengths, np.array(numbers, RECORD), counts,
                      tuple(bad))

    def _encoded(self, example: Example) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """All alternatives end to end, and the mask of both bits."""
        if (problem := self._kind.problem_of(len(example.alternatives))) is not None:
            raise DataError(problem)
        texts = [self._chat.encode(turns, self._kind.learn, example.tools) for turns in example.alternatives]
        bits = []
        for text in texts:
            if not text.learned[1:].any():
                raise DataError("nothing of it would be learned: every answer has weight 0, or nothing comes before it")
            own = text.learned.astype(np.uint8) * LEARNED
            own[0] |= BEGINS
            bits.append(own)
        return np.concatenate([text.tokens for text in texts]), np.concatenate(bits)

    def _ends(self, tokens: npt.NDArray[np.int32], mask: npt.NDArray[np.uint8]) -> set[int]:
        """The special tokens that end answers."""
        learned = np.append(mask & LEARNED, 0)
        last = tokens[(learned[:-1] == 1) & (learned[1:] == 0)]
        return set(last[np.isin(last, self._specials)].tolist())


def _encoder(wanted: Wanted) -> Encoder:
    """Built where it works, so that only these few words travel to a worker."""
    chat = ChatEncoder(load_tokenizer(wanted.tokenizer), wanted.template)
    return Encoder(chat, KINDS[wanted.kind], wanted.files)


@dataclass(frozen=True)
class Plan:
    """What is to be made, its tokenizer and template opened.

    Attributes:
        made_from: a hash of everything that the result depends on.
    """

    wanted: Wanted
    chat: ChatEncoder
    made_from: str

    @staticmethod
    def of(wanted: Wanted, contents: Sequence[str]) -> Plan:
        """
        Args:
            contents: what identifies the content of each file: a hash, or size and time of change.

        Raises:
            DataError: there is no such tokenizer or template.
        """
        tokenizer = load_tokenizer(wanted.tokenizer)
        chat = ChatEncoder(tokenizer, wanted.template)
        template = chat.renderer.template
        return Plan(wanted, chat, recipe("chats", VERSION, contents, tokenizer.sha256, tokenizer.eod_id,
                                         tokenizer.bos_id, template.source, template.tokens, wanted.kind,
                                         wanted.columns, wanted.on_error))


def prepare_chats(plan: Plan, prefix: Path, *, workers: int | None = None, overwrite: bool = False) -> Sidecar:
    """Makes the conversations under `prefix`, unless they are there.

    Returns:
        The side file; its `chat` says what was left out.

    Raises:
        DataError: a record cannot be used (file, where, why), or none can.
        RequestError: other files are there, or they cannot be written.
    """
    wanted, tokenizer = plan.wanted, plan.chat.tokenizer
    with write_errors(prefix), _alone(prefix) as folder:
        staged = folder / "made"
        if (done := _finished(staged, prefix, plan.made_from, overwrite)) is not None:
            return done
        counts = _write(wanted, staged, tokenizer, workers or available_cores())
        about = {"kind": wanted.kind, "template": plan.chat.renderer.template.name, "end_ids": sorted(counts.end_ids),
                 "learned": counts.learned, "skipped": counts.skipped, "skipped_examples": counts.skipped_examples,
                 "files": [{"path": file.path, "unit": UNITS[file.format]} for file in wanted.files]}
        sidecar = make_sidecar(staged, tokenizer.info, counts.records, counts.tokens,
                               best_dtype(tokenizer.vocab_size).name, plan.made_from)
        others = {suffix: describe_file(f"{staged}{suffix}") for suffix in SUFFIXES[:3]}
        sidecar = replace(sidecar, chat=about, files=sidecar.files | others)
        sidecar.write(staged)
        _commit(staged, prefix)
        return sidecar


def content_of(file: InputFile) -> str:
    """The SHA-256 of a file as it lies on disk; of one at an address what tells whether it has changed."""
    if is_remote(file.path):
        return f"{file.path} {file.num_bytes} {file.modified_ns}"
    try:
        return describe_file(file.path).sha256
    except OSError as error:
        raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from None


@contextmanager
def _alone(prefix: Path) -> Iterator[Path]:
    """The hidden folder in which the corpus is made, for one process at a time."""
    folder = prefix.with_name(f".{prefix.name}.making")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with open(prefix.with_name(f".{prefix.name}.lock"), "ab") as lock:
        with suppress(OSError):                                   # some network file systems have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        folder.mkdir(exist_ok=True)
        yield folder
        shutil.rmtree(folder, ignore_errors=True)


def _finished(staged: Path, prefix: Path, made_from: str, overwrite: bool) -> Sidecar | None:
    """The side file, where just this was made before; what a kill has left between two renames is renamed now."""
    with suppress(DataError):
        left = Sidecar.read(staged)
        if left is not None and left.made_from == made_from:
            _commit(staged, prefix)
    there = [path for suffix in SUFFIXES if (path := Path(f"{prefix}{suffix}")).exists()]
    try:
        sidecar = Sidecar.read(prefix)
    except DataError:
        sidecar = None
    if sidecar is not None and sidecar.made_from == made_from and len(there) == len(SUFFIXES):
        return sidecar
    if there and not overwrite:
        raise RequestError(f"{', '.join(map(str, there[:3]))} {'is' if len(there) == 1 else 'are'} there already, made "
                           "from other conversations, with other options or another tokenizer: give another --output, "
                           "or replace what is there with --overwrite")
    return None


def _commit(staged: Path, prefix: Path) -> None:
    if Path(f"{staged}{SUFFIXES[0]}").exists():
        Path(f"{prefix}.json").unlink(missing_ok=True)            # it describes the files that are replaced now
    for suffix in SUFFIXES:
        if Path(f"{staged}{suffix}").exists():
            os.replace(f"{staged}{suffix}", f"{prefix}{suffix}")
    sync_directory(prefix.absolute().parent)


def _write(wanted: Wanted, staged: Path, tokenizer: Tokenizer, workers: int) -> Counts:
    """All records, in tokens, under a passing name."""
    for suffix in SUFFIXES:
        Path(f"{staged}{suffix}").unlink(missing_ok=True)
    counts = Counts()
    num_workers = useful_workers(workers, wanted.files)
    dtype = best_dtype(tokenizer.vocab_size)
    before = bytes_before(wanted.files)
    with IndexedWriter(staged, dtype) as tokens, IndexedWriter(f"{staged}{MASK}", "u1") as mask, \
            open(f"{staged}{RECORDS}", "wb") as records, Progress("reading", before[-1]) as progress:
        for answer in ordered_map(functools.partial(_encoder, wanted), _tasks(wanted), num_workers):
            if answer.bad and wanted.on_error == "stop":
                raise DataError(f"{answer.bad[0]} (on_error: skip leaves such records out, and counts them)")
            tokens.add_documents(answer.tokens, answer.lengths)
            mask.add_documents(answer.mask, answer.lengths)
            records.write(answer.records.tobytes())
            counts.add(answer.counts)
            progress.reach(before[answer.file] + answer.position)
        if not counts.records:
            examples = "".join(f"\n  {example}" for example in counts.skipped_examples)
            raise DataError(f"no conversation in {', '.join(file.path for file in wanted.files[:5])}: "
                            f"{counts.skipped:,} records cannot be used, such as:{examples}")
        records.flush()
        os.fsync(records.fileno())
    return counts


def _tasks(wanted: Wanted) -> Iterator[Task]:
    for index, file in enumerate(wanted.files):
        for found in _batches(examples(file, wanted.columns)):
            yield Task(index, found)


def _batches(found: Iterable[Found]) -> Iterator[tuple[Found, ...]]:
    batch: list[Found] = []
    for each in found:
        batch.append(each)
        if len(batch) == BATCH:
            yield tuple(batch)
            batch = []
    if batch:
        yield tuple(batch)
