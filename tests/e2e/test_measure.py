"""``wcitrain measure`` on what training leaves: a run, its exports, its checkpoints, other tools' files."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_run import TINY

from wcitrain.__main__ import main
from wcitrain.attacks import ThreatModel
from wcitrain.checkpoint import load_checkpoint
from wcitrain.data import load_splits
from wcitrain.measures import measure_wci
from wcitrain.models import load_exported
from wcitrain.recipe import recipe_from_dict
from wcitrain.seeding import seed_from

QUICK = ["--examples", "6", "--steps", "1"]


def result(path: Path) -> dict:
    return json.loads(path.read_text())


def test_a_run_is_measured_with_table_json_and_figure(run, capsys):
    """The one command a user types after training must give the library's number on the same images."""
    assert main(["measure", str(run), "--measures", "wci", "--examples", "24"]) == 0
    printed = capsys.readouterr().out
    document = result(run / "measures" / "wci-last-train.json")
    assert (run / "measures" / "wci-last-train.png").stat().st_size > 10_000
    assert "(train, robust loss linf 0.1 PGD-2, 24 examples, gauss_newton)" in printed
    assert "PAC-Bayes surrogate" in printed
    assert all(name in printed for name in document["layers"])
    assert document["attack"] == {"num_steps": 2, "step_size": 0.06}  # the recipe's evaluation attack
    assert sum(layer["share"] for layer in document["layers"].values()) == pytest.approx(1)
    bound = document["pac_bayes_surrogate"]
    assert bound["terms"]["risk"] == document["mean_loss"]
    # 200 training images less 100 for validation
    assert bound["terms"]["complexity"] == bound["beta"] / (8 * 100)

    recipe = recipe_from_dict(TINY)
    splits = load_splits(recipe.data)
    again = measure_wci(
        load_exported(run / "model" / "last"),
        splits.train.batches(100, shuffle=True, seed=seed_from(0, "measure")),
        ThreatModel(eps=0.1),
        num_steps=2,
        step_size=0.06,
        num_examples=24,
    )
    assert document["wci"] == again.total


def test_run_export_checkpoint_and_files_are_the_same_model(run, tmp_path):
    """The same weights by every way in: a wrong prefix, stem or normalisation would give another index."""
    state = load_checkpoint(run / "checkpoints")[0]["model"]
    recipe = str(run / "recipe.yaml")
    whole = {"epoch": 1, "state_dict": {f"module.{k}": v for k, v in state.items()}}
    torch.save(whole, tmp_path / "whole.pt")
    torch.save({k.removeprefix("backbone."): v for k, v in state.items()}, tmp_path / "backbone.pth")
    save_file({k: v.clone() for k, v in state.items()}, tmp_path / "safe.safetensors")
    bare = Path(shutil.copytree(run, tmp_path / "bare"))
    shutil.rmtree(bare / "model")
    alone = Path(shutil.copytree(run / "model" / "last", tmp_path / "alone"))
    targets = {
        run: [],
        run / "model" / "last": [],
        bare: [],
        alone: ["--recipe", recipe],
        **{tmp_path / f: ["--recipe", recipe] for f in ("whole.pt", "backbone.pth", "safe.safetensors")},
    }
    values = []
    for number, (target, options) in enumerate(targets.items()):
        out = tmp_path / f"out{number}"
        assert main(["measure", str(target), *QUICK, "--out", str(out), *options]) == 0
        (file,) = out.glob("*.json")
        values.append(result(file)["wci"])
    assert len(set(values)) == 1


def test_options_reach_the_measurement_and_name_the_files(run, capsys):
    """An option that is parsed and dropped measures something else under the right name."""
    common = ["measure", str(run), "--examples", "10", "--at", "best"]
    own = ["--set", "wci.estimator=hutchinson", "wci.layers='*fc.weight'"]
    assert main([*common, "--split", "val", "--clean", *own]) == 0
    clean = result(run / "measures" / "wci-best-val-clean-hutchinson-fc.weight.json")
    assert (clean["threat"], clean["estimator"]) == (None, "hutchinson")
    assert list(clean["layers"]) == ["backbone.fc.weight"]
    assert clean["pac_bayes_surrogate"] is None  # the bound is about training images
    attack = ["--norm", "l2", "--eps", "1/2", "--steps", "5", "--seed", "3"]
    assert main([*common, *attack, "--recipe", "data.max_test=50"]) == 0
    attacked = result(run / "measures" / "wci-best-train-l2-0.5-PGD-5-s3.json")
    assert attacked["threat"] == {"norm": "l2", "eps": 0.5}
    assert attacked["attack"] == {"num_steps": 5, "step_size": 0.25}
    assert attacked["seed"] == 3
    capsys.readouterr()
    quick = ["--steps", "1", "--set", "wci.layers='*fc.weight'"]
    assert main(["measure", str(run), "--target-error", "0.001", *quick]) == 0
    assert "instead of 0.001: limited by examples" in capsys.readouterr().out
    assert result(run / "measures" / "wci-last-train-linf-0.1-PGD-1-fc.weight.json")["num_examples"] == 100


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}/nowhere"], "got nothing; expected a run folder"),
        (["{tmp}/other.pt"], "got no recipe; expected one that says its data and model"),
        (["{tmp}/other.pt", "--recipe", "{run}/recipe.yaml"], "1 unexpected (conv.weight); "),
        (
            ["{tmp}/wide.pt", "--recipe", "{run}/recipe.yaml"],
            "(backbone.fc.weight (7, 8) instead of (10, 8))",
        ),
        (["{tmp}/list.pt", "--recipe", "{run}/recipe.yaml"], "got a list; expected a state dict"),
        (["{tmp}/text.pt", "--recipe", "{run}/recipe.yaml"], "cannot read as weights alone"),
        (["{run}", "--eps", "eight"], "--eps: got 'eight'; expected a radius"),
        (["{run}", "--eps", "8"], "Did you mean 8/255?"),
        (["{run}", "--clean", "--eps", "8/255"], "--clean: got --eps as well"),
        (["{run}", "--target-error", "5"], "target_relative_error: got 5.0"),
        (["{run}", "--set", "wci.split_qkv=true"], "split_qkv: got True, but none"),
        (["{run}", "--recipe", "data.nothing=1"], "data.nothing"),
    ],
)
def test_wrong_input_is_explained(arguments, message, trained, tmp_path, capsys):
    """A traceback does not say what to do; a file of another model must not be measured half loaded."""
    torch.save({"model": {"conv.weight": torch.zeros(2)}}, tmp_path / "other.pt")
    state = load_checkpoint(trained / "checkpoints")[0]["model"]
    torch.save(state | {"backbone.fc.weight": torch.zeros(7, 8)}, tmp_path / "wide.pt")
    torch.save([1], tmp_path / "list.pt")
    (tmp_path / "text.pt").write_text("weights")
    assert main(["measure", *(text.format(tmp=tmp_path, run=trained) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (trained / "measures").exists()
