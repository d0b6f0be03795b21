"""Charts of runs that learn from their own texts: what to look at, in the order in which things go wrong.

    score          rises; the parts of it apart, which shows when one is learned at the cost of another
    divergence     grows slowly; of a policy that has found a gap in a reward model it runs away
    entropy        falls slowly; near 0 there is nothing left to choose from
    clipped        the share of tokens that are held back; more than a few in ten: too large steps
    value error    falls; beside it the share of the returns' variance that is foreseen
    lengths        texts that only grow, or are cut off, are learning how long to be
    seconds        by phase
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from engine.report.charts import Chart, Series, moving_median
from engine.report.runs import Run

SCORE = "critic/score/"
NO_PART = ("mean", "max", "min", "learned")                  # of what begins so


@dataclass(frozen=True)
class Panel:
    """A chart: its title, and the numbers in it, with the names that they have there; the first is of every run."""

    title: str
    keys: dict[str, str]
    from_zero: bool = False
    clipped: bool = False


PANELS = {
    "score": Panel("Score", {"critic/score/mean": "all together"}),
    "divergence": Panel("Divergence from the reference, per text", {"objective/kl": "KL"}),
    "policy_kl": Panel("Divergence within a step, per token", {"actor/ppo_kl": "KL"}, clipped=True),
    "entropy": Panel("Entropy, per token", {"actor/entropy": "entropy"}, from_zero=True),
    "clip_fraction": Panel("Share of tokens clipped", {"actor/pg_clipfrac": "policy", "critic/vf_clipfrac": "value"},
                           from_zero=True),
    "value_error": Panel("Value error", {"critic/vf_loss": "½ squared error"}, from_zero=True, clipped=True),
    "explained_variance": Panel("Returns foreseen, share of variance", {"critic/vf_explained_var": "explained"},
                                clipped=True),
    "response_length": Panel("Response length, tokens", {"response_length/mean": "mean", "response_length/max": "most"},
                             from_zero=True),
    "timing": Panel("Seconds of a step", {"timing_s/step": "step", "timing_s/gen": "making texts",
                                          "timing_s/update_actor": "actor", "timing_s/update_critic": "critic",
                                          "timing_s/reshard": "resharding"}, from_zero=True, clipped=True),
    "rollout_probs_diff": Panel("Probabilities: training beside generation, largest difference",
                                {"rollout_probs_diff_max": "difference"}, from_zero=True),
}


def rl_charts(runs: Sequence[Run]) -> dict[str, Chart]:
    """Those that the runs have numbers for."""
    if not any(run.values("critic/score/mean") for run in runs):
        return {}
    return {name: _chart(runs, panel if name != "score" else replace(panel, keys=panel.keys | _parts(runs[0])))
            for name, panel in PANELS.items() if any(run.values(key) for run in runs for key in panel.keys)}


def _parts(run: Run) -> dict[str, str]:
    """What is said of texts by each of several reward functions and models."""
    names = {key.removeprefix(SCORE) for record in run.records for key in record if key.startswith(SCORE)}
    return {SCORE + name: name for name in sorted(names.difference(NO_PART))}


def _chart(runs: Sequence[Run], panel: Panel) -> Chart:
    """Every number of one run, or the first of each of several, over its values where they are many."""
    named = [(run, key, name if len(runs) == 1 else run.name) for run in runs
             for key, name in [*panel.keys.items()][: None if len(runs) == 1 else 1] if run.values(key)]
    series: list[Series] = []
    for color, (run, key, name) in enumerate(named):
        points = run.points(key)
        window = 2 * (len(points) // 50) + 1
        if len(named) == 1 and window >= 5:
            series.append(Series("", points, color, "faint"))
        series.append(Series(name, moving_median(points, window) if window >= 5 else points, color))
    return Chart(panel.title, series, from_zero=panel.from_zero, clipped=panel.clipped)
