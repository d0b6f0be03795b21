"""`report.html` and SVG pictures of a run, from the files every run has: metrics, configuration and events.

The page is one file without scripts: charts, facts and layout are written into it, so it can be mailed or opened from a
cluster's file browser.  Several runs share the charts and get a column each in the table of facts.  Every chart is
drawn twice, as wide as a desk and as narrow as a phone, since letters that shrink with a picture cannot be read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from html import escape
from pathlib import Path

from engine.errors import RequestError
from engine.metrics.console import mfu_text
from engine.report.charts import Chart, line_chart
from engine.report.facts import facts, fixed, layout_text, progress, rounded
from engine.report.layout import layout_svg, schedule_picture
from engine.report.rollout_texts import texts_section
from engine.report.run_charts import charts
from engine.report.runs import Run
from engine.report.svg import STYLE, standalone
from engine.writing import write_picture

PHONE_WIDTH, PHONE_HEIGHT = 350, 240                         # pixels

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
.phone { display: none; }
.scroll svg.chart { min-width: 640px; } .scroll svg.schedule { width: auto; max-width: none; }
@media (max-width: 600px) {
  body { padding: 16px 10px 28px; font-size: 15px; } .desk { display: none; } .phone { display: block; }
  .tiles { grid-template-columns: repeat(2, 1fr); } .charts { grid-template-columns: 100%; }
  .one th, .one td { display: block; width: auto; padding: 4px 0; } .one th { padding-bottom: 0; }
  .one tr > td { border-top: 0; } }
pre { margin: 10px 0 0; overflow-x: auto; font-size: 12.5px; } summary { cursor: pointer; }
"""


def write_report(runs: Sequence[Run], page: Path, pictures: Path, refresh: int | None = None) -> list[Path]:
    """Write the page, and each picture as a file of its own in the folder `pictures`.

    Args:
        refresh: seconds after which a browser shall load the page again, while the run goes on.

    Returns:
        The paths, the page first.

    Raises:
        RequestError: they cannot be written there, or files are in the way that no report wrote.
    """
    drawn = charts(runs)
    files = {pictures / f"{name}.svg": standalone(line_chart(chart)) for name, chart in drawn.items()}
    if len(runs) == 1 and (layout := layout_svg(runs[0].config)):
        files[pictures / "layout.svg"] = standalone(layout)
    if len(runs) == 1 and (schedule := schedule_picture(runs[0].config)):
        files[pictures / "schedule.svg"] = standalone(schedule[0])
    files[page] = _page(runs, drawn, refresh)
    try:
        for path, text in files.items():
            write_picture(path, text)
    except RequestError as error:
        raise RequestError(f"{error}; --output names another place") from None
    return [page, *(path for path in files if path != page)]


def _page(runs: Sequence[Run], drawn: dict[str, Chart], refresh: int | None) -> str:
    title = ", ".join(run.name for run in runs)
    cards = [f'<div class="card chart-card{" wide" if name == "loss" else ""}">{_twice(chart)}</div>'
             for name, chart in drawn.items()]
    layouts = [f'<h2>Layout{of}</h2><div class="card chart-card scroll">{picture}</div>'
               for run, of in _named(runs) if (picture := layout_svg(run.config))]
    schedules = [f'<h2>Pipeline{of}</h2><div class="card chart-card scroll">{found[0]}</div>'
                 f'<p class="muted">{found[1]}</p>'
                 for run, of in _named(runs) if (found := schedule_picture(run.config))]
    configs = [f'<h2>Configuration{of}</h2><details class="card"><summary>{escape(str(run.directory))}/config.yaml'
               f"</summary><pre>{escape(run.config.dump())}</pre></details>" for run, of in _named(runs)]
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">{again}
<title>{escape(title)} · Octant</title><style>{PAGE_STYLE}{STYLE}</style></head><body>
<h1>{escape(title)}</h1><p class="muted">{escape(_subtitle(runs))}</p>
{_tiles(runs[0]) if len(runs) == 1 else ""}
<div class="charts">{"".join(cards)}</div>
{texts_section(runs[0].directory) if len(runs) == 1 else ""}
<h2>Facts</h2><div class="card scroll">{_facts_table(runs)}</div>
{"".join(layouts)}{"".join(schedules)}{"".join(configs)}
</body></html>
"""


def _twice(chart: Chart) -> str:
    """As wide as it is meant, and for a phone."""
    narrow = replace(chart, width=PHONE_WIDTH, height=PHONE_HEIGHT)
    return f'<div class="desk">{line_chart(chart)}</div><div class="phone">{line_chart(narrow)}</div>'


def _named(runs: Sequence[Run]) -> list[tuple[Run, str]]:
    return [(run, "" if len(runs) == 1 else f" of {escape(run.name)}") for run in runs]


def _subtitle(runs: Sequence[Run]) -> str:
    if len(runs) > 1:
        return f"{len(runs)} runs on the same axes; point at a chart to read its values"
    return f"{progress(runs[0])} · {layout_text(runs[0].config)}"


def _tiles(run: Run) -> str:
    tiles = {
        "last loss": fixed(run.latest("loss")),
        "validation loss": fixed(run.latest("valid_loss")),
        f"steps of {run.config.steps:,}": f"{run.last_step:,}",
        "tokens": rounded(run.latest("tokens")),
        "tokens/s": rounded(run.steady("tokens_per_second")),
        "TFLOP/s a device": rounded(run.steady("tflops_per_device")),
        "goodput": "n/a" if (goodput := run.latest("goodput")) is None else f"{goodput:.1%}",
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
    kind = ' class="one"' if len(runs) == 1 else ""
    return f"<table{kind}>{head}<tbody>{rows}</tbody></table>"
