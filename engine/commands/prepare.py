"""`octant prepare FILE… --tokenizer T --output PREFIX`: text to a memory-mapped corpus (`corpus_tools.prepare`)."""

from __future__ import annotations

import argparse
import time

from corpus_tools.prepare import prepare
from corpus_tools.shards import shard_prefix
from engine.errors import RequestError
from engine.hints import hint


def _shard(text: str | None) -> tuple[int, int] | None:
    """`3/16` -> (3, 16)."""
    if text is None:
        return None
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()):
        raise RequestError(f"--shard {text}: write K/N, such as 0/16")
    return int(index), int(count)


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
    )
    seconds = time.monotonic() - start
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
    print(hint("data", "inspect", args.output if shard is None else shard_prefix(args.output, *shard)))
    return 0
