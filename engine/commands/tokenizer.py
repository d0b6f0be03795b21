"""`octant tokenizer train|extend|verify`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from corpus_tools.readers import read_texts
from corpus_tools.tokenizers.extend import extend_tokenizer
from corpus_tools.tokenizers.training import train_tokenizer
from corpus_tools.tokenizers.verify import verify_tokenizer
from engine.data.tokenizer import load_tokenizer
from engine.hints import hint


def run(args: argparse.Namespace) -> int:
    """Dispatch to the action."""
    return {"train": _train, "extend": _extend, "verify": _verify}[args.action](args)


def _train(args: argparse.Namespace) -> int:
    path = train_tokenizer(read_texts(args.files, args.field), args.vocab_size, args.output)
    tokenizer = load_tokenizer(path)
    print(f"{path}: {tokenizer.vocab_size:,} pieces, end of document {tokenizer.eod_id}")
    print(hint("prepare", *args.files, *_field(args), "--tokenizer", path, "--output", "data/corpus"))
    return 0


def _extend(args: argparse.Namespace) -> int:
    plan = extend_tokenizer(args.model, args.with_model, args.output, only=args.only)
    plan_path = Path(args.output).with_suffix(".plan.json")
    plan_path.write_text(json.dumps(plan.to_json(), ensure_ascii=False))
    print(f"{args.output}: {plan.old_vocab_size:,} + {plan.num_new:,} = {plan.vocab_size:,} pieces")
    if plan.unreachable:
        print(f"{len(plan.unreachable):,} of the new pieces are never produced: no two pieces join to them")
    print(f"{plan_path}: each new embedding row as the mean of the old rows of the pieces it replaces")
    print("next: compare it with its Hugging Face export on text of yours: octant tokenizer verify --help")
    return 0


def _verify(args: argparse.Namespace) -> int:
    report = verify_tokenizer(load_tokenizer(args.tokenizer), read_texts(args.files, args.field))
    print(report.text())
    if not report.differences:
        print(hint("prepare", *args.files, *_field(args), "--tokenizer", args.tokenizer, "--output", "data/corpus"))
    return 1 if report.differences else 0


def _field(args: argparse.Namespace) -> list[str]:
    return [] if args.field == "text" else ["--field", args.field]
