"""`report.html` and SVG pictures of a run, from the two files every run has: `metrics.jsonl` and `config.yaml`.

The page is one file without scripts: charts, facts and layout are written into it, so it can be mailed or opened from a
cluster's file browser.  Several runs share the charts and get a column each in the table of facts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from engine.config import Config
from engine.distributed.topology import Topology
from engine.metrics.console import mfu_text
from engine.model.flops import count_parameters
from engine.parallel.pipeline.partition import deal_layers, layer_costs
from engine.report.charts import STYLE, Chart, Series, line_chart, moving_median, number, standalone
from engine.report.layout_picture import layout_picture
from engine.report.runs import Run
from engine.schedules.table import build_schedule
from engine.writing import write_picture

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --muted: #667085; --edge: #e3e7ee; --paper: #ffffff;
  --back: #f5f6f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6eaf2; --muted: #94a0b4; --edge: #2a3342; --paper: #161c27; --back: #0e131b; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 28px 20px 40px; max-width: 1180px; background: var(--back); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { margin: 0; font-size: 24px; } h2 { margin: 32px 0 10px; font-size: 16px; } p { margin: 2px 0 18px; }
.muted, th { color: var(--muted); font-weight: 400; }
.tiles, .charts { display: grid; gap: 12px; }
.tiles { grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); margin-bottom: 12px; }
.charts { grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr)); }
.card { background: var(--paper); border: 1px solid var(--edge); border-radius: 10px; padding: 12px 14px; }
.card.chart-card { padding: 6px; } .wide { grid-column: 1 / -1; }
.tile b { display: block; font-size: 18px; white-space: nowrap; font-variant-numeric: tabular-nums; }
svg.chart { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; } tr + tr > * { border-top: 1px solid var(--edge); }
th, td { padding: 6px 14px 6px 0; text-align: left; vertical-align: top; } tbody th { white-space: nowrap; width: 1%; }
thead th { color: var(--ink); font-weight: 600; }
pre { margin: 10px 0 0; overflow-x: auto; font-size: 12.5px; } summary { cursor: pointer; }
"""


def charts(runs: Sequence[Run]) -> dict[str, Chart]:
    """The charts of one run, or of several on the same axes, by file name."""
    found = {
        "loss": _loss_chart(runs),
        "grad_norm": replace(_chart(runs, "grad_norm", "Gradient norm", "norm"), log=_wide(runs, "grad_norm")),
        "lr": replace(_chart(runs, "lr", "Learning rate", "lr", smooth=False), from_zero=True),
        "tokens_per_second": replace(_chart(runs, "tokens_per_second", "Tokens per second", "tokens/s"),
                                     from_zero=True, clipped=True),
        "step_seconds": replace(_chart(runs, "step_seconds", "Step time", "seconds"), from_zero=True, clipped=True),
        "memory_bytes": replace(_chart(runs, "memory_bytes", "Peak memory of rank 0", "GiB", smooth=False,
                                       scale=2 ** -30), from_zero=True),
    }
    return {name: chart for name, chart in found.items()
            if any(value is not None for series in chart.series for _, value in series.points)}


def _loss_chart(runs: Sequence[Run]) -> Chart:
    training = _chart(runs, "loss", "Loss", "loss")
    alone = len(runs) == 1
    validation = [Series("validation" if alone else "", run.points("valid_loss"), 1 if alone else index, "dashed")
                  for index, run in enumerate(runs) if run.values("valid_loss")]
    skipped = [step for run in runs for step in run.skipped_at()]
    title = "Loss" if alone or not validation else "Loss (dashed: validation)"
    return Chart(title, [*training.series, *validation], clipped=True, marks=skipped,
                 mark_label="with skipped updates", width=1140, height=340)


def _chart(runs: Sequence[Run], key: str, title: str, unit: str, smooth: bool = True, scale: float = 1.0) -> Chart:
    """One line per run; where `smooth`, the values stand faintly behind their moving median."""
    series: list[Series] = []
    for index, run in enumerate(runs):
        points = [(step, None if value is None else scale * value) for step, value in run.points(key)]
        name = unit if len(runs) == 1 else run.name
        window = 2 * (len(points) // 100) + 1                # 2 % of the run
        if smooth and window >= 5:
            if len(runs) == 1:
                series.append(Series(name, points, index, "faint"))
                name = f"median of {window}"
            points = moving_median(points, window)
        series.append(Series(name, points, index))
    return Chart(title, series)


def _wide(runs: Sequence[Run], key: str) -> bool:
    """Whether a logarithmic axis serves better: positive values over more than one and a half decades."""
    values = sorted(value for run in runs for value in run.values(key))
    return len(values) > 1 and values[0] > 0 and values[-1] / values[0] > 30


def facts(run: Run) -> dict[str, str]:
    """What a reader wants to know about a run, as text."""
    config = run.config
    model, counts = config.model, count_parameters(config.model)
    batch, losses = config.batch, run.values("loss")
    step_tokens = batch.global_ * config.data.seq_len
    valid = run.points("valid_loss")
    peak_memory = max(run.values("memory_bytes"), default=None)
    return {
        "Progress": _progress(run),
        "Loss": f"{_fixed(losses[0])} → {_fixed(losses[-1])}" if losses else "n/a",
        "Validation loss": f"{_fixed(valid[-1][1])} at step {valid[-1][0]:,}" if valid else "not evaluated",
        "Tokens": f"{_rounded(run.latest('tokens'))} ({_rounded(run.latest('consumed_samples'))} samples)",
        "Throughput": f"{_rounded(run.steady('tokens_per_second'))} tokens/s, "
                      f"{_rounded(run.steady('step_seconds'))} s a step (medians)",
        "Utilisation": f"{_rounded(run.steady('tflops_per_device'))} TFLOP/s per device, {mfu_text(run.steady('mfu'))}",
        "Peak memory": "n/a" if peak_memory is None else f"{peak_memory / 2**30:.2f} GiB on rank 0",
        "Skipped updates": _rounded(run.latest("skipped")),
        "Model": f"{model.num_layers} layers, hidden {model.hidden_size:,}, {model.num_heads} heads "
                 f"({model.num_kv_heads} key-value), FFN {model.ffn_hidden_size:,}, vocabulary {model.vocab_size:,}",
        "Parameters": f"{counts.total:,} ({counts.matmul:,} in matrix products)",
        "Layout": _layout_text(config),
        "Batch": f"{batch.global_:,} sequences × {config.data.seq_len:,} tokens = {step_tokens:,} tokens a step "
                 f"(micro {batch.micro})",
        "Precision": f"{config.precision.compute}, gradients reduced in {config.precision.grad_reduce}, "
                     f"FP8 {config.precision.fp8}",
        "Optimizer": f"AdamW, lr {config.optim.lr:g} → {config.optim.min_lr:g} ({config.optim.decay}, "
                     f"{config.optim.warmup_steps:,} warm-up), weight decay {config.optim.weight_decay:g}, "
                     f"clip {config.optim.grad_clip:g}",
        "Data": ", ".join(source.path for source in config.data.train) or "n/a",
    }


def _progress(run: Run) -> str:
    done = " (done)" if run.last_step >= run.config.steps else ""
    return f"step {run.last_step:,} of {run.config.steps:,}{done}"


def _layout_text(config: Config) -> str:
    parallel = config.parallel
    axes = " × ".join(f"{axis} {getattr(parallel, axis)}" for axis in ("tensor", "pipeline", "context", "data")
                      if axis != "context" or parallel.context > 1)
    world_size = parallel.world_size if isinstance(parallel.data, int) else 0
    size = f" = {world_size:,} rank{'s' * (world_size > 1)}" if world_size else ""
    chunks = f" × {parallel.virtual_stages} chunks" if parallel.virtual_stages > 1 else ""
    sequence = ", sequence parallelism" if parallel.sequence and parallel.tensor > 1 else ""
    return f"{axes}{size}; {parallel.schedule}{chunks}, ZeRO-{parallel.zero}{sequence}, recompute {parallel.recompute}"


def _fixed(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4f}"


def _rounded(value: float | None) -> str:
    return "n/a" if value is None else number(value)


def stage_contents(config: Config) -> list[list[str]]:
    """What each pipeline stage holds, such as `["embedding", "layers 0–9"]`."""
    parallel, model = config.parallel, config.model
    schedule = build_schedule(parallel.schedule, parallel.pipeline, parallel.pipeline, parallel.virtual_stages)
    placement = schedule.placement
    layer, embedding, output = layer_costs(model, config.data.seq_len)
    dealt = deal_layers(model.num_layers, len(placement), layer=layer, embedding=embedding, output=output)
    contents: list[list[str]] = []
    for stage in range(parallel.pipeline):
        chunks = [chunk for chunk, rank in enumerate(placement) if rank == stage]
        spans = ", ".join(_span(dealt[chunk]) for chunk in chunks)
        ends = [name for name, chunk in (("embedding", 0), ("LM head", len(placement) - 1)) if chunk in chunks]
        contents.append([f"layers {spans}" if len(chunks) > 1 or len(dealt[chunks[0]]) > 1 else f"layer {spans}",
                         *([" + ".join(ends)] if ends else [])])
    return contents


def _span(layers: range) -> str:
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}–{layers[-1]}"


def layout_svg(config: Config) -> str | None:
    """The picture of the layout, or None where `parallel.data` was left open."""
    parallel = config.parallel
    if not isinstance(parallel.data, int):
        return None
    topology = Topology(parallel.pipeline, parallel.data, parallel.context, parallel.tensor)
    return layout_picture(topology, stage_contents(config))


def write_report(runs: Sequence[Run], page: Path, pictures: Path) -> list[Path]:
    """Write the page, and each chart as a file of its own in the folder `pictures`; returns the paths, page first."""
    drawn = {name: line_chart(chart) for name, chart in charts(runs).items()}
    files = {page: _page(runs, drawn)} | {pictures / f"{name}.svg": standalone(svg) for name, svg in drawn.items()}
    if len(runs) == 1 and (layout := layout_svg(runs[0].config)):
        files[pictures / "layout.svg"] = standalone(layout)
    for path, text in files.items():
        write_picture(path, text)
    return list(files)


def _page(runs: Sequence[Run], drawn: dict[str, str]) -> str:
    title = ", ".join(run.name for run in runs)
    cards = [f'<div class="card chart-card{" wide" if name == "loss" else ""}">{svg}</div>'
             for name, svg in drawn.items()]
    layouts = [f'<h2>Layout{of}</h2><div class="card chart-card">{picture}</div>'
               for run, of in _named(runs) if (picture := layout_svg(run.config))]
    configs = [f'<h2>Configuration{of}</h2><details class="card"><summary>{escape(str(run.directory))}/config.yaml'
               f"</summary><pre>{escape(run.config.dump())}</pre></details>" for run, of in _named(runs)]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)} · Octant</title><style>{PAGE_STYLE}{STYLE}</style></head><body>
<h1>{escape(title)}</h1><p class="muted">{escape(_subtitle(runs))}</p>
{_tiles(runs[0]) if len(runs) == 1 else ""}
<div class="charts">{"".join(cards)}</div>
<h2>Facts</h2><div class="card scroll">{_facts_table(runs)}</div>
{"".join(layouts)}{"".join(configs)}
</body></html>
"""


def _named(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, "" if len(runs) == 1 else f" of {escape(run.name)}") for run in runs]


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs on the same axes; point at a chart to read its values"
    return f"{_progress(runs[0])} · {_layout_text(runs[0].config)}"


def _tiles(run: Run) -> str:
    tiles = {
        "last loss": _fixed(run.latest("loss")),
        "validation loss": _fixed(run.latest("valid_loss")),
        f"steps of {run.config.steps:,}": f"{run.last_step:,}",
        "tokens": _rounded(run.latest("tokens")),
        "tokens/s": _rounded(run.steady("tokens_per_second")),
        "TFLOP/s a device": _rounded(run.steady("tflops_per_device")),
        "MFU (causal)": mfu_text(run.steady("mfu")).removeprefix("MFU ").removesuffix(" (causal)"),
    }
    cards = (f'<div class="card tile"><span class="muted">{name}</span><b>{value}</b></div>'
             for name, value in tiles.items())
    return f'<div class="tiles">{"".join(cards)}</div>'


def _facts_table(runs: Sequence[Run]) -> str:
    columns = [facts(run) for run in runs]
    head = ("" if len(runs) == 1 else
            "<thead><tr><th></th>" + "".join(f"<th>{escape(run.name)}</th>" for run in runs) + "</tr></thead>")
    rows = "".join(f"<tr><th>{name}</th>" + "".join(f"<td>{escape(column[name])}</td>" for column in columns) + "</tr>"
                   for name in columns[0])
    return f"<table>{head}<tbody>{rows}</tbody></table>"
