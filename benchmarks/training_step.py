"""One training step beside `transformers`, and what each kind of parallelism costs, on one machine's CPU.

    python benchmarks/training_step.py [--threads 2] [--repeats 9] [--json F] [--markdown F]

A step is forward, backward, gradient clipping and AdamW over the same number of random tokens in fp32, in four
microbatches.  First table: our single process, as `octant train` runs it, beside `transformers`' Llama with torch's
fused AdamW, both with `--threads` threads in this process.  Second table: the same step by two processes with half the
threads each (tensor 2, pipeline 2, data 2): the same cores, so the ratio shows what cutting the model costs, and what
two processes save where torch's threads don't scale.  Pipeline 2 includes its bubble, a fifth of its time.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from engine.config import Config
from engine.distributed.mesh import Mesh, build_mesh, single_mesh
from engine.distributed.topology import Topology
from engine.metrics.benchmark import Case, add_options, alternating, publish
from engine.model.context import Batch
from engine.optim.adamw import AdamW
from engine.optim.gradients import clip_divisor, sum_over_world
from engine.parallel.parallelize import parallelize

MODEL = {"num_layers": 6, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 4, "ffn_hidden_size": 704,
         "vocab_size": 4096, "max_seq_len": 256}


def make_config(**parallel: int) -> Config:
    """8 sequences of 256 tokens a step, in four microbatches."""
    config = Config.model_validate({
        "model": MODEL, "steps": 1000, "parallel": {"data": 1} | parallel, "precision": {"compute": "fp32"},
        "batch": {"micro": 2, "global": 8}, "data": {"seq_len": 256}})
    return config.with_world_size(config.parallel.world_size)


def tokens(config: Config) -> Tensor:
    """Random ids [samples, seq_len + 1], the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.model.vocab_size, (config.batch.global_, config.data.seq_len + 1), generator=generator)


def octant_step(config: Config, mesh: Mesh) -> Callable[[], None]:
    """The engine's step without reading data: what `engine.train.loop` does."""
    model = parallelize(config, mesh)
    model.initialise(config.run.seed)
    optimizer = AdamW(model.buckets, config.optim)
    positions = torch.arange(config.data.seq_len).unsqueeze(1)
    rows = tokens(config).split(config.batch.micro)[mesh.data.index::mesh.data.size]
    batches = [Batch(row.T[:-1].contiguous(), positions, row.T[1:].contiguous()) for row in rows]
    scale = 1 / (config.batch.global_ * config.data.seq_len)

    def step() -> None:
        loss = model.forward_backward(batches, scale)
        sums = sum_over_world(loss, model.buckets, mesh)
        found_inf = torch.isfinite(sums.grad_norm).logical_not().float()
        optimizer.step(config.optim.lr, clip_divisor(sums.grad_norm, config.optim.grad_clip), found_inf)
        model.publish()
        sums.loss_sum.item()

    return step


def transformers_step(config: Config) -> Callable[[], None]:
    """The same work with `LlamaForCausalLM` and torch's optimizer and clipping."""
    import transformers  # optional package

    model_config, optim = config.model, config.optim
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_hidden_layers=model_config.num_layers, hidden_size=model_config.hidden_size,
        num_attention_heads=model_config.num_heads, num_key_value_heads=model_config.num_kv_heads,
        intermediate_size=model_config.ffn_hidden_size, vocab_size=model_config.vocab_size,
        max_position_embeddings=model_config.max_seq_len, tie_word_embeddings=False, use_cache=False,
        attn_implementation="sdpa"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps,
                                  weight_decay=optim.weight_decay, fused=True)
    batches = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in tokens(config).split(config.batch.micro)]
    scale = 1 / (config.batch.global_ * config.data.seq_len)

    def step() -> None:
        total = torch.zeros(())
        for inputs, labels in batches:
            logits = model(input_ids=inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
            (loss * scale).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return step


def serve(rank: int, parallel: dict[str, int], store: str, threads: int, orders: Connection) -> None:
    """One process of a layout: a step per order, answered with its seconds."""
    torch.set_num_threads(threads)
    config = make_config(**parallel)
    size = config.parallel.world_size
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    p = config.parallel
    step = octant_step(config, build_mesh(Topology(p.pipeline, p.data_size, p.context, p.tensor), "cpu"))
    while orders.recv():
        dist.barrier()
        start = perf_counter()
        step()
        dist.barrier()
        orders.send(perf_counter() - start)
    dist.destroy_process_group()


@contextmanager
def running_layout(parallel: dict[str, int], threads: int) -> Iterator[Callable[[], float]]:
    """Processes that hold one layout; calling it runs a step there and returns the slowest rank's seconds."""
    context, size = mp.get_context("spawn"), make_config(**parallel).parallel.world_size
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(size)]
        arguments = [(rank, parallel, str(Path(folder) / "store"), threads, pipes[rank][1]) for rank in range(size)]
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


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2, help="in all; even (default: %(default)s)")
    add_options(parser)
    args = parser.parse_args(arguments)
    torch.set_num_threads(args.threads)
    config = make_config()
    work = config.batch.global_ * config.data.seq_len
    ours = octant_step(config, single_mesh())
    options: dict[str, Any] = {"repeats": args.repeats, "unit": "tokens", "packages": ["transformers"]}
    first = alternating(Case("transformers", transformers_step(config), work), Case("octant", ours, work),
                        title=f"A training step, one process, {args.threads} threads, fp32", **options)
    with (running_layout({"tensor": 2}, args.threads // 2) as tensor,
          running_layout({"pipeline": 2}, args.threads // 2) as pipeline,
          running_layout({"data": 2}, args.threads // 2) as data):
        second = alternating(
            Case("one process", ours, work), Case("tensor 2", tensor, work), Case("pipeline 2", pipeline, work),
            Case("data 2", data, work), **options,
            title=f"The same step by two processes of {args.threads // 2} threads")
    publish([first, second], args)


if __name__ == "__main__":
    main()
