"""Runs on image folders: what changes between training and measuring is noticed, and shares are kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from image_files import write_image, write_shares
from PIL import Image
from tiny_run import TINY

from wcitrain import monitoring
from wcitrain.__main__ import main
from wcitrain.checkpoint import class_names_in
from wcitrain.commands.study import Study, measure_all
from wcitrain.progress import StopRequest, run_folder
from wcitrain.recipe import Recipe, recipe_from_dict
from wcitrain.run import refuse_other_images
from wcitrain.targets import open_run as open_target
from wcitrain.train import Interrupted, fit, open_run, train, train_passes

NAMES = ("class_1", "class_2", "class_10")


def tiny(root: Path, *settings: str, **data) -> Recipe:
    own = {"source": "folder", "root": str(root / "images"), "val_size": 44, "num_workers": 0} | data
    evaluation = TINY["evaluation"] | {"train_size": 88}
    more = {"data": own, "output": str(root / "runs"), "evaluation": evaluation}
    return recipe_from_dict(TINY | more, ["train.batch_size=22", *settings])


def write_colors(root: Path, names=NAMES) -> None:
    """Write red, green and blue noise, in classes whose order depends on the reader."""
    for channel, name in enumerate(names):
        for split, count in {"train": 30, "test": 10}.items():
            for i in range(count):
                path = root / split / name / f"{i}.png"
                pixels = write_image(path, seed=100 * channel + i + 50 * (split == "test"))
                Image.fromarray((pixels // 3 + 160 * (np.arange(3) == channel)).astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def colors(tmp_path_factory) -> Path:
    """The folder of a run that tells three colors apart."""
    root = tmp_path_factory.mktemp("colors")
    write_colors(root / "images")
    short = "={num_steps: 1, step_size: null}"
    settings = ["train={epochs: 6, batch_size: 9}", "threat.eps=0.01", "optimizer.lr=0.01"]
    recipe = tiny(root, *settings, f"objective{short}", f"evaluation{short}", val_size=18)
    assert fit(recipe)["last"]["test"]["clean_accuracy"] == 1.0
    return run_folder(recipe)


def accuracy(target: Path, out: Path, *recipe: str) -> float:
    command = ["evaluate", str(target), "--attacks", "fgsm", "--preflight", "warn", "--out", str(out)]
    assert main([*command, "--recipe", *recipe]) == 0
    (document,) = (json.loads(path.read_text()) for path in out.glob("*.json"))
    return document["clean"]["accuracy"]


@pytest.mark.parametrize("kind", ["run", "export", "weights", "checkpoint"])
def test_classes_are_found_by_name_whatever_the_order_of_the_reader(colors, kind, tmp_path, capsys):
    """One reader sorts class_1, class_10, class_2 and the other 1, 2, 10: 100 % became 33 %, silently."""
    recipe = [str(colors / "recipe.yaml")]
    assert class_names_in(colors / "model" / "last") == ("class_1", "class_10", "class_2")
    target = colors / {"export": "model/last", "weights": "model/last/model.safetensors"}.get(kind, "")
    if kind == "checkpoint":
        target = shutil.copytree(colors, tmp_path / "bare") / "checkpoints" / "last"
        shutil.rmtree(tmp_path / "bare" / "model")
    assert accuracy(target, tmp_path / "own", *recipe) == 1.0
    assert "by name" not in capsys.readouterr().err
    natural = [*recipe, "data.source=timm", "data.name=folder"]
    assert accuracy(target, tmp_path / "natural", *natural) == 1.0
    assert "class_1, class_2, class_10 of the data are the model's 0, 2, 1" in capsys.readouterr().err


def test_a_renamed_class_is_refused_and_unknown_names_are_said(colors, tmp_path, capsys):
    """A renamed class moves to another place in the order, and every class between with it."""
    write_colors(tmp_path / "renamed", ("class_1", "a_class", "class_10"))
    command = ["evaluate", str(colors), "--attacks", "--recipe", str(colors / "recipe.yaml")]
    assert main([*command, f"data.root={tmp_path / 'renamed'}"]) == 2
    error = capsys.readouterr().err
    assert "got data of the classes a_class, class_1, class_10, where a_class are not the model's" in error
    assert "expected its own, class_1, class_10, class_2" in error
    weights = {name: value.clone() for name, value in open_target(colors).load_model().state_dict().items()}
    torch.save(weights, tmp_path / "bare.pt")
    accuracy(tmp_path / "bare.pt", tmp_path / "bare", str(colors / "recipe.yaml"))
    text = "the names of the model's classes are not known: they are taken in the order class_1, class_10"
    assert text in capsys.readouterr().err
    (document,) = (json.loads(path.read_text()) for path in (tmp_path / "bare").glob("*.json"))
    assert text in document["notes"][0]


def test_pseudo_labels_are_matched_by_name(colors, capsys):
    """The labels of a model that was trained by another reader would be those of other classes."""
    images = colors.parent.parent / "images"
    extra = f"extra={{path: {images / 'train'}, labels: pseudo, labeler: {colors / 'model' / 'last'}}}"
    recipe = tiny(images.parent, extra, "name=natural", source="timm", name="folder", val_size=18)
    run = open_run(recipe)
    assert run.splits.class_names == NAMES
    labelled = run.train_set.extra
    places = [labelled.source.locate(position) for position in labelled.positions.tolist()]
    right = [f"/{NAMES[y]}/" in place for y, place in zip(labelled.y, places, strict=True)]
    assert sum(right) == 90
    assert "class_1, class_2, class_10 of the data are the model's 0, 2, 1" in capsys.readouterr().out


def test_models_with_other_orders_share_the_images_of_one_study(colors, tmp_path):
    """The images are read once for several models; the numbers of one order are not those of the other."""
    other = tmp_path / "other-s0"
    file = shutil.copytree(colors, other) / "model" / "last" / "metadata.json"
    names = json.dumps(["class_10", "class_1", "class_2"])
    file.write_text(json.dumps(json.loads(file.read_text()) | {"class_names": names}))
    models = measure_all([open_target(colors), open_target(other)], Study(measures=["clean_loss"]), tmp_path)
    first, second = (one.value("clean_loss") for one in models)
    assert second > 3 * first  # of this model, two of its outputs have other names


def constant(recipe: Recipe):
    """Return a run whose model always says class 0, with probability e/(1+e)."""
    run = open_run(recipe)
    with torch.no_grad():
        run.bare.backbone.fc.weight.zero_()
        run.bare.backbone.fc.bias.copy_(torch.tensor([1.0, 0.0]))
    return run


def test_a_constant_model_has_the_share_of_its_class_everywhere_and_no_gap(tmp_path, monkeypatch):
    """Balanced training images against test images as they are: 60.0 and 86.4 %, a gap of -26.4 points."""
    write_shares(tmp_path / "images", {"train/a": 190, "train/b": 30, "test/a": 190, "test/b": 30})
    recipe = tiny(
        tmp_path, "measures={take: [clean_loss], num_examples: 44}", "objective.name=fgsm_rs", max_test=110
    )
    run, share = constant(recipe), 19 / 22
    metrics = monitoring.epoch_accuracies(run)
    for split in ("train", "val"):
        assert metrics[f"{split}/clean_accuracy"] == metrics[f"{split}/robust_accuracy"] == share
    assert metrics["robust_gap"] == 0
    loss = share * 0.31326169 + (1 - share) * 1.31326169  # log(1 + 1/e), and 1 more
    assert metrics["train/clean_loss"] == pytest.approx(loss, rel=1e-6)
    assert monitoring.take_measures(run, 44)["measures/train/clean_loss"] == pytest.approx(loss, rel=1e-6)
    guard, _ = monitoring.overfitting(run)
    assert guard["train/guard_robust_accuracy"] == pytest.approx(share)
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(type(run.objective), "loss", lambda self, model, x, x_adv, y: seen.append(y))
    list(train_passes(run, run.bare))  # averaging's statistics
    assert [torch.bincount(y).tolist() for y in seen] == [[19, 3]] * 4
    summary = monitoring.summarize(run)
    parts = [summary["last"][split] for split in ("train", "val", "test")]
    assert [part[f"{kind}_accuracy"] for part in parts for kind in ("clean", "robust")] == [share] * 6
    assert summary["last"]["robust_gap"] == 0
    folder = run_folder(recipe)
    out = tmp_path / "out"
    command = ["evaluate", str(folder), "--attacks", "fgsm", "--examples", "44", "--preflight", "warn"]
    assert main([*command, "--out", str(out)]) == 0
    (document,) = (json.loads(path.read_text()) for path in out.glob("*.json"))
    assert document["clean"]["accuracy"] == document["worst_case_of_all"]["accuracy"] == share
    study = Study(measures=["clean_loss", "robust_gap"], examples=88, gap_examples=66)
    (measured,) = measure_all([open_target(folder)], study)
    assert measured.value("clean_loss") == pytest.approx(loss, rel=1e-6)
    assert measured.value("robust_gap") == 0


def interrupted(recipe: Recipe, step: int) -> None:
    run = open_run(recipe)

    class Pressed(StopRequest):
        is_set = property(lambda self: run.progress.step == step, lambda self, value: None)

    run.stop = Pressed()
    with pytest.raises(Interrupted):
        train(run)


def test_images_added_between_stop_and_resume_are_refused_and_measuring_says_so(tmp_path, capsys):
    """The validation cut moves: 22 of 40 validation images had been trained on."""
    write_shares(tmp_path / "images", {"train/a": 60, "train/b": 60, "test/a": 10, "test/b": 10})
    recipe = tiny(tmp_path, val_size=40)
    interrupted(recipe, 2)
    folder = run_folder(recipe)
    assert json.loads((folder / "data.json").read_text())["class_names"] == ["a", "b"]
    write_image(tmp_path / "images" / "train" / "a" / "new.png", seed=9999)
    assert main(["train", "--resume", str(folder)]) == 2
    error = capsys.readouterr().err
    assert "got other train images, 81 images, digest" in error
    assert "expected those it began with, 80 images, digest" in error
    measure = ["measure", str(folder), "--measures", "clean_loss", "--examples", "9", "--split"]
    for split in ("train", "val"):
        assert main([*measure, split]) == 2
        assert f"got {split} images, " in capsys.readouterr().err
    assert main([*measure, "test"]) == 0
    assert capsys.readouterr().err == ""
    moved = (tmp_path / "images").rename(tmp_path / "elsewhere")
    more = ["val", "--recipe", f"data.root={moved}", "--out"]
    assert main([*measure, *more, str(tmp_path / "other")]) == 0
    assert "that are not the run's" in capsys.readouterr().err
    (document,) = (json.loads(path.read_text()) for path in (tmp_path / "other").rglob("*.json"))
    assert "that are not the run's" in document["notes"][0]
    (moved / "train" / "a" / "new.png").unlink()
    assert main([*measure, *more, str(tmp_path / "own")]) == 0
    assert capsys.readouterr().err == ""
    moved.rename(tmp_path / "images")
    assert main(["train", "--resume", str(folder)]) == 0
    write_image(tmp_path / "images" / "test" / "a" / "new.png", seed=9999)
    assert main([*measure, "test", "--out", str(tmp_path / "test")]) == 0
    assert "got test images, 21 images, digest" in capsys.readouterr().err
    (folder / "data.json").unlink()  # a run of before there were records
    assert main([*measure, "val", "--out", str(tmp_path / "older")]) == 0
    assert "the run has no record of its val images" in capsys.readouterr().err
    (tmp_path / "images" / "test" / "a" / "new.png").unlink()
    refuse_other_images(None, open_run(recipe, resume=True))
    assert "saved without a record of its images" in capsys.readouterr().out


def test_a_cut_test_image_stops_before_training_and_a_loss_at_the_end_says_what_is_saved(tmp_path, capsys):
    """It was reported after the last epoch, and nothing said that the weights were there."""
    write_shares(tmp_path / "images", {"train/a": 40, "train/b": 40, "test/a": 4, "test/b": 4})
    recipe, cut = tiny(tmp_path, val_size=20), tmp_path / "images" / "test" / "b" / "000.png"
    (tmp_path / "tiny.yaml").write_text(recipe.to_yaml())
    whole = cut.read_bytes()
    cut.write_bytes(whole[:60])
    assert main(["train", str(tmp_path / "tiny.yaml")]) == 2
    assert f"unreadable image {cut}" in capsys.readouterr().err
    assert not (run_folder(recipe) / "metrics.jsonl").exists()
    at = whole.index(b"IDAT") + 12
    cut.write_bytes(whole[:at] + bytes(8) + whole[at + 8 :])  # its header and end are whole
    assert main(["train", str(tmp_path / "tiny.yaml"), "--check-data"]) == 2
    assert f"unreadable image {cut}" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "tiny.yaml")]) == 2
    printed = capsys.readouterr()
    assert f"training is finished and saved in {run_folder(recipe)}" in printed.out
    assert "Training is finished and saved. Mend that, then `wcitrain train --resume" in printed.err
    cut.write_bytes(whole)
    assert main(["train", "--resume", str(run_folder(recipe))]) == 0
    assert json.loads((run_folder(recipe) / "summary.json").read_text())["status"] == "finished"


def test_a_backbone_of_one_channel_trains_from_folders(tmp_path):
    """Folders were always RGB, and the model's own setting was refused."""
    write_shares(tmp_path / "images", {"train/a": 40, "train/b": 40, "test/a": 4, "test/b": 4})
    recipe = tiny(tmp_path, val_size=20, channels=1)
    fit(recipe)
    model = open_target(run_folder(recipe)).load_model()
    assert model.backbone.conv1.weight.shape[1] == model.mean.numel() == 1
    with pytest.raises(ValueError, match=r"kwargs.in_chans: got 1; expected none, as data.channels says"):
        tiny(tmp_path, "model.kwargs.in_chans=1")
