"""Where training starts: weights of other classes, channels and sizes, against what timm makes of them."""

import json
import re
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from tiny_run import TINY
from torch import Tensor, nn

from wcitrain.build import initial_model, untrained
from wcitrain.checkpoint import save_exported_model
from wcitrain.data import load_splits
from wcitrain.models import create_model
from wcitrain.recipe import recipe_from_dict
from wcitrain.starting import start_from
from wcitrain.sweep import run_sweep
from wcitrain.targets import open_run
from wcitrain.train import fit
from wcitrain.train import open_run as open_training_run

SMALL = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SWIN = {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "patch_size": 2}
NEXT = {"depths": [1, 1, 1, 1], "dims": [4, 4, 4, 8]}
LEVIT = {"embed_dim": (16, 16, 16), "depth": (1, 1, 1), "num_heads": (1, 1, 1), "key_dim": 8}
FOLDED = {"layers": [1, 1, 1, 1], "width_factor": 0.25}
SOURCES = {  # architecture, arguments of the source, arguments of the model
    "head": ("resnet18", SMALL | {"num_classes": 7}, SMALL | {"num_classes": 3}),
    "gray": ("resnet18", SMALL, SMALL | {"in_chans": 1}),
    "five_channels": ("convnext_atto", NEXT, NEXT | {"in_chans": 5}),
    "color": ("resnet18", SMALL | {"in_chans": 1}, SMALL),
    "four_to_three": ("resnet18", SMALL | {"in_chans": 4}, SMALL),
    "folded_pixels": ("tresnet_m", FOLDED, FOLDED | {"in_chans": 1}),
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
    "head_with_a_norm": ("levit_128s", LEVIT | {"num_classes": 5}, LEVIT | {"num_classes": 2}),
    "two_heads": (
        "deit_tiny_distilled_patch16_224",
        VIT | {"img_size": 32, "num_classes": 5},
        VIT | {"img_size": 32, "num_classes": 2},
    ),
}


def built(name: str, seed: int, settings: dict, **more) -> nn.Module:
    torch.manual_seed(seed)
    return timm.create_model(name, **settings, **more)


@pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")  # of windows
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
    overlay["input_size"] = (theirs.get("in_chans", 3), 224, 224)
    wanted = built(name, 1, sizes, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    own = model.backbone.state_dict()
    heads = [key for key in own if "head" in key.split(".")[0] or key.startswith("fc.")]
    is_new = theirs.get("num_classes", 1000) != sizes["num_classes"]
    for key, value in own.items():
        if is_new and key in heads and value.shape != source[key].shape:
            continue  # of the initialisation: timm draws another one
        assert torch.equal(value, wanted[key]), key
    said = capsys.readouterr().out
    assert ("nothing of the head" in said) == is_new
    assert ("channels in place of" in said) == (theirs.get("in_chans", 3) != ours.get("in_chans", 3))
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
    strict = create_model("resnet18", num_classes=1000, **SMALL)
    start_from(strict, place, match="order", is_exact=True)
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


def test_a_measure_of_the_distance_does_not_need_the_weights_again(tmp_path):
    """It asked for the file, or would have measured from a random draw."""
    path = tmp_path / "w.pt"
    take = {"measures": {"every": 1, "num_examples": 50, "take": [{"name": "distance_from_initialisation"}]}}
    recipe = recipe_from_dict(TINY | take | {"output": str(tmp_path)}, [f"model.checkpoint_path={path}"])
    splits = load_splits(recipe.data)
    other = untrained(recipe.model_copy(update={"seed": 5}))
    torch.save(initial_model(other, splits).state_dict(), path)
    began = initial_model(recipe, splits).state_dict()
    fit(recipe)
    path.unlink()
    resumed = open_training_run(recipe, resume=True).initial
    for initial in (resumed, open_run(tmp_path / "tiny-s0").initial_weights()):
        assert all(torch.equal(initial[key], value) for key, value in began.items())


def convnext_of_the_paper(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of the paper's code: downsampling apart, blocks by number, a norm before the head."""
    names = {"stem.": "downsample_layers.0.", "conv_dw": "dwconv", "mlp.fc": "pwconv"}
    names |= {"head.norm.": "norm.", "head.fc.": "head."}
    found = {}
    for key, value in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        key = re.sub(r"stages\.(\d)\.downsample", r"downsample_layers.\1", key)
        found[re.sub(r"stages\.(\d)\.blocks", r"stages.\1", key)] = value
    return found


def test_names_of_a_paper_are_read_where_timm_knows_them(tmp_path, capsys):
    """timm renames them for its own downloads alone."""
    state = built("convnext_atto", 0, NEXT).state_dict()
    theirs = convnext_of_the_paper(state)
    assert len(theirs) == len(state) > 3 * len(theirs.keys() & state.keys())
    torch.save({"model": {f"module.{key}": value for key, value in theirs.items()}}, tmp_path / "w.pth")
    model = create_model("convnext_atto", num_classes=3, in_chans=1, **NEXT)
    start_from(model, str(tmp_path / "w.pth"))
    own = model.backbone.state_dict()
    assert torch.equal(own["stem.0.weight"], state["stem.0.weight"].sum(1, keepdim=True))
    same = [key for key in own if not key.startswith(("stem.0.weight", "head.fc."))]
    assert all(torch.equal(own[key], state[key]) for key in same)
    assert "timm knows" in capsys.readouterr().out


def test_a_resumed_run_keeps_the_normalisation_it_took_from_its_weights(tmp_path):
    """Its weights went on behind the architecture's own normalisation: another network, without a word."""
    base = TINY | {"output": str(tmp_path)}
    fit(recipe_from_dict(base, ["name=first", "model.mean=[0.2]", "model.std=[0.3]"]))
    recipe = recipe_from_dict(base, ["name=second", f"model.checkpoint_path={tmp_path / 'first-s0'}"])
    fit(recipe)
    shutil.rmtree(tmp_path / "first-s0")
    run = tmp_path / "second-s0"
    shutil.rmtree(run / "model")  # what is left is read by the recipe
    assert run_sweep([recipe]) == [run]  # finished, and still the same run
    models = [open_training_run(recipe, resume=True).bare, open_run(run, "last").load_model()]
    for model in models:
        assert float(model.mean) == pytest.approx(0.2)
        assert float(model.std) == pytest.approx(0.3)


def timm_folder(folder: Path, name: str, settings: dict, mean: list[float]) -> nn.Module:
    """A folder as timm saves it for its hub."""
    model = built(name, 0, settings)
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    cfg = {"mean": mean, "std": [0.5] * 3, "num_classes": model.num_classes, "input_size": [3, 32, 32]}
    cfg |= {"first_conv": "conv1", "classifier": "fc"}
    config = {"architecture": name, "model_args": settings, "pretrained_cfg": cfg}
    (folder / "config.json").write_text(json.dumps(config))
    return model


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The hub's cache with one repository in it, and no way out."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = cache / "models--someone--net"
    timm_folder(repository / "snapshots" / "abc", "resnet18", SMALL | {"num_classes": 7}, [0.1, 0.2, 0.3])
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")


COLOR = TINY | {"data": TINY["data"] | {"channels": 3}, "model": {}}


@pytest.mark.parametrize("source", ["local-dir", "hf-hub"])
def test_a_folder_of_timm_or_a_hub_is_a_start_that_a_run_needs_once(source, tmp_path, offline_hub):
    """The run asked for the folder or the hub again to go on, and its export named no architecture."""
    folder = tmp_path / "net"
    theirs = timm_folder(folder, "resnet18", SMALL | {"num_classes": 7}, [0.1, 0.2, 0.3])
    name = f"local-dir:{folder}" if source == "local-dir" else "hf-hub:someone/net"
    recipe = recipe_from_dict(
        COLOR | {"output": str(tmp_path)}, [f"model.name={name}", "model.pretrained=true"]
    )
    run = open_training_run(recipe)
    wanted = timm.create_model(name, pretrained=True, num_classes=10).state_dict()
    for key, value in run.bare.backbone.state_dict().items():
        assert torch.equal(value, wanted[key]) or key.startswith("fc."), key
    assert torch.equal(run.bare.backbone.conv1.weight, theirs.conv1.weight)
    shutil.rmtree(run.folder)
    summary = fit(recipe)
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "hub")
    assert fit(recipe, resume=True)["last"] == summary["last"]
    shutil.rmtree(tmp_path / "tiny-s0" / "model" / "best")
    for at in ("last", "best"):  # an export, and a checkpoint
        model = open_run(tmp_path / "tiny-s0", at).load_model()
        assert model.mean.flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match=r"(config\.json; expected|could not|cannot find).*"):
        fit(recipe.model_copy(update={"name": "anew"}))
    untold = recipe.model_copy(update={"model": recipe.model.model_copy(update={"pretrained": False})})
    with pytest.raises(ValueError, match=r"model\.name: got .* no source of weights; expected one"):
        fit(untold.model_copy(update={"name": "bare"}))
    assert not (tmp_path / "anew-s0").exists()
    assert not (tmp_path / "bare-s0").exists()


def test_a_normalisation_that_contradicts_pretrained_weights_is_refused(tmp_path):
    """It trained on images that the weights had never seen like that."""
    folder = tmp_path / "net"
    timm_folder(folder, "resnet18", SMALL, [0.1, 0.2, 0.3])
    own = {"name": f"local-dir:{folder}", "pretrained": True, "mean": [0.5] * 3, "std": [0.5] * 3}
    recipe = recipe_from_dict(COLOR | {"output": str(tmp_path), "model": own})
    for start in (fit, lambda recipe: initial_model(recipe, load_splits(recipe.data))):
        with pytest.raises(ValueError, match=r"model\.mean: got \[0\.5, 0\.5, 0\.5\]; expected \[0\.1, 0\.2"):
            start(recipe)
    assert not (tmp_path / "tiny-s0").exists()


def test_a_recipe_is_measured_behind_the_normalisation_of_its_weights(tmp_path):
    """As a target the same recipe had the architecture's own, which is another network."""
    export(tmp_path / "export", [str(n) for n in range(10)])
    recipe = recipe_from_dict(
        TINY | {"model": {"kwargs": SMALL, "checkpoint_path": str(tmp_path / "export")}}
    )
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    model = open_run(tmp_path / "r.yaml").load_model()
    assert (float(model.mean), float(model.std)) == (0.25, 0.5)
    export(tmp_path / "export", ["cat", "dog"])
    for is_target in (False, True):  # trained it may be, measured its new head would be random
        with pytest.raises(ValueError, match=r"fc\.weight") if is_target else nullcontext():
            initial_model(recipe, load_splits(recipe.data), is_target=is_target)


def test_settings_of_weights_without_effect_are_refused(tmp_path):
    """One of two sources was fetched and overwritten; an order of no file was taken for one that is kept."""
    with pytest.raises(ValueError, match=r"model\.pretrained: got true with checkpoint_path; expected one"):
        recipe_from_dict(TINY | {"model": {"pretrained": True, "checkpoint_path": "w.pt"}})
    recipe = recipe_from_dict(TINY | {"output": str(tmp_path), "model": {"match": "order"}})
    with pytest.raises(ValueError, match=r"model\.match: got order; expected it with model\.checkpoint_path"):
        fit(recipe)
    assert not list(tmp_path.iterdir())


def test_sorted_files_are_not_read_in_order(tmp_path):
    """safetensors sorts by name: tensors of one shape would change places."""
    save_file(built("resnet18", 0, SMALL).state_dict(), tmp_path / "w.safetensors")
    model = create_model("resnet18", num_classes=1000, **SMALL)
    with pytest.raises(ValueError, match=r"model\.match: got order with .* safetensors sorts"):
        start_from(model, str(tmp_path / "w.safetensors"), match="order")


def test_names_that_timm_does_not_know_are_answered_with_near_ones():
    """A wrong tag was an error of the hub."""
    with pytest.raises(ValueError, match=r"tag \(a1_in2k\).* Did you mean resnet18\.a1_in1k\?"):
        create_model("resnet18.a1_in2k", num_classes=2, pretrained=True)
    with pytest.raises(ValueError, match=r"\(resnt18\). Did you mean resnet18\?"):
        create_model("resnt18", num_classes=2)


def test_without_a_hub_one_message_names_the_local_ways(offline_hub):
    """It was tried again for half a minute, with `pretrained` or without it."""
    for name in ("resnet18", "hf-hub:someone/other"):
        with pytest.raises(
            ValueError, match=r"model\.checkpoint_path .* package:NAME/FILE .* local-dir:FOLDER"
        ):
            create_model(name, num_classes=2, pretrained=True)
    assert constants.HF_HUB_OFFLINE is True
