"""``wcitrain measure`` over measures, epochs and runs, ``--correlate``, and measures inside training."""

import functools
import json
import math
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_run import TINY as BASE

from wcitrain.__main__ import main
from wcitrain.attacks import ThreatModel
from wcitrain.data import load_splits
from wcitrain.measures.by_name import MEASURES, Shared, measure
from wcitrain.measuring_many import How, measure_many
from wcitrain.models import load_exported
from wcitrain.progress import run_folder
from wcitrain.recipe import load_recipe, recipe_from_dict
from wcitrain.recipe.reading import to_yaml_text
from wcitrain.recipe.sections import MeasureName
from wcitrain.train import fit

TINY = BASE | {
    "train": {"epochs": 2, "batch_size": 50, "device": "cpu"},
    "measures": {"names": ["gradient_norm", "distance_from_initialisation"], "every": 2, "num_examples": 20},
    "checkpoint": {"keep_every": 1},
}
QUICK = ["--examples", "10", "--gap-examples", "20", "--steps", "1"]


def document(run: Path) -> dict:
    (path,) = (run / "measures").glob("measures-*.json")
    return json.loads(path.read_text())


def test_training_measures_what_the_recipe_names_at_the_epochs_it_says(trained):
    """A measure that is named and never logged, or taken of other weights, would pass unseen."""
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert "measures/train/gradient_norm" not in lines[0]
    recipe = load_recipe(trained / "recipe.yaml")
    splits = load_splits(**recipe.data.model_dump(exclude={"crop_padding", "flip"}))
    subset = splits.train.subset(20)
    data = [(x, y) for x, y, _ in subset.batches(20)]
    model = load_exported(trained / "model" / "epoch-2")
    shared = Shared(num_examples=20, num_steps=2, step_size=0.06)
    expected = measure("gradient_norm", model, data, ThreatModel("linf", 0.1), shared)
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
    first = measure_many(
        [trained], How(["distance_from_initialisation"], num_examples=10), at="0", progress=False
    )[0]
    assert first.value("distance_from_initialisation") == 0.0
    shutil.rmtree(trained / "measures")


def test_the_recipe_knows_every_measure():
    """A measure that recipes cannot name, or a name without a measure."""
    assert set(MeasureName.__args__) == set(MEASURES)  # type: ignore[attr-defined]


def test_several_measures_make_a_table_and_a_file_that_is_gone_on_with(run, capsys, monkeypatch):
    """A study of hours that starts again from nothing after Ctrl-C is never finished."""
    arguments = ["measure", str(run), "--measures", "gradient_norm", "frobenius_norms", "robust_gap", *QUICK]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    first = document(run)
    assert set(first["measures"]) == {"gradient_norm", "frobenius_norms", "robust_gap"}
    assert f"{first['measures']['frobenius_norms']['value']:.4g}" in printed

    @functools.wraps(MEASURES["gradient_norm"])
    def refuse(*args, **settings):
        raise AssertionError("taken again")

    monkeypatch.setitem(MEASURES, "gradient_norm", refuse)
    assert main([*arguments[:3], "margins", *arguments[3:]]) == 0  # one more measure: only that one is taken
    assert set(document(run)["measures"]) == {*first["measures"], "margins"}
    with pytest.raises(AssertionError, match="taken again"):  # other settings are another measurement
        main([*arguments, "--set", "gradient_norm.layers=weights"])


def test_measures_of_other_weights_are_not_reused(run):
    """A run that was trained on, or trained anew under its old name, must be measured anew."""
    how = How(["frobenius_norms"], num_examples=10)
    before = measure_many([run], how, at="1", progress=False)[0].value("frobenius_norms")
    shutil.rmtree(run / "model" / "epoch-1")
    shutil.copytree(run / "model" / "epoch-2", run / "model" / "epoch-1")
    assert measure_many([run], how, at="1", progress=False)[0].value("frobenius_norms") != before


def test_results_of_other_data_are_neither_reused_nor_lost_and_two_models_never_share_a_file(run, tmp_path):
    """Hours of measures gone as a setting was tried, or another number of images returned as this one's."""
    how = How(["clean_loss"], num_examples=10)
    first = measure_many([run], how, progress=False)[0]
    other = measure_many([run], how, settings=["data.max_train=150"], progress=False)[0]
    again = measure_many([run], How(["clean_loss", "margins"], num_examples=10), progress=False)[0]
    assert other.path != first.path == again.path
    assert other.value("clean_loss") != first.value("clean_loss") == again.value("clean_loss")
    twin = Path(shutil.copytree(run, tmp_path / "twin-s0"))
    paths = [m.path for m in measure_many([run, twin], how, out=tmp_path / "out", progress=False)]
    assert len(set(paths)) == 2
    gaps = [measure_many([run], How(["robust_gap"], gap_examples=n), progress=False)[0] for n in (10, 20)]
    assert gaps[0].measures["robust_gap"]["num_examples"] == 20
    assert gaps[1].measures["robust_gap"]["num_examples"] == 40
    assert gaps[0].path == gaps[1].path  # the other measures stay where they are


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
    within = found["correlations"]["robust gap (loss)"]["margins"]["within"]["value"]
    assert within is None or -1 <= within <= 1
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
    from wcitrain.correlating_runs import study

    models = measure_many(
        folders, How(["robust_gap", "frobenius_norms"], num_examples=10, gap_examples=10), progress=False
    )
    found = study(models, num_bootstrap=10)
    assert set(found.axes) == {"optimizer.lr", "perturbation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--measures", "sharpnes"], "expected names of wci, hessian_trace"),
        (
            ["--measures", "margins", "--set", "margins.quantle=0.5"],
            "margins: got 'quantle'; expected one of",
        ),
        (["--measures", "margins", "--set", "wci.seed=1"], "settings of wci, which is not measured"),
        (["--measures", "margins", "--set", "quantile=0.5"], "expected measure.setting=value"),
        (["--measures", "margins", "--at", "7"], "epoch that"),
        (["--measures", "margins", "--estimator", "hutchinson"], "Use --set"),
        (["--measures", "margins", "--correlate"], "expected at least three"),
        (["--measures", "margins", "--gap-examples", "0"], "at least one example"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(run, capsys, arguments, message):
    """A misspelt setting found after an hour of measuring."""
    assert main(["measure", str(run), *QUICK, *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_recipe_with_a_wrong_measure_stops_before_the_run_begins(tmp_path):
    """The first measurement may come hours after the start."""
    wrong = {**TINY["measures"], "settings": {"gradient_norm": {"lr": 1}}}
    values = {"names": ["average_flatness"], "settings": {"average_flatness": {"xi": -1}}}
    for measures, message in (
        (wrong, r"measures\.settings\.gradient_norm: got 'lr'"),
        (values, r"xi: got -1.*a dry run"),
    ):
        recipe = recipe_from_dict(TINY | {"output": str(tmp_path), "measures": measures})
        with pytest.raises(ValueError, match=message):
            fit(recipe)
        assert not (run_folder(recipe) / "metrics.jsonl").exists()


def test_a_run_that_stops_early_measures_and_keeps_its_last_epoch(tmp_path):
    """The epoch that ends the run is the one that everybody asks about."""
    settings = {"name": "stopped", "output": str(tmp_path), "checkpoint": {"keep_every": 10}}
    settings |= {"measures": {"names": ["gradient_norm"], "every": 10, "num_examples": 4}}
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
    how = How(
        list(MEASURES),
        num_examples=10,
        num_steps=1,
        settings={
            "average_flatness": {"num_draws": 1, "reference_restarts": 1},
            "worst_flatness": {"num_restarts": 1, "num_steps": 2, "reference_restarts": 1},
            "average_sharpness": {"num_draws": 1},
            "worst_sharpness": {"ascent_steps": 1},
            "pac_bayes_sharpness": {"num_draws": 1, "num_bisections": 3},
            "magnitude_aware_sharpness": {"num_draws": 1, "num_bisections": 3},
            "lambda_max": {"tolerance": 0.1},
        },
    )
    (found,) = measure_many([trained], how, at="2", progress=False, out=trained.parent / "everything")
    values = {name: found.value(name) for name in MEASURES}
    bounded = {name: value for name, value in values.items() if not name.endswith("_sharpness")}
    assert all(map(math.isfinite, bounded.values())), values
    assert values["average_sharpness"] > -1
