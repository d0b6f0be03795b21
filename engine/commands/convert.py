"""`octant convert to-hf|from-hf|to-megatron|from-megatron|to-peft|from-peft|average|merge|extend-vocab`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from checkpoints_tools.check import Checked
from checkpoints_tools.combine import average, blend_of, combine
from checkpoints_tools.from_hf import convert_from_hf
from checkpoints_tools.hub import local_folder
from checkpoints_tools.megatron import convert_from_megatron, convert_to_megatron
from checkpoints_tools.peft import convert_from_peft, convert_to_peft
from checkpoints_tools.to_hf import convert_to_hf
from checkpoints_tools.vocabulary import extend_vocabulary
from engine.checkpoint.adapted import open_model
from engine.checkpoint.folder import checkpoints_at, no_checkpoint
from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import open_checkpoint
from engine.config import load_config
from engine.errors import CheckpointError
from engine.hints import hint
from engine.progress import Progress

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def run(args: argparse.Namespace) -> int:
    actions = {"to-hf": _to_hf, "from-hf": _from_hf, "to-megatron": _to_megatron, "from-megatron": _from_megatron,
               "to-peft": _to_peft, "from-peft": _from_peft, "average": _average, "merge": _merge,
               "extend-vocab": _extend_vocab}
    return actions[args.action](args)


def _to_hf(args: argparse.Namespace) -> int:
    source = _open(args.source, args.base)
    checked = convert_to_hf(source, Path(args.output), DTYPES[args.dtype], tokenizer=args.tokenizer,
                            check=not args.skip_check, begin=Progress)
    _report(f"{args.output}: step {source.step} of {source.path} for transformers, {args.dtype}", checked)
    scores = (source.metadata["config"]["model"]).get("head") == "score"
    task = "text-classification" if scores else "text-generation"
    print(f'next: python -c "from transformers import pipeline; '
          f"print(pipeline('{task}', '{args.output}')('The'))\"")
    return 0


def _from_hf(args: argparse.Namespace) -> int:
    checked = convert_from_hf(local_folder(args.source), Path(args.output), tokenizer=args.tokenizer,
                              allow_pickle=args.allow_pickle, check=not args.skip_check, begin=Progress)
    _report(f"{args.output}: the model of {args.source} as a checkpoint", checked)
    print(hint("generate", args.output, "--prompt", "The", why=f"or train on: checkpoint.load={args.output}")
          if args.tokenizer != "none" else hint("checkpoint", "inspect", args.output))
    return 0


def _to_megatron(args: argparse.Namespace) -> int:
    source = _open(args.source, args.base)
    checked = convert_to_megatron(source, Path(args.output), DTYPES[args.dtype], check=not args.skip_check,
                                  begin=Progress)
    _report(f"{args.output}: step {source.step} of {source.path} as torch_dist, {args.dtype}", checked)
    print(f"next: start Megatron-LM with --load {args.output} --ckpt-format torch_dist --finetune")
    return 0


def _from_megatron(args: argparse.Namespace) -> int:
    checked = convert_from_megatron(Path(args.source), Path(args.output), load_config(args.config).model,
                                    check=not args.skip_check, begin=Progress)
    _report(f"{args.output}: the model of {args.source} as a checkpoint", checked)
    print(hint("convert", "to-hf", args.output, f"{args.output.rstrip('/')}-hf",
               why=f"or train on: checkpoint.load={args.output}"))
    return 0


def _to_peft(args: argparse.Namespace) -> int:
    reader = open_checkpoint(Path(args.source))
    count = convert_to_peft(reader, Path(args.output), args.base_name)
    print(f"{args.output}: the adapter of step {reader.step} of {reader.path} for PEFT, on {count} projections")
    print(f"next: PeftModel.from_pretrained(model, '{args.output}'), model: what lies under it")
    return 0


def _from_peft(args: argparse.Namespace) -> int:
    adapter = convert_from_peft(Path(args.source), _open(args.base, None), Path(args.output))
    print(f"{args.output}: the adapter of {args.source} as a checkpoint: rank {adapter.rank}, alpha {adapter.alpha:g}, "
          f"on {', '.join(adapter.targets)}")
    print(hint("generate", args.output, "--prompt", "The", why=f"or convert to-hf {args.output}, which merges it"))
    return 0


def _average(args: argparse.Namespace) -> int:
    found = checkpoints_at(Path(args.source))
    if not found:
        raise no_checkpoint(Path(args.source))
    if not 1 <= args.last <= len(found):
        raise CheckpointError(f"--last {args.last}: {args.source} has {len(found)} checkpoints; checkpoint.keep says "
                              "how many stay, checkpoint.keep_every which stay for good")
    readers = [_open(str(path), None) for path in found[-args.last:]]
    combine(readers, Path(args.output), average, {"method": "average"}, begin=Progress)
    print(f"{args.output}: the average of steps {', '.join(str(reader.step) for reader in readers)} of {args.source}")
    print(hint("eval", args.output, "--data", "PREFIX", why=f"or train on: checkpoint.load={args.output}"))
    return 0


def _merge(args: argparse.Namespace) -> int:
    a, b = _open(args.source, None), _open(args.other, None)
    base = None if args.base is None else _open(args.base, None)
    setting = {"density": args.density} if args.method == "ties" else {"share": args.share}
    blend = blend_of(args.method, args.share, args.density, base)
    combine([a, b], Path(args.output), blend, {"method": args.method} | setting, [base] if base else [], Progress)
    print(f"{args.output}: {a.path} and {b.path}, merged by {args.method}")
    print(hint("eval", args.output, "--data", "PREFIX", why=f"or train on: checkpoint.load={args.output}"))
    return 0


def _extend_vocab(args: argparse.Namespace) -> int:
    reader = _open(args.source, None)
    rows = extend_vocabulary(reader, Path(args.output), args.tokenizer, args.from_tokenizer, Progress)
    print(f"{args.output}: the model of {reader.path} with {len(rows):,} new rows, {rows[-1].id + 1:,} in all; each is "
          "the mean of those of the pieces that it replaces")
    print(hint("generate", args.output, "--prompt", "The", why=f"or train on: checkpoint.load={args.output} "
                                                               f"data.tokenizer={args.tokenizer}"))
    return 0


def _open(path: str, base: str | None) -> CheckpointReader:
    """The checkpoint at `path`, or the newest of a run, every byte verified; with the model under its adapter."""
    found = checkpoints_at(Path(path))
    with Progress("verifying", CheckpointReader(found[-1]).manifest.num_bytes if found else 0) as progress:
        return open_model(Path(path), progress=progress.advance, base=None if base is None else Path(base))


def _report(done: str, checked: Checked | None) -> None:
    print(done)
    print(f"checked: {checked}" if checked is not None else "not checked (--skip-check)")

