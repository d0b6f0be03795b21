"""Charts: round ticks, no point lost, well-formed, and right where it can be measured in the picture."""

from __future__ import annotations

import re
from statistics import median
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.distributed.topology import Topology
from engine.report.charts import LEFT, TOP, Chart, Series, line_chart, moving_median
from engine.report.layout_picture import MAX_ROWS, layout_picture
from engine.report.svg import Axis, number, round_ticks, standalone

SVG = "{http://www.w3.org/2000/svg}"


def parse(picture: str) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def path_points(picture: str) -> list[list[tuple[float, float]]]:
    """Pixels of each path."""
    return [[(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.-]+),([\d.-]+)", path.get("d", ""))]
            for path in parse(picture).iter(f"{SVG}path")]


@given(st.floats(-1e3, 1e3), st.floats(1e-3, 1e6), st.integers(3, 10))
def test_ticks_are_round_inside_and_not_too_many(low: float, span: float, count: int) -> None:
    high = low + span
    ticks = round_ticks(low, high, count)
    assert len(ticks) <= count + 1
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)
    if len(ticks) > 1:
        step = (ticks[-1] - ticks[0]) / (len(ticks) - 1)
        leading = float(f"{step:.6e}".partition("e")[0])
        assert leading in (1, 2, 2.5, 5)


@pytest.mark.parametrize(("value", "text"), [
    (0, "0"), (3e-4, "0.0003"), (1.5e-6, "1.5e-06"), (0.1234, "0.1234"), (12.3, "12.3"), (1234, "1,234"),
    (2048.0, "2,048"), (45_600, "45.6k"), (999_999, "1000k"), (1.2e6, "1.2M"), (1.4e12, "1.4T"), (-12_000, "-12k"),
])
def test_numbers_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_points_land_where_the_axes_say() -> None:
    chart = Chart("Rate", [Series("lr", [(0, 0.0), (50, 1.0), (100, 0.5)])], from_zero=True)
    ((first, peak, last),) = path_points(line_chart(chart))
    assert first == (LEFT, chart.foot)
    assert last[0] == chart.right and peak[0] == (LEFT + chart.right) / 2
    assert chart.foot - last[1] == pytest.approx((chart.foot - peak[1]) / 2, abs=0.11)
    assert peak[1] > TOP


def test_spike_of_one_step_survives_a_hundred_thousand_points() -> None:
    values = [2.0] * 100_000
    values[54_321] = 9.0
    picture = line_chart(Chart("Loss", [Series("loss", list(enumerate(values)))]))
    ((*points,),) = path_points(picture)
    assert len(points) <= 2 * 560
    top = min(points, key=lambda point: point[1])
    assert top[0] == pytest.approx(Axis(0, 99_999, LEFT, 560 - 18)(54_321), abs=1)


def test_missing_value_breaks_the_line() -> None:
    picture = line_chart(Chart("Loss", [Series("loss", [(100 * i, None if i == 3 else 1.0 + i) for i in range(6)])]))
    d = next(parse(picture).iter(f"{SVG}path")).get("d", "")
    assert d.count("M") == 2 and d.count("L") == 3


def test_clipped_axis_keeps_the_centre_and_says_what_is_outside() -> None:
    values = [60.0] + [1.0 + 0.01 * (i % 5) for i in range(200)]
    series = [Series("seconds", list(enumerate(values, 1)))]
    whole, clipped = (line_chart(Chart("Step time", series, clipped=clip)) for clip in (False, True))
    assert "1 point off the scale, up to 60" in clipped and "off the scale" not in whole

    def span(picture: str) -> float:
        heights = [y for _, y in path_points(picture)[0][5:]]
        return max(heights) - min(heights)

    assert span(clipped) > 10 * span(whole)


def test_logarithmic_axis_gives_decades_equal_room() -> None:
    chart = Chart("Norm", [Series("norm", [(0, 100.0), (200, 10.0), (400, 1.0)])], log=True)
    ((a, b, c),) = path_points(line_chart(chart))
    assert b[1] - a[1] == pytest.approx(c[1] - b[1], abs=0.11)


def test_logarithmic_axis_is_given_up_where_a_value_is_zero() -> None:
    ((a, b, c),) = path_points(line_chart(Chart("Norm", [Series("n", [(0, 0.0), (200, 5.0), (400, 10.0)])], log=True)))
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.11)


def test_pointing_at_a_step_reads_its_values() -> None:
    chart = Chart("Loss", [Series("loss", [(step, 10.0 / step) for step in range(1, 21)]),
                           Series("validation", [(10, 1.25), (20, 0.75)], 1, "dashed")])
    tips = [tip for tip in parse(line_chart(chart)).iter(f"{SVG}g") if tip.get("class") == "tip"]
    texts = ["".join(tip.itertext()).strip() for tip in tips]
    assert len(tips) == 20
    assert texts[3] == "step 4 · loss 2.5"                   # no validation yet
    assert texts[11] == "step 12 · loss 0.8333 · validation 1.25"
    strips = [rect for tip in tips for rect in tip.iter(f"{SVG}rect")]
    widths = [float(rect.get("width", "")) for rect in strips]
    assert float(strips[0].get("x", "")) == LEFT and sum(widths) == pytest.approx(chart.right - LEFT, abs=1)


@pytest.mark.parametrize("points", [[], [(5, 2.0)], [(5, None)], [(1, 3.0), (2, 3.0)], [(1, 0.0), (2, 0.0)],
                                    [(1, -1e30), (2, 1e30)], [(7, 1e-30), (8, 2e-30)]])
@pytest.mark.parametrize("options", [{}, {"log": True}, {"clipped": True, "from_zero": True}])
def test_any_run_makes_a_well_formed_picture(points: list[tuple[float, float | None]],
                                             options: dict[str, Any]) -> None:
    parse(standalone(line_chart(Chart('A < B & "C"', [Series("<&>", points)], marks=[5], **options))))


def test_standalone_picture_carries_style_for_light_and_dark_and_no_script() -> None:
    picture = standalone(line_chart(Chart("Loss", [Series("loss", [(1, 1.0), (2, 2.0)])])))
    assert "prefers-color-scheme: dark" in picture
    assert "<script" not in picture and "http" not in picture.replace("http://www.w3.org/2000/svg", "")


@given(st.lists(st.none() | st.floats(-100, 100), max_size=40), st.sampled_from([1, 3, 5, 21]))
def test_moving_median_is_the_median_of_the_window(values: list[float | None], window: int) -> None:
    known = [(step, value) for step, value in enumerate(values) if value is not None]
    for i, (step, value) in enumerate(moving_median(list(enumerate(values)), window)):
        around = sorted(v for _, v in known[max(0, i - window // 2): i + window // 2 + 1])
        assert step == known[i][0]
        assert value == around[len(around) // 2]
        assert len(around) % 2 == 0 or value == median(around)


def test_layout_shows_every_rank_with_its_coordinates_and_layers() -> None:
    topology = Topology(pipeline=2, data=2, tensor=2)
    picture = layout_picture(topology, [["layers 0–1", "embedding"], ["layers 2–3", "LM head"]])
    hints = {title.text for title in parse(picture).iter(f"{SVG}title")}
    assert "rank 5: data 0, tensor 1, stage 1 (layers 2–3, LM head)" in hints
    assert "rank 2: data 1, tensor 0, stage 0 (layers 0–1, embedding)" in hints
    assert len([hint for hint in hints if hint and hint.startswith("rank")]) == 8


def test_layout_of_thousands_of_ranks_stays_a_picture() -> None:
    topology = Topology(pipeline=8, data=32, tensor=8)
    picture = layout_picture(topology, [[f"layers {10 * stage}–{10 * stage + 9}"] for stage in range(8)])
    ranks = re.findall(r">rank (\d+)<", picture)
    assert len(ranks) == MAX_ROWS * 8 and {"0", "263", "1799"} <= set(ranks)
    assert "and 30 more replicas" in picture
