"""Where training starts: weights of other classes, channels and sizes, against what timm makes of them."""

import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from tiny_run import TINY
from torch import Tensor, nn

from wcitrain.build import initial_model
from wcitrain.checkpoint import save_exported_model
from wcitrain.data import load_splits
from wcitrain.models import create_model
from wcitrain.recipe import recipe_from_dict
from wcitrain.starting import start_from
from wcitrain.train import fit

SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2}
NEXT = {"depths": [1, 1, 1, 1], "dims": [4, 4, 4, 8]}
SOURCES = {  # architecture, arguments of the source, arguments of the model
    "head": ("resnet18", SMALL | {"num_classes": 7}, SMALL | {"num_classes": 3}),
    "gray": ("resnet18", SMALL, SMALL | {"in_chans": 1}),
    "five_channels": ("convnext_atto", NEXT, NEXT | {"in_chans": 5}),
    "positions": ("vit_tiny_patch16_224", VIT | {"img_size": 32}, VIT | {"img_size": 64, "num_classes": 3}),
    "average_pooling": (
        "vit_tiny_patch16_224",
        VIT | {"img_size": 32, "class_token": False, "global_pool": "avg"},
        VIT | {"img_size": 48, "class_token": False, "global_pool": "avg"},
    ),
    "windows": (
        "swin_tiny_patch4_window7_224",
        SWIN | {"img_size": 16, "window_size": 2},
        SWIN | {"img_size": 32, "window_size": 4},
    ),
    "two_heads": (
        "deit_tiny_distilled_patch16_224",
        VIT | {"img_size": 32, "num_classes": 5},
        VIT | {"img_size": 32, "num_classes": 2},
    ),
}


def built(name: str, seed: int, settings: dict, **more) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **settings, **more)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # in timm's interpolation of windows
@pytest.mark.filterwarnings("ignore:torch.searchsorted")  # likewise
@pytest.mark.parametrize("prefix", ["", "module._orig_mod."])
@pytest.mark.parametrize("case", SOURCES)
def test_weights_of_other_shapes_become_what_timm_makes_of_them(case, prefix, tmp_path, capsys):
    """timm does it for weights it calls pretrained, and refuses the same in a file."""
    name, theirs, ours = SOURCES[case]
    source = built(name, 0, theirs).state_dict()
    torch.save({"state_dict": {prefix + key: value for key, value in source.items()}}, tmp_path / "w.pt")
    sizes = {"num_classes": 1000, "in_chans": 3} | ours
    torch.manual_seed(1)
    model = create_model(name, **sizes)
    start_from(model, str(tmp_path / "w.pt"))
    overlay = {"state_dict": dict(source), "num_classes": theirs.get("num_classes", 1000)}
    wanted = built(name, 1, ours, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    own = model.backbone.state_dict()
    heads = [key for key in own if "head" in key.split(".")[0] or key.startswith("fc.")]
    is_new = theirs.get("num_classes", 1000) != sizes["num_classes"]
    for key, value in own.items():
        if is_new and key in heads and value.shape != source[key].shape:
            continue  # of the initialisation: timm draws another one
        assert torch.equal(value, wanted[key]), key
    said = capsys.readouterr().out
    assert ("nothing of the head" in said) == is_new
    assert ("channels in place of 3" in said) == ("in_chans" in ours)
    assert ("resized" in said) == ("img_size" in ours and theirs["img_size"] != ours["img_size"])


def test_a_new_head_is_the_models_own_initial_one(tmp_path):
    """A head filled with zeros or with rows of other classes would train, from somewhere else."""
    torch.save(built("resnet18", 0, SMALL | {"num_classes": 7}).state_dict(), tmp_path / "w.pt")
    torch.manual_seed(1)
    model = create_model("resnet18", num_classes=3, **SMALL)
    torch.manual_seed(1)
    fresh = create_model("resnet18", num_classes=3, **SMALL)
    start_from(model, str(tmp_path / "w.pt"))
    assert torch.equal(model.backbone.fc.weight, fresh.backbone.fc.weight)
    assert not torch.equal(model.backbone.conv1.weight, fresh.backbone.conv1.weight)


def export(folder: Path, names: list[str], mean: float = 0.25) -> dict[str, Tensor]:
    """An export of a run on gray images, with the names of its classes."""
    state = built("resnet18", 0, SMALL | {"num_classes": len(names), "in_chans": 1}).state_dict()
    metadata = {"class_names": json.dumps(names), "mean": json.dumps([mean]), "std": "[0.5]"}
    save_exported_model(folder, state, metadata)
    return state


@pytest.mark.parametrize("way", ["model/best", "model/best/model.safetensors", "checkpoints/best", "."])
def test_a_run_is_a_start_and_its_classes_go_by_name(way, tmp_path, capsys):
    """The head of a robust model was read in the order of another data set, or lost for the same classes."""
    state = export(tmp_path / "model" / ("last" if way == "." else "best"), ["cat", "dog", "eel"])
    (tmp_path / "checkpoints" / "best").mkdir(parents=True)

    def started(names: list[str], **given):
        torch.manual_seed(1)
        model = create_model("resnet18", num_classes=len(names), in_chans=1, **given, **SMALL)
        start_from(model, str(tmp_path / way), class_names=names, **given)
        return model

    model = started(["eel", "cat", "dog"])
    assert torch.equal(model.backbone.fc.weight, state["fc.weight"][[2, 0, 1]])
    assert torch.equal(model.backbone.fc.bias, state["fc.bias"][[2, 0, 1]])
    assert (float(model.mean), float(model.std)) == (0.25, 0.5)  # its own, not timm's
    assert "rows by the names of the classes" in capsys.readouterr().out
    other = started(["cat", "dog", "fox"])  # as many, and not these
    assert not torch.equal(other.backbone.fc.weight, state["fc.weight"])
    assert torch.equal(other.backbone.conv1.weight, state["conv1.weight"])
    started(["cat", "dog", "eel"], mean=[0.25], std=[0.5])
    with pytest.raises(ValueError, match=r"model\.mean: got \[0\.5\]; expected \[0\.25\], behind which"):
        started(["cat", "dog", "eel"], mean=[0.5], std=[0.5])


def test_the_normalisation_of_a_folder_of_timm_is_taken(tmp_path):
    """timm's default for the architecture is another one than that of these weights."""
    save_file(built("resnet18", 0, SMALL).state_dict(), tmp_path / "model.safetensors")
    own = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.25]}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": own}))
    model = create_model("resnet18", num_classes=3, **SMALL)
    start_from(model, str(tmp_path))
    assert model.mean.flatten().tolist() == pytest.approx(own["mean"])
    assert model.std.flatten().tolist() == pytest.approx(own["std"])


def in_a_package(folder: Path, state: dict[str, Tensor]) -> None:
    (folder / "some_weights" / "models").mkdir(parents=True)
    (folder / "some_weights" / "__init__.py").write_text("raise RuntimeError('never imported')")
    torch.save(state, folder / "some_weights" / "models" / "net.pth")


def test_weights_in_a_package_under_other_names_are_read_in_order(tmp_path, monkeypatch):
    """Ports keep the order and rename all; a permutation of equal shapes would be another network."""
    state = built("resnet18", 0, SMALL).state_dict()
    in_a_package(tmp_path, {f"_n{k}.{key.rpartition('.')[2]}": v for k, (key, v) in enumerate(state.items())})
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    model = create_model("resnet18", num_classes=1000, **SMALL)
    place = "package:some_weights/models/net.pth"
    start_from(model, place, match="order")
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.state_dict().items())
    strict = create_model("resnet18", num_classes=1000, checkpoint_path=place, match="order", **SMALL)
    assert torch.equal(strict.backbone.fc.weight, state["fc.weight"])
    with pytest.raises(ValueError, match=r"got names such as _n0\.weight"):
        start_from(model, place)
    deeper = create_model("resnet18", num_classes=1000, layers=[1, 1, 1, 2], channels=[4, 4, 4, 4])
    with pytest.raises(ValueError, match=r"net\.pth: got .* expected the same in the same order"):
        start_from(deeper, place, match="order")
    with pytest.raises(ValueError, match=r"got no file 'net\.pth' in some_weights; expected one of m"):
        start_from(model, "package:some_weights/net.pth")
    with pytest.raises(ValueError, match=r"no package 'other_weights'; .* `pip install other-weights`"):
        start_from(model, "package:other_weights/net.pth")


def test_weights_of_another_model_are_named(tmp_path):
    """Half of a network that loads is a random network with a good name."""
    torch.save(built("resnet18", 0, SMALL | {"layers": [1, 1, 1, 2]}).state_dict(), tmp_path / "w.pt")
    model = create_model("resnet18", num_classes=3, **SMALL)
    with pytest.raises(ValueError, match=r"of no layer layer4\.1\.conv1\.weight"):
        start_from(model, str(tmp_path / "w.pt"))
    wider = create_model("resnet18", num_classes=3, layers=[1, 1, 1, 2], channels=[8, 8, 8, 8])
    with pytest.raises(ValueError, match=r"of another shape layer1\.0\.conv1\.weight \[4, 64"):
        start_from(wider, str(tmp_path / "w.pt"))


def test_a_resumed_run_does_not_need_the_weights_it_began_with(tmp_path):
    """They were on another disk: the checkpoint has all that is needed."""
    path = tmp_path / "w.pt"
    recipe = recipe_from_dict(TINY | {"output": str(tmp_path)}, [f"model.checkpoint_path={path}"])
    splits = load_splits(recipe.data)
    bare = recipe.model_copy(update={"model": recipe.model.model_copy(update={"checkpoint_path": None})})
    torch.save(initial_model(bare.model_copy(update={"seed": 5}), splits).backbone.state_dict(), path)
    began = initial_model(recipe, splits)
    summary = fit(recipe)
    assert began.backbone.state_dict().keys() <= torch.load(path).keys()
    path.unlink()
    assert fit(recipe, resume=True)["last"] == summary["last"]
    with pytest.raises(ValueError, match=r"w\.pt: got no file; expected weights"):
        fit(recipe.model_copy(update={"name": "anew"}))
