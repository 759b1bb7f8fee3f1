"""What is not taken for data, what is checked before training, and which images and classes are the same."""

import io
import re
import tarfile
import warnings
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import timm.data
import torch
from image_files import FakeStream, load, write_classes, write_image, write_shares
from PIL import Image

from wcitrain.data import Data, Extra, check_images, identity, load_extra, match_classes, parts_of
from wcitrain.data.folders import scan_folder
from wcitrain.data.sources import _source
from wcitrain.data.stream import StreamSet

READERS = {
    "folder": {"source": "folder"},
    "timm": {"source": "timm", "name": "folder"},
    "torchvision": {"source": "timm", "name": "torch/image_folder"},
}
LITTER = (
    *("train/cat/.ipynb_checkpoints/00-checkpoint.png", "train/ant/.thumbs/deep/x.png", "train/cat/._00.png"),
    *("train/.ipynb_checkpoints/a.png", "train/__MACOSX/cat/00.png", "train/cat/@eaDir/00.png/thumb.png"),
    *("test/ant/.cache/b.png", "test/__MACOSX/a.png", "test/.hidden/c.png", "train/cat/#recycle/old.png"),
)


@pytest.fixture
def folder(tmp_path):
    """Two classes, 20 training and 6 test PNGs, below a hidden folder, as caches are."""
    root = tmp_path / ".cache" / "data"
    write_classes(root, train=10, test=3)
    return root


def places(images):
    return [images.source.locate(position) for position in images.positions.tolist()]


@pytest.mark.parametrize("reader", READERS)
def test_hidden_files_and_litter_are_no_images_in_any_reader(folder, reader):
    """A notebook's checkpoints are copies: 20 images become 25, of which some are in two splits."""

    def read():
        splits = load(**READERS[reader], root=str(folder), val_size=4)
        parts = [splits.train, splits.val, splits.test]
        return splits.class_names, [(places(part), part.y.tolist()) for part in parts]

    before = read()
    for name in LITTER:
        write_image(folder / name)
    (folder / "train" / ".empty").mkdir()
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    assert read() == before
    assert before[0] == ("ant", "cat")
    assert sum(len(names) for names, _ in before[1]) == 26


def test_litter_is_no_extra_image_and_no_class_of_corruptions(folder):
    """Extra images are trained on, corrupted ones are counted against the test images by number."""
    like = load("folder", root=str(folder), val_size=4)
    for name in LITTER:
        write_image(folder / name)
    for labels, labeler in (("given", None), ("pseudo", "model")):
        extra = load_extra(Extra(str(folder / "train"), labels=labels, labeler=labeler), Data(), like)
        assert len(extra) == 20
    assert len(scan_folder(folder / "test", key="corruptions").labels) == 6


def test_litter_in_an_archive_is_no_class(tmp_path):
    """A zip of a Mac, packed anew, holds __MACOSX/cat/._a.png: one more class, which shifts all after it."""
    content = io.BytesIO()
    Image.new("RGB", (4, 4)).save(content, "PNG")
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("__MACOSX/._a.png", "ant/a.png", "ant/.ipynb_checkpoints/a.png", "cat/b.png"):
            member = tarfile.TarInfo(name)
            member.size = len(content.getvalue())
            tar.addfile(member, io.BytesIO(content.getvalue()))
    source = _source(timm.data.create_dataset("", root=str(tmp_path / "x.tar")), "x")
    assert (source.class_names, source.labels.tolist()) == (("ant", "cat"), [0, 1])
    assert [source.locate(i) for i in range(2)] == ["ant/a.png", "cat/b.png"]
    assert source.read(1).size == (4, 4)
    source.dataset.reader.tar_state.tf.close()


def copy(one, other):
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(one.read_bytes())


def test_exact_copies_between_splits_are_counted_and_named(folder):
    """Accuracy on images that were trained on is not accuracy; nobody compares thousands of files by eye."""
    for i in range(8):
        write_image(folder / "val" / "cat" / f"{i}.png", seed=7000 + i)
        if i < 3:
            copy(folder / "train" / "cat" / f"0{i}.png", folder / "val" / "cat" / f"{i}.png")
    copy(folder / "test" / "cat" / "00.png", folder / "train" / "cat" / "copy.png")
    large = [np.random.RandomState(0).randint(0, 256, (90, 90, 3), dtype=np.uint8) for _ in range(2)]
    large[1][45, 45] ^= 1  # in the middle of the file, of the same size, and nowhere else
    for pixels, name in zip(large, ("train", "test"), strict=True):
        Image.fromarray(pixels).save(folder / name / "ant" / "large.bmp")
    splits = load("folder", root=str(folder), val_split="val", image_size=6)
    for_val, for_test = check_images(parts_of(splits))
    assert for_val.startswith("3 of 8 val images are exact copies of train images: ")
    assert for_val.count("/val/cat/") == for_val.count("/train/cat/") == 3
    assert for_test.startswith("1 of 7 test images are exact copies of train images: ")
    assert for_test.endswith("/test/cat/00.png = " + str(folder / "train" / "cat" / "copy.png"))


def test_copies_of_test_images_among_extra_arrays_are_counted(tmp_path):
    """Generated sets have been published with test images in them."""
    digits = load()
    pixels = np.concatenate([digits.test.source.pixels[:2], np.full((3, 8, 8), 7, np.uint8)])
    np.savez(tmp_path / "x.npz", image=pixels, label=np.zeros(5, int))
    extra = load_extra(Extra(str(tmp_path / "x.npz")), Data(), digits)
    (line,) = check_images(parts_of(digits, extra))
    assert line.startswith("2 of 5 extra images are exact copies of test images: ")


# The endings that all readers know, and those of ours.
@pytest.mark.parametrize(
    ("reader", "suffix"), [*product(READERS, ("png", "jpg")), ("folder", "gif"), ("folder", "bmp")]
)
def test_cut_test_images_are_found_by_their_ends(folder, reader, suffix):
    """Test images are opened after the last epoch: a cut one was reported after days of training."""
    path = folder / "test" / "cat" / f"cut.{suffix}"
    write_image(path, seed=77)
    splits = load(**READERS[reader], root=str(folder), val_size=4)
    assert check_images(parts_of(splits)) == []
    path.write_bytes(path.read_bytes()[: -len(path.read_bytes()) // 3])
    splits = load(**READERS[reader], root=str(folder), val_size=4)
    with pytest.raises(ValueError, match=rf"unreadable image .*/test/cat/cut\.{suffix}"):
        check_images(parts_of(splits))


def test_damage_inside_is_found_by_decoding_and_other_sizes_by_headers(folder):
    """Headers are whole where pixels are not; a size stops an evaluation as late as damage does."""
    path = folder / "test" / "cat" / "00.png"
    content = bytearray(path.read_bytes())
    at = content.index(b"IDAT") + 12
    content[at : at + 8] = bytes(8)
    path.write_bytes(content)
    parts = parts_of(load("folder", root=str(folder), val_size=4))
    assert check_images(parts) == []
    with pytest.raises(ValueError, match=r"unreadable image .*/test/cat/00\.png"):
        check_images(parts, decode=True)
    write_image(path, size=(7, 5))
    with pytest.raises(ValueError, match=r"data.image_size: got \[3, 5, 7\] in .*/test/cat/00\.png"):
        check_images(parts_of(load("folder", root=str(folder), val_size=4)))
    assert check_images(parts_of(load("folder", root=str(folder), val_size=4, image_size=6))) == []


@pytest.mark.parametrize("reader", READERS)
def test_an_identity_is_of_names_and_classes(folder, tmp_path, reader):
    """A resumed run would select on images it has trained on, and a moved one would not be recognised."""

    def identities(root=folder, **settings):
        splits = load(**READERS[reader], root=str(root), **{"val_size": 4} | settings)
        return {name: identity(images) for name, images in parts_of(splits).items()}

    before = identities()
    assert before["test"] == identity(load("folder", root=str(folder), val_size=4).test_files)
    assert before["train"].startswith("16 images, digest ")
    assert identities(in_memory=False, image_size=9) == before
    assert set(identities(split_seed=1).values()) & set(before.values()) == {before["test"]}
    moved = folder.rename(tmp_path / "moved")
    assert identities(moved) == before
    (moved / "test" / "cat" / "00.png").rename(moved / "test" / "cat" / "a.png")
    assert identities(moved) == before | {"test": identities(moved)["test"]}
    (moved / "test" / "cat" / "a.png").rename(moved / "test" / "ant" / "a.png")
    assert identities(moved)["test"].startswith("6 images")
    assert identities(moved)["test"] != before["test"]
    write_image(moved / "train" / "cat" / "99.png")
    assert not set(identities(moved).values()) & set(before.values())


def test_an_identity_of_arrays_is_of_their_pixels():
    """Arrays have no names: others of equal labels would be the same."""
    train = load(max_train=50, val_size=10).train
    source = train.source
    same, other = source.pixels.copy(), source.pixels.copy()
    other[int(train.positions[3]), 0, 0] += 1
    of_same, of_other = (
        identity(replace(train, source=replace(source, pixels=pixels))) for pixels in (same, other)
    )
    assert of_same == identity(train) != of_other


@pytest.mark.parametrize(
    ("model", "data", "numbers", "note"),
    [
        (["a", "b"], ["a", "b"], [0, 1], None),
        (["a", "b", "c"], ["c", "a", "b"], [2, 0, 1], "by name: c, a, b of the data are the model's 2, 0, 1"),
        (["a", "b", "c"], ["c", "a"], [2, 0], "by name"),
        (["1", "2", "10"], ["1", "10", "2"], [0, 2, 1], "by name"),
        (None, ["a", "b"], [0, 1], "the names of the model's classes are not known: .* order a, b"),
        (["a", "b"], ["0", "1"], [0, 1], "the names of the data's classes are not known: .* order a, b"),
        (["0", "1"], ["a", "b"], [0, 1], "the names of the model's classes are not known: .* order a, b"),
        (None, ["0", "1"], [0, 1], None),
    ],
)
def test_classes_are_matched_by_name(model, data, numbers, note):
    """Readers sort 1, 10, 2 or 1, 2, 10: every label after the first would be another class."""
    found, text = match_classes(model, data, "run")
    assert found == numbers
    assert text is None if note is None else re.search(note, text)


def test_classes_that_the_model_lacks_are_refused_with_both_lists():
    """A renamed class moves in the order, and all between with it."""
    with pytest.raises(ValueError, match=r"run: got data of .*cow, dog, where cow are.*own, cat, dog"):
        match_classes(["cat", "dog"], ["cow", "dog"], "run")


def test_renumbered_splits_keep_every_image_with_its_class(folder):
    """Labels of one split would be of the model's order, and those of the test split of the data's."""
    splits = load("folder", root=str(folder), val_size=4)
    other = splits.renumbered([2, 0], ["cat", "bee", "ant"])
    assert (other.num_classes, other.class_names) == (3, ("cat", "bee", "ant"))
    for split in ("train", "val", "test"):
        one, two = getattr(splits, split), getattr(other, split)
        assert torch.equal(one.positions, two.positions)
        for images, names in ((one, splits.class_names), (two, other.class_names)):
            labels = images.source.labels[images.positions]
            for place, y, label in zip(places(images), images.y, labels, strict=True):
                assert f"/{names[y]}/" in place
                assert y == label


@pytest.mark.parametrize("in_memory", [True, False])
@pytest.mark.parametrize("reader", READERS)
def test_one_channel_is_the_luma_of_files(folder, reader, in_memory):
    """A backbone of one channel could not be trained from folders."""
    splits = load(**READERS[reader], root=str(folder), val_size=4, channels=1, in_memory=in_memory)
    assert (splits.shape, splits.in_chans) == ((1, 6, 6), 1)
    for part in (splits.train, splits.test):
        (batch,) = part.batches(len(part))
        for x, place in zip(batch.x, places(part), strict=True):
            assert torch.equal(x[0], torch.from_numpy(np.array(Image.open(place).convert("L"))) / 255)
    gray = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6))
    gray.save(folder / "train" / "cat" / "00.png")
    levels = [next(load(root=str(folder), val_size=4, source="folder", channels=c).train.batches(16)).x
              for c in (1, 3)]  # fmt: skip
    row = next(i for i, place in enumerate(places(splits.train)) if place.endswith("cat/00.png"))
    assert torch.equal(levels[0][row].expand(3, 6, 6), levels[1][row])


def test_channels_of_arrays_and_streams(monkeypatch):
    """Digits have one channel and CIFAR three, until somebody asks for the other."""
    gray, color = (next(load(channels=c, max_train=50, val_size=9).train.batches(41)).x for c in (1, 3))
    assert torch.equal(gray.expand(-1, 3, -1, -1), color)
    assert [Data().num_channels, Data("folder", root="x").num_channels] == [1, 3]
    assert Data("timm", name="torch/mnist", root="x").num_channels == 1
    monkeypatch.setattr("timm.data.create_dataset", lambda name, **settings: FakeStream(**settings))
    stream = {"name": "wds/x", "root": "x", "val_split": "val", "image_size": 4, "num_classes": 2}
    splits = load("timm", **stream, channels=1)
    x = next(splits.test.batches(10)).x
    assert (x.shape, splits.shape) == ((10, 1, 4, 4), (1, 4, 4))
    assert [round(float(one) * 255) for one in x[:, 0, 0, 0]] == [round((i + 5) * 0.299) for i in range(10)]


@pytest.mark.parametrize("settings", [{"max_train": 110}, {"max_train": None}])
def test_every_subset_keeps_the_shares_of_imbalanced_classes(tmp_path, settings):
    """Train accuracy on balanced images and test accuracy on all of them differ, for a constant model too."""
    write_shares(tmp_path, {"train/a": 190, "train/b": 30, "test/a": 190, "test/b": 30})
    splits = load("folder", root=str(tmp_path), max_test=110, val_size=22, **settings)
    sets = [splits.train, splits.val, splits.test, splits.train.subset(44), splits.train.subset(22, "other")]
    sets += [splits.train.subset(44).subset(22)]
    for images in sets:
        counts = torch.bincount(images.y, minlength=2).tolist()
        assert counts == [round(len(images) * 19 / 22), round(len(images) * 3 / 22)]
        assert counts[0] / len(images) == pytest.approx(0.864, abs=0.005)


def test_the_front_of_a_stream_that_is_sorted_by_class_warns():
    """Streams have no places to choose from: an average over their front may be that of one class."""
    for order, is_sorted in (([0] * 50 + [1] * 50, True), ([0, 1, 1, 0] * 25, False)):
        stream = FakeStream(declared=100, num_images=100)
        stream.__class__ = type("Labelled", (FakeStream,), {"__iter__": lambda self, order=order: (
            (self.transform(Image.new("RGB", (6, 6))), y) for y in order)})  # fmt: skip
        images = StreamSet(lambda stream=stream, **_: stream, 100, 6)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            list(images.subset(30).batches(10))
            list(images.batches(10))
        assert [("sorted" in str(one.message) or "shuffled" in str(one.message)) for one in caught] == (
            [True] * is_sorted
        )
