"""`octant prepare FILE… --tokenizer T --output PREFIX`: text to a memory-mapped corpus (`corpus_tools.prepare`)."""

from __future__ import annotations

import argparse
import re
import time

from corpus_tools.conversations.formats import require_columns
from corpus_tools.conversations.prepare import Plan, Wanted, prepare_chats
from corpus_tools.conversations.start import about
from corpus_tools.holdout import Holdout
from corpus_tools.inputs import expand_inputs
from corpus_tools.outputs import output_prefix
from corpus_tools.parts import Counts
from corpus_tools.prepare import held_prefix, prepare
from engine.errors import RequestError
from engine.hints import hint


def _shard(text: str | None) -> tuple[int, int] | None:
    """`3/16` -> (3, 16)."""
    if text is None:
        return None
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text, re.ASCII)
    if not found:
        raise RequestError(f"--shard {text[:80]}: write K/N, such as 0/16")
    return int(found[1]), int(found[2])


def run(args: argparse.Namespace) -> int:
    """Tokenize, then say what went through and what comes next."""
    if args.chat:
        return _chats(args)
    start, shard = time.monotonic(), _shard(args.shard)
    counts = prepare(
        args.files,
        args.tokenizer,
        args.output,
        workers=args.workers,
        text_field=args.field,
        on_error=args.on_error,
        append_eod=args.append_eod,
        backend=args.backend,
        shard=shard,
        holdout=Holdout.of(args.holdout),
        overwrite=args.overwrite,
    )
    if not counts.was_there:
        _report(counts, time.monotonic() - start)
    if counts.held_out:
        print(f"{counts.held_out:,} of the documents are held out, in {held_prefix(args.output, shard)}")
    print(hint("data", "inspect", output_prefix(args.output, shard)))
    return 0


def _chats(args: argparse.Namespace) -> int:
    """Conversations in tokens, for `data.train: [{path: PREFIX}]`."""
    if args.holdout is not None:
        raise RequestError("--holdout does not go with --chat: give other files and another --output")
    if args.shard is not None:
        raise RequestError("--shard does not go with --chat: give each part's files and another --output")
    columns = dict(pair.partition("=")[::2] for pair in args.columns)
    require_columns(columns, "--columns")
    files = tuple(expand_inputs(args.files))
    wanted = Wanted(files, args.tokenizer, args.template, args.kind, columns, args.on_error)
    prefix = output_prefix(args.output)
    plan = Plan.of(wanted, [f"{file.path} {file.num_bytes} {file.modified_ns}" for file in files])
    print(about(str(prefix), prepare_chats(plan, prefix, workers=args.workers, overwrite=args.overwrite)))
    print(hint("data", "inspect", prefix))
    return 0


def _report(counts: Counts, seconds: float) -> None:
    print(
        f"{counts.documents:,} documents, {counts.text_bytes:,} bytes of text -> {counts.tokens:,} tokens "
        f"({counts.text_bytes / max(1, counts.tokens):.2f} bytes per token) in {seconds:.1f} s, "
        f"{counts.text_bytes / 1e6 / max(seconds, 1e-9):.1f} MB/s"
    )
    if counts.empty_documents:
        print(f"{counts.empty_documents:,} empty documents were left out")
    if counts.skipped_records:
        print(f"{counts.skipped_records:,} unusable records were skipped, such as:")
        for example in counts.skipped_examples:
            print(f"  {example}")
