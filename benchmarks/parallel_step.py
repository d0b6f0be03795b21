"""A training step of every schedule and every ZeRO level by four processes, beside what the simulator predicts.

    OMP_NUM_THREADS=1 python benchmarks/parallel_step.py [--repeats 9] [--markdown F] [--json F] [--trace FOLDER]

One process per stage or replica, one thread each, fp32, microbatches of one sequence: eight for the pipeline, two for
each replica.  All layouts live in the same four processes and take turns.

The prediction: F, B and W of each stage are measured in the four processes at once, without messages, and so are one
message and what comes after the schedule (gradient norm, AdamW, publishing).  `simulate` is given the costs of the
slowest stage, and its time from first start to last end is added to the rest.  For ZeRO it is twice F + B + W of
the whole model and the rest: what the step would take if the network were free.  Both sides take the fastest of
their rounds, which on a machine with other work is what comes nearest to the machine without it.

Where the processes do not have a core each, a bubble costs nothing: another stage computes in it.  So the schedules are
also run with a tiny model whose every F, B and W is followed by a wait, which needs no core: what is measured then is
the executor and its messages, and whether they keep the simulator's time.

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
from time import perf_counter, sleep
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from engine.bench.harness import Case, Comparison, add_options, alternating, publish
from engine.config import Config, resolve_layout
from engine.distributed.collectives import DONE, Work
from engine.distributed.mesh import Job, Mesh
from engine.distributed.topology import Topology
from engine.model.context import Batch
from engine.optim.adamw import AdamW
from engine.optim.gradients import clip_divisor, sum_over_world
from engine.parallel.parallelize import ParallelModel, parallelize
from engine.schedules.action import Action, Kind
from engine.schedules.simulate import Costs, simulate
from engine.schedules.table import build_schedule

NUM_PROCESSES = 4
PIPELINE_MICROBATCHES, REPLICA_MICROBATCHES = 8, 2
BUCKET_ELEMENTS = 1_000_000
MODEL = {"num_layers": 8, "hidden_size": 256, "num_heads": 8, "num_kv_heads": 8, "ffn_hidden_size": 704,
         "vocab_size": 512, "max_seq_len": 256}
PIPELINES = {name: {"pipeline": NUM_PROCESSES, "schedule": name, "virtual_stages": chunks}
             for name, chunks in (("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb-h1", 1), ("zb-h2", 1),
                                  ("zb-v", 2))}
ZERO = {f"zero {level}": {"data": NUM_PROCESSES, "zero": level} for level in range(4)}
WAITS = {f"{name}, waits": parallel for name, parallel in PIPELINES.items()}
LAYOUTS: dict[str, dict[str, Any]] = PIPELINES | ZERO | WAITS | {"tensor 2 × data 2": {"tensor": 2, "data": 2}}
TINY = {"num_layers": 8, "hidden_size": 32, "num_heads": 4, "ffn_hidden_size": 64, "vocab_size": 64, "max_seq_len": 256}
WAITED = Costs(forward=0.06, backward=0.06, weight=0.06)      # seconds


def make_config(parallel: dict[str, Any], model: dict[str, int]) -> Config:
    data = parallel.get("data", 1)
    microbatches = PIPELINE_MICROBATCHES if data == 1 else REPLICA_MICROBATCHES
    config = Config.model_validate({
        "model": model, "steps": 1000, "parallel": {"data": 1} | parallel, "precision": {"compute": "fp32"},
        "batch": {"micro": 1, "global": microbatches * data}, "data": {"seq_len": 256}})
    return resolve_layout(config, config.parallel.world_size)


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
        self.optimizer = AdamW(self.model.buckets, self.config.optim, self.model.operations)
        generator = torch.Generator().manual_seed(self.mesh.data.index)
        ids = torch.randint(self.config.model.vocab_size, (self.config.num_microbatches, 257, 1), generator=generator)
        self.batches = [Batch(row[:-1], torch.arange(256).unsqueeze(1), row[1:]) for row in ids]

    def step(self) -> tuple[float, float]:
        """What `engine.train.loop` does, without reading data: seconds of all, and of what comes after the schedule."""
        dist.barrier()
        start = perf_counter()
        losses = self.model.forward_backward(self.batches, 1e-3)
        dist.barrier()
        middle = perf_counter()
        sums = sum_over_world(losses, self.model.buckets, self.mesh)
        self.optimizer.step(1e-4, clip_divisor(sums.grad_norm, 1.0), torch.zeros(()))
        self.model.publish()
        dist.barrier()
        return perf_counter() - start, perf_counter() - middle


def add_waits(layout: Layout) -> None:
    """Lets every F, B and W of this layout take `WAITED` longer, divided by the chunks of a stage."""
    engine, chunks = layout.model.executor, layout.model.schedule.num_chunks
    do = dict(engine._do)

    def waiting(action: Action) -> None:
        do[action.kind](action)
        if action.kind.is_compute:
            sleep(WAITED.of(action.kind) / chunks)

    engine._do = dict.fromkeys(do, waiting)


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
    """Seconds of F, B and W of this rank's only chunk, the fastest of the microbatches, all ranks computing at once."""
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
    program = [Action(kind, m, chunk) for m in range(len(layout.batches)) for part in parts for kind in part]
    for bucket in model.buckets:
        bucket.begin_step(len(layout.batches))
    dist.barrier()
    engine.run(program, layout.batches, 1e-3)
    engine.messenger, engine._do = messenger, do
    return {kind.value: min(values) for kind, values in seconds.items()}


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
    return min(seconds) if mesh.rank < 2 else 0.0


def serve(rank: int, store: str, orders: Connection) -> None:
    """One process: answers (what, layout) with seconds, until it is told None."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=NUM_PROCESSES)
    job = Job("cpu")
    layouts = {}
    for name, parallel in LAYOUTS.items():
        config = make_config(parallel, TINY if name in WAITS else MODEL)
        layouts[name] = Layout(config, job.mesh(Topology.of(config)))
        if name in WAITS:
            add_waits(layouts[name])
    while (order := orders.recv()) is not None:
        what, name = order
        layout = layouts[name]
        if what == "step":
            orders.send(layout.step())
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
    """Costs of the stage with the most work, the fastest of `repeats` measurements."""
    rounds = [ask("costs", name) for _ in range(repeats)]
    stages = [{kind: min(costs[rank][kind] for costs in rounds) for kind in "FBW"} for rank in range(NUM_PROCESSES)]
    worst = max(stages, key=lambda costs: sum(costs.values()))
    return Costs(worst["F"], worst["B"], worst["W"], max(ask("message", name)))


def predictions(stage: Costs, whole: Costs, rest: dict[str, float]) -> dict[str, float]:
    """Predicted seconds of a step by layout; `rest`: what comes after the schedule."""
    out = {name: REPLICA_MICROBATCHES * whole.work + rest[name] for name in ZERO}
    for name, parallel in (PIPELINES | WAITS).items():
        schedule = build_schedule(parallel["schedule"], NUM_PROCESSES, PIPELINE_MICROBATCHES,
                                  parallel["virtual_stages"])
        out[name] = simulate(schedule, WAITED if name in WAITS else stage).elapsed + rest[name]
    return out


def words(costs: Costs) -> str:
    """Costs in milliseconds."""
    return (f"F {costs.forward * 1e3:.2f}, B {costs.backward * 1e3:.2f}, W {costs.weight * 1e3:.2f}, "
            f"message {costs.communication * 1e3:.2f} ms")


def table(result: Comparison, predicted: dict[str, float]) -> str:
    """Measured beside predicted."""
    base, seconds = result.measurements[0], {m.name: min(m.seconds) for m in result.measurements}
    lines = ["| case | predicted s | measured s | measured / predicted | predicted / " + base.name
             + " | measured / " + base.name + " |", "|---|---:|---:|---:|---:|---:|"]
    lines += [f"| {name} | {predicted[name]:.4f} | {taken:.4f} | {taken / predicted[name]:.2f} | "
              f"{predicted[name] / predicted[base.name]:.3f} | {taken / seconds[base.name]:.3f} |"
              for name, taken in seconds.items()]
    return "\n".join(lines)


def compare(ask: Ask, names: Sequence[str], repeats: int, title: str, rest: dict[str, float]) -> Comparison:
    """Steps of these layouts, in turns; the fastest time of what comes after the schedule goes to `rest`."""
    def step(name: str) -> float:
        answers = ask("step", name)
        rest[name] = min(rest.get(name, 1e9), max(after for _, after in answers))
        return max(seconds for seconds, _ in answers)

    work = 256 * make_config(LAYOUTS[names[0]], MODEL).batch.global_
    return alternating(*(Case(name, lambda name=name: step(name), work) for name in names), repeats=repeats,
                       unit="tokens", title=title)


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
        rest: dict[str, float] = {}
        results = [compare(ask, list(PIPELINES), args.repeats, "Schedules, four stages, eight microbatches", rest),
                   compare(ask, list(ZERO), args.repeats, "ZeRO levels, four replicas, two microbatches each", rest),
                   compare(ask, list(WAITS), args.repeats, "Schedules, each of F, B and W a wait of 60 ms", rest)]
        stage, whole = slowest_stage(ask, "zb-h1", args.repeats), slowest_stage(ask, "zero 0", args.repeats)
    predicted = predictions(stage, whole, rest)
    costs = f"Measured costs: slowest of four stages {words(stage)}; whole model {words(whole)}."
    publish(results, args)
    text = "\n\n".join([costs, *(f"### {result.title}\n\n{table(result, predicted)}" for result in results)])
    print(text)
    if args.markdown is not None:
        with args.markdown.open("a", encoding="utf-8") as file:
            file.write(f"\n## Beside the prediction\n\n{text}\n")


if __name__ == "__main__":
    main()
