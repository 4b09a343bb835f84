"""Curves, heat maps and their drawing."""

import re
from unittest.mock import patch

import numpy as np
import pytest
from matplotlib.axes import Axes

from padd_ds.report.plots import block_means, curves, distribution, expert_map, running_mean, stacked_bars
from padd_ds.report.source import Series


def series(values: list[float]) -> Series:
    return Series(steps=np.arange(len(values), dtype=float), values=np.array(values))


def test_block_means_keep_short_curves_and_average_long_ones() -> None:
    values = np.array([1.0, 3.0, 5.0, 7.0, 10.0])
    assert block_means(values, 5) is values
    assert block_means(values, 3).tolist() == [2.0, 6.0, 10.0]


def test_running_mean_equals_a_slow_loop() -> None:
    values = np.random.default_rng(0).normal(size=20)
    slow = [values[max(i - 2, 0) : i + 3].mean() for i in range(20)]
    assert running_mean(values, 5) == pytest.approx(slow)


def test_colours_come_from_the_page() -> None:
    svg = curves({"x": series([1.0, 2.0]), "y": series([2.0, 1.0])}, reference=1.5).svg("a & b", "k")
    assert set(re.findall(r"#[0-9a-f]{6}\b", svg)) == set()
    assert {"var(--ink)", "var(--grid)", "var(--series-1)", "var(--series-2)"} <= set(re.findall(r"var\([^)]*\)", svg))
    assert 'aria-label="a &amp; b"' in svg


def test_the_same_drawing_is_the_same_text_and_keys_keep_names_apart() -> None:
    first, again, other = (curves({"loss": series([1.0, 2.0])}).svg("loss", key) for key in ("a", "a", "b"))
    assert first == again
    names, other_names = (set(re.findall(r'\bid="([^"]+)"', svg)) for svg in (first, other))
    assert names and not names & other_names


def test_a_long_curve_stays_small() -> None:
    values = list(np.random.default_rng(0).normal(size=50_000))
    assert len(curves({"loss": series(values)}).svg("loss", "k")) < 40_000


@pytest.mark.parametrize("values", [[0.0], [5.0, 5.0], [-1.0, 1e-9], [1e-30, 1e30]])
def test_odd_values_can_be_drawn(values: list[float]) -> None:
    assert "nan" not in curves({"odd": series(values)}).svg("odd", "k").lower()


@pytest.mark.parametrize(
    ("values", "lowest", "highest"),
    [([0.0, 2e-4], "10⁻⁴", "10⁻³"), ([1e-5, 0.03], "10⁻⁵", "10⁻¹"), ([1.0], "10⁰", "10¹")],
)
def test_a_log_axis_labels_the_decades_around_its_values(values: list[float], lowest: str, highest: str) -> None:
    labels = re.findall(r">(10[⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)</text>", curves({"log": series(values)}, log=True).svg("log", "k"))
    assert (labels[0], labels[-1]) == (lowest, highest)


def test_bars_stand_on_each_other() -> None:
    svg = stacked_bars({"x": series([1.0]), "y": series([1.0])}).svg("time", "k")
    boxes = {}
    for variable in ("--series-1", "--series-2"):
        path = re.search(rf'd="([^"]*)"[^>]*fill: var\({variable}\)', svg)
        assert path is not None
        boxes[variable] = [float(y) for y in re.findall(r"[ML] [\d.]+ ([\d.]+)", path[1])]
    # y grows downwards: the second bar ends where the first begins
    assert max(boxes["--series-2"]) == pytest.approx(min(boxes["--series-1"]))


def test_a_distribution_ends_at_all_values_but_those_above_the_last_edge() -> None:
    with patch.object(Axes, "step") as step:
        distribution([0.1, 1.0, 10.0], {"d": [1, 2, 4, 1]}, "x").svg("d", "k")
    assert step.call_args.args[1].tolist() == [1 / 8, 3 / 8, 7 / 8]


def test_a_heat_map_is_an_image_of_one_pixel_per_cell() -> None:
    svg = expert_map(np.zeros((3, 5)), 1.0).svg("load", "k")
    image = re.search(r"<image[^>]*>", svg)
    assert image is not None and 'width="5" height="3"' in image[0] and "data:image/png;base64" in image[0]
