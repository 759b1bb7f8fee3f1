"""The figures of a study: what is in their axes, not how large they are."""

import json
import math

import numpy as np
import pytest

from wcitrain.report.scatter import scatter_page
from wcitrain.report.through_training import Point, measures_against_loss, measures_through_training

EPOCHS = (0, 4, 8)


def points_of(folder, best: int, values: dict[str, list[float]]) -> list[Point]:
    """Write the summary of a run and return its points, the epochs out of order."""
    folder.mkdir()
    summary = {"method": folder.name.upper(), "seed": 1, "best": {"epoch": best}}
    (folder / "summary.json").write_text(json.dumps(summary))
    found = [Point(folder, e, {name: row[i] for name, row in values.items()}) for i, e in enumerate(EPOCHS)]
    return found[::-1]


@pytest.fixture
def points(tmp_path) -> list[Point]:
    """Two runs: one whose best epoch was kept, one whose best epoch lies between kept ones."""
    first = {"wci": [1.0, 5.0, 40.0], "robust_loss": [2.0, 1.5, 1.6]}
    second = {"wci": [2.0, 3.0, 4.0], "robust_loss": [2.1, 1.4, 1.7]}
    return points_of(tmp_path / "at", 8, first) + points_of(tmp_path / "awp", 7, second)


def data(line) -> tuple[list, list]:
    return list(line.get_xdata()), list(line.get_ydata())


def test_curves_run_over_the_epochs_and_rings_are_at_the_best_kept_epoch(points):
    """A ring at an epoch after the best would show what early stopping has never seen."""
    figure = measures_through_training(points)
    wci, loss = figure.axes
    assert [ax.get_ylabel() for ax in (wci, loss)] == ["wci", "robust loss"]
    first, first_ring, second, second_ring = wci.lines
    assert data(first) == ([0, 4, 8], [1.0, 5.0, 40.0])
    assert data(second) == ([0, 4, 8], [2.0, 3.0, 4.0])
    assert data(first_ring) == ([8], [40.0])
    assert data(second_ring) == ([4], [3.0])  # best at 7: the kept epoch before it
    assert (wci.get_yscale(), loss.get_yscale()) == ("log", "linear")
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["AT, seed 1", "AWP, seed 1"]
    assert "(or the kept epoch before it)" in legend.get_title().get_text()


def test_two_recipes_of_one_method_keep_their_names_apart(tmp_path):
    """Plain AT and AT with more weight decay are both "AT": two curves under one name."""
    points = []
    for name in ("at", "weight-decay"):
        (tmp_path / name).mkdir()
        summary = {"method": "AT", "group": name, "seed": 0}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
        points.append(Point(tmp_path / name, 1, {"wci": 2.0}))
    labels = [line.get_label() for line in measures_through_training(points).axes[0].lines]
    assert labels == ["AT (at), seed 0", "AT (weight-decay), seed 0"]


def test_a_run_without_a_summary_has_its_folders_name_and_no_ring(tmp_path):
    """An unfinished run has no best epoch yet."""
    figure = measures_through_training(
        [Point(tmp_path / "new", 3, {"wci": 2.0}), Point(tmp_path / "new", 1, {})]
    )
    (line,) = figure.axes[0].lines
    assert line.get_label() == "new"
    assert line.get_xdata().tolist() == [1, 3]
    assert np.array_equal(line.get_ydata(), [math.nan, 2.0], equal_nan=True)


def test_the_robust_loss_is_drawn_against_every_other_measure(points):
    """Axes that are swapped turn a flat minimum into a steep one."""
    (ax,) = measures_against_loss(points).axes
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("wci", "robust loss")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    path, end = ax.lines[:2]
    assert data(path) == ([1.0, 5.0, 40.0], [2.0, 1.5, 1.6])
    assert data(end) == ([40.0], [1.6])


def test_nothing_to_draw_gives_no_figure(points):
    """A study of the robust loss alone has no partner to draw; it must not crash after hours of measuring."""
    only = [Point(p.run, p.epoch, {"robust_loss": p.measures["robust_loss"]}) for p in points]
    assert measures_against_loss(only) is None
    assert len(measures_through_training(only).axes) == 1
    assert measures_against_loss([Point(p.run, p.epoch, {"wci": 1.0}) for p in points]) is None
    assert measures_through_training([Point(p.run, p.epoch, {}) for p in points]) is None
    assert scatter_page({}, {}, [1.0, 2.0], "gap", ["AT", "AWP"]) is None


def test_one_measure_fills_the_page(points):
    """A single panel in a quarter of the picture is read as three that failed."""
    for figure in (
        measures_against_loss(points),
        scatter_page({"wci": [1.0, 2.0]}, {}, [0.1, 0.2], "gap", ["AT", "AWP"]),
    ):
        figure.draw_without_rendering()
        (ax,) = figure.axes
        assert ax.get_position().width > 0.7


def test_scatter_panels_hold_the_pairs_of_each_group():
    """A pair under another group's colour, or a shifted target, is another correlation."""
    panels = {
        "wide": [1.0, 2.0, 50.0, math.nan],
        "narrow": [1.0, 2.0, 3.0, 4.0],
        "signed": [-1.0, 1.0, 10.0, 100.0],
    }
    figure = scatter_page(
        panels, {"wide": "τ 0.3"}, [0.1, 0.2, 0.3, 0.4], "robust gap", ["AT", "AWP", "AT", "AWP"]
    )
    wide, narrow, signed = figure.axes
    assert wide.get_title() == "wide\nτ 0.3"
    assert [c.get_label() for c in wide.collections] == ["AT", "AWP"]
    at, awp = (c.get_offsets() for c in narrow.collections)
    assert (at.tolist(), awp.tolist()) == ([[1.0, 0.1], [3.0, 0.3]], [[2.0, 0.2], [4.0, 0.4]])
    assert [ax.get_xscale() for ax in (wide, narrow, signed)] == ["log", "linear", "linear"]
    assert figure.get_supylabel() == "robust gap"


def test_panels_beyond_the_last_are_hidden(points):
    """Empty axes look like a measure without values."""
    many = [Point(p.run, p.epoch, {f"m{k}": float(k) for k in range(3)}) for p in points]
    assert [ax.get_visible() for ax in measures_through_training(many).axes] == [True, True, True, False]
