"""`octant eval`: loss, perplexity and bits per byte of a checkpoint on a corpus."""

from __future__ import annotations

import argparse
from importlib import import_module

from engine.commands._layout import run_in_layout
from engine.data.indexed import IndexedDataset
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.generate.request import EvalRequest, TaskRequest


def run(args: argparse.Namespace) -> int:
    """Refuse what can be seen at once; then evaluate."""
    if (args.data is None) == (not args.tasks):
        raise RequestError("give --data PREFIX, a corpus, or --tasks FILE, questions")
    if (args.bos and not args.tasks) or (args.tasks and (args.seq_len or args.batches or args.stride)):
        raise RequestError("--bos is for --tasks, --seq-len, --stride and --batches are for --data")
    if (args.positions and args.tasks) or (args.svg and not args.positions):
        raise RequestError("--positions is for --data, and --svg FILE draws them")
    if args.stride is not None and args.stride < 1:
        raise RequestError(f"--stride {args.stride}: windows begin at least a token apart")
    if args.tasks:
        return _tasks(args)
    request = EvalRequest(args.checkpoint, args.data, args.seq_len, args.batches, args.batch_size, args.tokenizer,
                          args.json, args.dtype, args.device, args.base, args.stride, args.positions, args.svg)
    IndexedDataset(args.data).close()

    def on_this_rank(topology: Topology, launched: LaunchEnvironment | None) -> None:
        import_module("engine.generate.evaluate").evaluate_corpus(request, topology, launched)   # torch from here on

    return run_in_layout(args, on_this_rank, data_parallel=True)


def _tasks(args: argparse.Namespace) -> int:
    request = TaskRequest(args.checkpoint, args.tasks, args.bos, args.batch_size, args.tokenizer, args.json, args.dtype,
                          args.device, args.base)

    def on_this_rank(topology: Topology, launched: LaunchEnvironment | None) -> None:
        import_module("engine.generate.tasks").answer_tasks(request, topology, launched)     # torch from here on

    return run_in_layout(args, on_this_rank)
