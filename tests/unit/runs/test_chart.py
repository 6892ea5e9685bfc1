from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptcli.runs.chart import MAX_POINTS, Axis, Line, braille, smooth, svg, thin, tick_text, ticks

CURVE = [(float(step), 5 * math.exp(-step / 300) + 2) for step in range(10, 1000, 10)]


@given(st.floats(-1e9, 1e9), st.floats(1e-6, 1e9))
def test_ticks_enclose_the_range_in_round_steps(low: float, width: float) -> None:
    found = ticks(low, low + width, 4)
    step = found[1] - found[0]
    slack = 1e-6 * max(abs(low), abs(low + width), step)
    assert found[0] <= low + slack and found[-1] >= low + width - slack
    assert 2 <= len(found) <= 8


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0, 1e-3, 2e-3, 3e-3], ["0", "1e-3", "2e-3", "3e-3"]),
        ([2, 2.5, 3], ["2.0", "2.5", "3.0"]),
        ([0, 20_000, 40_000], ["0", "20K", "40K"]),
        ([0, 500, 1000], ["0", "500", "1,000"]),
        ([0, 500_000, 1_000_000], ["0", "0.5M", "1.0M"]),
        ([0, 2_500_000, 5_000_000], ["0", "2.5M", "5.0M"]),
    ],
)
def test_tick_texts_share_digits_and_units(values: list[float], texts: list[str]) -> None:
    assert [tick_text(value, values) for value in values] == texts


@pytest.mark.parametrize("points", [CURVE, CURVE[:1], [(5.0, 0.0), (5.0, 0.0)], [(1.0, -3.0), (2.0, 1e12)]])
def test_any_curve_makes_well_formed_svg_inside_its_box(points: list[tuple[float, float]]) -> None:
    picture = svg([Line(points, "main", "a <b> & c")], "x & y", str, last_step=1000, width=500, height=200)
    root = ElementTree.fromstring(picture)
    assert any("a <b> & c" in (title.text or "") for title in root.iter("title"))
    for line in root.iter("polyline"):
        for pair in line.attrib["points"].split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= 500 and 0 <= y <= 200
    assert not re.search(r"nan|inf", picture)


def test_an_axis_of_its_own_puts_equal_factors_at_equal_distances_and_names_its_points() -> None:
    axis = Axis(1.0, 64.0, [(1.0, "one"), (8.0, "eight")], lambda x: f"at {x:g}", log=True)
    line = Line([(1.0, 0.5), (8.0, 0.2), (64.0, 0.9)], "main", "a", tips=["first", "second"])
    root = ElementTree.fromstring(svg([line], "x", str, axis=axis, values=(0.0, 1.0), width=500, height=200))
    (points,) = (each.attrib["points"].split() for each in root.iter("polyline"))
    left, middle, right = (float(pair.split(",")[0]) for pair in points)
    assert middle - left == pytest.approx(right - middle, abs=0.2)
    assert [title.text for title in root.iter("title")] == ["at 1\na: first", "at 8\na: second", "at 64\na: 0.9"]
    assert {"one", "eight", "0", "1.0"} <= {text.text for text in root.iter("text")}


def test_a_spike_survives_thinning() -> None:
    points = [(float(step), 1.0) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    kept = thin(points, MAX_POINTS)
    assert len(kept) <= MAX_POINTS
    assert (54_321.0, 99.0) in kept
    assert kept[0] == points[0] and kept[-1] == points[-1]
    assert [x for x, _ in kept] == sorted(x for x, _ in kept)


def test_smoothing_does_not_lag_behind_a_slope() -> None:
    line = [(float(step), 3.0 * step) for step in range(500)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    assert smooth([]) == []


def test_braille_goes_from_the_top_left_to_the_bottom_right() -> None:
    lines = braille(CURVE, width=20, height=4)
    assert [len(line) for line in lines] == [20] * 4
    assert lines[0][0] != "\u2800" and lines[-1][-1] != "\u2800"
    assert lines[0][-1] == "\u2800" and lines[-1][0] == "\u2800"
    assert braille([], width=20, height=4) == []
    assert len(braille([(1.0, 2.0)], width=5, height=2)) == 2
