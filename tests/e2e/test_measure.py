"""``wcitrain measure`` on what training leaves: one model in detail, many measures and models, studies."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file
from tiny_run import TINY as BASE

from wcitrain.__main__ import main
from wcitrain.attacks import Attack, ThreatModel
from wcitrain.checkpoint import load_checkpoint
from wcitrain.commands.correlation import correlated, hyper_parameters
from wcitrain.commands.measure import _table
from wcitrain.commands.study import GAP, Measured, Study, measure_all
from wcitrain.data import Splits, load_splits
from wcitrain.measures import MEASURES, Problem, correlate, measure_wci
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


def in_detail(target: Path, *options: str, out: Path | None = None) -> tuple[str, dict]:
    """Measure and return the name and the content of the one new file."""
    folder = out or target / "measures"
    before = set(folder.glob("*.json"))
    assert main(["measure", str(target), *options, *(["--out", str(out)] if out else [])]) == 0
    (file,) = set(folder.glob("*.json")) - before
    return file.stem, json.loads(file.read_text())


def test_a_run_is_measured_with_table_json_and_figure(run, capsys):
    """The one command a user types after training must give the library's number on the same images."""
    name, document = in_detail(run, "--measures", "wci", "--examples", "24")
    printed = capsys.readouterr().out
    assert (run / "measures" / "wci-last-train-n24.png").stat().st_size > 10_000
    assert "(train, robust loss linf 0.1 PGD-2, 24 examples, gauss_newton)" in printed
    assert "PAC-Bayes surrogate" in printed
    assert all(layer in printed for layer in document["layers"])
    assert document["attack"] == {"num_steps": 2, "step_size": 0.06}  # the recipe's evaluation attack
    bound = document["pac_bayes_surrogate"]
    assert bound["terms"]["risk"] == document["mean_loss"]
    assert bound["terms"]["complexity"] == bound["beta"] / 800  # 200 training images, 100 for validation
    train = load_splits(recipe_from_dict(TINY).data).train
    batches = train.subset(24, "measure", 0).batches(24)
    settings = {"num_steps": 2, "step_size": 0.06, "num_examples": 24}
    again = measure_wci(load_exported(run / "model" / "last"), batches, ThreatModel(eps=0.1), **settings)
    assert (name, document["wci"]) == ("wci-last-train-n24", again.total)


def test_run_export_checkpoint_and_files_are_the_same_model(run, tmp_path):
    """The same weights by every way in: a wrong prefix, stem or normalisation would give another index."""
    state = load_checkpoint(run / "checkpoints")[0]["model"]
    recipe = ["--recipe", str(run / "recipe.yaml")]
    whole = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(whole, tmp_path / "whole.pt")
    torch.save({k.removeprefix("backbone."): v for k, v in state.items()}, tmp_path / "backbone.pth")
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "safe.safetensors")
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    shutil.rmtree(bare / "model")
    alone = Path(shutil.copytree(run / "model" / "last", tmp_path / "alone"))
    targets = {run: [], run / "model" / "last": [], bare: [], alone: recipe}
    targets |= {tmp_path / name: recipe for name in ("whole.pt", "backbone.pth", "safe.safetensors")}
    values = set()
    for number, (target, options) in enumerate(targets.items()):
        options = ["--examples", "6", "--steps", "1", *options]
        values.add(in_detail(target, *options, out=tmp_path / f"out{number}")[1]["wci"])
    assert len(values) == 1


def test_options_reach_the_measurement_and_name_the_files(run, capsys):
    """An option that is parsed and dropped measures something else under the right name."""
    few = ["--examples", "10", "--at", "best"]
    own = ["--set", "wci.estimator=hutchinson", "wci.layers='*fc.weight'"]
    name, clean = in_detail(run, *few, "--split", "val", "--clean", *own)
    assert re.fullmatch(r"wci-best-val-clean-n10-r[0-9a-f]{8}", name)
    assert (clean["threat"], clean["estimator"]) == (None, "hutchinson")
    assert list(clean["layers"]) == ["backbone.fc.weight"]
    assert clean["pac_bayes_surrogate"] is None  # the bound is about training images
    name, attacked = in_detail(run, *few, "--norm", "l2", "--eps", "1/2", "--steps", "5", "--seed", "3")
    assert name == "wci-best-train-l2-0.5-PGD-5-n10-s3"
    assert (attacked["threat"], attacked["seed"]) == ("l2 0.5", 3)
    assert attacked["attack"] == {"num_steps": 5, "step_size": 0.25}
    _, aimed = in_detail(run, "--target-error", "0.001", "--steps", "1", "--set", "wci.layers='*fc.weight'")
    assert "instead of 0.001: limited by examples" in capsys.readouterr().out
    assert aimed["num_examples"] == 100


def test_another_measurement_never_takes_the_file_of_an_earlier_one(run):
    """Hours of measuring gone, or a number of other images or layers under the old name."""
    changes = [[], ["--recipe", "data.max_train=150"], ["--recipe", "threat.eps=0.11"], ["--examples", "12"]]
    layers = [f"layers='{pattern}'" for pattern in ("*fc.weight", "*fc.weight*")]
    changes += [["--set", f"wci.{text}"] for text in (*layers, "num_probes=3", "chunk_size=2")]
    for change in changes:
        _, document = in_detail(run, "--clean", "--examples", "10", *change)  # a new file
        assert document["num_examples"] == (12 if "12" in change else 10)  # the same images, in detail
        assert document["layers"]


def test_test_images_are_not_opened_where_nothing_asks_for_them(trained, monkeypatch, tmp_path):
    """Measures are of training images: a missing or broken test set is no reason to stop."""
    monkeypatch.setattr(Splits, "test", property(lambda splits: pytest.fail("test images were opened")))
    command = ["measure", str(trained), "--measures", "clean_loss", *QUICK, "--out", str(tmp_path)]
    assert main([part for part in command if part not in ("--gap-examples", "20")]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{tmp}/nowhere", "got nothing; expected a run folder"),
        ("{tmp}/other.pt", "got no recipe; expected its data and model"),
        ("{tmp}/other.pt --recipe {run}/recipe.yaml", "got names such as model/conv.weight, and a model"),
        ("{tmp}/wide.pt --recipe {run}/recipe.yaml", "of another shape fc.weight ["),
        ("{tmp}/list.pt --recipe {run}/recipe.yaml", "got a list; expected a state dict"),
        ("{tmp}/text.pt --recipe {run}/recipe.yaml", "cannot be read as weights alone"),
        ("{run} --eps 8", "Did you mean 8/255?"),
        ("{run} --clean --eps 8/255", "--clean: got --eps as well"),
        ("{run} --target-error 5", "target_relative_error: got 5.0"),
        ("{run} {run} --target-error 0.1", "--target-error: got several models or measures"),
        ("{run} --measures margins --target-error 0.1", "--target-error: got several models or measures"),
        ("{run} --set wci.split_qkv=true", "split_qkv: got True, but none"),
        ("{run} --norm l2", "--norm: got l2 without --eps, and a recipe whose radius 0.1 is for linf"),
        ("{run} --out {tmp}/text.pt", "text.pt, a file; expected a folder that can be"),
        ("{run} --measures margins --out {tmp}/text.pt/more", "text.pt, a file; expected a folder"),
        ("{run} {run} {run}/model/last --correlate", "which are the same model; expected each model once"),
        ("{run} --at all --correlate --measures margins --out {tmp}/text.pt", "text.pt, a file; expected"),
        ("{run} --set wci.center=initial --recipe seed=1", "wci.center: got {run} with another seed or"),
        (
            "{run}/model/last/model.safetensors --recipe {run}/recipe.yaml --set wci.center=initial",
            "model.safetensors without its run; expected a run with its own seed and model",
        ),
        (
            "{run}/model/last/model.safetensors --recipe {run}/recipe.yaml "
            "--measures margins distance_from_initialisation",
            "distance_from_initialisation: got {run}/model/last/model.safetensors without its run",
        ),
    ],
)
def test_wrong_input_is_explained(arguments, message, trained, tmp_path, capsys):
    """A traceback does not say what to do; a file of another model must not be measured half loaded."""
    torch.save({"model": {"conv.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    state = load_checkpoint(trained / "checkpoints")[0]["model"]
    torch.save(state | {"backbone.fc.weight": torch.zeros(7, 8)}, tmp_path / "wide.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("weights")
    assert main(["measure", *arguments.format(tmp=tmp_path, run=trained).split()]) == 2
    assert message.format(tmp=tmp_path, run=trained) in capsys.readouterr().err
    assert not (trained / "measures").exists()


def test_what_cannot_be_written_or_counted_twice_is_refused_before_anything_is_measured(
    trained, tmp_path, monkeypatch, capsys
):
    """An hour of measuring that has nowhere to go; one run that counts as three is a perfect correlation."""

    def fail(*arguments):
        raise AssertionError("measured")

    for kind in (MEASURES["margins"], MEASURES["robust_gap"]):
        monkeypatch.setattr(kind, "measure", fail)
    monkeypatch.setattr(MEASURES["wci"], "by_layer", fail)
    (tmp_path / "file").touch()
    out, run = ["--out", str(tmp_path / "file")], str(trained)
    assert main(["measure", run, *out]) == 2
    assert main(["measure", run, "--measures", "margins", *out]) == 2
    assert main(["measure", run, "--at", "all", "--correlate", "--measures", "margins", *out]) == 2
    assert main(["landscape", run, *out]) == 2
    assert main(["report", run, "--no-images", *out]) == 2
    assert capsys.readouterr().err.count(f"--out: got {tmp_path / 'file'}, a file; expected a folder") == 5
    assert main(["measure", run, run, run, "--correlate", "--measures", "margins"]) == 2


def test_measures_are_taken_under_an_l1_attack(run):
    """l1 attacks exist: refusing the norm would leave a recipe's own l1 as the only way to it."""
    name, document = in_detail(run, "--examples", "10", "--norm", "l1", "--eps", "2", "--steps", "2")
    assert name == "wci-last-train-l1-2-PGD-2-n10"
    assert document["loss"] == "robust loss l1 2 PGD-2"


def test_the_index_of_a_run_has_a_prior_at_its_own_start(run, tmp_path):
    """Weights of another seed as the start would give a distance that looks like training."""
    few = ["--examples", "10", "--steps", "1", "--set"]
    _, document = in_detail(run, *few, "wci.center=initial", "wci.groups=stage")
    (distance,) = measured(run, measures=["distance_from_initialisation"], out=tmp_path / "out")
    squares = [layer["squared_norm"] for layer in document["layers"].values()]
    assert sum(squares) == pytest.approx(distance.value("distance_from_initialisation") ** 2, rel=1e-5)
    assert {"layer1", "layer4", "fc"} < set(document["layers"])
    (first,) = measured(run, at="0", measures=["wci"], settings={"wci": {"center": "initial"}}, out=tmp_path)
    assert first.value("wci") == 0.0
    weights = load_exported(run / "model" / "epoch-0")
    weights.backbone.fc.weight.data.add_(1)
    file = run / "model" / "epoch-0" / "model.safetensors"
    save_file({k: v.contiguous() for k, v in weights.backbone.state_dict().items()}, file)
    assert (
        main(["measure", str(run), *few, "wci.center=initial", "--clean"]) == 2
    )  # kept weights are another's


def measured(*runs: Path, at=None, overrides=(), out=None, **study) -> list[Measured]:
    """Take measures of ten images by default."""
    targets = [open_run(run, at, settings=overrides) for run in runs]
    return measure_all(targets, Study(**{"examples": 10} | study), out)


def test_training_measures_what_the_recipe_names_at_the_epochs_it_says(trained, tmp_path):
    """A measure that is named and never logged, or taken of other weights, would pass unseen."""
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert "measures/train/gradient_norm" not in lines[0]
    subset = load_splits(load_recipe(trained / "recipe.yaml").data).train.subset(20)
    data = [(x, y) for x, y, _ in subset.batches(20)]
    model, attack = load_exported(trained / "model" / "epoch-2"), Attack(ThreatModel("linf", 0.1), 2, 0.06)
    expected = MEASURES["gradient_norm"]().measure(Problem(model, data, attack))
    # The same numbers from the same weights; the sums of float32 may be taken in another order.
    assert lines[1]["measures/train/gradient_norm"] == pytest.approx(expected.value, rel=1e-5)
    assert lines[1]["measures/train/distance_from_initialisation"] > 0
    (first,) = measured(trained, at="0", measures=["distance_from_initialisation"], out=tmp_path)
    assert first.value("distance_from_initialisation") == 0.0  # curves through training need epoch 0 too


def test_several_measures_make_a_table_and_a_file_that_is_gone_on_with(run, capsys, monkeypatch):
    """A study of hours that starts again from nothing after Ctrl-C is never finished."""
    arguments = ["measure", str(run), "--measures", "gradient_norm", "frobenius_norms", "robust_gap", *QUICK]
    assert main(arguments) == 0
    (path,) = (run / "measures").glob("measures-*.json")
    first = json.loads(path.read_text())["measures"]
    assert set(first) == {"gradient_norm", "frobenius_norms", "robust_gap"}
    assert f"{first['frobenius_norms']['value']:.4g}" in capsys.readouterr().out

    def refuse(*arguments):
        raise AssertionError("taken again")

    monkeypatch.setattr(MEASURES["gradient_norm"], "measure", refuse)
    assert main([*arguments[:3], "margins", *arguments[3:]]) == 0  # one more measure: only that one is taken
    assert set(json.loads(path.read_text())["measures"]) == {*first, "margins"}
    with pytest.raises(AssertionError, match="taken again"):  # other settings are another measurement
        main([*arguments, "--set", "gradient_norm.layers=weights"])
    for damaged in ("[]", path.read_text()[:100]):
        path.write_text(damaged)
        assert main(arguments) == 2
        assert f"{path}: got" in capsys.readouterr().err
        assert path.read_text() == damaged


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


def test_models_without_an_index_are_named_and_left_out_of_tables_and_correlations(run, tmp_path):
    """A dash without a reason, or a zero, is taken for a flat model; one NaN must not end a study."""
    why = "clean loss, hutchinson, no index: 1 of 2 traces negative beyond their error, fc.weight"
    target, models = open_run(run), []
    for i, wci in enumerate((2.0, 3.0, None, 5.0)):
        gap = {"value": 0.1 * i, "stderr": 0.1, "parts": {"accuracy_gap": 0.1 * i, "test_loss": 1.0 + i}}
        one = {"value": wci, "stderr": 0.1, "settings": why if wci is None else "", "parts": {}}
        models.append(Measured(target, {"wci": one, GAP: gap}, tmp_path))
    text, written = correlated(models, tmp_path)
    assert f"Left out: wci of {target.name} {target.at}: no finite value ({why})." in text
    assert json.loads(written[0].read_text())["correlations"]["robust gap (loss)"]["wci"]["num_models"] == 3
    assert why in _table(models)


def test_the_correlation_of_all_epochs_is_written_and_readable(run, capsys, tmp_path):
    """--at all --correlate: one run, three epochs; the table, JSON and plots a user looks at."""
    command = ["measure", str(run), "--at", "all", "--correlate", "--measures", "frobenius_norms", "margins"]
    assert main([*command, *QUICK, "--out", str(tmp_path / "study")]) == 0
    printed = capsys.readouterr().out
    assert "3 models of 1 runs" in printed
    assert "| frobenius_norms |" in printed
    document = json.loads((tmp_path / "study" / "correlation.json").read_text())
    found, settings = document["correlations"], document["settings"]
    models, goal = document["models"], "robust gap (loss)"
    assert [(one["seed"], one["epoch"]) for one in models] == [(0, 0), (0, 1), (0, 2)]
    columns = [one["measures"]["margins"]["value"] for one in models], [one["goals"][goal] for one in models]
    again = correlate(*columns, [one["run"] for one in models], document["axes"], seed=settings["seed"])
    assert again.kendall.value == found[goal]["margins"]["kendall"]["value"]  # from what the file holds alone
    assert found[goal]["margins"]["kendall"]["low"] is None  # one run is no sample
    assert found[goal]["margins"]["holm"]["kendall_p"] == 1.0
    assert found[goal]["margins"]["difference"]["p"] is None
    assert set(found) == {"robust gap (loss)", "robust gap (accuracy)", "robust loss on test"}
    assert -1 <= found["robust gap (loss)"]["margins"]["kendall"]["value"] <= 1
    assert (tmp_path / "study" / "scatter-robust-gap-loss.png").stat().st_size > 10_000


def test_hyper_parameters_are_what_differs_between_recipes(trained, tmp_path):
    """An axis that is missing makes Ψ too good; one that says nothing (name, seed) makes groups of one."""
    models = []
    for i, (lr, gamma) in enumerate([(0.1, None), (0.2, None), (0.1, 0.01)]):
        recipe = yaml.safe_load((trained / "recipe.yaml").read_text()) | {"name": f"run{i}", "seed": i}
        recipe["optimizer"]["lr"] = lr
        recipe |= {"perturbation": {"name": "awp", "gamma": gamma}} if gamma else {}
        (tmp_path / f"run{i}").mkdir()
        (tmp_path / f"run{i}" / "recipe.yaml").write_text(yaml.safe_dump(recipe))
        models.append(Measured(open_run(tmp_path / f"run{i}"), {}, tmp_path))
    assert set(hyper_parameters(models)) == {"optimizer.lr", "perturbation"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("sharpnes", "expected names of wci, hessian_trace"),
        ("margins --set margins.quantle=0.5", "quantle: got 0.5; expected a setting it has"),
        ("margins --set wci.seed=1", "settings of wci, which is not measured"),
        ("margins --set quantile=0.5", "expected measure.setting=value"),
        ("margins --at first", "at: got 'first'; expected last, best, all"),
        ("margins --correlate", "expected at least three"),
        ("margins --gap-examples 0", "gap_examples: got 0; expected"),
        ("margins", "gap_examples: got 20 without effect; expected robust_gap among the measures"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_measured(trained, capsys, arguments, message):
    """A misspelt setting found after an hour of measuring."""
    assert main(["measure", str(trained), *QUICK, "--measures", *arguments.split()]) == 2
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
    recipe = recipe_from_dict(TINY | settings | {"early_stopping": {"patience": 1}})
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
    curves = {"at": "all", "split": "test", "seeds": [0], "measures": ["margins", "robust_loss"]}
    correlated = {"at": "last", "measures": ["margins"], "gap_examples": 20, "correlate": True}
    content = {
        "bases": ["base.yaml"],
        "methods": ["at.yaml"],
        "grid": {"optimizer.lr": [0.05, 0.1], "threat.eps": ["8/255"]},
        "seeds": [0, 1],
        "measure": [study | {"examples": 10} for study in (curves, correlated)],
    }
    sweep.write_text(to_yaml_text(content))
    assert main(["sweep", str(sweep)]) == 0
    names = sorted(p.name for p in (tmp_path / "runs").iterdir() if p.name.startswith("tiny"))
    assert names == [f"tiny-lr_{lr}-eps_8_255-s{seed}" for lr in ("0.05", "0.1") for seed in (0, 1)]
    assert load_recipe(tmp_path / "runs" / names[0] / "recipe.yaml").optimizer.lr == 0.05
    drawn = ["measures-through-training.png", "measures-against-loss.png"]
    for name in [*drawn, "correlation-last-train/correlation.md"]:
        assert (tmp_path / "runs" / "grid-report" / name).stat().st_size > 500
    assert "4 models of 4 runs; hyper-parameters that differ: optimizer.lr" in capsys.readouterr().out
    studies = [{"measure": ["wci"]}, {"seeds": [7]}, {"seeds": 0}, {"at": "first"}, {"measures": []}]
    wrong = [{"grid": {"optimizer.lr": 0.1}}, {"grid": {"seed": [1]}}, {"settings": ["optimizer.lr=0.3"]}]
    wrong += [{"settings": ["checkpoint.keep_every=null"]}, {"measure": [{"correlate": "no"}]}]
    for change in (*wrong, *({"measure": [study]} for study in studies)):
        sweep.write_text(to_yaml_text(content | change))
        assert main(["sweep", str(sweep)]) == 2, change


def test_every_measure_of_a_real_network_has_a_finite_value(trained, tmp_path):
    """Names that lead nowhere, or measures that fail on BatchNorm and convolutions."""
    few = {"num_draws": 1, "num_bisections": 3}
    settings = {"pac_bayes_sharpness": few, "magnitude_aware_sharpness": few}
    settings |= {"lambda_max": {"tolerance": 0.1}}
    settings |= {"average_sharpness": {"num_draws": 1}, "worst_sharpness": {"ascent_steps": 1}}
    settings |= {"average_flatness": {"num_draws": 1, "reference_restarts": 1}}
    settings |= {"worst_flatness": {"num_restarts": 1, "num_steps": 2, "reference_restarts": 1}}
    study = {"measures": "all", "steps": 1, "gap_examples": 10, "settings": settings}
    (model,) = measured(trained, at="2", out=tmp_path, **study)
    values = {name: model.value(name) for name in MEASURES}
    assert all(math.isfinite(values[name]) for name in values if not name.endswith("_sharpness")), values
    assert values["average_sharpness"] > -1
