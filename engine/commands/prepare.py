"""`octant prepare FILE… --tokenizer T --output PREFIX`: text to a memory-mapped corpus (`corpus_tools.prepare`)."""

from __future__ import annotations

import argparse
import re
import time

from corpus_tools.outputs import output_prefix
from corpus_tools.parts import Counts
from corpus_tools.prepare import prepare
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
        overwrite=args.overwrite,
    )
    if not counts.was_there:
        _report(counts, time.monotonic() - start)
    print(hint("data", "inspect", output_prefix(args.output, shard)))
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
