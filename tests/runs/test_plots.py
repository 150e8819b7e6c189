"""Pictures that show all they are given."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fewstep.agents.report import Panel
from fewstep.runs.reports.distilled import errors_by_step
from fewstep.runs.reports.plots import (
    correlation_figure,
    curve_figure,
    dots_figure,
    image_grid,
    panels_figure,
    paths_figure,
    samples_figure,
    save_figure,
    timelines_figure,
    trajectories_figure,
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


def test_panels_are_drawn_each_with_its_curves():
    levels = {"learned": ([0, 1, 2], [80.0, 1.0, 0.01]), "Karras": ([0, 1, 2], [80.0, 2.0, 0.01])}
    lambdas = {"1": ([0, 1], [0.5, -300.0])}
    figure = panels_figure(
        [
            (Panel("noise level", "network call", scale="log"), levels),
            (Panel("lambda", "network call", scale="symlog"), lambdas),
        ]
    )
    first, second = figure.axes
    assert [axis.get_title() for axis in figure.axes] == ["noise level", "lambda"]
    assert [line.get_ydata().tolist() for line in first.lines] == [y for _, y in levels.values()]
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["learned", "Karras"]
    assert second.get_legend() is None
    assert (first.get_yscale(), second.get_yscale()) == ("log", "symlog")
    assert all(tick == round(tick) for tick in first.get_xticks())


def test_what_is_zero_everywhere_has_a_plain_axis_and_no_warning(recwarn, tmp_path):
    """Matplotlib cannot take logarithms of nothing but zeros, and warns."""
    zero = {"error": ([0.0, 1.0], [0.0, 0.0])}
    figures = [
        curve_figure(zero, x="calls", y="metric", floor=0.0),
        panels_figure([(Panel("error", "round", scale="log"), zero)]),
        panels_figure([(Panel("error", "round", scale="log"), {"nothing": ([], [])})]),
        timelines_figure({("error", "mean square"): (zero, {})}, "seconds"),
        errors_by_step(zero),
    ]
    for figure in figures:
        save_figure(figure, tmp_path / "figure.png")
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear"] * 5
    partly = curve_figure({"error": ([0.0, 1.0], [0.0, 0.5])}, x="calls", y="metric")
    save_figure(partly, tmp_path / "figure.png")
    assert partly.axes[0].get_yscale() == "log"
    assert not recwarn.list


def test_small_numbers_have_a_plain_axis_and_many_curves_a_legend_beside_it():
    curves = {str(k): ([0, 1], [0.1 * k, -0.2]) for k in range(8)}
    figure = panels_figure([(Panel("lambda", "network call", scale="symlog"), curves)])
    assert figure.axes[0].get_yscale() == "linear"
    assert figure.axes[0].get_legend() is None
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(curves)


def test_every_picture_is_laid_out_and_drawn(recwarn):
    """As `save_figure` does it; the runs of other tests are drawn without the layout."""
    points, times = torch.randn(5, 20, 2), [4.0, 3.0, 2.0, 1.0, 0.0]
    curves = {str(k): ([0, 1], [0.1 * k, -9.0]) for k in range(8)}
    for figure in (
        samples_figure({"before": points[0], "data": points[1]}, points[2]),
        trajectories_figure({"before": (points, times), "after": (points, times)}, points[0]),
        trajectories_figure({"after": (torch.rand(5, 20, 1, 4, 4), times)}, torch.rand(9, 1, 4, 4)),
        curve_figure({"sft": ([0.0, 9.0], [0.3, 0.2])}, x="calls", y="metric", floor=0.1),
        panels_figure([(Panel("lambda", "network call", scale="symlog"), curves)]),
        correlation_figure(np.array(times), {"epsilon": np.eye(4), "sample": np.eye(4)}),
        paths_figure({"reference": (np.array(times), points), "base": (times, points)}, [0, 1]),
        dots_figure({"Digits": {"5 calls": {"a": 0.5, "b": 2.0}}}, "distance", line=1.0),
    ):
        figure.canvas.draw()
        assert figure.get_layout_engine() is not None
    assert not recwarn.list


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
