"""The table's figures of a device, replaced by what was measured on this machine.

    octant bench network    latency and bandwidth between processes, as they were fitted there
    octant bench kernels    what large products, copies and the fastest attention reach: three shares of the peaks
    octant bench mfu        computation: shares of the peak that products and attention reach, of the bandwidth that
                            elementwise passes do, and what a kernel costs, so that the model of `engine.plan.step` says
                            what the rows took for their passes and updates

Rows of a few shapes are enough, and one device's: what a rank computes is measured without what it waits for, so any
layout will do.  Five figures are fitted to their logarithms, by Gauss and Newton; each is held near the table's, or
what kernels reach where such a file is given too (all of them times what the rows are slower by), as far as the rows
say nothing of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import exp, log
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np

from engine.config import Config
from engine.errors import RequestError
from engine.plan.devices import Device
from engine.plan.step import step_time, with_reached

FITTED = ("product", "half_depth", "attention", "stream", "kernel")
FASTER = {"product": 1, "half_depth": 0, "attention": 1, "stream": 1, "kernel": -1}        # when its figure grows
NEAR = 0.05                                # weight of the table's figure against a row
ROUNDS, LONGEST = 12, 1.0                  # of the fit, and its steps, in logarithms
CAUSES = (("compute", ("compute", "recompute")), ("optimizer", ("optimizer",)))


@dataclass(frozen=True)
class Point:
    """What a row's job took for a cause."""

    config: Config
    causes: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Calibrated:
    """A device with measured figures.

    Attributes:
        said: what was taken from where, for people.
        error: mean relative error of what the rows took, after the fit; None without rows.
    """

    device: Device
    said: list[str]
    error: float | None = None


def calibrated(device: Device, files: Sequence[Path]) -> Calibrated:
    """The device with what the files hold.

    Raises:
        RequestError: one cannot be read, or holds nothing to calibrate with.
    """
    said: list[str] = []
    points: list[Point] = []
    for path in files:
        content = _read(path)
        if isinstance(content, list):
            device = _with_kernels(device, content)
            said.append(f"kernels: {_counted(content, 'operation')} in {content[0]['dtype']} of {path}")
        elif content["benchmark"] == "network":
            device = _with_network(device, content)
            said.append(f"network: {path}")
        else:
            rows = [row for row in content["rows"] if "error" not in row]
            shared = [row["ranks_per_core"] for row in rows if row["ranks_per_core"] is not None]
            device = replace(device, sharing=max([1.0, *shared]))
            points += [point for row in rows for point in _points(row)]
            said.append(f"computation: {_counted(rows, 'row')} of {path}")
    if not points:
        return Calibrated(device, said)
    device, error = _fitted(device, points)
    return Calibrated(replace(device, off_by=error), said, error)


def _counted(what: Sequence[object], name: str) -> str:
    return f"{len(what)} {name}{'s' * (len(what) != 1)}"


def _read(path: Path) -> dict[str, Any] | list[dict[str, Any]]:
    """A file of `octant bench kernels` is a list."""
    try:
        content: dict[str, Any] | list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, list):
            if content and all({"operation", "reached", "flops", "cases"} <= set(each) for each in content):
                return content
        elif content["benchmark"] in ("network", "mfu"):
            return content
    except (OSError, ValueError, TypeError, KeyError):
        pass
    raise RequestError(f"--calibrate {path}: it is no file that octant bench network, octant bench kernels or octant "
                       "bench mfu wrote (--json)")


def _with_kernels(device: Device, operations: Sequence[dict[str, Any]]) -> Device:
    """Shares of the peak of the dtype that was measured, and of the memory's bandwidth.

    Raises:
        RequestError: the device has no peak for that dtype.
    """
    first, named = operations[0], {each["operation"]: each for each in operations}
    if (peak := device.peaks.get(first["dtype"])) is None:
        raise RequestError(f"--calibrate: kernels were measured in {first['dtype']}, in which {device.name} has no "
                           f"peak (it has {', '.join(device.peaks)})")
    reached, side = first["reached"], first["reached"]["product"]
    deep = side / (side + device.reached.half_depth)       # what the model takes off for that product's depth
    device = with_reached(device, product=reached["flops_per_second"] / peak / deep,
                          stream=reached["bytes_per_second"] / device.bandwidth)
    if (attention := named.get("attention")) is not None:
        fastest = min(case["median_seconds"] for case in attention["cases"])
        device = with_reached(device, attention=attention["flops"] / fastest / peak)
    return device


def _with_network(device: Device, content: dict[str, Any]) -> Device:
    """Links from the collectives inside a node, the network from those across; where there are none, as they were."""
    fits = content["fit"]
    per_node = content["world"] // content["nodes"]
    device = replace(device, per_node=per_node) if per_node > 1 or content["nodes"] > 1 else device
    if (inside := fits.get("inside")) is not None:
        device = with_reached(replace(device, link=inside["bytes_per_second"]), link=1.0,
                              latency=inside["latency_seconds"])
    if (across := fits.get("across")) is not None:
        device = with_reached(replace(device, network=across["bytes_per_second"]), network=1.0,
                              far=across["latency_seconds"])
    return device


def _points(row: dict[str, Any]) -> list[Point]:
    config = Config.model_validate(row["config"] | {"steps": 10**6})
    return [Point(config, causes, row["breakdown"][name]) for name, causes in CAUSES if row["breakdown"][name] > 0]


def _predicted(device: Device, points: Sequence[Point]) -> list[float]:
    known: dict[int, dict[str, float]] = {}
    for point in points:
        if id(point.config) not in known:
            known[id(point.config)] = step_time(point.config, device).breakdown
    return [sum(known[id(point.config)][cause] for cause in point.causes) for point in points]


def _fitted(device: Device, points: Sequence[Point]) -> tuple[Device, float]:
    """The device whose figures say best what the points took, and how far off it is on average."""
    slower = median(point.seconds / predicted for point, predicted in
                    zip(points, _predicted(device, points), strict=True))
    start = np.array([log(getattr(device.reached, name)) - FASTER[name] * log(slower) for name in FITTED])

    def at(figures: Any) -> Device:
        return with_reached(device, **{name: exp(value) for name, value in zip(FITTED, figures, strict=True)})

    def off(figures: Any) -> Any:
        predicted = _predicted(at(figures), points)
        return np.array([log(each / point.seconds) for each, point in zip(predicted, points, strict=True)])

    best = now = start
    for _ in range(ROUNDS):
        here, step = off(now), 1e-3
        slopes = np.stack([(off(now + step * unit) - here) / step for unit in np.eye(len(now))], axis=1)
        system = np.concatenate((slopes, NEAR ** 0.5 * np.eye(len(now))))
        wanted = np.concatenate((-here, NEAR ** 0.5 * (start - now)))
        now = now + np.clip(np.linalg.lstsq(system, wanted, rcond=None)[0], -LONGEST, LONGEST)
        if _cost(off(now), now - start) < _cost(off(best), best - start):
            best = now
    return at(best), mean(abs(exp(each) - 1) for each in off(best))


def _cost(off: Any, away: Any) -> float:
    return float(off @ off + NEAR * (away @ away))
