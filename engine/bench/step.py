"""`octant bench step`: one process's training step, beside peers that are installed, and where its time goes.

*Beside peers.*  The same model, number of tokens and optimizer, taking turns, the peer first.  `transformers` keeps
fp32 weights and, in bf16, computes under autocast, with torch's fused AdamW: like ours it steps in fp32.  A peer that
is not installed here says so.

*Where it goes.*  One step under torch's profiler.  Every kernel belongs to the operation, or else to the phase of the
step, inside which it was started.  Beside what each took stands the least that it must take: its products and bytes
(`engine/bench/workloads.py`) at the speeds at which this device has been seen to multiply and to copy.

`--least GB/S TFLOP/S` measures nothing and prints those least times for a device of the speeds given.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from engine.bench.harness import Case, add_options, alternating, publish
from engine.bench.kernels import DTYPES, Ceiling, measured_ceiling
from engine.bench.workloads import workloads
from engine.config import Config, resolve_layout
from engine.config.fields import nearest
from engine.config.load import preset_fields, preset_names
from engine.distributed.mesh import Mesh, single_mesh
from engine.errors import RequestError
from engine.kernels.operation import Place
from engine.metrics.peaks import peak_tflops
from engine.metrics.phases import Phases
from engine.model.context import Batch
from engine.model.flops import count_parameters, flops_per_token
from engine.optim.adamw import AdamW
from engine.optim.gradients import clip_divisor, sum_over_world
from engine.parallel.parallelize import parallelize

# What a profiler's event, or one around it, is called, and the row that it belongs to; the innermost counts.
OWNERS: Mapping[str, str] = MappingProxyType({
    "_Linear": "linear layers", "_KeepingInput": "linear layers", "_PerToken": "output layer and loss",
    "_WeightedSum": "output layer and loss", "_RingAttention": "attention", "_VocabEmbedding": "embedding",
    "ScaledDotProduct": "attention", "scaled_dot_product": "attention", "flash_attention": "attention",
    "_AddRMSNorm": "norms", "_LayerNorm": "norms", "_SplitAndRotate": "rotary embedding", "_SwiGLU": "activation",
    "_SquaredReLU": "activation", "reduce": "norm of the gradient", "update": "optimizer",
    "publish": "weights of the next step",
})
OTHER = "additions and the rest"


def run(arguments: Sequence[str]) -> int:
    """Parse the benchmark's own arguments and measure."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(prog="octant bench step",
                                     description="A training step of one process, beside peers and in parts.")
    parser.add_argument("--model", default="llama3.2-1b" if on_gpu else "tiny", metavar="PRESET",
                        help="(default: %(default)s)")
    parser.add_argument("--layers", type=int, metavar="L", help="only so many (default: the model's)")
    parser.add_argument("--seq-len", type=int, default=8192 if on_gpu else 256, metavar="S",
                        help="(default: %(default)s)")
    parser.add_argument("--micro", type=int, default=1, metavar="N", help="sequences of a microbatch (default: 1)")
    parser.add_argument("--microbatches", type=int, default=4, metavar="N", help="of a step (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16" if on_gpu else "fp32", help="(default: %(default)s)")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=["transformers"], help="(default: transformers)")
    parser.add_argument("--least", nargs=2, type=float, metavar=("GB/S", "TFLOP/S"), help="only say what the parts of "
                        "a step must take where so much is copied and multiplied in a second")
    add_options(parser, repeats=5)
    args = parser.parse_args(arguments)
    config, mesh = _config(args), single_mesh(device)
    if args.least:
        print(_title(config) + "\n" + least_table(config, Ceiling(args.least[0] * 1e9, args.least[1] * 1e12)))
        return 0
    absent = [name for name in args.peers if (package := PEERS[name][0]) and find_spec(package) is None]
    tokens = config.batch.global_ * config.data.seq_len
    step, phases = octant_step(config, mesh), Phases(device)
    cases = [Case(name, PEERS[name][1](config, device), tokens) for name in args.peers if name not in absent]
    work = flops_per_token(config.model, config.data.seq_len) * tokens
    result = alternating(*cases, Case("octant", step, tokens), repeats=args.repeats, unit="tokens",
                         synchronize=torch.cuda.synchronize if on_gpu else None, packages=["transformers"],
                         title=_title(config))
    publish([result], args)
    print("".join(f"\n{name}: not installed here" for name in absent))
    print(_speed(work / result.measurements[-1].median_seconds / 1e12, device))
    took = seconds_by_operation(octant_step(config, mesh, phases), device)
    ceiling = measured_ceiling(Place(device, DTYPES[args.dtype]), args.repeats)
    print(parts_table(took, least_seconds(config, ceiling)))
    return 0


def octant_step(config: Config, mesh: Mesh, phases: Phases | None = None) -> Callable[[], None]:
    """The engine's step without reading data: what `engine.train.loop` does."""
    phase = phases or Phases(mesh.device)
    model = parallelize(config, mesh)
    model.initialise(config.run.seed)
    optimizer = AdamW(model.buckets, config.optim, model.operations)
    positions = torch.arange(config.data.seq_len, device=mesh.device).unsqueeze(1)
    rows = random_tokens(config).to(mesh.device).split(config.batch.micro)[mesh.data.index::mesh.data.size]
    batches = [Batch(row.T[:-1].contiguous(), positions, row.T[1:].contiguous()) for row in rows]
    scale = 1 / (config.batch.global_ * config.data.seq_len)

    def step() -> None:
        with phase("forward_backward"):
            losses = model.accumulate(batches, scale)
        with phase("reduce"):
            model.finish_reduction()
            sums = sum_over_world(losses, model.buckets, mesh)
        with phase("update"):
            found_inf = torch.isfinite(sums.grad_norm).logical_not().float()
            optimizer.step(config.optim.lr, clip_divisor(sums.grad_norm, config.optim.grad_clip), found_inf)
        with phase("publish"):
            model.publish()
        with phase("read"):
            sums.sums.tolist()
        phase.taken()

    return step


def random_tokens(config: Config) -> Tensor:
    """Ids [samples, seq_len + 1], the same for everybody."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(config.model.vocab_size, (config.batch.global_, config.data.seq_len + 1), generator=generator)


def transformers_step(config: Config, device: torch.device, *, fused: bool = True,
                      compiled: bool = False) -> Callable[[], None]:
    """The same work with `LlamaForCausalLM` and sdpa, torch's clipping and AdamW, fused or as it is by default."""
    import transformers  # optional package

    shape, optim = config.model, config.optim
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        num_hidden_layers=shape.num_layers, hidden_size=shape.hidden_size, num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads, head_dim=shape.head_dim, intermediate_size=shape.ffn_hidden_size,
        vocab_size=shape.vocab_size, max_position_embeddings=shape.max_seq_len, use_cache=False,
        tie_word_embeddings=shape.tie_embeddings, attn_implementation="sdpa")).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps,
                                  weight_decay=optim.weight_decay, fused=fused or None)
    rows = random_tokens(config).to(device).split(config.batch.micro)
    batches = [(row[:, :-1].contiguous(), row[:, 1:].contiguous()) for row in rows]
    scale, in_bf16 = 1 / (config.batch.global_ * config.data.seq_len), config.precision.compute == "bf16"
    forward = torch.compile(model) if compiled else model

    def step() -> None:
        total = torch.zeros((), device=device)
        for inputs, labels in batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16):
                logits = forward(input_ids=inputs).logits
            loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            (loss * scale).backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), optim.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        total.item()

    return step


# What is asked for by name: the package it needs, and its step.
PEERS: Mapping[str, tuple[str, Callable[..., Callable[[], None]]]] = MappingProxyType({
    "transformers": ("transformers", transformers_step),
    "transformers-compiled": ("transformers", lambda config, device: transformers_step(config, device, compiled=True)),
})


def seconds_by_operation(step: Callable[[], None], device: torch.device) -> dict[str, float]:
    """What each row took in a step, as a profiler saw it: on a GPU its kernels, else its operators; most first."""
    on_gpu = device.type == "cuda"
    step()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    seconds: Counter[str] = Counter()
    for event in profiler.events() or ():
        micro = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        if micro and event.device_type == torch.autograd.DeviceType.CPU:
            seconds[_owner(event)] += micro / 1e6
    return dict(seconds.most_common())


def _owner(event: Any) -> str:
    """The row of the innermost event around this one that has one."""
    while event is not None:
        for name, row in OWNERS.items():
            if name in event.name:
                return row
        event = event.cpu_parent
    return OTHER


def least_seconds(config: Config, ceiling: Ceiling) -> dict[str, float]:
    """For each row that is made of products or of passes through memory, what it must take."""
    model, works = config.model, workloads(config.model)
    length, number = config.data.seq_len, config.batch.global_
    tokens, counts = length * number, count_parameters(model)
    width = DTYPES[config.precision.compute].itemsize

    def of(name: str, times: int = 1) -> float:
        return times * number * ceiling.seconds(works[name], length, width)

    layers = model.num_layers
    return {
        "linear layers": 6 * tokens * layers * counts.layer_matrices / ceiling.flops_per_second,
        "output layer and loss": 6 * tokens * counts.head / ceiling.flops_per_second + of("cross_entropy"),
        "attention": of("attention", layers),
        "norms": of("rms_norm", 2 * layers + 1),
        "rotary embedding": of("rope", layers),
        "activation": of("swiglu", layers),
        "optimizer": 28 * counts.total / ceiling.bytes_per_second,
        "norm of the gradient": 4 * counts.total / ceiling.bytes_per_second,
    }


def parts_table(took: Mapping[str, float], least: Mapping[str, float]) -> str:
    """A line per row."""
    whole = sum(took.values())
    lines = [f"{'one step, by operation':<26} {'ms':>10} {'share':>7} {'least ms':>10}"]
    for row, seconds in took.items():
        bound = f"{1e3 * least[row]:>10.2f}" if row in least else ""
        lines.append(f"{row:<26} {1e3 * seconds:>10.2f} {seconds / whole:>7.1%} {bound}".rstrip())
    return "\n".join(lines)


def least_table(config: Config, ceiling: Ceiling) -> str:
    """A line per row, most first, and what they come to."""
    least = sorted(least_seconds(config, ceiling).items(), key=lambda item: -item[1])
    whole = sum(seconds for _, seconds in least)
    tokens = config.batch.global_ * config.data.seq_len
    work = flops_per_token(config.model, config.data.seq_len) * tokens / 1e12
    lines = [f"{row:<26} {1e3 * seconds:>10.1f} ms {seconds / whole:>7.1%}" for row, seconds in least]
    return "\n".join([*lines, f"{'all':<26} {1e3 * whole:>10.1f} ms; {tokens / whole:,.0f} tokens/s, "
                              f"{work / whole:,.0f} TFLOP/s, causal attention counted half"])


def _config(args: argparse.Namespace) -> Config:
    if args.model not in preset_names():
        raise RequestError(f"--model {args.model}: " + nearest(args.model, preset_names()))
    numbers = (1 if args.layers is None else args.layers, args.seq_len, args.micro, args.microbatches, args.repeats)
    if min(args.least or [1]) <= 0:
        raise RequestError(f"--least {args.least[0]:g} {args.least[1]:g}: both speeds have to be above 0")
    if min(numbers) < 1:
        raise RequestError("--layers, --seq-len, --micro, --microbatches and --repeats: "
                           f"{', '.join(map(str, numbers))}; each has to be at least 1")
    shape = preset_fields(args.model) | ({"num_layers": args.layers} if args.layers else {})
    shape["max_seq_len"] = max(shape["max_seq_len"], args.seq_len)
    return resolve_layout(Config.model_validate({
        "model": shape, "steps": 1000, "parallel": {"data": 1}, "data": {"seq_len": args.seq_len},
        "precision": {"compute": args.dtype},
        "batch": {"micro": args.micro, "global": args.micro * args.microbatches}}), 1)


def _title(config: Config) -> str:
    model = config.model
    return (f"{model.num_layers} layers of {model.hidden_size}, vocabulary {model.vocab_size:,}, "
            f"{config.num_microbatches} × {config.batch.micro} × {config.data.seq_len:,} tokens, "
            + config.precision.compute)


def _speed(tflops: float, device: torch.device) -> str:
    peak = peak_tflops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    mfu = "MFU n/a: the data sheet's peak of this device isn't known" if peak is None else f"MFU {tflops / peak:.1%}"
    return f"octant: {tflops:.3g} TFLOP/s, causal attention counted half; {mfu}"
