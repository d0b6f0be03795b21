"""What a reader wants to know about a run, as text: progress, numbers, configuration, and where it came from."""

from __future__ import annotations

import math

from engine.config import Config
from engine.metrics.console import mfu_text
from engine.metrics.goodput import account, text
from engine.model.flops import count_parameters
from engine.report.charts import number
from engine.report.runs import Run
from engine.report.story import changes


def facts(run: Run) -> dict[str, str]:
    """What a reader wants to know about a run, as text."""
    config = run.config
    model, counts = config.model, count_parameters(config.model)
    batch, losses = config.batch, run.values("loss")
    step_tokens = batch.global_ * config.data.seq_len
    valid = run.points("valid_loss")
    peak_memory = max(run.values("memory_bytes"), default=None)
    return {
        "Progress": progress(run),
        "Started": _started(run),
        "Duration": _duration(run),
        **({"Changed": "; ".join(f"after step {event.step:,}: {changes(event.detail)}" for event in run.changes)}
           if run.changes else {}),
        "Software": _software(run),
        "Loss": f"{fixed(losses[0])} → {fixed(losses[-1])}" if losses else "n/a",
        "Validation loss": f"{fixed(valid[-1][1])} at step {valid[-1][0]:,}" if valid else "not evaluated",
        "Tokens": f"{rounded(run.latest('tokens'))} ({rounded(run.latest('consumed_samples'))} samples)",
        "Throughput": f"{rounded(run.steady('tokens_per_second'))} tokens/s, "
                      f"{rounded(run.steady('step_seconds'))} s a step (medians)",
        "Utilisation": f"{rounded(run.steady('tflops_per_device'))} TFLOP/s per device, {mfu_text(run.steady('mfu'))}",
        "Goodput": _goodput(run),
        "Slow ranks": _slow(run),
        "Peak memory": "n/a" if peak_memory is None else f"{peak_memory / 2**30:.2f} GiB on rank 0",
        "Skipped updates": rounded(run.latest("skipped")),
        "Model": f"{model.num_layers} layers, hidden {model.hidden_size:,}, {model.num_heads} heads "
                 f"({model.num_kv_heads} key-value), FFN {model.ffn_hidden_size:,}, vocabulary {model.vocab_size:,}",
        "Parameters": f"{counts.total:,} ({counts.matmul:,} in matrix products)",
        "Layout": layout_text(config),
        "Batch": f"{batch.global_:,} sequences × {config.data.seq_len:,} tokens = {step_tokens:,} tokens a step "
                 f"(micro {batch.micro})",
        "Precision": f"{config.precision.compute}, gradients reduced in {config.precision.grad_reduce}, "
                     f"FP8 {config.precision.fp8}",
        "Optimizer": f"{config.optim.name}, lr {config.optim.lr:g} → {config.optim.min_lr:g} ({config.optim.decay}, "
                     f"{config.rates.warmup_steps:,.10g} warm-up), weight decay {config.optim.weight_decay:g}, "
                     f"clip {config.optim.grad_clip:g}",
        "Data": ", ".join(source.path for source in config.data.train) or "n/a",
    }


def _started(run: Run) -> str:
    """When and where, of the first start; how often it was started again."""
    if not run.starts:
        return "n/a"
    first, again = run.starts[0], len(run.starts) - 1
    hosts = list(dict.fromkeys(str(start.detail.get("host")) for start in run.starts))
    return (f"{first.time:%Y-%m-%d %H:%M} on {', '.join(hosts[:3])}{' …' * (len(hosts) > 3)}, "
            f"{first.detail.get('device')}" + f"; started again {again} time{'s' * (again > 1)}" * (again > 0))


def _duration(run: Run) -> str:
    """From the first start to the last record, and how much of it went into steps."""
    seconds = run.step_seconds()
    steps = "" if seconds is None else f"{_time(seconds)} in steps"
    if not run.starts or run.last_written is None:
        return steps or "n/a"
    return f"{_time((run.last_written - run.starts[0].time).total_seconds())}" + f", {steps}" * bool(steps)


def _goodput(run: Run) -> str:
    """Of all starts, up to the last record."""
    found = next((seconds for each in reversed(run.records) if (seconds := account(each)) is not None), None)
    return "n/a" if found is None else text(found).removeprefix("goodput ")


def _slow(run: Run) -> str:
    """Ranks whose own time stood out, and how often."""
    factor = run.config.reliability.straggler_factor or math.inf
    ratios = [(each["slowest_rank"], each["slowest_seconds"] / each["own_seconds"]) for each in run.records
              if each.get("own_seconds") and each.get("slowest_seconds") is not None]
    slow: dict[int, list[float]] = {}
    for rank, ratio in ratios:
        if ratio > factor:
            slow.setdefault(rank, []).append(ratio)
    often = sorted(slow.items(), key=lambda entry: -len(entry[1]))[:4]
    return "; ".join(f"rank {rank} in {len(found):,} of {len(ratios):,} records, up to {max(found):.1f} × the median's"
                     for rank, found in often) or ("none" if ratios else "n/a")


def _software(run: Run) -> str:
    if not run.starts:
        return "n/a"
    said = run.starts[-1].detail
    commit = f", commit {said['commit']}" if said.get("commit") else ""
    return f"Octant {said.get('octant')}{commit}, Python {said.get('python')}"


def _time(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    if minutes < 120:
        return f"{minutes} min"
    hours = minutes // 60
    return f"{hours} h {minutes % 60:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def progress(run: Run) -> str:
    done = " (done)" if run.last_step >= run.config.steps else ""
    return f"step {run.last_step:,} of {run.config.steps:,}{done}"


def layout_text(config: Config) -> str:
    parallel = config.parallel
    axes = " × ".join(f"{axis} {getattr(parallel, axis)}" for axis in ("tensor", "pipeline", "context", "data")
                      if axis != "context" or parallel.context > 1)
    world_size = parallel.world_size if isinstance(parallel.data, int) else 0
    size = f" = {world_size:,} rank{'s' * (world_size > 1)}" if world_size else ""
    chunks = f" × {parallel.virtual_stages} chunks" if parallel.virtual_stages > 1 else ""
    sequence = ", sequence parallelism" if parallel.sequence and parallel.tensor > 1 else ""
    return f"{axes}{size}; {parallel.schedule}{chunks}, ZeRO-{parallel.zero}{sequence}, recompute {parallel.recompute}"


def fixed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def rounded(value: float | None) -> str:
    return "n/a" if value is None else number(value)
