"""The figures of a study: what is in their axes, not how large they are."""

import json
import math

import pytest

from wcitrain.report.figures import Point, measures_against_loss, measures_through_training, scatter_page

EPOCHS = (0, 4, 8)


def points_of(folder, best: int, values: dict[str, list[float]]) -> list[Point]:
    """Write the summary of a run and return its points, the epochs out of order."""
    folder.mkdir()
    summary = {"method": folder.name.upper(), "seed": 1, "best": {"epoch": best}}
    (folder / "summary.json").write_text(json.dumps(summary))
    points = [Point(folder, e, {name: row[i] for name, row in values.items()}) for i, e in enumerate(EPOCHS)]
    return points[::-1]


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
    first, second, first_ring, second_ring = wci.lines
    assert data(first) == ([0, 4, 8], [1.0, 5.0, 40.0])
    assert data(second) == ([0, 4, 8], [2.0, 3.0, 4.0])
    assert data(first_ring) == ([8], [40.0])
    assert data(second_ring) == ([4], [3.0])  # best at 7: the kept epoch before it
    assert (wci.get_yscale(), loss.get_yscale()) == ("log", "linear")
    legend = figure.legends[0]
    assert [text.get_text() for text in legend.get_texts()] == ["at", "awp"]
    assert "(or the kept epoch before it)" in legend.get_title().get_text()


def test_the_robust_loss_is_drawn_against_every_other_measure(points):
    """Axes that are swapped turn a flat minimum into a steep one."""
    figure = measures_against_loss(points)
    (ax,) = figure.axes
    assert (ax.get_title("left"), figure.get_supylabel()) == ("wci", "robust loss")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert data(ax.lines[0]) == ([40.0, 5.0, 1.0], [1.6, 1.5, 2.0])


def test_nothing_to_draw_gives_no_figure(points):
    """A study of the robust loss alone has no partner to draw; it must not crash after hours of measuring."""
    only = [Point(p.run, p.epoch, {"robust_loss": p.measures["robust_loss"]}) for p in points]
    assert measures_against_loss(only) is None
    assert len(measures_through_training(only).axes) == 1
    assert measures_against_loss([Point(p.run, p.epoch, {"wci": 1.0}) for p in points]) is None
    assert measures_through_training([Point(p.run, p.epoch, {}) for p in points]) is None
    assert scatter_page({}, {}, [1.0, 2.0], "gap", ["AT", "AWP"]) is None


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
    assert wide.get_title("left") == "wide\nτ 0.3"
    assert [line.get_label() for line in wide.lines] == ["AT", "AWP"]
    assert [data(line) for line in narrow.lines] == [([1.0, 3.0], [0.1, 0.3]), ([2.0, 4.0], [0.2, 0.4])]
    assert [ax.get_xscale() for ax in (wide, narrow, signed)] == ["log", "linear", "linear"]
    assert figure.get_supylabel() == "robust gap"
