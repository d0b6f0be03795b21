"""One training step beside `transformers`, and what each kind of parallelism costs, on one machine's CPU.

    python benchmarks/training_step.py [--sizes small large] [--threads 2] [--repeats 9] [--json F] [--markdown F]

A step is forward, backward, gradient clipping and AdamW over the same number of random tokens in fp32.

First tables, one per size: our single process, as `octant train` runs it, beside `transformers`' Llama (sdpa attention)
with torch's AdamW, fused and as it is by default, all with `--threads` threads in this process.  `octant, torch's
products` is our step with matrix products from the library that torch calls for `transformers` too: it differs from
`octant` only where `kernels/matmul.py` finds a faster one.

Last table: the `accumulate` step by two processes with half the threads each (tensor 2, pipeline 2, data 2): the same
cores, so the ratio shows what cutting the model costs, and what two processes save where torch's threads don't scale.
Pipeline 2 includes its bubble, a fifth of its time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from engine.bench.harness import Case, Comparison, add_options, alternating, publish
from engine.bench.step import octant_step, transformers_step
from engine.config import Config, resolve_layout
from engine.distributed.mesh import Job, single_mesh
from engine.distributed.topology import Topology

SMALL = {"num_layers": 8, "hidden_size": 512, "num_heads": 8, "ffn_hidden_size": 1408, "vocab_size": 8192,
         "max_seq_len": 512}
LARGE = {"num_layers": 6, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 4, "ffn_hidden_size": 2816,
         "vocab_size": 32000, "max_seq_len": 1024}
TINY = {"num_layers": 2, "hidden_size": 64, "num_heads": 4, "ffn_hidden_size": 176, "vocab_size": 512,
        "max_seq_len": 64}


@dataclass(frozen=True)
class Size:
    """A model, and sequences (as long as it allows) per microbatch and per step."""

    model: dict[str, int]
    micro: int
    per_step: int

    def config(self, **parallel: int) -> Config:
        """A job of this size in the layout `parallel`."""
        config = Config.model_validate({
            "model": self.model, "steps": 1000, "parallel": {"data": 1} | parallel, "precision": {"compute": "fp32"},
            "batch": {"micro": self.micro, "global": self.per_step}, "data": {"seq_len": self.model["max_seq_len"]}})
        return resolve_layout(config, config.parallel.world_size)


SIZES = {"small": Size(SMALL, micro=2, per_step=2), "accumulate": Size(SMALL, micro=1, per_step=4),
         "large": Size(LARGE, micro=1, per_step=1), "tiny": Size(TINY, micro=1, per_step=4)}

CPU = torch.device("cpu")
TORCH_PRODUCTS = {"linear": "torch", "weight_gradient": "torch"}


def serve(rank: int, config: Config, store: str, threads: int, orders: Connection) -> None:
    """One process of a layout: a step per order, answered with its seconds."""
    torch.set_num_threads(threads)
    size = config.parallel.world_size
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    step = octant_step(config, Job("cpu").mesh(Topology.of(config)))
    while orders.recv():
        dist.barrier()
        start = perf_counter()
        step()
        dist.barrier()
        orders.send(perf_counter() - start)
    dist.destroy_process_group()


@contextmanager
def running_layout(config: Config, threads: int) -> Iterator[Callable[[], float]]:
    """Processes that hold one layout; calling it runs a step there and returns the slowest rank's seconds."""
    context, size = mp.get_context("spawn"), config.parallel.world_size
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(size)]
        arguments = [(rank, config, str(Path(folder) / "store"), threads, pipes[rank][1]) for rank in range(size)]
        processes = [context.Process(target=serve, args=each, daemon=True) for each in arguments]
        for process in processes:
            process.start()

        def step() -> float:
            for ours, _ in pipes:
                ours.send(True)
            return max(ours.recv() for ours, _ in pipes)

        yield step
        for ours, _ in pipes:
            ours.send(False)
        for process in processes:
            process.join()


def beside_transformers(name: str, threads: int, options: dict[str, Any]) -> Comparison:
    """The first kind of table."""
    config = SIZES[name].config()
    work = config.batch.global_ * config.data.seq_len
    model, micro, number = config.model, config.batch.micro, config.num_microbatches
    title = (f"{name}: {model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size}, {number} × "
             f"{micro} × {config.data.seq_len} tokens, {threads} threads")
    return alternating(
        Case("transformers, fused AdamW", transformers_step(config, CPU), work),
        Case("transformers, default AdamW", transformers_step(config, CPU, fused=False), work),
        Case("octant, torch's products", octant_step(config.with_changes(kernels=TORCH_PRODUCTS), single_mesh()), work),
        Case("octant", octant_step(config, single_mesh()), work), title=title, **options)


def across_layouts(name: str, threads: int, options: dict[str, Any]) -> Comparison:
    """The second kind of table: two processes of half the threads."""
    size = SIZES[name]
    config = size.config()
    work = config.batch.global_ * config.data.seq_len
    with ExitStack() as stack:
        layouts = [Case(f"{axis} 2", stack.enter_context(running_layout(size.config(**{axis: 2}), threads // 2)), work)
                   for axis in ("tensor", "pipeline", "data")]
        return alternating(Case("one process", octant_step(config, single_mesh()), work), *layouts, **options,
                           title=f"{name}, by two processes of {threads // 2} threads")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=["small", "accumulate", "large"])
    parser.add_argument("--layouts", choices=SIZES, default="accumulate", help="size of the last table")
    parser.add_argument("--threads", type=int, default=2, help="in all; even (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    options: dict[str, Any] = {"repeats": args.repeats, "unit": "tokens", "packages": ["transformers"]}
    results = [beside_transformers(name, args.threads, options) for name in args.sizes]
    results.append(across_layouts(args.layouts, args.threads, options))
    publish(results, args)


if __name__ == "__main__":
    main()
