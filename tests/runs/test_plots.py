"""Pictures that show all they are given."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep.runs.reports.plots import (
    curve_figure,
    dots_figure,
    image_grid,
    lambdas_figure,
    schedule_figure,
)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_has_lines_around_every_image(channels):
    images = torch.rand(5, channels, 4, 6) * 2 - 1
    grid = image_grid(images).reshape(2 * 5 + 1, 3 * 7 + 1, channels)
    for number, image in enumerate(images):
        top, left = 5 * (number // 3) + 1, 7 * (number % 3) + 1
        tile = grid[top : top + 4, left : left + 6]
        np.testing.assert_allclose(tile, (image.permute(1, 2, 0) + 1) / 2, atol=1e-6)
    for line in (grid[::5], grid[:, ::7]):
        assert (line == 0.5).all()


def test_a_curve_of_one_point_is_seen():
    figure = curve_figure({"one": ([0.0], [0.3])}, x="calls", y="metric")
    assert figure.axes[0].lines[0].get_marker() == "o"


def test_a_schedule_without_a_history_has_no_panel_for_it():
    levels = {"learned": np.geomspace(80, 0.01, 4)}
    weights = {"learned": np.ones(3)}
    bare = schedule_figure(levels, weights, {})
    history = {"error": ([10.0], [0.3]), "variance ratio": ([10.0], [0.9])}
    full = schedule_figure(levels, weights, history)
    titles = [[axis.get_title() for axis in figure.axes] for figure in (bare, full)]
    assert "stage one" in titles[1]
    assert titles[0] == titles[1][:2]
    assert all(tick == round(tick) for axis in full.axes[:3] for tick in axis.get_xticks())


def test_several_directions_are_told_apart():
    one, several = (
        lambdas_figure([9.0, 5.0, 1.0, 0.0], [np.ones(n) for n in counts])
        for counts in ((1, 1, 1), (1, 2, 3))
    )
    assert not one.legends
    labels = [text.get_text() for text in several.legends[0].get_texts()]
    assert labels == ["1", "2", "3"]


@pytest.mark.parametrize("factor", [1.3, 7, 60, 1e3, 1e6])
def test_ticks_of_a_logarithmic_axis_do_not_overlap(factor):
    scores = {str(row): 0.9 * factor ** (row / 4) for row in range(5)}
    figure = dots_figure({"Digits": {"5 calls": scores}}, "distance", line=1.0)
    figure.canvas.draw()
    (axis,) = figure.axes
    low, high = axis.get_xlim()
    ticks = [
        label.get_window_extent()
        for label, at in zip(axis.get_xticklabels(), axis.get_xticks(), strict=True)
        if low <= at <= high
    ]
    assert len(ticks) >= 2
    assert all(left.x1 < right.x0 for left, right in pairwise(ticks))
    assert not any(label.get_text() for label in axis.get_xticklabels(minor=True))
