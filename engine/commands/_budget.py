"""`octant plan --budget 1e21 [RUN_DIR …]`: the model and the tokens that so much compute is best spent on."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean

from engine.errors import RequestError
from engine.model.flops import count_parameters
from engine.plan.laws import HOFFMANN, Law, Trained, fit
from engine.plan.text import counted, table
from engine.report.charts import Chart, Series, line_chart
from engine.report.runs import read_run
from engine.report.svg import standalone
from engine.writing import write_picture

SPAN, CURVE = 1.5, 61                      # decades on both sides of the best size, and points of the curve


def plan_budget(args: argparse.Namespace) -> int:
    """Prints what the law says; the law is Hoffmann's, or of the runs that are named.

    Raises:
        RequestError: the budget is no number, or the runs do not determine a law.
    """
    compute = _operations(args.budget)
    runs = [trained(folder) for folder in args.runs or ()]
    law = fit(runs) if runs else HOFFMANN
    parameters, tokens = law.best(compute)
    if args.json:
        print(json.dumps({"budget": compute, "parameters": parameters, "tokens": tokens,
                          "loss": law.loss(parameters, tokens), "law": vars(law),
                          "runs": [vars(run) | {"predicted": law.loss(run.parameters, run.tokens)} for run in runs]},
                         indent=1))
    else:
        print("\n".join(_words(compute, law, runs)))
    if args.svg is not None:
        write_picture(Path(args.svg), standalone(line_chart(_chart(compute, law, runs))))
    return 0


def trained(folder: str) -> Trained:
    """A run by its folder: the latest held-out loss, or where there is none the mean of the last tenth.

    Raises:
        RequestError: it has no loss.
        DataError: its records are damaged.
    """
    run = read_run(folder)
    losses = run.values("loss")
    loss = run.latest("valid_loss")
    if loss is None and losses:
        loss = mean(losses[-max(1, len(losses) // 10):])
    tokens = run.latest("tokens")
    if loss is None or not tokens:
        raise RequestError(f"{folder} has no logged loss yet")
    return Trained(run.name, count_parameters(run.config.model).total, tokens, loss)


def _operations(given: str) -> float:
    try:
        compute = float(given)
    except ValueError:
        compute = math.nan
    if not 0 < compute < 1e40:
        raise RequestError(f"--budget {given}: give floating-point operations, such as 1e21")
    return compute


def _words(compute: float, law: Law, runs: Sequence[Trained]) -> list[str]:
    parameters, tokens = law.best(compute)
    whose = f"fitted to {len(runs)} runs" if runs else "Hoffmann et al. 2022"
    lines = [f"{compute:.3g} operations: {counted(round(parameters))} parameters on {counted(round(tokens))} tokens "
             f"({tokens / parameters:.1f} for each), loss {law.loss(parameters, tokens):.3f}",
             f"by L = {law.irreducible:.4g} + {law.a:.4g}/N^{law.alpha:.3f} + {law.b:.4g}/D^{law.beta:.3f} ({whose})",
             ""]
    rows: list[tuple[str, ...]] = [("parameters", "tokens", "loss")]
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        n, d = parameters * factor, tokens / factor
        rows.append((counted(round(n)), counted(round(d)), f"{law.loss(n, d):.4f}"))
    lines += table(rows, right=(0, 1, 2))
    if runs:
        compared: list[tuple[str, ...]] = [("run", "parameters", "tokens", "loss", "by the law")]
        compared += [(run.name, counted(round(run.parameters)), counted(round(run.tokens)), f"{run.loss:.4f}",
                      f"{law.loss(run.parameters, run.tokens):.4f}") for run in runs]
        lines += ["", *table(compared, right=(1, 2, 3, 4))]
    return lines


def _chart(compute: float, law: Law, runs: Sequence[Trained]) -> Chart:
    """Loss over the decimal logarithm of the parameters: the budget's curve, its lowest point, and the runs."""
    best = math.log10(law.best(compute)[0])
    at = [best + SPAN * (2 * i / (CURVE - 1) - 1) for i in range(CURVE)]
    curve = Series(f"{compute:.3g} operations", [(x, law.loss(10**x, compute / 6 / 10**x)) for x in at])
    ordered = sorted(runs, key=lambda run: run.parameters)
    measured = Series("runs", [(math.log10(run.parameters), run.loss) for run in ordered], 1, "dashed")
    fitted = Series("runs, by the law", [(math.log10(run.parameters), law.loss(run.parameters, run.tokens))
                                         for run in ordered], 2, "dashed")
    return Chart("loss over log10 of the parameters", [curve, *([measured, fitted] if runs else [])])
