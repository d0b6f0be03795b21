"""`octant generate`: sample from a checkpoint, here or on the local processes that a layout needs."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from engine.commands._layout import run_in_layout
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.generate.request import Sampling, TextRequest


def run(args: argparse.Namespace) -> int:
    """Refuse what can be seen at once; then generate."""
    request = TextRequest(
        args.checkpoint, [*args.prompt, *_lines(args.prompt_file)],
        Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.repetition_penalty),
        args.max_new_tokens, tokenizer=args.tokenizer, token_ids=args.token_ids, begin=args.bos,
        batch_size=args.batch_size, as_json=args.json, dtype=args.dtype, device=args.device, chat=args.chat,
        template=args.template, best_of=args.best_of, reward_model=args.reward_model, keep_all=args.keep_all,
        num_samples=args.num_samples, stop=tuple(args.stop), beams=args.beams, base=args.base)

    def on_this_rank(topology: Topology, launched: LaunchEnvironment | None) -> None:
        import_module("engine.generate.text").generate_text(request, topology, launched)     # torch from here on

    return run_in_layout(args, on_this_rank)


def _lines(path: str | None) -> list[str]:
    """The prompts of a file, one per line; empty lines are none."""
    if path is None:
        return []
    try:
        return [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read the prompts of {path}: {error}") from None
