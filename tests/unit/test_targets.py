"""What a command is pointed at: which weights and which recipe, and what is refused instead of guessed."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wcitrain import targets
from wcitrain.checkpoint import save_checkpoint, save_exported_model
from wcitrain.models import Classifier, create_model
from wcitrain.recipe import recipe_from_dict
from wcitrain.recipe.reading import to_yaml_text
from wcitrain.targets import attack_of, device_of, find_target, load_model, load_weights, recipe_of

MODEL = {"name": "resnet18", "stem": "cifar", "kwargs": {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}}
SPLITS = SimpleNamespace(num_classes=10, in_chans=1)
RECIPE = recipe_from_dict({"name": "tiny", "data": {"source": "digits"}, "model": MODEL})


def classifier(seed: int, num_classes: int = 10, in_chans: int = 1) -> Classifier:
    torch.manual_seed(seed)
    return create_model(
        "resnet18", num_classes=num_classes, in_chans=in_chans, stem="cifar", **MODEL["kwargs"]
    ).eval()


def export(folder: Path, model: Classifier, num_classes: int = 10, in_chans: int = 1) -> Path:
    """Write a model as a run exports it."""
    metadata = {
        "architecture": "resnet18",
        "kwargs": json.dumps(MODEL["kwargs"]),
        "stem": "cifar",
        "seed": "0",
    }
    metadata |= {"num_classes": str(num_classes), "in_chans": str(in_chans)}
    metadata |= {name: json.dumps(getattr(model, name).flatten().tolist()) for name in ("mean", "std")}
    save_exported_model(folder, model.backbone.state_dict(), metadata)
    return folder


def write_recipe(path: Path, **model) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml_text({"name": "tiny", "data": {"source": "digits"}, "model": MODEL | model}))
    return path


@pytest.fixture
def run(tmp_path) -> Path:
    """A run folder with two checkpoints and no export."""
    folder = write_recipe(tmp_path / "tiny-s0" / "recipe.yaml").parent
    for seed, name in enumerate(("last", "best")):
        save_checkpoint(folder / "checkpoints", {"epoch": 1, "model": classifier(seed).state_dict()}, name)
    return folder


def test_a_checkpoint_folder_means_its_run_at_that_epoch(run):
    """The weights of another epoch, or of no run at all, would be measured under its name."""
    for seed, at in enumerate(("last", "best")):
        target = find_target(run / "checkpoints" / at, None)
        assert target == ("run", run, run, at) == find_target(run, at)
        model = load_model(target, recipe_of(target, None, []), SPLITS)
        assert torch.equal(model.backbone.conv1.weight, classifier(seed).backbone.conv1.weight)
    with pytest.raises(ValueError, match="one epoch already"):
        find_target(run / "checkpoints" / "last", "best")
    with pytest.raises(ValueError, match=r"got another folder; expected .*RUN/checkpoints/last"):
        find_target(run / "checkpoints", None)


def test_a_recipe_with_weights_is_a_model_without_a_run(tmp_path):
    """Published weights have no run; building them must not move the caller's random numbers."""
    torch.save(classifier(7).backbone.state_dict(), tmp_path / "weights.pth")
    path = write_recipe(tmp_path / "published.yaml", checkpoint_path=str(tmp_path / "weights.pth"))
    target = find_target(path, None)
    assert target == ("recipe", path, None, "published")
    recipe = recipe_of(target, None, ["threat.eps=0.1"])
    assert recipe.threat.eps == 0.1
    torch.manual_seed(3)
    model = load_model(target, recipe, SPLITS)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert torch.equal(model.backbone.conv1.weight, classifier(7).backbone.conv1.weight)
    assert not model.training


def test_a_recipe_without_weights_or_with_another_recipe_is_refused(tmp_path):
    """A model as it was before the first step is seldom meant, and of two recipes one would be ignored."""
    target = find_target(write_recipe(tmp_path / "untrained.yaml"), None)
    with pytest.raises(
        ValueError, match=r"whose model is untrained; expected model\.pretrained or model\.checkpoint_path"
    ):
        recipe_of(target, None, [])
    with pytest.raises(ValueError, match=r"--recipe: got other\.yaml with the recipe"):
        recipe_of(target, "other.yaml", ["model.pretrained=true"])


def test_pretrained_weights_of_other_classes_are_refused(tmp_path, monkeypatch):
    """Timm replaces the head by a random one without a word."""
    built = classifier(0)
    monkeypatch.setattr(targets, "initial_model", lambda recipe, splits: built)
    target = find_target(write_recipe(tmp_path / "published.yaml", stem="default", pretrained=True), None)
    recipe = recipe_of(target, None, [])
    built.backbone.pretrained_cfg = {"num_classes": 10}
    assert load_model(target, recipe, SPLITS) is built
    built.backbone.pretrained_cfg = {"num_classes": 1000}
    with pytest.raises(ValueError, match="pretrained for 1000 classes, and data of 10"):
        load_model(target, recipe, SPLITS)


def test_settings_of_the_model_are_refused_where_an_export_says_what_it_is(run, tmp_path):
    """They would be dropped in silence: an export holds its own model; others are built by the recipe."""
    alone = find_target(export(tmp_path / "alone", classifier(0)), None)
    before = find_target(run, None)
    assert recipe_of(before, None, ["model.name=resnet34"]).model.name == "resnet34"
    export(run / "model" / "last", classifier(0))
    for target in (before, find_target(run / "model" / "last", None), alone):
        for setting in ("model.name=resnet34", " model.stem = default", "model={name: resnet34}"):
            with pytest.raises(
                ValueError, match="which says what its model is; expected settings of other sections"
            ):
                recipe_of(target, run / "recipe.yaml", ["threat.eps=0.1", setting])
        assert recipe_of(target, run / "recipe.yaml", ["threat.eps=0.1"]).threat.eps == 0.1
    torch.save(classifier(0).state_dict(), tmp_path / "w.pt")
    file = find_target(tmp_path / "w.pt", None)
    assert recipe_of(file, run / "recipe.yaml", ["model.name=resnet34"]).model.name == "resnet34"


@pytest.mark.parametrize(
    ("num_classes", "in_chans", "message"),
    [
        (4, 1, "a model for 1 channels and 4 classes, and data of 1 and 10"),
        (10, 3, "a model for 3 channels and 10 classes, and data of 1 and 10"),
    ],
)
def test_an_export_for_other_data_is_refused(num_classes, in_chans, message, tmp_path):
    """A model of fewer classes gives a loss on labels it knows, and a crash or nonsense on the others."""
    sizes = {"num_classes": num_classes, "in_chans": in_chans}
    target = find_target(export(tmp_path / "export", classifier(0, **sizes), **sizes), None)
    with pytest.raises(ValueError, match=message):
        load_model(target, RECIPE, SPLITS)


def test_a_normalisation_in_a_file_must_be_the_models():
    """Weights behind another normalisation are another network, and every number of it would be wrong."""
    model, weights = classifier(0), dict(classifier(1).state_dict())
    same = weights | {"mean": model.mean.flatten().double() * (1 + 1e-5), "std": model.std.clone()}
    load_weights(model, same, "file")
    assert torch.equal(model.backbone.conv1.weight, classifier(1).backbone.conv1.weight)
    for name, value in (
        ("mean", model.mean * 1.001),
        ("std", torch.full((3,), 0.25)),
        ("std", torch.tensor([0.9])),
    ):
        fresh = classifier(0)
        with pytest.raises(
            ValueError, match=rf"file: got weights for images normalised with {name} .*Set model\.{name}"
        ):
            load_weights(fresh, weights | {name: value}, "file")
        assert torch.equal(fresh.backbone.conv1.weight, classifier(0).backbone.conv1.weight)


@pytest.mark.parametrize("eps", ["1e400", float("inf"), "1/0", "eight", "nan"])
def test_a_radius_that_is_no_number_is_explained(eps):
    """A traceback does not say what to do."""
    with pytest.raises(ValueError, match="--eps: got"):
        attack_of(RECIPE, False, None, eps, None)


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta", ""])
def test_a_device_that_is_not_there_is_explained(device):
    """Torch raises an assertion here and a runtime error there, and says nothing of the choice."""
    with pytest.raises(ValueError, match=rf"--device: got '{device}'; expected auto, cpu"):
        device_of(device, RECIPE)
    assert device_of("cpu", RECIPE) == "cpu"
