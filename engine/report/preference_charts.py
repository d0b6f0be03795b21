"""Charts of runs that learn from comparisons: reward models, DPO, ORPO.

    accuracy       of training, and dashed of held-out pairs; where they part, pairs are learned by heart
    margin         grows while anything is learned; without end, where nothing holds it
    rewards        of a policy: both may fall, the rejected one faster
    calibration    how often a reward model is right, by how sure it is; below the line it is too sure
"""

from __future__ import annotations

from collections.abc import Sequence

from engine.report.charts import Chart, Series
from engine.report.runs import Run

# Of comparisons: the picture's name, its title, and the numbers that it shows; each also as `valid_…`.
COMPARED = {
    "accuracy": ("Pairs in the right order", "accuracy", "rewards/accuracies"),
    "margin": ("By how much: chosen − rejected", "margin", "rewards/margins"),
    "rewards": ("Rewards of the policy itself", "rewards/chosen", "rewards/rejected"),
}
CALIBRATION = "valid_calibration/"


def preference_charts(runs: Sequence[Run]) -> dict[str, Chart]:
    """By file name; those without a value have no series."""
    compared = {name: _measured(runs, keys, title) for name, (title, *keys) in COMPARED.items()}
    return compared | {"calibration": _calibration(runs)}


def _measured(runs: Sequence[Run], keys: Sequence[str], title: str) -> Chart:
    """Numbers of training, and dashed those of evaluations; of several runs each under its name."""
    series: list[Series] = []
    for run in runs:
        for key in keys:
            name = key if len(runs) == 1 else f"{run.name} {key}" if len(keys) > 1 else run.name
            index = len({one.color for one in series})
            for prefix, style in (("", "line"), ("valid_", "dashed")):
                if run.values(prefix + key):
                    series.append(Series(prefix + name if len(runs) == 1 else name if not prefix else "",
                                         run.points(prefix + key), index, style))          # type: ignore[arg-type]
    return Chart(title, series)


def _calibration(runs: Sequence[Run]) -> Chart:
    """How often a reward model is right, by how sure it is: the last evaluation of each run, beside what it says."""
    series = []
    for index, run in enumerate(runs):
        found = [{float(key.removeprefix(CALIBRATION)): 100 * value for key, value in record.items()
                  if key.startswith(CALIBRATION) and value is not None} for record in run.records]
        if points := next((sorted(own.items()) for own in reversed(found) if own), None):
            series.append(Series("right, %" if len(runs) == 1 else run.name, points, index, "dashed"))
    if series:
        series.append(Series("as sure as right", [(50, 50.0), (100, 100.0)], len(runs), "faint"))
    return Chart("Right, by how sure the reward model is, %", series, across="sure, %")
