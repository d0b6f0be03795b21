"""A training step of every schedule and every ZeRO level by four processes, beside what the simulator predicts.

    OMP_NUM_THREADS=1 python benchmarks/parallel_step.py [--repeats 9] [--markdown F] [--json F] [--trace FOLDER]

One process per stage or replica, one thread each, fp32, eight microbatches of one sequence per pipeline.  All layouts
live in the same four processes and take turns.

The prediction: F, B and W of each stage are measured in the four processes at once, without messages, and so are one
message and what comes after the schedule (gradient norm, AdamW, publishing).  `simulate` is given the costs of the
slowest stage, and its time from first start to last end is added to the rest.  For ZeRO it is eight times F + B + W
of the whole model and the rest: what the step would take if the network were free.

`--trace` writes profiles of rank 0 for https://ui.perfetto.dev, in which collectives are seen under matrix products.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from engine.config import Config
from engine.distributed.collectives import DONE, Work
from engine.distributed.mesh import Groups, Mesh, build_mesh
from engine.distributed.topology import Topology
from engine.metrics.benchmark import Case, Comparison, add_options, alternating, publish
from engine.model.context import Batch
from engine.optim.adamw import AdamW
from engine.optim.gradients import clip_divisor, sum_over_world
from engine.parallel.parallelize import ParallelModel, parallelize
from engine.parallel.pipeline.action import Action, Kind
from engine.parallel.pipeline.schedules import build_schedule
from engine.parallel.pipeline.simulate import Costs, simulate

NUM_PROCESSES, NUM_MICROBATCHES = 4, 8
BUCKET_ELEMENTS = 1_000_000
MODEL = {"num_layers": 8, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 8, "ffn_hidden_size": 704,
         "vocab_size": 512, "max_seq_len": 256}
PIPELINES = {name: {"pipeline": NUM_PROCESSES, "schedule": name, "virtual_stages": chunks}
             for name, chunks in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-h2", 1),
                                  ("zb-v", 2))}
ZERO = {f"zero {level}": {"data": NUM_PROCESSES, "zero": level} for level in range(4)}
LAYOUTS: dict[str, dict[str, Any]] = PIPELINES | ZERO | {"tensor 2 × data 2": {"tensor": 2, "data": 2}}


def make_config(parallel: dict[str, Any]) -> Config:
    data = parallel.get("data", 1)
    config = Config.model_validate({
        "model": MODEL, "steps": 1000, "parallel": {"data": 1} | parallel, "precision": {"compute": "fp32"},
        "batch": {"micro": 1, "global": NUM_MICROBATCHES * data}, "data": {"seq_len": 256}})
    return config.with_world_size(config.parallel.world_size)


@dataclass
class Layout:
    """One rank's part of a layout, and the batches it works on (random ids, always the same)."""

    config: Config
    mesh: Mesh
    model: ParallelModel = field(init=False)
    optimizer: AdamW = field(init=False)
    batches: list[Batch] = field(init=False)

    def __post_init__(self) -> None:
        self.model = parallelize(self.config, self.mesh, bucket_elements=BUCKET_ELEMENTS)
        self.model.initialise(0)
        self.optimizer = AdamW(self.model.buckets, self.config.optim)
        generator = torch.Generator().manual_seed(self.mesh.data.index)
        ids = torch.randint(self.config.model.vocab_size, (NUM_MICROBATCHES, 257, 1), generator=generator)
        self.batches = [Batch(row[:-1], torch.arange(256).unsqueeze(1), row[1:]) for row in ids]

    def step(self) -> None:
        """What `engine.train.loop` does, without reading data."""
        losses = self.model.forward_backward(self.batches, 1e-3)
        self.update(losses)

    def update(self, losses: Tensor | None) -> None:
        """What comes after the schedule."""
        sums = sum_over_world(losses, self.model.buckets, self.mesh)
        self.optimizer.step(1e-4, clip_divisor(sums.grad_norm, 1.0), torch.zeros(()))
        self.model.publish()


class Silence:
    """A messenger that sends nothing and receives noise at once."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.noise, self.device = torch.randn(shape), torch.device("cpu")

    def send(self, action: Action, tensor: Tensor, stage: int) -> None:
        """Drops the tensor."""

    def receive(self, action: Action, stage: int) -> tuple[Tensor, Work]:
        """Noise, there already."""
        return self.noise.clone(), DONE

    def wait_sent(self) -> None:
        """Nothing to wait for."""


def measure_costs(layout: Layout) -> dict[str, float]:
    """Seconds of F, B and W of this rank's only chunk: medians over the microbatches, all ranks computing at once."""
    model, engine = layout.model, layout.model.executor
    (chunk,) = model.chunks
    messenger, do = engine.messenger, engine._do
    engine.messenger = Silence(messenger.shape)      # type: ignore[assignment]
    seconds: dict[Kind, list[float]] = {Kind.F: [], Kind.B: [], Kind.W: []}

    def timed(action: Action) -> None:
        start = perf_counter()
        do[action.kind](action)
        if action.kind in seconds:
            seconds[action.kind].append(perf_counter() - start)

    engine._do = dict.fromkeys(do, timed)
    last = chunk + 1 == len(model.schedule.placement)
    parts = [[Kind.RECV_F] * (chunk > 0), [Kind.F], [Kind.SEND_F] * (not last), [Kind.RECV_B] * (not last), [Kind.B],
             [Kind.SEND_B] * (chunk > 0), [Kind.W]]
    program = [Action(kind, m, chunk) for m in range(NUM_MICROBATCHES) for part in parts for kind in part]
    for bucket in model.buckets:
        bucket.begin_step(NUM_MICROBATCHES)
    dist.barrier()
    engine.run(program, layout.batches, 1e-3)
    engine.messenger, engine._do = messenger, do
    return {kind.value: median(values) for kind, values in seconds.items()}


def measure_message(mesh: Mesh, shape: tuple[int, ...]) -> float:
    """Seconds of one message between neighbours, there and back halved; the other ranks wait."""
    x, seconds = torch.randn(shape), []
    for _ in range(20):
        dist.barrier()
        start = perf_counter()
        if mesh.rank == 0:
            dist.send(x, 1)
            dist.recv(x, 1)
        elif mesh.rank == 1:
            dist.recv(x, 0)
            dist.send(x, 0)
        seconds.append((perf_counter() - start) / 2)
    return median(seconds) if mesh.rank < 2 else 0.0


def timed_call(call: Callable[[], Any]) -> float:
    dist.barrier()
    start = perf_counter()
    call()
    dist.barrier()
    return perf_counter() - start


def serve(rank: int, store: str, orders: Connection) -> None:
    """One process: answers (what, layout) with seconds, until it is told None."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_PROCESSES)
    groups: Groups = {}
    layouts = {}
    for name, parallel in LAYOUTS.items():
        config = make_config(parallel)
        layouts[name] = Layout(config, build_mesh(Topology.of(config.parallel), "cpu", groups=groups))
    while (order := orders.recv()) is not None:
        what, name = order
        layout = layouts[name]
        if what == "step":
            orders.send(timed_call(layout.step))
        elif what == "update":
            losses = layout.model.forward_backward(layout.batches, 1e-3)
            orders.send(timed_call(lambda layout=layout, losses=losses: layout.update(losses)))
        elif what == "costs":
            orders.send(measure_costs(layout))
        elif what == "message":
            orders.send(measure_message(layout.mesh, layout.model.executor.messenger.shape))
        else:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                layout.step()
            if rank == 0:
                profile.export_chrome_trace(what)
            orders.send(0.0)
    dist.destroy_process_group()


Ask = Callable[[str, str], list[Any]]


@contextmanager
def processes() -> Iterator[Ask]:
    """Four processes; calling it gives an order and collects their answers."""
    context = mp.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [context.Pipe() for _ in range(NUM_PROCESSES)]
        workers = [context.Process(target=serve, args=(rank, str(Path(folder) / "store"), theirs), daemon=True)
                   for rank, (_, theirs) in enumerate(pipes)]
        for worker in workers:
            worker.start()

        def ask(what: str, name: str) -> list[Any]:
            for ours, _ in pipes:
                ours.send((what, name))
            return [ours.recv() for ours, _ in pipes]

        yield ask
        for ours, _ in pipes:
            ours.send(None)
        for worker in workers:
            worker.join()


def slowest_stage(ask: Ask, name: str, repeats: int) -> Costs:
    """Costs of the stage with the most work, medians over `repeats` measurements."""
    rounds = [ask("costs", name) for _ in range(repeats)]
    stages = [{kind: median(costs[rank][kind] for costs in rounds) for kind in "FBW"} for rank in range(NUM_PROCESSES)]
    worst = max(stages, key=lambda costs: sum(costs.values()))
    return Costs(worst["F"], worst["B"], worst["W"], max(ask("message", name)))


def predictions(ask: Ask, repeats: int) -> tuple[dict[str, float], str]:
    """Predicted seconds of a step by layout, and the measured costs in words."""
    stage, whole = slowest_stage(ask, "zb-h1", repeats), slowest_stage(ask, "zero 0", repeats)
    out = {}
    for name, parallel in (PIPELINES | ZERO).items():
        rest = median(max(ask("update", name)) for _ in range(repeats))
        if name in PIPELINES:
            schedule = build_schedule(name, NUM_PROCESSES, NUM_MICROBATCHES, parallel["virtual_stages"])
            out[name] = simulate(schedule, stage).elapsed + rest
        else:
            out[name] = NUM_MICROBATCHES * whole.work + rest

    def words(costs: Costs) -> str:
        return (f"F {costs.forward * 1e3:.2f}, B {costs.backward * 1e3:.2f}, W {costs.weight * 1e3:.2f}, "
                f"message {costs.communication * 1e3:.2f} ms")

    return out, f"Measured costs — slowest of four stages: {words(stage)}; whole model: {words(whole)}."


def table(result: Comparison, predicted: dict[str, float]) -> str:
    """Measured beside predicted."""
    base, seconds = result.measurements[0], {m.name: m.median_seconds for m in result.measurements}
    lines = ["| case | predicted s | measured s | measured / predicted | predicted / " + base.name
             + " | measured / " + base.name + " |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {name} | {predicted[name]:.4f} | {taken:.4f} | {taken / predicted[name]:.2f} | "
              f"{predicted[name] / predicted[base.name]:.3f} | {taken / seconds[base.name]:.3f} |"
              for name, taken in seconds.items()]
    return "\n".join(lines)


def compare(ask: Ask, names: Sequence[str], repeats: int, title: str) -> Comparison:
    """Steps of these layouts, in turns."""
    work = NUM_MICROBATCHES * 256 * (NUM_PROCESSES if names[0] in ZERO else 1)
    return alternating(*(Case(name, lambda name=name: max(ask("step", name)), work) for name in names),
                       repeats=repeats, unit="tokens", title=title)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--trace", type=Path, metavar="FOLDER", help="only write profiles of rank 0")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    with processes() as ask:
        if args.trace is not None:
            args.trace.mkdir(parents=True, exist_ok=True)
            for name in ("tensor 2 × data 2", "zero 1", "zero 3", "1f1b"):
                ask("step", name)
                ask(str(args.trace / f"{name.replace(' ', '-')}.json"), name)
            print(f"profiles are in {args.trace}; open them with https://ui.perfetto.dev")
            return
        before, costs = predictions(ask, 5)
        results = [compare(ask, list(PIPELINES), args.repeats, "Schedules, four stages, eight microbatches"),
                   compare(ask, list(ZERO), args.repeats, "ZeRO levels, four replicas, eight microbatches each")]
        after, _ = predictions(ask, 5)
    predicted = {name: (before[name] + after[name]) / 2 for name in before}
    publish(results, args)
    text = "\n\n".join([costs, *(f"### {result.title}\n\n{table(result, predicted)}" for result in results)])
    print(text)
    if args.markdown is not None:
        with args.markdown.open("a", encoding="utf-8") as file:
            file.write(f"\n## Beside the prediction\n\n{text}\n")


if __name__ == "__main__":
    main()
