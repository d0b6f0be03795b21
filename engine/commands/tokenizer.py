"""`octant tokenizer train|extend|verify`."""

from __future__ import annotations

import argparse
from itertools import chain, count
from pathlib import Path

from corpus_tools.outputs import unused_prefix
from corpus_tools.readers import read_texts
from corpus_tools.tokenizers.extend import extend_tokenizer, plan_path
from corpus_tools.tokenizers.training import model_path, train_tokenizer
from corpus_tools.tokenizers.verify import verify_tokenizer
from engine.data.tokenizer import load_tokenizer
from engine.hints import hint

MOST_FILES_SHOWN = 8


def run(args: argparse.Namespace) -> int:
    """Dispatch to the action."""
    return {"train": _train, "extend": _extend, "verify": _verify}[args.action](args)


def _train(args: argparse.Namespace) -> int:
    path = train_tokenizer(read_texts(args.files, args.field), args.vocab_size, args.output,
                           overwrite=args.overwrite)
    tokenizer = load_tokenizer(path)
    print(f"{path}: {tokenizer.vocab_size:,} pieces, end of document {tokenizer.eod_id}")
    print(_prepare(args, path))
    return 0


def _extend(args: argparse.Namespace) -> int:
    path = model_path(args.output)
    plan = extend_tokenizer(args.model, args.with_model, path, only=args.only, overwrite=args.overwrite)
    print(f"{path}: {plan.old_vocab_size:,} + {plan.num_new:,} = {plan.vocab_size:,} pieces")
    if plan.unreachable:
        print(f"{len(plan.unreachable):,} of the new pieces are never produced: no two pieces join to them")
    print(f"{plan_path(path)}: each new embedding row as the mean of the old rows of the pieces it replaces")
    print(f"a model of the old one takes it with octant convert extend-vocab RUN OUT --tokenizer {path}")
    print(_try(path))
    return 0


def _try(model: Path) -> str:
    """The command that makes a text, on which the model can be tried."""
    names = chain(["example.jsonl"], (f"example-{number}.jsonl" for number in count(2)))
    text = next(name for name in names if not Path(name).exists())
    return hint("data", "example", text,
                why=f"or text of yours; then octant tokenizer verify {text} --tokenizer {model}")


def _verify(args: argparse.Namespace) -> int:
    report = verify_tokenizer(load_tokenizer(args.tokenizer), read_texts(args.files, args.field))
    print(report.text())
    if not report.differences:
        print(_prepare(args, args.tokenizer))
    return 1 if report.differences else 0


def _prepare(args: argparse.Namespace, tokenizer: object) -> str:
    """The command that prepares the same files; of very many the first."""
    files = args.files if len(args.files) <= MOST_FILES_SHOWN else args.files[:1]
    field = [] if args.field == "text" else ["--field", args.field]
    return hint("prepare", *files, *field, "--tokenizer", tokenizer, "--output", unused_prefix("data/corpus"))
