"""Tables and figures from run folders whose numbers are known by hand."""

import copy
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from matplotlib.image import imread

from wcitrain.report import load_run, results_table, write_report
from wcitrain.report.drawing import short_names

LAYERS = ("backbone.conv1.weight", "backbone.layer1.0.conv1.weight", "backbone.fc.weight")


def write_run(folder, group="at", seed=0, *, method="AT", robust=0.5, num_epochs=3, **options):
    """Write a run folder: clean test accuracy is robust + 0.3, robust train accuracy robust + 0.1."""
    folder.mkdir(parents=True)
    recipe = {
        "name": group,
        "seed": seed,
        "data": {"source": "digits"},
        "model": {"name": "resnet18", "kwargs": {}},
    }
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
    os.utime(folder / "metrics.jsonl", (1_700_000_000, 1_700_000_000))  # 2023-11-14 22:13 UTC
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
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in table.splitlines() if "|" in line
    ]
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
        "cost": "1.00×",
        "best (epoch)": "53.0, epoch 2",
    }


def test_seeds_of_a_group_become_mean_and_range(tmp_path):
    """Rows per seed, or a range taken for a standard deviation, would mislead the comparison."""
    runs = [write_run(tmp_path / str(i), seed=i, robust=r) for i, r in enumerate((0.50, 0.52, 0.57))]
    row = cells(results_table(runs), "AT")
    assert row["seeds"] == "3"
    assert row["robust test"] == "53.0 (50.0 to 57.0)"  # (50 + 52 + 57) / 3
    assert row["clean test"] == "83.0 (80.0 to 87.0)"
    assert row["best (epoch)"] == "56.0 (53.0 to 60.0), epochs 2 to 4"


def test_at_best_reports_the_best_epoch(tmp_path):
    """The choice of the epoch must reach every column, or last and best would silently be mixed."""
    assert cells(results_table([write_run(tmp_path / "a")], at="best"), "AT")["robust test"].startswith(
        "53.0"
    )
    with pytest.raises(ValueError, match='got at=\'final\'; expected "last" or "best"'):
        results_table([write_run(tmp_path / "b")], at="final")


def test_cost_is_a_multiple_of_the_mean_of_plain_training(tmp_path):
    """Dividing by one seed, or by another method, would misstate what a method costs."""
    runs = [
        write_run(tmp_path / f"at{i}", seed=i, summary={"train_seconds": s})
        for i, s in enumerate((80.0, 120.0))
    ]
    runs.append(write_run(tmp_path / "wci", "wci", method="WCI r=1", summary={"train_seconds": 230.0}))
    table = results_table(runs)
    assert cells(table, "WCI r=1")["cost"] == "2.30×"  # 230 / mean(80, 120)
    assert cells(table, "AT")["cost"] == "1.00× (0.80 to 1.20)"
    assert cells(results_table(runs[2:]), "WCI r=1")["cost"] == "–"
    runs.append(write_run(tmp_path / "b", "large"))  # two plain groups leave no single reference
    assert [cells(results_table(runs), f"AT ({name})")["cost"] for name in ("at", "large")] == ["–", "–"]


def test_unfinished_runs_have_their_own_row_of_validation_numbers(tmp_path):
    """Averaged with finished seeds, a half-trained run on validation data would pass for a test result."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", seed=1, robust=0.3, finished=False)]
    assert [run.is_finished for run in runs] == [True, False]
    assert runs[1].group == "at"  # the recipe's name
    table = results_table(runs)
    assert cells(table, "AT")["robust test"] == "50.0 [48.0, 52.0]"
    row = cells(table, "AT, seed 1 (unfinished, epoch 3)")
    assert row["robust test"] == "29.0 (val)"  # epoch 3 is one point below the best
    assert row["best (epoch)"] == "30.0 (val), epoch 2"
    assert row["cost"] == "–"


def test_missing_numbers_are_counted(tmp_path):
    """A seed that diverged must not vanish into the mean of the others."""
    runs = [write_run(tmp_path / str(i), seed=i) for i in range(3)]
    runs[1].summary["last"]["wci"] = None
    runs[2].summary["last"]["wci"] = float("nan")
    assert cells(results_table(runs), "AT")["WCI"] == "3.33, 1 of 3 runs"


def test_a_sentence_says_when_the_runs_do_not_tell_the_methods_apart(tmp_path):
    """A ranking whose intervals overlap is none; rows in another order than the runs hide a trend."""
    shares = {"z": 0.50, "a": 0.53, "m": 0.52}  # each ± 2 points
    runs = [write_run(tmp_path / name, name, method=name, robust=share) for name, share in shares.items()]
    table = results_table(runs)
    assert "does not tell these methods apart: their intervals overlap." in table
    assert [line.split()[1] for line in table.splitlines()[2:5]] == ["z", "a", "m"]
    runs.append(write_run(tmp_path / "far", "far", method="far", robust=0.56))  # above z alone
    assert "apart" not in results_table(runs)
    assert "apart" not in results_table(runs[:1])


def test_a_seed_given_twice_warns(tmp_path):
    """Two runs of one seed would shrink the range without adding evidence."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b")]
    with pytest.warns(UserWarning, match="holds a seed twice"):
        results_table(runs)


def test_a_run_given_twice_is_refused(tmp_path):
    """It would count as two runs of one method, whatever its folder is called."""
    run = write_run(tmp_path / "a")
    (tmp_path / "again").symlink_to(tmp_path / "a")
    with pytest.raises(ValueError, match=r"got .*again more than once; expected each run once"):
        write_report([run, load_run(tmp_path / "again")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_different_attacks_are_all_named(tmp_path):
    """Robust accuracies under different attacks do not compare, and nothing else in the table would tell."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "b", method="B")]
    runs[1].summary["attack"] = "PGD-50 linf 8/255"
    assert "attack: PGD-10 linf 8/255 / PGD-50 linf 8/255" in results_table(runs)


def test_a_half_written_last_line_is_left_out_with_a_warning(tmp_path):
    """Reporting on a run that is writing would otherwise fail by chance."""
    write_run(tmp_path / "a")
    with (tmp_path / "a" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 4, "val/rob')
    with pytest.warns(UserWarning, match=r"metrics\.jsonl:4: the last line is not whole"):
        assert [m["epoch"] for m in load_run(tmp_path / "a").metrics] == [1, 2, 3]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (
            "metrics.jsonl",
            None,
            r"without metrics\.jsonl; expected a run folder: recipe\.yaml, metrics\.jsonl and",
        ),
        ("metrics.jsonl", "", r"got no whole line; expected one JSON object an epoch"),
        ("metrics.jsonl", 'oops\n{"epoch": 1}\n', r"metrics\.jsonl:1: got 'oops'"),
        ("recipe.yaml", "- a\n", r"recipe\.yaml: got \['a'\]; expected a mapping"),
        ("recipe.yaml", "a: [\n", r"recipe\.yaml: got .*expected YAML"),
        ("summary.json", "{", r"summary\.json: got .*Delete it to report the run as unfinished"),
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


def test_what_is_not_a_folder_or_holds_no_runs_is_refused(tmp_path):
    """A misspelt path must not become an empty report."""
    with pytest.raises(ValueError, match="nowhere: got a path that is not a folder"):
        load_run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="got no runs"):
        results_table([])
    run = write_run(tmp_path / "a")
    with pytest.raises(ValueError, match="which is a file; expected a folder"):
        write_report([run], tmp_path / "a" / "recipe.yaml")


def assert_is_drawn(path: Path):
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
    figures = ["overview.png", "curves.png", "wci_layers.png"]
    paths = write_report(runs, out)
    assert [path.name for path in paths] == ["table.md", "report.html", *figures]
    assert {path.name for path in out.iterdir()} == {path.name for path in paths} | {"notes.txt"}
    assert (out / "table.md").read_text("utf-8") == results_table(runs)
    assert (out / "notes.txt").read_text() == "mine"
    for path in paths[2:]:
        assert_is_drawn(path)
    pyplot = sys.modules.get("matplotlib.pyplot")  # another test may have imported it
    assert pyplot is None or not pyplot.get_fignums(), "a figure is held in pyplot's global state"
    again = write_report([load_run(run.folder) for run in runs], tmp_path / "again")
    assert [a.read_bytes() == b.read_bytes() for a, b in zip(paths, again, strict=True)] == [True] * len(
        paths
    )


def test_figures_without_numbers_are_left_out_and_old_ones_warn(tmp_path):
    """Beside a new table, a figure of an earlier report would be read as showing the same runs."""
    without = {key: None for key in ("wci/total", *(f"wci/{layer}" for layer in LAYERS))}
    run = write_run(tmp_path / "a", num_epochs=1, metrics=without, finished=False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "overview.png").write_bytes(b"old")
    with pytest.warns(UserWarning, match=r"overview\.png is from an earlier report"):
        paths = write_report([run], tmp_path / "out")
    assert [path.name for path in paths] == ["table.md", "report.html", "curves.png"]
    assert_is_drawn(paths[2])
    assert (tmp_path / "out" / "overview.png").read_bytes() == b"old"


@pytest.mark.parametrize("values", [(None, float("nan"), float("inf")), (-1.0, 0.0, -1.0)])
def test_figures_survive_values_that_are_not_numbers(tmp_path, values):
    """A diverged run is exactly the one whose report somebody wants to see."""
    keys = (
        "wci/total",
        f"wci/{LAYERS[0]}",
        "robust_gap",
        "val/robust_loss",
        "measures/x",
        "wci/total_stderr",
    )
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


def test_layer_names_lose_only_what_all_of_them_share():
    """A prefix cut inside a word, or a name cut to nothing, would point at the wrong layer."""
    assert short_names([f"wci/{layer}" for layer in LAYERS]) == ["conv1", "layer1.0.conv1", "fc"]
    assert short_names(["wci/layer1.weight", "wci/layer2.weight"]) == ["layer1", "layer2"]
    assert short_names(["wci/head.weight", "wci/head.norm.weight"]) == ["head", "head.norm"]
