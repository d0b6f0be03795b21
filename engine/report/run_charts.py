"""Which charts a run has, or several on the same axes: loss, gradient norm, learning rate, speed, memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from engine.report.charts import Chart, Series, central, moving_median
from engine.report.preference_charts import preference_charts
from engine.report.rl_charts import rl_charts
from engine.report.runs import Run
from engine.report.story import changes


def charts(runs: Sequence[Run]) -> dict[str, Chart]:
    """The charts of one run, or of several on the same axes, by file name."""
    found = {
        "loss": _loss_chart(runs),
        **preference_charts(runs),
        "tasks": _tasks_chart(runs),
        **rl_charts(runs),
        "grad_norm": replace(_chart(runs, "grad_norm", "Gradient norm", "norm"), log=_wide(runs, "grad_norm"),
                             clipped=True),
        "lr": replace(_chart(runs, "lr", "Learning rate", "lr", smooth=False), from_zero=True),
        "tokens_per_second": replace(_chart(runs, "tokens_per_second", "Tokens per second", "tokens/s"),
                                     from_zero=True, clipped=True),
        "step_seconds": replace(_chart(runs, "step_seconds", "Step time", "seconds"), from_zero=True, clipped=True),
        "memory_bytes": replace(_chart(runs, "memory_bytes", "Peak memory of rank 0", "GiB", smooth=False,
                                       scale=2 ** -30), from_zero=True),
    }
    if len(runs) == 1:
        lines = [(event.step, changes(event.detail)) for event in runs[0].changes]
        found = {name: replace(chart, lines=lines if chart.across == "step" else ()) for name, chart in found.items()}
    return {name: chart for name, chart in found.items()
            if any(value is not None for series in chart.series for _, value in series.points)}


def _loss_chart(runs: Sequence[Run]) -> Chart:
    training = _chart(runs, "loss", "Loss", "loss")
    alone = len(runs) == 1
    validation = [Series("validation" if alone else "", run.points("valid_loss"), 1 if alone else index, "dashed")
                  for index, run in enumerate(runs) if run.values("valid_loss")]
    keys = {key for record in runs[0].records for key in record if key.startswith("valid_loss/")} if alone else ()
    validation += [Series(key.removeprefix("valid_loss/"), runs[0].points(key), index, "dashed")
                   for index, key in enumerate(sorted(keys), 2)]
    skipped = [step for run in runs for step in run.skipped_at()]
    title = "Loss" if alone or not validation else "Loss (dashed: validation)"
    return Chart(title, [*training.series, *validation], clipped=True, marks=skipped,
                 mark_label="with skipped updates", width=1140, height=340)


def _tasks_chart(runs: Sequence[Run]) -> Chart:
    """What `eval.tasks` measured, a line per file and number."""
    keys = sorted({key for run in runs for record in run.records for key in record if key.startswith("tasks/")})
    return Chart("Tasks", [Series(f"{'' if len(runs) == 1 else run.name + ' '}{key.removeprefix('tasks/')}",
                                  run.points(key), index)
                           for index, (run, key) in enumerate((run, key) for run in runs for key in keys)])


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
    """Whether a logarithmic axis serves better: the central values are positive and cover one and a half decades."""
    low, high = central(sorted(value for run in runs for value in run.values(key)) or [0.0])
    return low > 0 and high / low > 30
