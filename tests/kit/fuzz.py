"""Damaged input, tried in bulk: whatever a file holds, its reader takes it or refuses it in a sentence.

    READER = Reader("idx", read=lambda folder: IndexedDataset(folder / "web"), template=folder_with_a_good_corpus)

    def test_damaged_index(request: pytest.FixtureRequest) -> None:
        fuzz(READER, st.fixed_dictionaries({"web.idx": damaged(good_bytes)}), request)

hypothesis makes the damage (below are strategies for bytes, text and JSON).  Each input is read in a process of its
own, forked once and kept, with a limit on memory and on time, in a fresh copy of the reader's template folder.  Then

    refused     an OctantError of exit code 2 that names the place, in printable words of bearable length
    accepted    `read` returned; what it returns is its own to check: an AssertionError there is nonsense accepted
    unclear     an OctantError, but none that helps: control characters, no name of a file, endless
    traceback   anything else was raised, MemoryError and RecursionError included
    hang        no answer in the time that is allowed; killed: the process died

and all but the first two fail the test, with the inputs kept in a folder that the message names.  `pytest --fuzz N`
(`make fuzz`) sets the number of inputs and takes new ones each time; otherwise there are 200, the same each time.
"""

from __future__ import annotations

import faulthandler
import os
import re
import resource
import shutil
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from engine.errors import OctantError

Files = Mapping[str, bytes]

GOOD = ("refused", "accepted")
KINDS = (*GOOD, "unclear", "nonsense", "traceback", "hang", "killed")
DEFAULT_INPUTS = 200
LONGEST_MESSAGE = 3000
MOST_DEATHS = 10                                             # each costs its limit: stop there
PATIENCE = 6                                                 # wall-clock time allowed per second of the limit
TOTALS: dict[str, Counter[str]] = {}                         # by reader, for the table at the end of the session


@dataclass(frozen=True)
class Reader:
    """What is tried.

    Attributes:
        name: its row in the table of totals.
        read: reads what lies in the folder it is given; returns where it accepts, raises AssertionError for nonsense.
        template: a folder with good files, copied for every input; what is damaged is written over the copy.
        limit_seconds: of the reading process's own time.
        limit_bytes: of address space on top of what that process has when it starts.
    """

    name: str
    read: Callable[[Path], object]
    template: Path | None = None
    limit_seconds: float = 10.0
    limit_bytes: int = 1 << 30


@dataclass(frozen=True)
class Outcome:
    """One of `KINDS`, and what was said."""

    kind: str
    text: str = ""


@dataclass
class Box:
    """The process that reads.  A new one is forked when the last has hung or died."""

    reader: Reader
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="octant-fuzz-")))
    pid: int = 0
    pipe: Connection | None = None

    def __call__(self, files: Files) -> Outcome:
        """What becomes of one input."""
        if self.pipe is None:
            self._start()
        assert self.pipe is not None
        self.pipe.send(dict(files))
        begun, used = time.monotonic(), _cpu_seconds(self.pid)
        while not self.pipe.poll(0.2):
            waited, worked = time.monotonic() - begun, _cpu_seconds(self.pid) - used
            if worked > self.reader.limit_seconds or waited > PATIENCE * self.reader.limit_seconds:
                where = self._log()
                self.close()
                return Outcome("hang", f"no answer after {waited:.0f} s ({worked:.0f} s of work)\n{where}")
        try:
            return Outcome(*self.pipe.recv())
        except EOFError:
            self.close()
            return Outcome("killed", self._log())

    def close(self) -> None:
        """Ends the process."""
        if self.pipe is not None:
            self.pipe.close()
            self.pipe = None
            os.kill(self.pid, 9)
            os.waitpid(self.pid, 0)

    def _log(self) -> str:
        return (self.folder / "log").read_text(errors="replace")[:1500]

    def _start(self) -> None:
        ours, theirs = Pipe()
        self.pid = os.fork()
        if self.pid:
            theirs.close()
            self.pipe = ours
            return
        ours.close()                                         # so that it ends when whoever asks has ended
        try:
            self._serve(theirs)
        finally:
            os._exit(1)

    def _serve(self, pipe: Connection) -> None:
        log = os.open(self.folder / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        faulthandler.enable(log)                             # where it died goes there too
        limit = _address_space() + self.reader.limit_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        while True:
            files = pipe.recv()
            os.ftruncate(log, 0)
            faulthandler.dump_traceback_later(self.reader.limit_seconds * 0.9, file=log)
            outcome = self._read(files)
            faulthandler.cancel_dump_traceback_later()
            pipe.send((outcome.kind, outcome.text))

    def _read(self, files: Files) -> Outcome:
        inside = self.folder / "input"
        shutil.rmtree(inside, ignore_errors=True)
        shutil.copytree(self.reader.template, inside) if self.reader.template else inside.mkdir()
        for name, data in files.items():
            (inside / name).write_bytes(data)
        try:
            self.reader.read(inside)
            return Outcome("accepted")
        except OctantError as error:
            problem = _unclear(error, inside)
            return Outcome("unclear", f"{problem}: {str(error)!r:.600}") if problem else Outcome("refused", str(error))
        except AssertionError as error:
            return Outcome("nonsense", f"{error}")
        except BaseException:                                # SystemExit as well: a reader ends no process
            return Outcome("traceback", traceback.format_exc()[-1500:])


def _unclear(error: OctantError, folder: Path) -> str | None:
    message = str(error)
    if error.exit_code != 2:
        return f"exit code {error.exit_code}"
    if str(folder) not in message and not any(path.name in message for path in folder.iterdir()):
        return "names no file"
    if found := re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]", message):
        return f"control character {found[0]!r}"
    return f"{len(message)} characters" if len(message) > LONGEST_MESSAGE else None


def _cpu_seconds(pid: int) -> float:
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(words[11]) + int(words[12])) / os.sysconf("SC_CLK_TCK")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(reader: Reader, files: st.SearchStrategy[Files], request: pytest.FixtureRequest) -> None:
    """Tries the reader on inputs of the strategy `files`: contents by file name, over the template.

    Raises:
        AssertionError: an input was neither refused nor rightly accepted; all of them are kept.
    """
    asked = request.config.getoption("--fuzz")
    box, totals = Box(reader), TOTALS.setdefault(reader.name, Counter())
    bad: list[tuple[Files, Outcome]] = []

    @settings(max_examples=asked or DEFAULT_INPUTS, derandomize=asked is None, database=None, deadline=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(files)
    def try_one(damaged_files: Files) -> None:
        outcome = box(damaged_files)
        totals[outcome.kind] += 1
        if outcome.kind not in GOOD:
            bad.append((damaged_files, outcome))
        if sum(seen.kind in ("hang", "killed") for _, seen in bad) == MOST_DEATHS:
            raise AssertionError(_complaint(reader, bad))

    try:
        try_one()
    finally:
        box.close()
        shutil.rmtree(box.folder, ignore_errors=True)
    assert not bad, _complaint(reader, bad)


def _complaint(reader: Reader, bad: list[tuple[Files, Outcome]]) -> str:
    """The smallest input of each kind of failure, and where all of them are."""
    kept = Path(tempfile.mkdtemp(prefix=f"octant-fuzz-{reader.name.replace(' ', '-')}-"))
    for index, (files, _) in enumerate(bad):
        (kept / str(index)).mkdir()
        for name, data in files.items():
            (kept / str(index) / name).write_bytes(data)
    by_kind: dict[str, int] = {}
    for index in sorted(range(len(bad)), key=lambda i: sum(map(len, bad[i][0].values()))):
        by_kind.setdefault(f"{bad[index][1].kind}: {bad[index][1].text.strip().splitlines()[-1]:.200}", index)
    shown = "\n".join(f"  {kept}/{index}  {bad[index][1].kind}: {bad[index][1].text}"
                      for index in list(by_kind.values())[:8])
    return f"{reader.name}: {len(bad)} inputs were neither refused nor rightly accepted\n{shown}"


def totals_table() -> list[str]:
    """A line per reader that was tried in this session."""
    if not TOTALS:
        return []
    rows = [("reader", "inputs", *KINDS)]
    rows += [(name, str(counts.total()), *(str(counts[kind]) for kind in KINDS)) for name, counts in TOTALS.items()]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                      for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in rows]


# Strategies -----------------------------------------------------------------------------------------------------------

EXTREMES = (0, 1, -1, 2**15, 2**31 - 1, 2**31, -2**31, 2**32, 2**53, 2**62, 2**63 - 1, 2**63, -2**63, 2**64, 10**20)
PIECES = (b"\0", b"\xff", b"\xff\xfe", b"\xef\xbb\xbf", b"\n", b"\r", b"\t", b"\x1b[31m", b"\x85", b"\xe2\x80\xa8",
          b'"', b"'", b"{", b"}", b"[", b"]", b",", b":", b"\\", b"\\ud800", b"-", b"1" * 5000, b"[" * 3000,
          b'{"a":' * 2000,
          b"nan", b"1e999", b"null", b"%", b"#", b"&a ", b"*a ", b"!!python/object/apply:os.system ", b"<<: ")


@st.composite
def damaged(draw: st.DrawFn, good: bytes | list[bytes], edits: int = 4) -> bytes:
    """A good file (or one of several) with up to `edits` places bent, cut, doubled or overwritten."""
    data = bytearray(draw(st.sampled_from(good)) if isinstance(good, list) else good)
    for _ in range(draw(st.integers(1, edits))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        size = draw(st.sampled_from((1, 1, 2, 4, 8, 16, 60)))
        match draw(st.integers(0, 8)):
            case 0:
                data[at:at + 1] = bytes([data[at] ^ 1 << draw(st.integers(0, 7))]) if data else b""
            case 1:
                data[at:at + size] = draw(st.binary(min_size=size, max_size=size))
            case 2:
                del data[at:]
            case 3:
                del data[at:at + size]
            case 4:
                data[at:at] = data[at:at + size] * draw(st.sampled_from((1, 2, 50)))
            case 5:
                data[at:at] = draw(st.sampled_from(PIECES))
            case 6:
                data[at:at + 8] = (draw(st.sampled_from(EXTREMES)) % 2**64).to_bytes(8, "little")
            case 7:
                data[at:at + 4] = (draw(st.sampled_from(EXTREMES)) % 2**32).to_bytes(4, "little")
            case 8:
                data[at:at + size] = draw(st.sampled_from((b"\0", b"\xff", b"\x7f", b"\x80"))) * size
    return bytes(data)


def hostile() -> st.SearchStrategy[bytes]:
    """Files that have nothing to do with what is expected."""
    text = st.text(max_size=200).map(lambda words: words.encode("utf-8", "surrogatepass"))
    one = st.sampled_from((b"\0", b"[", b"{", b"a", b"9"))
    many = st.builds(bytes.__mul__, one, st.sampled_from((5000, 500_000)))
    return st.one_of(st.binary(max_size=300), text, many, st.sampled_from((
        b"", '{"a": 1}'.encode("utf-16"), b"version https://git-lfs.github.com/spec/v1\n",
        b"<!doctype html><html></html>", b"\x1f\x8b\x08\0", b"PK\x03\x04", b"\x80\x02}q\0.")))


def _nested(tens: int) -> object:
    value: object = 0
    for level in range(10 * tens):
        value = [value] if level % 2 else {"a": value}
    return value


WEIRD = st.one_of(
    st.none(), st.booleans(), st.sampled_from(EXTREMES), st.just(-10**400), st.floats(), st.text(max_size=20),
    st.sampled_from(("", " ", ".", "..", "/", "a" * 5000, "\x1b[2J", "\ud800", "0x10")),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.integers(2, 80).map(_nested))


@st.composite
def bent(draw: st.DrawFn, value: object, edits: int = 3) -> object:
    """A JSON value with up to `edits` of its parts replaced, removed, renamed or added."""
    result = value
    for _ in range(draw(st.integers(1, edits))):
        result = _bend(draw, result)
    return result


def _bend(draw: st.DrawFn, value: object) -> object:
    if isinstance(value, dict) and value and draw(st.integers(0, 9)):
        key = draw(st.sampled_from(list(value)))
        match draw(st.integers(0, 6)):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {(draw(st.text(max_size=8)) if k == key else k): v for k, v in value.items()}
            case 2:
                return value | {draw(st.one_of(st.text(max_size=8), st.sampled_from(list(value)))): draw(WEIRD)}
            case _:
                return value | {key: _bend(draw, value[key])}
    if isinstance(value, list) and value and draw(st.integers(0, 9)):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], *([_bend(draw, value[at])] * draw(st.sampled_from((0, 1, 1, 1, 2)))), *value[at + 1:]]
    return draw(WEIRD)
