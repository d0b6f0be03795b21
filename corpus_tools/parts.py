"""The output of `octant prepare` while it grows: parts that are finished one by one and survive a kill.

Documents go to `PREFIX.parts/part-00000.bin` and `.idx`.  Now and then the open part is finished, and only then
described by `part-00000.json`, with a key: a hash of everything its tokens depend on.  Opening the folder again keeps
the parts from the first on whose files are whole and whose key still holds, and says where in the corpus the next
block is.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from corpus_tools.holdout import VALID, Holdout, divide
from corpus_tools.outputs import commit
from engine.data.indexed import IndexedDataset, IndexedWriter, merge
from engine.data.sidecar import make_sidecar
from engine.data.tokenizer_identity import TokenizerInfo
from engine.errors import DataError, RequestError

NUM_EXAMPLES = 10  # of unusable records, kept for the report
MERGED = "merged"  # the passing name of the whole corpus
HELD = MERGED + VALID  # and of what is held out
OURS = re.compile(r"(part-\d{5}|merged(-valid)?)\.(tmp|(bin|idx|json|lengths)(\.partial)?)")


@dataclass(frozen=True, order=True)
class Position:
    """A place in the corpus: before block `block` of file `file`."""

    file: int = 0
    block: int = 0

    @property
    def behind(self) -> Position:
        """The place behind that block."""
        return Position(self.file, self.block + 1)


@dataclass
class Counts:
    """What went through."""

    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    empty_documents: int = 0
    skipped_records: int = 0
    skipped_examples: list[str] = field(default_factory=list)
    was_there: bool = False  # the corpus was made before, so nothing went through
    held_out: int = 0  # documents, of those above

    def add(self, other: Counts) -> None:
        """Add another count to this one; of the examples the first few are kept."""
        self.documents += other.documents
        self.tokens += other.tokens
        self.text_bytes += other.text_bytes
        self.empty_documents += other.empty_documents
        self.skipped_records += other.skipped_records
        self.skipped_examples = (self.skipped_examples + other.skipped_examples)[:NUM_EXAMPLES]


@dataclass(frozen=True)
class Documents:
    """Tokens of some documents end to end, and the length of each.

    A long document comes in several of these: one that `continues` goes on with the document before it, one that isn't
    `ended` leaves its (only) document open, and `abandon` forgets an open document.
    """

    tokens: npt.NDArray[Any]
    lengths: list[int]
    counts: Counts  # without documents and tokens, which are counted when documents end
    end: Position  # of the block they are from
    continues: bool = False
    ended: bool = True
    abandon: bool = False


@dataclass(frozen=True)
class Part:
    """A finished part, as recorded in its `.json`."""

    key: str
    end: Position
    counts: Counts
    num_bytes: int  # of the .bin

    def save(self, path: Path) -> None:
        """Write the record by rename: it is there whole or not at all."""
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self)))
        os.replace(temporary, path)

    @staticmethod
    def load(path: Path) -> Part | None:
        """The part, or None where it isn't there or isn't whole."""
        try:
            record = json.loads(path.read_text())
            part = Part(record["key"], Position(**record["end"]), Counts(**record["counts"]), record["num_bytes"])
            whole = path.with_suffix(".bin").stat().st_size == part.num_bytes
            IndexedDataset(path.with_suffix(""))
        except (OSError, ValueError, KeyError, TypeError, DataError):
            return None
        return part if whole else None


class Parts:
    """The folder of parts: keeps what still holds, takes new documents, joins everything in the end.

    `key_of(position)` is the key of a part that ends there.  The open part is finished after `seconds`.
    """

    def __init__(self, folder: Path, key_of: Callable[[Position], str], dtype: npt.DTypeLike, seconds: float) -> None:
        self._folder = folder
        self._lock = -1
        self._key_of = key_of
        self._dtype = np.dtype(dtype)
        self._seconds = seconds
        self._writer: IndexedWriter | None = None
        self._opened_at = 0.0
        self._counts = Counts()
        self._open_document: list[npt.NDArray[Any]] = []
        self._open_counts = Counts()  # of blocks since the last document ended
        self.finished: list[Part] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._take()
        self._keep_finished()
        self._boundary = self.end  # behind the last block that ended its document

    def _take(self) -> None:
        """Keep other processes out, and other files where they are.

        Raises:
            RequestError: another process writes here, or something here is not of our making.
        """
        self._lock = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        with suppress(OSError):  # some network file systems have no locks
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RequestError(f"{self._folder} is in use: another process prepares this corpus") from None
        for path in self._folder.iterdir():
            if not OURS.fullmatch(path.name):
                raise RequestError(
                    f"{path} is not of octant's making, and {self._folder} is removed when the corpus is complete: "
                    "move it elsewhere, or give another --output"
                )

    @property
    def end(self) -> Position:
        """Where the finished parts end: the next block to do when the folder is opened."""
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

    def add(self, documents: Documents) -> None:
        """Take the next block's documents; finishes the part when its time is up and no document is open."""
        if self._writer is None:
            self._writer = IndexedWriter(self._path(len(self.finished)).with_suffix(""), self._dtype)
            self._opened_at, self._counts = time.monotonic(), Counts()
        if documents.abandon or not documents.continues:
            self._open_document = []
        self._open_counts.add(documents.counts)
        self._write(self._writer, documents)
        if self._open_document:
            return
        self._counts.add(self._open_counts)
        self._open_counts = Counts()
        self._boundary = documents.end
        if time.monotonic() - self._opened_at >= self._seconds:
            self.finish()

    def _write(self, writer: IndexedWriter, documents: Documents) -> None:
        tokens, lengths = documents.tokens, documents.lengths
        if documents.continues or not documents.ended:
            self._open_document.append(tokens)
            if not documents.ended:
                return
            tokens = np.concatenate(self._open_document)
            lengths, self._open_document = [len(tokens)], []
        writer.add_documents(tokens, lengths)
        self._counts.documents += len(lengths)
        self._counts.tokens += len(tokens)

    def finish(self) -> None:
        """Finish the open part: it holds every document that ended."""
        if self._writer is None:
            return
        self._writer.finalize()
        self._writer = None
        path = self._path(len(self.finished))
        part = Part(self._key_of(self._boundary), self._boundary, self._counts, path.with_suffix(".bin").stat().st_size)
        part.save(path)
        self.finished.append(part)

    def total(self) -> Counts:
        """The sum over finished parts."""
        total = Counts()
        for part in self.finished:
            total.add(part.counts)
        return total

    def join(self, files: Sequence[Path], tokenizer: TokenizerInfo, made_from: str, holdout: Holdout | None = None,
             held_files: Sequence[Path] = ()) -> int:
        """All parts -> the `files_of` a corpus, renamed into place whole; then the folder is removed.

        Args:
            holdout: what of the documents goes to another corpus, of `held_files`, which is there first.

        Returns:
            Documents that were held out.
        """
        merged, held = self._folder / MERGED, self._folder / HELD
        parts = [self._path(index).with_suffix("") for index in range(len(self.finished))]
        total, documents, tokens = self.total(), 0, 0
        if holdout is None:
            merge(parts, merged)
        else:
            documents, tokens = divide(parts, holdout, merged, held)
            make_sidecar(held, tokenizer, documents, tokens, self._dtype.name, made_from).write(held)
        make_sidecar(merged, tokenizer, total.documents - documents, total.tokens - tokens, self._dtype.name,
                     made_from).write(merged)
        if holdout is not None:
            commit(held, held_files)
        commit(merged, files)
        remove_parts(self._folder)
        return documents

    def __enter__(self) -> Parts:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes in."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1


def remove_parts(folder: Path) -> None:
    """Remove a folder of parts that nobody needs any more, and nothing else."""
    with suppress(OSError):  # what is left over does no harm
        for path in folder.iterdir():
            if OURS.fullmatch(path.name):
                path.unlink()
        folder.rmdir()
