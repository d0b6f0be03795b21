"""`octant data extract`: documents out of what is no plain text yet, as JSON lines that cleaning and prepare read.

    records        JSON of any shape: those whose metadata are as wanted, and the text of one of their fields
    --kind html    the main text of a page, without what stands around it (trafilatura: Barbaresi 2021)
    --kind tex     a paper: from its first section to its bibliography, without comments, with the author's macros that
                   take no argument written out (LLaMA: Touvron et al. 2023, section 2.1, arXiv)
    Posts.xml      a StackExchange dump: each question with the answer of the highest score, of equals the first one
                   (LLaMA sorts answers by score, the same section)

A dump is read twice: which answer is each question's best is known at its end only.  Between the two passes a question
takes about 100 bytes.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from corpus_tools.inputs import decompressed, expand_inputs, open_input, utf8
from corpus_tools.json_values import Broken, json_values
from corpus_tools.records import text_of
from engine.errors import DataError, RequestError
from engine.reading import said
from engine.writing import write_errors

QUESTION, ANSWER = "1", "2"  # PostTypeId of a dump
BLOCKS = frozenset("p pre li blockquote div br h1 h2 h3 h4 h5 h6 tr hr".split())
SECTION = re.compile(r"\\(?:section|chapter)\*?\s*[\[{]")
BIBLIOGRAPHY = re.compile(r"\\(?:begin\s*\{thebibliography\}|bibliography\s*\{|printbibliography\b|appendix\b)")
COMMENT = re.compile(r"(?<!\\)((?:\\\\)*)%.*")
MACRO = re.compile(r"\\(?:(?:re)?newcommand\*?\s*\{?\s*\\(\w+)\s*\}?|def\s*\\(\w+))\s*\{((?:[^{}]|\{[^{}]*\})*)\}")


@dataclass(frozen=True)
class Wanted:
    """What a record's metadata must be; keys are as `a.b` for field `b` of the object in field `a`."""

    equal: Mapping[str, frozenset[str]]
    at_least: Mapping[str, float]
    at_most: Mapping[str, float]

    def __call__(self, record: Any) -> bool:
        return all(written(value_of(record, key)) in values for key, values in self.equal.items()) and all(
            number >= least for number, least in _numbers(record, self.at_least)) and all(
            number <= most for number, most in _numbers(record, self.at_most))


def written(value: object) -> str:
    """A value as one writes it in a command: text as it is, anything else as JSON does."""
    return value if isinstance(value, str) else json.dumps(value)


def value_of(record: Any, key: str) -> Any:
    """None where there is none."""
    for name in key.split("."):
        if not isinstance(record, dict) or name not in record:
            return None
        record = record[name]
    return record


def _numbers(record: Any, bounds: Mapping[str, float]) -> Iterator[tuple[float, float]]:
    """What is there and its bound; NaN, which no bound holds for, where there is no number."""
    for key, bound in bounds.items():
        try:
            yield float(value_of(record, key)), bound
        except (TypeError, ValueError):
            yield float("nan"), bound


def html_text(html: str) -> str:
    """The main text of a page; empty where there is none.

    Raises:
        RequestError: the package is missing.
    """
    try:
        import trafilatura  # optional package
    except ImportError as error:
        raise RequestError(f"--kind html needs the package trafilatura: pip install trafilatura ({said(error)})") \
            from error
    return trafilatura.extract(html, include_comments=False, favor_precision=True) or ""


def tex_text(source: str) -> str:
    """A paper from its first section to its bibliography; empty where it has no section."""
    source = "\n".join(COMMENT.sub(r"\1", line) for line in source.split("\n")
                       if not line.lstrip().startswith("%"))
    macros = {found[1] or found[2]: found[3] for found in MACRO.finditer(source) if "#" not in found[3]}
    begin = SECTION.search(source)
    if begin is None:
        return ""
    end = BIBLIOGRAPHY.search(source, begin.start())
    stop = end.start() if end else (source + "\\end{document}").find("\\end{document}")
    body = MACRO.sub("", source[begin.start() : stop])
    for name, meaning in macros.items():
        body = meaning.join(re.split(rf"\\{re.escape(name)}(?![A-Za-z])(?:\{{\}})?", body))
    return body.strip()


class _Body(HTMLParser):
    """The text of a post, whose HTML is simple and all of it text."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_endtag(self, tag: str) -> None:
        if tag in BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def body_text(html: str) -> str:
    """Blocks of a post as lines, at most one of them blank in a row."""
    parser = _Body()
    parser.feed(html)
    parser.close()
    return re.sub(r"\s*\n\s*\n\s*", "\n\n", "".join(parser.parts)).strip()


KINDS: dict[str, Callable[[str], str]] = {"text": str, "html": html_text, "tex": tex_text}


@dataclass
class Counted:
    """Records read, unwanted by their metadata, without text, broken; and documents written."""

    read: int = 0
    unwanted: int = 0
    empty: int = 0
    broken: int = 0
    documents: int = 0


def extract(files: Sequence[str], output: Path, kind: str, field: str, wanted: Wanted) -> Counted:
    """Writes the documents of files, in order, as JSON lines; whole, or not at all.

    Raises:
        DataError: a file cannot be read.  RequestError: a package is missing.
    """
    counted = Counted()
    partial = output.with_name(output.name + ".partial")
    try:
        opener = gzip.open if output.suffix == ".gz" else open
        with write_errors(output), opener(partial, "wt", encoding="utf-8") as file:
            for text, source in _documents(files, kind, field, wanted, counted):
                file.write(json.dumps({"text": text, "source": source}, ensure_ascii=False) + "\n")
                counted.documents += 1
        with write_errors(output):
            partial.rename(output)
    finally:
        partial.unlink(missing_ok=True)
    return counted


def _documents(files: Sequence[str], kind: str, field: str, wanted: Wanted,
               counted: Counted) -> Iterator[tuple[str, str]]:
    dumps = [name for name in files if name.endswith(".xml")]
    others = [name for name in files if name not in dumps]
    for dump in dumps:
        yield from best_answers(Path(dump), counted)
    for input_file in expand_inputs(others) if others else ():
        if input_file.format not in (".json", ".jsonl", ".txt"):
            raise DataError(f"{input_file.path}: records are read from JSON, .txt and StackExchange's Posts.xml; write "
                            f"{input_file.format} as JSON lines first")
        with open_input(input_file) as raw:
            chunks = decompressed(raw, input_file.compression)
            if input_file.format == ".txt":
                records: Iterable[Any] = [{field: b"".join(chunks).decode(errors="replace")}]
            else:
                records = json_values(utf8(chunks, json=True))
            for number, record in enumerate(records, 1):
                text = _text(record, kind, field, wanted, counted)
                if text:
                    yield text, f"{input_file.path}, record {number}"


def _text(record: Any, kind: str, field: str, wanted: Wanted, counted: Counted) -> str:
    counted.read += 1
    if isinstance(record, Broken):
        counted.broken += 1
        return ""
    if not wanted(record):
        counted.unwanted += 1
        return ""
    try:
        text = KINDS[kind](text_of(record, field)).strip()
    except ValueError:
        counted.broken += 1
        return ""
    counted.empty += not text
    return text


def best_answers(path: Path, counted: Counted) -> Iterator[tuple[str, str]]:
    """Each question of a `Posts.xml` that has an answer: title, question, its best answer.

    Raises:
        DataError: it is no such dump.
    """
    best: dict[str, tuple[int, int]] = {}  # by question: the highest score, and minus the answer's number
    for row in _rows(path):
        if row.get("PostTypeId") == ANSWER:
            rank = (_number(row, "Score", path), -_number(row, "Id", path))
            parent = row.get("ParentId", "")
            best[parent] = max(best.get(parent, rank), rank)
    chosen = {str(-number): question for question, (_, number) in best.items()}
    waiting: dict[str, str] = {}
    for row in _rows(path):
        number = row.get("Id", "")
        counted.read += 1
        question = chosen.get(number) if row.get("PostTypeId") == ANSWER else number
        if question is None or question not in best:
            counted.unwanted += 1
        elif row.get("PostTypeId") == QUESTION or question in waiting:
            body = body_text(row.get("Body", ""))
            if row.get("PostTypeId") == QUESTION:
                waiting[question] = f"{row.get('Title', '').strip()}\n\n{body}".strip()
            else:
                yield f"{waiting.pop(question)}\n\n{body}", f"{path}, question {question}"
        else:
            counted.unwanted += 1  # an answer before its question: no dump has one


def _number(row: Mapping[str, str], key: str, path: Path) -> int:
    try:
        return int(row.get(key, "0"))
    except ValueError:
        raise DataError(f"{path}: {key} of a post is {row.get(key)!r:.40}, not a number") from None


def _rows(path: Path) -> Iterator[dict[str, str]]:
    try:
        rows = ElementTree.iterparse(path, events=("start", "end"))
        _, root = next(rows)
        for event, element in rows:
            if event == "end" and element.tag == "row":
                yield dict(element.attrib)
                root.clear()  # or it would hold every row
    except (ElementTree.ParseError, OSError, ValueError, StopIteration) as error:
        raise DataError(f"{path} cannot be read as a dump of StackExchange: {said(error)}") from None
