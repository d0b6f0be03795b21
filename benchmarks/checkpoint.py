"""Saving and loading beside `torch.distributed.checkpoint` (DCP), on the same state, taking turns.

    python benchmarks/checkpoint.py [--gigabytes 1.1] [--rounds 9] [--processes 1] [--directory D] [--output F.md]

The state is fp32 parameters and both Adam moments of a Llama-shaped model, in shards of rows over the processes (boxes
for us, `DTensor`s for DCP).  Both write to the page cache and fsync, both load from a warm page cache into existing
tensors; ours also hashes everything it writes, and `verify + load` reads everything twice.  `stall` is the time for
which an asynchronous save keeps the caller, once buffers exist; `first stall` allocates them.  Peak memory is measured
in fresh processes, as the growth of the resident set over what the state itself takes, summed over processes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import platform
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from engine.checkpoint.read import CheckpointReader
from engine.checkpoint.resume import open_verified
from engine.checkpoint.write import CheckpointWriter
from engine.distributed.boxes import Box
from engine.distributed.pieces import Piece

Measures = dict[str, float]


def state_shapes(num_bytes: float) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a Llama-shaped model whose three copies take about `num_bytes`."""
    hidden, ffn, vocab = 1024, 2816, 16384
    layer = {"self_attention.linear_qkv.weight": (16, 3, 64, hidden),
             "self_attention.linear_proj.weight": (hidden, hidden),
             "mlp.linear_fc1.weight": (ffn * 2, hidden), "mlp.linear_fc2.weight": (hidden, ffn),
             "input_layernorm.weight": (hidden,), "pre_mlp_layernorm.weight": (hidden,)}
    model: dict[str, tuple[int, ...]] = {"embedding.weight": (vocab, hidden)}
    index = 0
    while 12 * sum(torch.Size(shape).numel() for shape in model.values()) < num_bytes:
        model |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        index += 1
    return {f"{prefix}.{name}": shape for prefix in ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
            for name, shape in model.items()}


class Ours:
    """Octant."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], rank: int, world: int) -> None:
        self.group = dist.group.WORLD if world > 1 else None
        self.pieces = []
        generator = torch.Generator().manual_seed(rank)
        for key, shape in shapes.items():
            rows = shape[0] // world
            box = Box.whole(shape).narrow(0, rank * rows, rows)
            self.pieces.append(Piece(key, shape, box, torch.randn(box.size, generator=generator)))
        self.writers: dict[bool, CheckpointWriter] = {}

    def save(self, directory: Path, asynchronous: bool = False) -> Callable[[], None]:
        if asynchronous not in self.writers:
            self.writers[asynchronous] = CheckpointWriter(directory, None, asynchronous, self.group)
        writer = self.writers[asynchronous]
        writer.directory = directory
        writer.save(1, self.pieces, {})

        def finish() -> None:
            [report] = writer.wait()
            assert report.error is None, report.error
        return finish

    def load(self, directory: Path) -> None:
        CheckpointReader(directory / "step-00000001").load_into(self.pieces)

    def verify_and_load(self, directory: Path) -> None:
        reader, problems = open_verified(directory / "step-00000001", self.group)
        assert reader is not None, problems
        reader.load_into(self.pieces)


class Theirs:
    """torch.distributed.checkpoint with its defaults (fsync on, one thread)."""

    def __init__(self, ours: Ours, world: int) -> None:
        mesh = init_device_mesh("cpu", (world,)) if world > 1 else None
        self.state = {p.key: p.tensor if mesh is None else DTensor.from_local(p.tensor, mesh, [Shard(0)])
                      for p in ours.pieces}

    def save(self, directory: Path, asynchronous: bool = False) -> Callable[[], None]:
        if asynchronous:
            future = dcp.async_save(self.state, checkpoint_id=directory)
            return lambda: (future.result(), None)[1]
        dcp.save(self.state, checkpoint_id=directory)
        return lambda: None

    def load(self, directory: Path) -> None:
        dcp.load(self.state, checkpoint_id=directory)


def _timed(action: Callable[[], Any]) -> tuple[float, Any]:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    result = action()
    if dist.is_initialized():
        dist.barrier()
    return time.perf_counter() - start, result


def _turn(side: Ours | Theirs, directory: Path, background: Path) -> Measures:
    """Each operation once."""
    measures: Measures = {}
    measures["save"], finish = _timed(lambda: side.save(directory))
    finish()
    measures["load"], _ = _timed(lambda: side.load(directory))
    if isinstance(side, Ours):
        measures["verify + load"], _ = _timed(lambda: side.verify_and_load(directory))
    start = time.perf_counter()
    finish = side.save(background, asynchronous=True)
    measures["stall"] = time.perf_counter() - start
    finish()
    measures["async total"] = time.perf_counter() - start
    return measures


def _round(ours: Ours, theirs: Theirs, root: Path, rank: int, turn: int) -> dict[str, Measures]:
    """Both sides once; who begins changes with the turn."""
    measures = {}
    sides: list[tuple[str, Ours | Theirs]] = [("ours", ours), ("dcp", theirs)]
    for name, side in sides[::1 if turn % 2 else -1]:
        directory, background = root / f"{name}-{turn}", root / f"{name}-async-{turn}"
        measures[name] = _turn(side, directory, background)
        _timed(lambda: None)
        if rank == 0:
            shutil.rmtree(directory)
            shutil.rmtree(background)
        _timed(lambda: None)
    return measures


def _worker(rank: int, world: int, port: int, args: argparse.Namespace, root: Path, peak: str, pipe: Any) -> None:
    warnings.simplefilter("ignore")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("cpu:gloo", rank=rank, world_size=world)
    torch.set_num_threads(max(1, 4 // world))
    ours = Ours(state_shapes(args.gigabytes * 1e9), rank, world)
    theirs = Theirs(ours, world)
    if peak:
        pipe.send(_peak(ours, theirs, root, peak))
    else:
        pipe.send([_round(ours, theirs, root, rank, turn) for turn in range(args.rounds + 1)])
    dist.destroy_process_group()


def _peak(ours: Ours, theirs: Theirs, root: Path, what: str) -> float:
    """Bytes by which the resident set grew over the state's."""
    name, operation = what.split(":")
    side = ours if name == "ours" else theirs
    if operation == "load":                         # the file is made by another process before
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        side.load(root / name)
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        side.save(root / (name if operation == "save" else name + "-async"), operation == "async")()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def _run(args: argparse.Namespace, root: Path, peak: str = "") -> list[Any]:
    """Starts the processes; results by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    pipes, processes = [], []
    for rank in range(args.processes):
        here, there = context.Pipe()
        process = context.Process(target=_worker, args=(rank, args.processes, port, args, root, peak, there))
        process.start()
        pipes.append(here)
        processes.append(process)
    results = [pipe.recv() for pipe in pipes]
    for process in processes:
        process.join()
    return results


def _table(rounds: list[dict[str, Measures]], peaks: dict[str, float]) -> list[str]:
    median = {(name, op): statistics.median(r[name][op] for r in rounds[1:]) for name in ("ours", "dcp")
              for op in rounds[0][name]}
    lines = ["| | Octant | DCP | Octant / DCP |", "|---|---|---|---|"]
    for op in ("save", "load", "verify + load", "stall", "async total"):
        ours, theirs = median["ours", op], median.get(("dcp", op))
        ratio = f"{ours / theirs:.2f}" if theirs else ""
        lines.append(f"| {op} (median) | {ours:.3f} s | {f'{theirs:.3f} s' if theirs else '—'} | {ratio} |")
    first = [rounds[0][name]["stall"] for name in ("ours", "dcp")]
    lines.append(f"| first stall | {first[0]:.3f} s | {first[1]:.3f} s | {first[0] / first[1]:.2f} |")
    for op in ("save", "load", "async"):
        ours, theirs = peaks[f"ours:{op}"] / 2**20, peaks[f"dcp:{op}"] / 2**20
        lines.append(f"| extra memory, {op} | {ours:,.0f} MiB | {theirs:,.0f} MiB | {ours / max(theirs, 1):.2f} |")
    share = median["ours", "stall"] / median["ours", "save"]
    lines += ["", f"The stall is {100 * share:.0f} % of our synchronous save and "
              f"{100 * median['ours', 'stall'] / median['dcp', 'save']:.0f} % of DCP's."]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=1.1)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="on the disk to be measured (default: the temporary one)")
    parser.add_argument("--output", type=Path, help="append the table to this Markdown file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        results = _run(args, Path(folder))
        peaks = {f"{name}:{op}": sum(_run(args, Path(folder), f"{name}:{op}"))
                 for op in ("save", "load", "async") for name in ("ours", "dcp")}
    slowest = [{name: {op: max(rank[i][name][op] for rank in results) for op in results[0][i][name]}
                for name in ("ours", "dcp")} for i in range(args.rounds + 1)]
    total = sum(torch.Size(s).numel() * 4 for s in state_shapes(args.gigabytes * 1e9).values())
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    text = "\n".join([
        f"## {total / 1e9:.2f} GB, {args.processes} process{'es' if args.processes > 1 else ''}", "",
        f"`python benchmarks/checkpoint.py {' '.join(sys.argv[1:])}`, commit {commit}, torch {torch.__version__}, "
        f"{os.cpu_count()} cores ({platform.machine()}), {args.rounds} rounds after one warm-up.", "",
        *_table(slowest, peaks), ""])
    print(text)
    print(json.dumps(slowest), file=sys.stderr)
    if args.output:
        with open(args.output, "a") as file:
            file.write(text + "\n")


if __name__ == "__main__":
    main()
