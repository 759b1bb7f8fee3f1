"""Tables and figures from run folders whose numbers are known by hand."""

import copy
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from wcitrain.report import load_run, results_table, write_report
from wcitrain.report.figures import measures_against_loss, measures_through_training, scatter_page

LAYERS = ("backbone.conv1.weight", "backbone.layer1.0.conv1.weight", "backbone.fc.weight")
BEST = {Path("at"): 8.0, Path("awp"): 7.0}  # one epoch that was kept, one between kept ones


def write_run(folder, group="at", seed=0, *, method="AT", robust=0.5, num_epochs=3, **options):
    """Write a run folder: clean test accuracy is robust + 0.3, robust train accuracy robust + 0.1."""
    folder.mkdir(parents=True)
    recipe = {"name": group, "seed": seed, "data": {"source": "digits"}, "model": {"name": "resnet18"}}
    recipe |= {"optimizer": {"lr": 0.1}, "train": {"epochs": 3}} | options.get("settings", {})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    lines = []
    for epoch in range(1, num_epochs + 1):
        line = {"epoch": epoch, "step": 10 * epoch, "train_seconds": 10.0 * epoch, "robust_gap": 0.1}
        for split, shift in (("train", 0.1), ("val", 0.0)):
            line[f"{split}/clean_accuracy"] = robust + shift + 0.3
            line[f"{split}/robust_accuracy"] = robust + shift - 0.01 * abs(epoch - 2)  # best at epoch 2
            line[f"{split}/robust_loss"] = 2.0 - shift
        line |= {f"wci/{layer}": 10.0**-i * epoch for i, layer in enumerate(LAYERS)}
        line |= {"wci/total": 1.11 * epoch, "wci/total_stderr": 0.05}
        lines.append(line | options.get("metrics", {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if options.get("finished", True):
        test = {"clean_accuracy": robust + 0.3, "clean_accuracy_interval": [robust + 0.28, robust + 0.32]}
        test |= {"robust_accuracy": robust, "robust_accuracy_interval": [robust - 0.02, robust + 0.02]}
        last = {"epoch": num_epochs, "train": {"robust_accuracy": robust + 0.1}, "test": test}
        last |= {"robust_gap": 0.1, "wci": 3.3312, "wci_stderr": 0.05}
        best = copy.deepcopy(last) | {"epoch": 2 + seed}
        best["test"]["robust_accuracy"] += 0.03
        summary = {"name": folder.name, "seed": seed, "group": group, "method": method, "status": "finished"}
        summary |= {"last": last, "best": best, "attack": "PGD-10 linf 8/255", "train_seconds": 100.0}
        summary |= {"cost": {"relative": 1.25, "relative_to_pgd10_at": 0.5}, "peak_memory_mb": 1234.0}
        (folder / "summary.json").write_text(json.dumps(summary | options.get("summary", {})))
    return load_run(folder)


def cells(table, method):
    """Return the cells of the one row whose method is ``method``."""
    lines = [line for line in table.splitlines() if "|" in line]
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    (row,) = [row for row in rows if row[0] == method]
    return dict(zip(rows[0], row, strict=True))


def test_one_run_shows_values_with_their_intervals(tmp_path):
    """A single seed would otherwise look as certain as a mean over many."""
    assert cells(results_table([write_run(tmp_path / "a")]), "AT") == {
        "method": "AT",
        "seeds": "1",
        "clean test": "80.0 [78.0, 82.0]",
        "robust test": "50.0 [48.0, 52.0]",
        "robust train": "60.0",
        "gap": "10.0",
        "WCI": "3.33 ± 0.05",
        "best (epoch)": "53.0, epoch 2",
    }


def test_seeds_of_a_group_become_mean_and_range(tmp_path):
    """Rows per seed, or a range taken for a standard deviation, would mislead the comparison."""
    runs = [write_run(tmp_path / str(i), seed=i, robust=r) for i, r in enumerate((0.50, 0.52, 0.57))]
    row = cells(results_table(runs), "AT")
    assert row["seeds"] == "3"
    assert row["robust test"] == "53.0 (50.0 to 57.0)"  # (50 + 52 + 57) / 3
    assert row["best (epoch)"] == "56.0 (53.0 to 60.0), epochs 2 to 4"
    runs.append(write_run(tmp_path / "b", "large"))  # two groups of one method are told apart
    assert [cells(results_table(runs), f"AT ({name})")["seeds"] for name in ("at", "large")] == ["3", "1"]


def test_unfinished_runs_have_their_own_row_of_validation_numbers(tmp_path):
    """Averaged with finished seeds, a half-trained run on validation data would pass for a test result."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, robust=0.3, finished=False)]
    assert runs[1].group == "at"  # the recipe's name
    table = results_table(runs)
    assert cells(table, "AT")["robust test"] == "50.0 [48.0, 52.0]"
    row = cells(table, "AT, seed 1 (unfinished, epoch 3)")
    assert row["robust test"] == "29.0 (val)"  # epoch 3 is one point below the best
    assert row["best (epoch)"] == "30.0 (val), epoch 2"


def test_missing_numbers_are_counted(tmp_path):
    """A seed that diverged must not vanish into the mean of the others; a run may be writing a line."""
    runs = [write_run(tmp_path / str(i), seed=i) for i in range(3)]
    with (tmp_path / "0" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "val/rob')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:4: the last line is not whole"):
        assert [m["epoch"] for m in load_run(tmp_path / "0").metrics] == [1, 2, 3]
    runs[1].summary["last"]["wci"] = None
    runs[2].summary["last"]["wci"] = float("nan")
    assert cells(results_table(runs), "AT")["WCI"] == "3.33, 1 of 3 runs"


def test_a_sentence_says_when_the_runs_do_not_tell_the_methods_apart(tmp_path):
    """A ranking whose intervals overlap is none; rows in another order than the runs hide a trend."""
    shares = {"z": 0.50, "a": 0.53, "m": 0.52}  # each ± 2 points
    runs = [write_run(tmp_path / name, name, method=name, robust=share) for name, share in shares.items()]
    table = results_table(runs)
    assert "does not tell these methods apart: their ranges overlap." in table
    assert [line.split()[1] for line in table.splitlines()[2:5]] == ["z", "a", "m"]
    runs.append(write_run(tmp_path / "far", "far", method="far", robust=0.56))  # above z alone
    # Robust accuracies under different attacks do not compare.
    runs[0].summary["attack"] = "PGD-50 linf 8/255"
    assert "apart" not in results_table(runs)
    assert "attack: PGD-10 linf 8/255 / PGD-50 linf 8/255" in results_table(runs)
    assert "apart" not in results_table(runs[:1])


def test_runs_that_are_not_independent_warn_or_are_refused(tmp_path):
    """Two runs of one seed shrink the range without adding evidence; a run given twice is no second run."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    with pytest.warns(UserWarning, match="holds a seed twice"):
        results_table(runs)
    (tmp_path / "again").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"got .*again more than once; expected each run once"):
        write_report([runs[0], load_run(tmp_path / "again")], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="got no runs"):
        results_table([])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", None, r"got no metrics\.jsonl; expected a run folder: recipe\.yaml, metrics\.js"),
        ("metrics.jsonl", "", r"got no whole line; expected one an epoch"),
        ("metrics.jsonl", 'oops\n{"epoch": 1}\n', r"metrics\.jsonl:1: got 'oops'"),
        ("metrics.jsonl", '[1]\n{"epoch": 1}\n', r"metrics\.jsonl:1: got '\[1\]'"),
        ("recipe.yaml", "- a\n", r"recipe\.yaml: got \['a'\]; expected a mapping"),
        ("recipe.yaml", "a: [\n", r"recipe\.yaml: .*expected YAML"),
        ("summary.json", "{", r"summary\.json: got .*expected a JSON object"),
        ("summary.json", "[]", r"summary\.json: got \[\]; expected a JSON object"),
    ],
)
def test_damaged_folders_are_named(tmp_path, file, content, message):
    """A traceback from a parser does not say which of forty run folders to look at."""
    write_run(tmp_path / "a")
    (tmp_path / "a" / file).unlink()
    if content is not None:
        (tmp_path / "a" / file).write_text(content)
    with pytest.raises(ValueError, match=rf"(?s)^{tmp_path / 'a'}.*{message}"):
        load_run(tmp_path / "a")


def assert_is_drawn(path):
    image = imread(path)[..., :3]
    assert 0.005 < np.mean(image.min(axis=2) < 0.95) < 0.9, f"{path.name} is blank or full"


def test_a_report_writes_table_page_and_figures_and_nothing_else(tmp_path):
    """A figure that is blank or missing shows only when someone opens the folder."""
    runs = [write_run(tmp_path / f"at{i}", seed=i, robust=0.5 + i / 50) for i in range(2)]
    runs.append(write_run(tmp_path / "wci", "wci", method="WCI r=1", robust=0.6, num_epochs=5))
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    (out / "table.md").write_text("old")
    paths = write_report(runs, out)
    figures = ["overview.png", "curves.png", "wci_layers.png"]
    assert [path.name for path in paths] == ["table.md", "report.html", *figures]
    assert {path.name for path in out.iterdir()} == {path.name for path in paths} | {"notes.txt"}
    assert (out / "table.md").read_text("utf-8") == results_table(runs)
    for path in paths[2:]:
        assert_is_drawn(path)
    pyplot = sys.modules.get("matplotlib.pyplot")  # another test may have imported it
    assert pyplot is None or not pyplot.get_fignums(), "a figure is held in pyplot's global state"
    again = write_report([load_run(run.folder) for run in runs], tmp_path / "again")
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(paths, again, strict=True))


@pytest.mark.parametrize("values", [(None, float("nan"), float("inf")), (-1.0, 0.0, -1.0)])
def test_figures_survive_values_that_are_not_numbers(tmp_path, values):
    """A diverged run is exactly the one whose report somebody wants to see."""
    keys = ["wci/total", f"wci/{LAYERS[0]}", "wci/total_stderr"]
    keys += ["robust_gap", "val/robust_loss", "measures/x"]
    metrics = dict(zip(keys, (*values, *values), strict=True))
    empty = dict.fromkeys((f"wci/{layer}" for layer in LAYERS), values[1])
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "c", "c", metrics=empty)]
    runs.append(write_run(tmp_path / "b", "b", method="B", metrics=metrics, summary={"train_seconds": None}))
    paths = write_report(runs, tmp_path / "out")
    for path in paths[2:]:
        assert_is_drawn(path)
    drawn = re.findall(r' (?:d|points|x|y|viewBox)="([^"]*)"', paths[1].read_text("utf-8"))
    assert len(drawn) > 100
    assert not [value for value in drawn if re.search("nan|inf", value)]


@pytest.fixture
def points():
    """Two runs at three epochs, out of order."""
    values = {"at": ([1.0, 5.0, 40.0], [2.0, 1.5, 1.6]), "awp": ([2.0, 3.0, 4.0], [2.1, 1.4, 1.7])}
    return [
        (Path(name), epoch, {"wci": wci[i], "robust_loss": loss[i]})
        for name, (wci, loss) in values.items()
        for i, epoch in ((2, 8), (1, 4), (0, 0))
    ]


def data(line) -> tuple[list, list]:
    return list(line.get_xdata()), list(line.get_ydata())


def test_curves_run_over_the_epochs_and_rings_are_at_the_best_kept_epoch(points):
    """A ring at an epoch after the best would show what early stopping has never seen."""
    figure = measures_through_training(points, BEST)
    wci, loss = figure.axes
    assert [ax.get_ylabel() for ax in (wci, loss)] == ["wci", "robust loss"]
    first, second, first_ring, second_ring = wci.lines
    assert data(first) == ([0, 4, 8], [1.0, 5.0, 40.0])
    assert data(second) == ([0, 4, 8], [2.0, 3.0, 4.0])
    assert data(first_ring) == ([8], [40.0])
    assert data(second_ring) == ([4], [3.0])  # best at 7: the kept epoch before it
    assert (wci.get_yscale(), loss.get_yscale()) == ("log", "linear")
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["at", "awp"]
    assert len(measures_through_training(points, {Path("at"): math.nan}).axes[0].lines) == 2


def test_the_robust_loss_is_drawn_against_every_other_measure(points):
    """Axes that are swapped turn a flat minimum into a steep one."""
    figure = measures_against_loss(points)
    (ax,) = figure.axes
    assert (ax.get_title("left"), figure.get_supylabel()) == ("wci", "robust loss")
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "linear")
    assert data(ax.lines[0]) == ([40.0, 5.0, 1.0], [1.6, 1.5, 2.0])
    for name in ("robust_loss", "wci"):  # alone it has no partner to draw
        assert measures_against_loss([(run, epoch, {name: one[name]}) for run, epoch, one in points]) is None
    assert measures_through_training([(run, epoch, {}) for run, epoch, _ in points], BEST) is None


def test_scatter_panels_hold_the_pairs_of_each_group():
    """A pair under another group's colour, or a shifted target, is another correlation."""
    panels = {"wide": [1.0, 2, 50, math.nan], "narrow": [1.0, 2.0, 3.0, 4.0], "signed": [-1.0, 1, 10, 100]}
    groups = ["AT", "AWP", "AT", "AWP"]
    figure = scatter_page(panels, {"wide": "τ 0.3"}, [0.1, 0.2, 0.3, 0.4], "robust gap", groups)
    wide, narrow, signed = figure.axes
    assert wide.get_title("left") == "wide\nτ 0.3"
    assert [line.get_label() for line in wide.lines] == ["AT", "AWP"]
    assert [data(line) for line in narrow.lines] == [([1.0, 3.0], [0.1, 0.3]), ([2.0, 4.0], [0.2, 0.4])]
    assert [ax.get_xscale() for ax in (wide, narrow, signed)] == ["log", "linear", "linear"]
    assert figure.get_supylabel() == "robust gap"
