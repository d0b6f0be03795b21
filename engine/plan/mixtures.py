"""Mixtures of sources to be tried on small models, and what came of each.

Which shares of web pages, books and code are best is found by training small models on several mixtures and comparing
what each loses on every held-out source (Xie et al. 2023, DoReMi, section 4; Liu et al. 2024, RegMix).  What is best
for a small model ranks near the top for a large one; the absolute losses say nothing about it.

A file says what is tried:

    base: small.yaml                          # how each is trained; its data.valid are the sources that are measured
    dir: runs/mixtures                        # a run's folder for each, and its configuration beside it
    sources: {web: data/web, books: data/books}
    mixtures:
      even: {web: 1, books: 1}                # relative weights; a source that is left out has none
      bookish: {web: 1, books: 3}
    random: {count: 6, seed: 0}               # besides: weights drawn evenly from all there are (Dirichlet, α = 1)
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.errors import ConfigError
from engine.plan.text import table
from engine.reading import read_bytes, said
from engine.report.charts import Chart, Series

MOST_BYTES = 1 << 20                                         # of a file of mixtures
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"                       # of a mixture, which becomes a folder
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Drawn(_Strict):
    """Mixtures drawn at random."""

    count: Annotated[int, Field(ge=1, le=1000)]
    seed: int = 0


class Sweep(_Strict):
    """What is tried."""

    base: str
    dir: str
    sources: dict[str, str]
    mixtures: dict[Annotated[str, Field(pattern=NAME)], dict[str, Weight]] = {}
    random: Drawn | None = None

    def all(self) -> dict[str, dict[str, float]]:
        """Shares by mixture and source, those that are drawn last; they add up to 1."""
        given = {name: {source: weights.get(source, 0.0) for source in self.sources}
                 for name, weights in self.mixtures.items()}
        if self.random is not None:
            draw = random.Random(self.random.seed)
            for index in range(self.random.count):
                given[f"random-{index}"] = {source: draw.expovariate(1.0) for source in self.sources}
        return {name: {source: weight / sum(weights.values()) for source, weight in weights.items()}
                for name, weights in given.items()}


def read_sweep(path: Path) -> Sweep:
    """
    Raises:
        ConfigError: the file cannot be read, or says what cannot be tried.
    """
    try:
        sweep = Sweep.model_validate(yaml.safe_load(read_bytes(path, MOST_BYTES).decode()))
    except ValidationError as error:
        problems = (".".join(map(str, item["loc"])) + ": " + item["msg"] for item in error.errors())
        raise ConfigError(f"{path}: {'; '.join(problems)}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as YAML: {said(error)}") from None
    for name, weights in sweep.mixtures.items():
        if unknown := weights.keys() - sweep.sources.keys():
            raise ConfigError(f"{path}: mixtures.{name} names {', '.join(sorted(unknown))}, and sources are "
                              f"{', '.join(sweep.sources)}")
        if not sum(weights.values()) or (sweep.random is not None and name.startswith("random-")):
            raise ConfigError(f"{path}: mixtures.{name} has no source with a weight, or the name of one drawn at "
                              "random")
    if not sweep.all():
        raise ConfigError(f"{path} names no mixtures: give mixtures, or random: {{count: 8}}")
    return sweep


@dataclass(frozen=True)
class Tried:
    """A mixture: shares by source, losses by held-out source, and the loss over all of them."""

    name: str
    shares: Mapping[str, float]
    losses: Mapping[str, float]
    loss: float

    def told(self) -> dict[str, Any]:
        return {"mixture": self.name, "shares": dict(self.shares), "losses": dict(self.losses), "loss": self.loss}


def losses_table(found: Sequence[Tried]) -> str:
    """Shares and losses, the best of all first; the lowest of a column has a star."""
    sources, held_out = list(found[0].shares), list(found[0].losses)
    lowest = {name: min(one.losses[name] for one in found) for name in held_out}
    rows = [("mixture", *sources, *(f"loss on {name}" for name in held_out), "loss")]
    for one in sorted(found, key=lambda one: one.loss):
        stars = {name: "*" if one.losses[name] == lowest[name] else " " for name in held_out}
        rows.append((one.name, *(f"{one.shares[name]:.1%}" for name in sources),
                     *(f"{one.losses[name]:.4f}{stars[name]}" for name in held_out), f"{one.loss:.4f}"))
    return "\n".join(line.rstrip() for line in table(rows, right=range(1, len(rows[0]))))


def losses_chart(found: Sequence[Tried]) -> Chart:
    """A line per held-out source over the mixtures, the best of all first."""
    ordered = sorted(found, key=lambda one: one.loss)
    names = ["all", *ordered[0].losses] if len(ordered[0].losses) > 1 else ["all"]
    series = [Series(name, [(place, one.loss if name == "all" else one.losses[name])
                            for place, one in enumerate(ordered, 1)], index) for index, name in enumerate(names)]
    return Chart("Held-out loss of the mixtures, best first", series, across="place")
