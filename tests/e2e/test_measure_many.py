"""``wcitrain measure`` over measures, epochs and runs, ``--correlate``, and measures inside training."""

import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY as BASE

from wcitrain.__main__ import main
from wcitrain.attacks import Attack, ThreatModel
from wcitrain.commands.correlation import hyper_parameters
from wcitrain.commands.study import Measured, Study, measure_all
from wcitrain.data import load_splits
from wcitrain.measures import MEASURES, Problem
from wcitrain.models import load_exported
from wcitrain.progress import run_folder
from wcitrain.recipe import load_recipe, recipe_from_dict
from wcitrain.recipe.reading import to_yaml_text
from wcitrain.targets import open_run
from wcitrain.train import fit

TINY = BASE | {
    "train": {"epochs": 2, "batch_size": 50, "device": "cpu"},
    "measures": {"take": ["gradient_norm", "distance_from_initialisation"], "every": 2, "num_examples": 20},
    "checkpoint": {"keep_every": 1},
}
QUICK = ["--examples", "10", "--gap-examples", "20", "--steps", "1"]


def measured(*runs: Path, at=None, overrides=(), out=None, **study) -> list[Measured]:
    """Take measures of ten images by default."""
    targets = [open_run(run, at, settings=overrides) for run in runs]
    return measure_all(targets, Study(**{"examples": 10} | study), out)


def document(run: Path) -> dict:
    (path,) = (run / "measures").glob("measures-*.json")
    return json.loads(path.read_text())


def test_training_measures_what_the_recipe_names_at_the_epochs_it_says(trained):
    """A measure that is named and never logged, or taken of other weights, would pass unseen."""
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert "measures/train/gradient_norm" not in lines[0]
    recipe = load_recipe(trained / "recipe.yaml")
    splits = load_splits(recipe.data)
    subset = splits.train.subset(20)
    data = [(x, y) for x, y, _ in subset.batches(20)]
    model = load_exported(trained / "model" / "epoch-2")
    expected = MEASURES["gradient_norm"]().measure(
        Problem(model, data, Attack(ThreatModel("linf", 0.1), 2, step_size=0.06))
    )
    # The same numbers from the same weights; the sums of float32 may be taken in another order.
    assert lines[1]["measures/train/gradient_norm"] == pytest.approx(expected.value, rel=1e-5)
    assert lines[1]["measures/train/distance_from_initialisation"] > 0


def test_every_epoch_is_kept_from_the_first_weights_on(trained):
    """Distances and curves through training need epoch 0 too."""
    assert sorted(p.name for p in (trained / "model").iterdir()) == [
        "best",
        "epoch-0",
        "epoch-1",
        "epoch-2",
        "last",
    ]
    (first,) = measured(trained, at="0", measures=["distance_from_initialisation"])
    assert first.value("distance_from_initialisation") == 0.0
    shutil.rmtree(trained / "measures")


def test_several_measures_make_a_table_and_a_file_that_is_gone_on_with(run, capsys, monkeypatch):
    """A study of hours that starts again from nothing after Ctrl-C is never finished."""
    arguments = ["measure", str(run), "--measures", "gradient_norm", "frobenius_norms", "robust_gap", *QUICK]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    first = document(run)
    assert set(first["measures"]) == {"gradient_norm", "frobenius_norms", "robust_gap"}
    assert f"{first['measures']['frobenius_norms']['value']:.4g}" in printed

    def refuse(*arguments):
        raise AssertionError("taken again")

    monkeypatch.setattr(MEASURES["gradient_norm"], "measure", refuse)
    assert main([*arguments[:3], "margins", *arguments[3:]]) == 0  # one more measure: only that one is taken
    assert set(document(run)["measures"]) == {*first["measures"], "margins"}
    with pytest.raises(AssertionError, match="taken again"):  # other settings are another measurement
        main([*arguments, "--set", "gradient_norm.layers=weights"])


def test_results_of_other_data_are_neither_reused_nor_lost_and_two_models_never_share_a_file(run, tmp_path):
    """Hours of measures gone as a setting was tried, or another number of images returned as this one's."""
    (first,) = measured(run, measures=["clean_loss"])
    (other,) = measured(run, measures=["clean_loss"], overrides=["data.max_train=150"])
    (again,) = measured(run, measures=["clean_loss", "margins"])
    shutil.rmtree(run / "model" / "last")
    shutil.copytree(run / "model" / "epoch-1", run / "model" / "last")  # trained anew under its old name
    (retrained,) = measured(run, measures=["clean_loss"])
    assert len({first.path, other.path, retrained.path}) == 3
    assert first.path == again.path
    assert retrained.value("clean_loss") != first.value("clean_loss")
    assert other.value("clean_loss") != first.value("clean_loss") == again.value("clean_loss")
    twin = Path(shutil.copytree(run, tmp_path / "twin-s0"))
    paths = {model.path for model in measured(run, twin, measures=["clean_loss"], out=tmp_path / "out")}
    assert len(paths) == 2
    gaps = [measured(run, measures=["robust_gap"], gap_examples=num)[0] for num in (10, 20)]
    assert [gap.measures["robust_gap"]["num_examples"] for gap in gaps] == [20, 40]
    assert gaps[0].path == gaps[1].path == retrained.path  # the other measures stay where they are


def test_the_correlation_of_all_epochs_is_written_and_readable(run, capsys, tmp_path):
    """--at all --correlate: one run, three epochs; the table, JSON and plots a user looks at."""
    out = tmp_path / "study"
    command = ["measure", str(run), "--at", "all", "--correlate", "--measures", "frobenius_norms", "margins"]
    assert main([*command, *QUICK, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "3 models of 1 runs" in printed
    assert "| frobenius_norms |" in printed
    found = json.loads((out / "correlation.json").read_text())
    assert set(found["correlations"]) == {"robust gap (loss)", "robust gap (accuracy)", "robust loss on test"}
    assert -1 <= found["correlations"]["robust gap (loss)"]["margins"]["kendall"]["value"] <= 1
    assert (out / "scatter-robust-gap-loss.png").stat().st_size > 10_000


def test_hyper_parameters_are_what_differs_between_recipes(trained, tmp_path):
    """An axis that is missing makes Ψ too good; one that says nothing (name, seed) makes groups of one."""
    folders = []
    for i, (lr, gamma) in enumerate([(0.1, None), (0.2, None), (0.1, 0.01)]):
        folder = Path(shutil.copytree(trained, tmp_path / f"run{i}"))
        recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
        recipe |= {"name": f"run{i}", "seed": i}
        recipe["optimizer"]["lr"] = lr
        if gamma:
            recipe["perturbation"] = {"name": "awp", "gamma": gamma}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        folders.append(folder)
    models = measured(*folders, measures=["frobenius_norms"])
    assert set(hyper_parameters(models)) == {"optimizer.lr", "perturbation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--measures", "sharpnes"], "expected names of wci, hessian_trace"),
        (
            ["--measures", "margins", "--set", "margins.quantle=0.5"],
            "quantle: got 0.5; expected a setting it has",
        ),
        (["--measures", "margins", "--set", "wci.seed=1"], "settings of wci, which is not measured"),
        (["--measures", "margins", "--set", "quantile=0.5"], "expected measure.setting=value"),
        (["--measures", "margins", "--at", "7"], "epoch that"),
        (["--measures", "margins", "--correlate"], "expected at least three"),
        (["--measures", "margins", "--gap-examples", "0"], "--gap-examples: got 0; expected"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(run, capsys, arguments, message):
    """A misspelt setting found after an hour of measuring."""
    assert main(["measure", str(run), *QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_with_a_wrong_measure_stops_before_the_run_begins(tmp_path):
    """The first measurement may come hours after the start."""
    wrong = {"take": [{"name": "gradient_norm", "layers": "nothing"}]}
    recipe = recipe_from_dict(TINY | {"output": str(tmp_path), "measures": wrong})
    with pytest.raises(ValueError, match=r"measures: layers: got 'nothing'.*a dry run"):
        fit(recipe)
    assert not (run_folder(recipe) / "metrics.jsonl").exists()


def test_a_run_that_stops_early_measures_and_keeps_its_last_epoch(tmp_path):
    """The epoch that ends the run is the one that everybody asks about."""
    settings = {"name": "stopped", "output": str(tmp_path), "checkpoint": {"keep_every": 10}}
    settings |= {"measures": {"take": ["gradient_norm"], "every": 10, "num_examples": 4}}
    settings |= {"train": TINY["train"] | {"epochs": 9}, "optimizer": {"lr": 1e-9}}
    settings |= {"early_stopping": {"patience": 1}}
    recipe = recipe_from_dict(TINY | settings)
    fit(recipe)
    last = json.loads((run_folder(recipe) / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epoch"] < 9
    assert "measures/train/gradient_norm" in last
    assert (run_folder(recipe) / "model" / f"epoch-{last['epoch']}").is_dir()


def test_a_sweep_with_a_grid_trains_every_point_and_its_studies_are_drawn(tmp_path, capsys):
    """One command from a base and methods to the figures of a paper."""
    small = TINY | {"output": str(tmp_path / "runs"), "measures": {}, "train": TINY["train"] | {"epochs": 1}}
    (tmp_path / "base.yaml").write_text(to_yaml_text(small))
    (tmp_path / "at.yaml").write_text("")
    sweep = tmp_path / "grid.yaml"
    content = {
        "bases": ["base.yaml"],
        "methods": ["at.yaml"],
        "grid": {"optimizer.lr": [0.05, 0.1], "threat.eps": ["8/255"]},
        "seeds": [0, 1],
        "measure": [
            {
                "at": "all",
                "split": "test",
                "seeds": [0],
                "measures": ["margins", "robust_loss"],
                "examples": 10,
            },
            {"at": "last", "measures": ["margins"], "examples": 10, "gap_examples": 20, "correlate": True},
        ],
    }
    sweep.write_text(to_yaml_text(content))
    assert main(["sweep", str(sweep)]) == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir() if p.name.startswith("tiny"))
    assert names == [f"tiny-lr_{lr}-eps_8_255-s{seed}" for lr in ("0.05", "0.1") for seed in (0, 1)]
    assert load_recipe(tmp_path / "runs" / names[0] / "recipe.yaml").optimizer.lr == 0.05
    out = tmp_path / "runs" / "grid-report"
    for name in (
        "measures-through-training.png",
        "measures-against-loss.png",
        "correlation-last-train/correlation.md",
    ):
        assert (out / name).stat().st_size > 500
    assert "4 models of 4 runs; hyper-parameters that differ: optimizer.lr" in capsys.readouterr().out
    studies = [
        {"measure": ["wci"]},
        {"seeds": [7]},
        {"seeds": 0},
        {"at": "first"},
        {"measures": []},
        {"correlate": "no"},
    ]
    wrong = [{"grid": {"optimizer.lr": 0.1}}, {"grid": {"seed": [1]}}, {"settings": ["optimizer.lr=0.3"]}]
    wrong += [{"settings": ["checkpoint.keep_every=null"]}, *({"measure": [study]} for study in studies)]
    for change in wrong:
        sweep.write_text(to_yaml_text(content | change))
        assert main(["sweep", str(sweep)]) == 2, change


def test_every_measure_of_a_real_network_has_a_finite_value(trained):
    """Names that lead nowhere, or measures that fail on BatchNorm and convolutions."""
    settings = {
        "average_flatness": {"num_draws": 1, "reference_restarts": 1},
        "worst_flatness": {"num_restarts": 1, "num_steps": 2, "reference_restarts": 1},
        "average_sharpness": {"num_draws": 1},
        "worst_sharpness": {"ascent_steps": 1},
        "pac_bayes_sharpness": {"num_draws": 1, "num_bisections": 3},
        "magnitude_aware_sharpness": {"num_draws": 1, "num_bisections": 3},
        "lambda_max": {"tolerance": 0.1},
    }
    study = {"measures": "all", "steps": 1, "gap_examples": 10, "settings": settings}
    (model,) = measured(trained, at="2", out=trained.parent / "everything", **study)
    values = {name: model.value(name) for name in MEASURES}
    bounded = {name: value for name, value in values.items() if not name.endswith("_sharpness")}
    assert all(map(math.isfinite, bounded.values())), values
    assert values["average_sharpness"] > -1
