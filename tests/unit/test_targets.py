"""``open_run``: which weights and which recipe a target means, and what is refused instead of guessed."""

import json
from pathlib import Path

import pytest
import torch

from wcitrain import targets
from wcitrain.checkpoint import save_checkpoint, save_exported_model
from wcitrain.models import Classifier, create_model, load_weights
from wcitrain.recipe.reading import to_yaml_text
from wcitrain.targets import open_run

MODEL = {"name": "resnet18", "stem": "cifar", "kwargs": {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}}
CONTENT = {"name": "tiny", "data": {"source": "digits"}, "model": MODEL}


def classifier(seed: int, num_classes: int = 10, in_chans: int = 1) -> Classifier:
    torch.manual_seed(seed)
    sizes = {"num_classes": num_classes, "in_chans": in_chans}
    return create_model("resnet18", stem="cifar", **sizes, **MODEL["kwargs"]).eval()


def first_weights(model: Classifier) -> list:
    return model.backbone.conv1.weight.tolist()


def export(folder: Path, model: Classifier, num_classes: int = 10, in_chans: int = 1) -> Path:
    """Write a model as a run exports it."""
    metadata = {"architecture": "resnet18", "kwargs": json.dumps(MODEL["kwargs"]), "stem": "cifar"}
    metadata |= {"num_classes": str(num_classes), "in_chans": str(in_chans)}
    metadata |= {name: json.dumps(getattr(model, name).flatten().tolist()) for name in ("mean", "std")}
    save_exported_model(folder, model.backbone.state_dict(), metadata)
    return folder


def write_recipe(path: Path, **model) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_yaml_text(CONTENT | {"model": MODEL | model}))
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
        target = open_run(run / "checkpoints" / at)
        assert target == open_run(run, at)
        assert (target.path, target.run, target.at, target.export) == (run, run, at, None)
        assert first_weights(target.load_model()) == first_weights(classifier(seed))
    with pytest.raises(ValueError, match="one epoch already"):
        open_run(run / "checkpoints" / "last", "best")
    with pytest.raises(ValueError, match=r"got another folder; expected .*RUN/checkpoints/last"):
        open_run(run / "checkpoints")


def test_a_recipe_with_weights_is_a_model_without_a_run(tmp_path):
    """Published weights have no run; building them must not move the caller's random numbers."""
    torch.save(classifier(7).backbone.state_dict(), tmp_path / "weights.pth")
    path = write_recipe(tmp_path / "published.yaml", checkpoint_path=str(tmp_path / "weights.pth"))
    target = open_run(path, settings=["threat.eps=0.1"])
    assert (target.run, target.at, target.recipe.threat.eps) == (None, "published", 0.1)
    torch.manual_seed(3)
    model = target.load_model()
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))
    assert first_weights(model) == first_weights(classifier(7))
    assert not model.training


def test_a_recipe_whose_weights_are_not_those_of_its_model_is_refused(tmp_path, monkeypatch):
    """A model before its first step is seldom meant; timm replaces a head of other classes without a word."""
    path = write_recipe(tmp_path / "untrained.yaml")
    with pytest.raises(ValueError, match=r"model is untrained; expected model\.pretrained or model\.checkp"):
        open_run(path)
    with pytest.raises(ValueError, match=r"--recipe: got other\.yaml with the recipe"):
        open_run(path, recipe="other.yaml", settings=["model.pretrained=true"])
    built = classifier(0)
    monkeypatch.setattr(targets, "initial_model", lambda recipe, splits, is_target: built)
    target = open_run(write_recipe(tmp_path / "published.yaml", stem="default", pretrained=True))
    built.backbone.pretrained_cfg = {"num_classes": 10}
    assert target.load_model() is built
    built.backbone.pretrained_cfg = {"num_classes": 1000}
    with pytest.raises(ValueError, match="pretrained for 1000 classes, and data of 10"):
        target.load_model()


def test_settings_of_the_model_are_refused_where_an_export_says_what_it_is(run, tmp_path):
    """They would be dropped in silence: an export holds its own model; others are built by the recipe."""
    alone, recipe = export(tmp_path / "alone", classifier(0)), run / "recipe.yaml"
    torch.save(classifier(0).state_dict(), tmp_path / "w.pt")
    for target in (run, tmp_path / "w.pt"):
        other = open_run(target, recipe=recipe, settings=["model.name=resnet34"])
        assert other.recipe.model.name == "resnet34"
    export(run / "model" / "last", classifier(0))
    for target in (run, run / "model" / "last", alone):
        for setting in ("model.name=resnet34", " model.stem = default", "model={name: resnet34}"):
            with pytest.raises(ValueError, match="what its model is; expected settings of other sections"):
                open_run(target, recipe=recipe, settings=["threat.eps=0.1", setting])
        assert open_run(target, recipe=recipe, settings=["threat.eps=0.1"]).recipe.threat.eps == 0.1


@pytest.mark.parametrize(("num_classes", "in_chans"), [(4, 1), (10, 3)])
def test_an_export_for_other_data_is_refused(num_classes, in_chans, tmp_path):
    """A model of fewer classes gives a loss on labels it knows, and a crash or nonsense on the others."""
    sizes = {"num_classes": num_classes, "in_chans": in_chans}
    path = export(tmp_path / "export", classifier(0, **sizes), **sizes)
    target = open_run(path, recipe=write_recipe(tmp_path / "recipe.yaml"))
    message = f"a model for {in_chans} channels and {num_classes} classes, and data of 1 and 10"
    with pytest.raises(ValueError, match=message):
        target.load_model()


def test_a_damaged_export_is_named(tmp_path):
    """A traceback does not say which of forty folders to look at."""
    path = export(tmp_path / "export", classifier(0))
    target = open_run(path, recipe=write_recipe(tmp_path / "recipe.yaml"))
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"export/model\.safetensors: got weights that cannot be read"):
        target.load_model()
    (path / "metadata.json").write_text("[]")
    with pytest.raises(ValueError, match=r"metadata\.json: got \[\]; expected a JSON object"):
        print(target.title)


def test_a_normalisation_in_a_file_must_be_the_models():
    """Weights behind another normalisation are another network, and every number of it would be wrong."""
    model, weights = classifier(0), dict(classifier(1).state_dict())
    same = weights | {"mean": model.mean.flatten().double() * (1 + 1e-5), "std": model.std.clone()}
    load_weights(model, same, "file")
    assert first_weights(model) == first_weights(classifier(1))
    others = [("mean", model.mean * 1.001), ("std", torch.full((3,), 0.25)), ("std", torch.tensor([0.9]))]
    for name, value in others:
        fresh = classifier(0)
        with pytest.raises(ValueError, match=rf"file: got .* normalised with {name} .*Set model\.{name}"):
            load_weights(fresh, weights | {name: value}, "file")
        assert first_weights(fresh) == first_weights(classifier(0))


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "meta"])
def test_a_device_that_is_not_there_is_explained(device, run):
    """Torch raises an assertion here and a runtime error there, and says nothing of the choice."""
    with pytest.raises(ValueError, match=rf"--device: got '{device}'; expected auto, cpu"):
        open_run(run, device=device)
    assert open_run(run, device="cpu").device == "cpu"


@pytest.mark.parametrize("as_archive", [True, False])
def test_weights_are_known_by_their_content_under_any_suffix(as_archive, tmp_path):
    """``net.model`` was taken with --checkpoint and unknown as a target."""
    path, model = tmp_path / "net.model", classifier(3)
    torch.save(model.state_dict(), path, _use_new_zipfile_serialization=as_archive)
    recipe = write_recipe(tmp_path / "recipe.yaml")
    assert first_weights(
        open_run(path, recipe=recipe, settings=["model.mean=[0.5]", "model.std=[0.5]"]).load_model()
    ) == first_weights(model)
    (tmp_path / "notes.model").write_text("neither")
    with pytest.raises(ValueError, match=r"got a \.model file; expected a run folder"):
        open_run(tmp_path / "notes.model", recipe=recipe)
