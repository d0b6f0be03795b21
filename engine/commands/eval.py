"""`octant eval`: what a checkpoint makes of a corpus, of questions, or of the tasks of lm-evaluation-harness."""

from __future__ import annotations

import argparse
from importlib import import_module
from importlib.util import find_spec

from engine.commands._layout import run_in_layout
from engine.data.indexed import IndexedDataset
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.topology import Topology
from engine.errors import RequestError
from engine.generate.request import EvalRequest, HarnessRequest, TaskRequest


def run(args: argparse.Namespace) -> int:
    """Refuse what can be seen at once; then evaluate."""
    if sum(map(bool, (args.data, args.tasks, args.harness))) != 1:
        raise RequestError("give --data PREFIX, a corpus, --tasks FILE, questions, or --harness TASK, by name")
    if (args.bos and args.data) or (not args.data and (args.seq_len or args.batches or args.stride or args.positions)):
        raise RequestError("--bos is for --tasks and --harness; --seq-len, --stride, --batches and --positions are for "
                           "--data")
    if args.svg and not args.positions:
        raise RequestError("--svg FILE draws what --positions says")
    if not args.harness and (args.include or args.limit is not None or args.fewshot is not None):
        raise RequestError("--include, --limit and --fewshot are for --harness")
    if args.stride is not None and args.stride < 1:
        raise RequestError(f"--stride {args.stride}: windows begin at least a token apart")
    if args.tasks or args.harness:
        return _tasks(args) if args.tasks else _harness(args)
    request = EvalRequest(args.checkpoint, args.data, args.seq_len, args.batches, args.batch_size, args.tokenizer,
                          args.json, args.dtype, args.device, args.base, args.stride, args.positions, args.svg)
    IndexedDataset(args.data).close()

    def on_this_rank(topology: Topology, launched: LaunchEnvironment | None) -> None:
        import_module("engine.generate.evaluate").evaluate_corpus(request, topology, launched)   # torch from here on

    return run_in_layout(args, on_this_rank, data_parallel=True)


def _harness(args: argparse.Namespace) -> int:
    if find_spec("lm_eval") is None:
        raise RequestError("--harness needs EleutherAI's lm-evaluation-harness: pip install lm_eval")
    request = HarnessRequest(args.checkpoint, args.harness, args.include, args.fewshot, args.limit, args.bos,
                             args.batch_size, args.tokenizer, args.json, args.dtype, args.device, args.base)

    def on_this_rank(topology: Topology, launched: LaunchEnvironment | None) -> None:
        import_module("engine.generate.harness").run_harness(request, topology, launched)    # torch from here on

    return run_in_layout(args, on_this_rank)


def _tasks(args: argparse.Namespace) -> int:
    request = TaskRequest(args.checkpoint, args.tasks, args.bos, args.batch_size, args.tokenizer, args.json, args.dtype,
                          args.device, args.base)

    def on_this_rank(topology: Topology, launched: LaunchEnvironment | None) -> None:
        import_module("engine.generate.tasks").answer_tasks(request, topology, launched)     # torch from here on

    return run_in_layout(args, on_this_rank)
