"""`octant data example|extract|classifier|inspect|verify|merge|clean`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from corpus_tools.classifier import train_classifier
from corpus_tools.cleaning.command import run as clean
from corpus_tools.conversations.preview import coloured, rows_of
from corpus_tools.conversations.start import open_corpora
from corpus_tools.example import write_example
from corpus_tools.extract import Wanted, extract
from corpus_tools.inspect import histogram_lines, segments, share_lines, statistics
from corpus_tools.outputs import output_prefix, prefix_name, unused_prefix
from corpus_tools.shards import merge_corpora
from corpus_tools.verify import num_bytes_to_read, verify
from engine.config import load_config
from engine.data.corpus import Corpus
from engine.data.indexed import bin_path, idx_path
from engine.data.tokenizer import Tokenizer, load_tokenizer
from engine.data.training_data import Sample
from engine.errors import DataError, RequestError
from engine.hints import hint
from engine.progress import Progress
from engine.writing import refuse_existing, write_errors

CONFIG_SUFFIXES = (".yaml", ".yml")
CORPUS_SUFFIXES = (".bin", ".idx", ".json")


def run(args: argparse.Namespace) -> int:
    actions = {"example": _example, "extract": _extract, "classifier": _classifier, "inspect": _inspect,
               "verify": _verify, "merge": _merge, "clean": clean, "preview": _preview}
    return actions[args.action](args)


def _example(args: argparse.Namespace) -> int:
    number = write_example(Path(args.output), args.bytes)
    print(f"{args.output}: {number:,} documents, the sources of this Python's standard library")
    print(hint("prepare", args.output, "--tokenizer", "bytes", "--output", unused_prefix("data/tiny")))
    return 0


def _extract(args: argparse.Namespace) -> int:
    equal = {key: frozenset(values.split(",")) for key, values in map(_pair, args.keep)}
    bounds = [{key: _bound(key, value) for key, value in map(_pair, given)} for given in (args.at_least, args.at_most)]
    output = Path(args.output)
    refuse_existing([output], args.overwrite)
    counted = extract(args.files, output, args.kind, args.field, Wanted(equal, *bounds))
    print(f"{output}: {counted.documents:,} documents of {counted.read:,} records; {counted.unwanted:,} not wanted, "
          f"{counted.empty:,} without text, {counted.broken:,} that cannot be read")
    print(hint("data", "clean", output, "--output", "clean"))
    return 0


def _pair(given: str) -> tuple[str, str]:
    key, sign, value = given.partition("=")
    if not sign or not key:
        raise RequestError(f"{given!r}: write KEY=VALUE")
    return key, value


def _bound(key: str, value: str) -> float:
    try:
        return float(value)
    except ValueError:
        raise RequestError(f"{key}={value}: the bound of a number is a number") from None


def _classifier(args: argparse.Namespace) -> int:
    output = Path(args.output)
    refuse_existing([output], args.overwrite)
    with write_errors(output):
        found = train_classifier(args.good, args.bad, output, args.field)
    print(f"{output}: of {found.examples:,} examples held back {found.good:.1%} of the good and {found.bad:.1%} of the "
          "bad are told right")
    print("in a rules file: documents: [{rule: fasttext, name: quality, "
          f"model: {output}, keep: [good], min_probability: 0.5}}]")
    print(hint("data", "clean", "--print-rules"))
    return 0


def _merge(args: argparse.Namespace) -> int:
    prefixes = list(dict.fromkeys(map(_prefix, args.target)))  # a glob names .bin, .idx and .json of each
    output = output_prefix(args.output)
    whole = merge_corpora(prefixes, output, overwrite=args.overwrite)
    print(f"{output}: {len(prefixes)} corpora, {whole.num_documents:,} documents, {whole.num_tokens:,} tokens")
    print(hint("data", "inspect", output))
    return 0


def _inspect(args: argparse.Namespace) -> int:
    if args.target[0].endswith(CONFIG_SUFFIXES):
        return _inspect_config(args)
    if args.samples is not None:
        raise RequestError(
            f"--samples {args.samples}: a corpus alone has no order of training. Give the CONFIG.yaml of a run."
        )
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    for target in args.target:
        prefix = _prefix(target)
        if args.document is None:
            _print_statistics(prefix, args.json)
        else:
            _print_document(prefix, args.document, tokenizer, args.json)
    return 0


def _prefix(target: str) -> str:
    """`data/web`, also when it is given as one of its files."""
    path = Path(target)
    return str(path.with_name(prefix_name(path.name))) if path.name.endswith(CORPUS_SUFFIXES) else target


def _print_statistics(prefix: str, as_json: bool) -> None:
    corpus = Corpus.open(prefix)
    sidecar, found = corpus.sidecar, statistics(corpus.dataset)
    if as_json:
        fields = asdict(found) | {"prefix": prefix, "mean_length": found.mean_length}
        print(json.dumps(fields | {"tokenizer": asdict(sidecar.tokenizer) if sidecar else None}, ensure_ascii=False))
        return
    print(f"{prefix}: {found.documents:,} documents, {found.tokens:,} tokens ({found.dtype})")
    if sidecar is not None:
        made_by = sidecar.tokenizer
        print(
            f"tokenizer {made_by.name} ({made_by.kind}, {made_by.vocab_size:,} ids, end of document {made_by.eod_id}, "
            f"sha256 {made_by.sha256[:12]}…)"
        )
    if found.documents:
        print(f"length {found.shortest:,} to {found.longest:,} tokens, {found.mean_length:,.1f} on average\n")
        print("\n".join(histogram_lines(found)))
    print(f"\n{hint('data', 'inspect', prefix, '--document', 0)}" if found.documents else "")
    print(hint("data", "verify", prefix))


def _print_document(prefix: str, number: int, tokenizer: Tokenizer | None, as_json: bool) -> None:
    corpus = Corpus.open(prefix)
    made_by = corpus.sidecar.tokenizer if corpus.sidecar else None
    if tokenizer and made_by and (difference := made_by.difference(tokenizer.info)):
        raise DataError(f"{prefix} was made with another tokenizer: {difference}")
    tokens = corpus.dataset.document(number).tolist()
    if as_json:
        fields = {"prefix": prefix, "document": number, "tokens": tokens}
        print(json.dumps(fields | ({"text": _text(tokens, tokenizer)} if tokenizer else {}), ensure_ascii=False))
        return
    print(f"{prefix}, document {number}: {len(tokens):,} tokens")
    print(_text(tokens, tokenizer))


def _text(ids: list[int], tokenizer: Tokenizer | None) -> str:
    """What ids say; without a tokenizer the ids.

    Raises:
        DataError: there are ids that are none of the tokenizer's.
    """
    if tokenizer is None:
        return " ".join(map(str, ids))
    if ids and not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
        raise DataError(
            f"ids from {min(ids)} to {max(ids)}: the tokenizer {tokenizer.name} has those from 0 to "
            f"{tokenizer.vocab_size - 1}, so another one made them"
        )
    return tokenizer.decode(ids)


def _inspect_config(args: argparse.Namespace) -> int:
    """The samples a run consumes, or without `--samples` what it takes from every source."""
    if args.document is not None:
        raise RequestError(f"--document {args.document}: documents are those of a corpus. Give its PREFIX.")
    config = load_config(args.target[0], args.target[1:])
    data = open_corpora(config, say=_aside).train
    if args.samples is None:
        shares = data.report(config.num_samples)
        if args.json:
            print("\n".join(json.dumps(asdict(share)) for share in shares))
            return 0
        rising = f"{config.ramp.stages[0].size:,} to " if config.batch.ramp else ""
        print(f"{config.steps:,} steps of {rising}{config.batch.global_:,} samples of {data.seq_len:,} tokens\n")
        print("\n".join(share_lines(shares)))
        print(f"\n{hint('data', 'inspect', *args.target, '--samples', '0:2')}")
        return 0
    first, last = _range(args.samples)
    spec = args.tokenizer or (None if args.json else config.data.tokenizer)
    tokenizer = load_tokenizer(spec) if spec else None
    for index in range(first, last):
        sample = data.sample(index)
        if args.json:
            _print_sample_json(index, sample, tokenizer)
        else:
            _print_sample(index, sample, data.source_names[sample.source], tokenizer)
    return 0


def _preview(args: argparse.Namespace) -> int:
    """What a run sees of its samples: tokens, and which are learned."""
    config = load_config(args.config, args.overrides)
    if config.data.tokenizer is None:
        raise RequestError(f"{args.config} names no data.tokenizer, without which there is no text to show")
    data, tokenizer = open_corpora(config, say=_aside).train, load_tokenizer(config.data.tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    for index in range(*_range(args.samples)):
        sample, rows = rows_of(data, index)
        for row in rows:
            if args.json:
                print(json.dumps(row.record(index, sample.source)))
                continue
            said = f"{len(row.tokens):,} tokens, {int(row.learned.sum()):,} learned"
            name = ", ".join(filter(None, [data.source_names[sample.source], row.role]))
            console.print(f"── sample {index}: {name}, {said}")
            console.print(coloured(row, tokenizer))
    if not args.json:
        _aside("in colour: what is learned; dim: what is only read")
    return 0


def _aside(line: str) -> None:
    print(line, file=sys.stderr)


def _range(text: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d{1,18}):(\d{1,18})", text, re.ASCII)
    if not found or int(found[1]) > int(found[2]):
        raise RequestError(f"--samples {text[:80]}: give A:B for samples A to B - 1, such as 0:8.")
    return int(found[1]), int(found[2])


def _print_sample_json(index: int, sample: Sample, tokenizer: Tokenizer | None) -> None:
    tokens = sample.tokens.tolist()
    fields = {"index": index, "source": sample.source, "window": sample.window, "tokens": tokens}
    print(json.dumps(fields | ({"text": _text(tokens, tokenizer)} if tokenizer else {}), ensure_ascii=False))


def _print_sample(index: int, sample: Sample, name: str, tokenizer: Tokenizer | None) -> None:
    """What is to be predicted, in segments of one document and one loss mask."""
    num_targets = len(sample.tokens) - 1
    print(f"── sample {index}: source {sample.source} ({name}), window {sample.window}, {num_targets:,} targets")
    for segment in segments(sample):
        learned = "" if segment.learned else ", not learned"
        print(f"   document {segment.document}, {len(segment.tokens):,} tokens{learned}")
        print(_text(segment.tokens.tolist(), tokenizer))


def _verify(args: argparse.Namespace) -> int:
    """Exit 1 when anything is wrong with any of them."""
    prefixes = [_prefix(target) for target in args.target]
    for prefix in prefixes:
        if not bin_path(prefix).exists() and not idx_path(prefix).exists():
            raise DataError(f"{prefix}: neither {prefix}.bin nor {prefix}.idx is there; give the PREFIX of a corpus.")
    failed = False
    with Progress("verifying", sum(map(num_bytes_to_read, prefixes))) as progress:
        for prefix in prefixes:
            verdict = verify(prefix, progress.advance)
            failed |= bool(verdict.problems)
            if args.json:
                print(json.dumps(asdict(verdict) | {"whole": not verdict.problems}, ensure_ascii=False))
            else:
                print(f"{prefix}: {'DAMAGED' if verdict.problems else 'whole'}")
                print("".join(f"  {line}\n" for line in (*verdict.problems, *verdict.notes)), end="")
    if not args.json and failed:
        print("prepare the damaged corpora again, or copy them from where they are whole")
    elif not args.json:
        print(hint("data", "inspect", prefixes[0]))
    return 1 if failed else 0
