"""`octant data clean FILE… --output DIR`."""

from __future__ import annotations

import argparse

from corpus_tools.cleaning.pipeline import clean
from corpus_tools.cleaning.rules import DEFAULT_RULES, load_rules
from corpus_tools.outputs import unused_prefix
from engine.errors import RequestError
from engine.hints import hint


def run(args: argparse.Namespace) -> int:
    """Clean and print what each rule removed; or print the default rules file."""
    if args.print_rules:
        print(DEFAULT_RULES.read_text(encoding="utf-8"), end="")
        return 0
    if not args.files or not args.output:
        raise RequestError("give files and --output DIR (or --print-rules)")
    report = clean(
        args.files,
        args.output,
        load_rules(args.rules or DEFAULT_RULES),
        evaluation_files=args.decontaminate,
        workers=args.workers,
        text_field=args.field,
        on_error=args.on_error,
        num_examples=args.examples,
        overwrite=args.overwrite,
    )
    print("\n".join([report.summary(), "", *report.table(), ""]))
    print(f"examples of what each rule removed: {args.output}/report.md")
    print(hint("prepare", args.output, "--tokenizer", "bytes", "--output", unused_prefix("data/clean")))
    return 0
