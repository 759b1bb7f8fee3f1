"""What the data promise: which images, in which order, with which pixels; and which mistakes they refuse."""

from collections import Counter
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_files import FakeStream, assert_equal, global_states, joined, load, write_classes, write_image
from PIL import Image
from sklearn.datasets import load_digits

from wcitrain.data import sets
from wcitrain.data.augment import crop, draw_crops
from wcitrain.data.sets import class_order

AUGMENTED = {"shuffle": True, "seed": 3, "epoch": 2, "crop_padding": 2, "flip": True, "drop_last": True}


@pytest.fixture
def folder(tmp_path):
    """Two classes, 20 training and 6 test PNGs of 6x6 pixels."""
    write_classes(tmp_path, train=10, test=3)
    return tmp_path


def load_folder(root, **settings):
    return load("folder", root=str(root), **{"val_size": 4} | settings)


@pytest.fixture(scope="module")
def digits():
    return load()


def test_digits_splits_partition_the_data_in_exact_sixteenths(digits):
    """Images in two splits make test accuracy a training accuracy; rounding to 255 moves every gray level."""
    assert (len(digits.train), len(digits.val), len(digits.test)) == (800, 200, 797)
    assert not set(digits.train.positions.tolist()) & set(digits.val.positions.tolist())
    batches = [next(part.batches(1000)) for part in (digits.train, digits.val, digits.test)]
    assert (batches[2].x.shape, batches[2].x.dtype) == ((797, 1, 8, 8), torch.float32)
    seen = Counter((x[0].double() * 16).numpy().tobytes() for batch in batches for x in batch.x)
    assert seen == Counter(image.tobytes() for image in load_digits().images)


def test_digits_test_images_never_change(digits):
    """Numbers of two versions could not be compared if the test split moved."""
    assert_equal(digits.test.batches(100), load(split_seed=7, max_train=300).test.batches(100))
    assert digits.test.y[:12].tolist() == [7, 3, 6, 7, 1, 4, 7, 8, 0, 9, 5, 5]
    assert int(digits.test.y @ torch.arange(797)) == 1422448  # the split of version 0.1


def test_digits_can_be_resized():
    """A backbone that needs 16 pixels would fail, or see images of 17 coarse levels, or out of [0, 1]."""
    splits = load(image_size=16)
    x = next(splits.train.batches(64)).x
    assert (x.shape, splits.shape) == ((64, 1, 16, 16), (1, 16, 16))
    assert 0 <= x.min() < 0.01 < 0.95 < x.max() <= 1
    assert len(x.unique()) > 17


def test_class_order_keeps_class_shares_in_every_beginning():
    """An average over a balanced subset is not the set's, and a cut would take all images of a rare class."""
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = class_order(labels, seed=5)
    assert sorted(order.tolist()) == list(range(100))
    assert not torch.equal(order, class_order(labels, seed=6))
    for n in range(1, 100):
        counts = torch.bincount(labels[order[:n]], minlength=3)
        assert (counts - n * torch.tensor([0.6, 0.3, 0.1])).abs().max() < 1
    order = class_order(torch.arange(12) % 3, seed=5)
    assert all(sorted(turn.tolist()) == [0, 1, 2] for turn in (order % 3).split(3))


def test_max_train_keeps_class_shares_and_is_cut_before_validation():
    """A budget of labelled images would silently grow by the validation images, or not repeat."""
    sizes = {"max_train": 100, "val_size": 20, "max_test": 50}
    first, same, other = (load(**sizes, split_seed=seed) for seed in (0, 0, 1))
    counts = [torch.bincount(part.y).tolist() for part in (first.train, first.val, first.test)]
    assert counts == [[8] * 10, [2] * 10, [5] * 10]
    assert torch.equal(first.val.positions, same.val.positions)
    assert not torch.equal(first.val.positions, other.val.positions)
    assert set(first.train.positions.tolist()) != set(other.train.positions.tolist())


def test_subset_keeps_class_shares_fixed_and_nested(digits):
    """Training accuracy measured on changing or lopsided images would move without the model moving."""
    small, large = digits.train.subset(50), digits.train.subset(100)
    assert torch.bincount(small.y).tolist() == [5] * 10
    assert torch.equal(small.positions, large.positions[:50])
    assert torch.equal(next(large.batches(50)).x, next(small.batches(50)).x)
    assert len(digits.train.subset(10**6)) == 800


def test_seed_and_epoch_change_order_and_augmentation(digits):
    """Every epoch would show the images in one order, or crop each of them at one place for ever."""
    for change, shuffle in product(({"seed": 4}, {"epoch": 3}), (True, False)):
        settings = AUGMENTED | {"shuffle": shuffle}
        first, other = (next(digits.train.batches(800, **settings | more)) for more in ({}, change))
        assert torch.equal(first.index, other.index) is not shuffle
        assert not torch.equal(first.x, other.x)


def test_ranks_and_interruptions_cut_one_sequence_bitwise(digits):
    """Two processes, or a resumed one, would see other images, crop them elsewhere or disturb dropout."""
    whole = list(digits.train.batches(60, **AUGMENTED))
    assert len(whole) == 13
    before = global_states()
    parts = [list(digits.train.batches(60, rank=rank, world=3, **AUGMENTED)) for rank in range(3)]
    assert global_states() == before
    assert all(len(batch.y) == 20 for part in parts for batch in part)
    assert_equal(whole, [joined(batches) for batches in zip(*parts, strict=True)])
    torch.rand(3)
    assert_equal(whole[5:], digits.train.batches(60, start=5, **AUGMENTED))
    assert list(digits.train.batches(60, start=13, **AUGMENTED)) == []


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_ranks_see_every_image_once(folder, world):
    """Padding to equal parts counts images twice; dropping the last batch loses some: accuracy changes."""
    test = load_folder(folder).test
    seen = [batch for rank in range(world) for batch in test.batches(4, rank=rank, world=world)]
    assert all(len(batch.y) > 0 for batch in seen)
    assert sorted(joined(seen)[2].tolist()) == list(range(6))


def test_shuffling_loses_nothing_and_keeps_index_and_label_with_the_image(digits):
    """An epoch would miss images, an error name the wrong file, or images train with labels of others."""
    source, batches = digits.train.source, list(digits.train.batches(64, shuffle=True))
    index = joined(batches)[2]
    assert not torch.equal(index, digits.train.positions)
    assert torch.equal(index.sort().values, digits.train.positions)
    for batch in batches:
        assert torch.equal(batch.y, source.labels[batch.index])
        assert np.array_equal((batch.x[:, 0] * 16).numpy(), source.pixels[batch.index.numpy()])


def test_impossible_batches_are_refused_at_the_call(digits):
    """An epoch without a batch trains nothing, a batch ranks cannot share loses images, both quietly."""
    for message, size, settings in [
        ("train.batch_size: got 801; expected at most the 800", 801, {}),
        ("train.batch_size: got 10; .* multiple of the 3", 10, {"world": 3}),
        ("start: got 9; expected 0 to 8", 96, {"start": 9}),
    ]:
        with pytest.raises(ValueError, match=message):
            digits.train.batches(size, drop_last=True, **settings)


@pytest.mark.parametrize("shape", [(9, 3, 5, 7), (9, 1, 8, 8)])
def test_crops_equal_a_loop_over_images(shape):
    """Swapped axes, a crop of the mirrored image or a shared shift would go unnoticed in a loss curve."""
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    crops = draw_crops(len(pixels), 3, True, "place")
    crops[:2, 2] = torch.tensor([1, 0])
    result, (h, w) = crop(pixels, crops, 3).numpy(), shape[2:]
    for image, (top, left, mirror), out in zip(pixels.numpy(), crops.tolist(), result, strict=True):
        expected = np.pad(image, [(0, 0), (3, 3), (3, 3)])[:, top : top + h, left : left + w]
        assert np.array_equal(out, expected[:, :, ::-1] if mirror else expected)


def test_crops_cover_all_places_evenly():
    """An off-by-one draw would never reach one border, or never mirror."""
    top, left, mirror = draw_crops(9000, 2, True, 0).unbind(1)
    counts = torch.bincount(top * 5 + left, minlength=25)
    # 25 places, mean 360, standard deviation sqrt(9000 * 1/25 * 24/25) = 18.6; 5 of them allowed.
    assert (counts - 360).abs().max() < 93
    assert abs(int(mirror.sum()) - 4500) < 5 * 47.5  # sqrt(9000 / 4) = 47.4


def test_folder_reads_the_files_it_names(folder):
    """Wrong channel order, scale or label would train on other images than those on disk."""
    splits = load_folder(folder)
    assert splits.class_names == ("ant", "cat")
    assert (splits.num_classes, splits.shape) == (2, (3, 6, 6))
    for part in (splits.train, splits.val, splits.test):
        for x, y, index in zip(*joined(part.batches(3)), strict=True):
            path = part.source.locate(int(index))
            assert f"/{splits.class_names[y]}/" in path
            expected = np.array(Image.open(path)).transpose(2, 0, 1)
            assert torch.equal(x, torch.from_numpy(expected).float() / 255)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("image_size", [None, 9])
def test_pixels_from_files_and_from_memory_are_equal(folder, num_workers, image_size):
    """Results would depend on how much memory the machine has."""
    memory = load_folder(folder, in_memory=True, image_size=image_size)
    files = load_folder(folder, in_memory=False, image_size=image_size, num_workers=num_workers)
    assert memory.train.pixels is not None
    assert files.train.pixels is None
    before = global_states()
    assert_equal(memory.train.batches(8, **AUGMENTED), files.train.batches(8, **AUGMENTED))
    assert global_states() == before
    assert_equal(memory.test.batches(4, rank=1, world=2), files.test.batches(4, rank=1, world=2))
    assert_equal(memory.train.subset(5).batches(4), files.train.subset(5).batches(4))


def test_auto_keeps_out_of_memory_what_is_too_large(folder, monkeypatch):
    """A large set would fill the memory of the machine before the first batch."""
    for limit, is_kept in ((16 * 3 * 6 * 6, True), (16 * 3 * 6 * 6 - 1, False)):  # 16 images
        monkeypatch.setattr(sets, "MEMORY_LIMIT", limit)
        assert (load_folder(folder).train.pixels is not None) is is_kept


def test_only_the_images_used_are_decoded(folder, monkeypatch):
    """A trial with 8 images of ImageNet would first decode all of it, and training would read test images."""
    read = []
    monkeypatch.setattr(
        Image, "open", lambda path, original=Image.open: (read.append(str(path)), original(path))[1]
    )
    splits = load_folder(folder, max_train=8, val_size=2, max_test=2)
    assert len(set(read)) == 8
    assert not any("/test/" in path for path in read)
    assert len(splits.test) == 2
    assert sum("/test/" in path for path in read) == 2
    assert splits.test is splits.test


def test_folder_may_have_a_validation_split_and_other_files(folder):
    """Training images would be held out instead; thumbnails would become a class, or stop the run."""
    for name in ("ant", "cat"):
        write_image(folder / "validation" / name / "a.png", seed=77)
    for name in ("cat/Thumbs.db", "cat/._00.png", "labels.csv", ".cache/a.png"):
        (folder / "train" / name).parent.mkdir(exist_ok=True)
        (folder / "train" / name).write_bytes(b"x")
    splits = load_folder(folder, val_split="validation")
    assert (len(splits.train), len(splits.val)) == (20, 2)
    assert all("/validation/" in splits.val.source.locate(i) for i in range(2))


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_different_sizes_name_two_files(folder, in_memory):
    """Stacking would fail with shapes only, and nobody would know which of a million files to look at."""
    for name in ("train/cat/zz.png", "test/ant/zz.png"):
        write_image(folder / name, size=(7, 5))
        splits = load_folder(folder, in_memory=in_memory, image_size=6)
        assert splits.shape == (3, 6, 6)
    message = r"data.image_size: got \[3, 5, 7\] in .*zz\.png; expected \[3, 6, 6\] as in .*train.*png"
    with pytest.raises(ValueError, match=message):
        list(load_folder(folder, in_memory=in_memory, val_size=1).train.batches(19))
    (folder / "train/cat/zz.png").unlink()
    with pytest.raises(ValueError, match=message):
        list(load_folder(folder, in_memory=in_memory).test.batches(7))


@pytest.mark.parametrize("source", [{"source": "folder"}, {"source": "timm", "name": "folder"}])
def test_images_that_are_broken_or_have_16_bits_are_named(folder, source):
    """PIL names no file, and clips 16-bit gray to white; timm silently takes the next image."""
    path = folder / "train" / "cat" / "03.png"
    content = path.read_bytes()[:60]
    Image.fromarray(np.full((6, 6), 40000, dtype=np.uint16)).save(path)
    for message in (r"\(mode I.* has more than 8 bits", ""):
        with pytest.raises(ValueError, match=rf"unreadable image .*train/cat/03\.png {message}"):
            load(**source, root=str(folder), val_size=4, num_workers=2)
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        ("flat/a.png", {"train_split": "flat"}, r"flat without class folders; expected some"),
        ("test/dog/a.png", {}, r"got classes dog in .*test; expected .* training folder, ant, cat"),
        (None, {"val_split": "test"}, r"Data.test_split: got splits train, test, test; expected different"),
        (None, {"val_split": "./test"}, r"data.test_split: got one folder for two of train, ./test, test"),
        (None, {"val_size": 20}, r"data.val_size: got 20; .*fewer than the 20 training images"),
        (None, {"max_test": 7}, r"data.max_test: got 7; expected 1 to the 6"),
        (None, {"val_size": 19}, r"data.max_train: got 1 training images, none of class (ant|cat)"),
        (None, {"num_classes": 3}, r"data.num_classes: got 3; expected 2.*ant, cat"),
    ],
)
def test_folder_mistakes_are_named_before_the_first_batch(folder, damage, settings, message):
    """A run would fail hours later, in another file, or be scored on the images that selected it."""
    if damage:
        write_image(folder / damage)
    with pytest.raises(ValueError, match=message):
        load_folder(**{"root": folder} | settings)


@pytest.mark.parametrize(("source", "kind"), [("cifar10", "CIFAR10"), ("svhn", "SVHN")])
def test_torchvision_arrays_keep_their_layout(monkeypatch, source, kind):
    """SVHN stores channels first and CIFAR last: mixed up, images become stripes and still train."""
    pixels = np.random.RandomState(0).randint(0, 256, (40, 3, 4, 4), dtype=np.uint8)  # channels first
    labels = np.arange(40) % 10
    stored = {"data": pixels, "labels": labels} if kind == "SVHN" else {"data": pixels.transpose(0, 2, 3, 1)}
    stored |= {"targets": labels.tolist(), "classes": list("abcdefghij")} if kind != "SVHN" else {}
    monkeypatch.setattr(f"torchvision.datasets.{kind}", lambda *args, **kwargs: SimpleNamespace(**stored))
    for batch in load(source, root="x", val_size=10).train.batches(30):
        assert torch.equal(batch.x, torch.from_numpy(pixels)[batch.index].float() / 255)
        assert torch.equal(batch.y, batch.index % 10)


def test_timm_folders_equal_folders(folder):
    """Two ways to open one folder would give different numbers."""
    timm, own = load("timm", name="folder", root=str(folder), val_size=4), load_folder(folder)
    assert_equal(timm.train.batches(8, **AUGMENTED), own.train.batches(8, **AUGMENTED))
    assert_equal(timm.test.batches(4), own.test.batches(4))


def test_timm_splits_are_checked(folder, monkeypatch):
    """timm reads all of root for a name with a typo, and CIFAR-10's test split for every name but train."""
    found = {"name": "folder", "root": str(folder)}
    for settings, message in [
        ({"train_split": "trian"}, r"data.test_split: got 'test', .* images with data.train_split='trian'"),
        ({"val_split": "valid"}, r"data.val_split: got 'valid', .* images with data.train_split='train'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load("timm", **found | settings)
    for path in (folder / "test" / "ant").iterdir():
        path.unlink()  # timm numbers each split's classes by itself: one missing shifts all after it
    with pytest.raises(ValueError, match=r"data.test_split: got classes cat; expected .* ant, cat"):
        load("timm", **found)

    def create(name, *, root, split, download):
        return SimpleNamespace(train=split == "train", targets=[0, 1, 0, 1])

    monkeypatch.setattr("timm.data.create_dataset", create)
    for key, value in {"val_split": "val", "train_split": "trainval"}.items():
        with pytest.raises(ValueError, match=f"data.{key}: got '{value}', which is the test split of torch"):
            load("timm", name="torch/cifar10", root="x", **{key: value})


@pytest.mark.parametrize("unlabelled", ["test", "val"])
def test_unlabelled_splits_are_refused(monkeypatch, unlabelled):
    """Hidden labels are published as -1: accuracy would be zero, and validation would select at random."""

    class Images(list):
        targets, class_to_idx = (0, 1, 0, 1), {"a": 0, "b": 1}

    def create(name, *, root, split, download):
        images = Images([(Image.new("RGB", (4, 4)), 0)] * 4)
        images.targets = (-1,) * 4 if split == unlabelled else Images.targets
        return images

    monkeypatch.setattr("timm.data.create_dataset", create)
    with pytest.raises(ValueError, match=r"data.name: got labels -1 to -1; expected 0 to 1"):
        _ = load("timm", name="hfds/x", val_split="val").test


STREAM = {"name": "wds/x", "root": "x", "val_split": "val", "image_size": 4, "num_classes": 2}


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr("timm.data.create_dataset", lambda name, **settings: FakeStream(**settings))
    return load("timm", **STREAM)


def reds(batches):
    return [((batch.x[:, 0, 0, 0] * 255).round().int() - 5).tolist() for batch in batches]


def test_streams_train_and_repeat(stream):
    """A stream would show one order for ever, or another one at every start."""

    def shown(**settings):
        return reds(stream.train.batches(4, shuffle=True, drop_last=True, **{"seed": 1} | settings))

    first = shown()
    assert [len(batch) for batch in first] == [4, 4]
    assert first == shown()
    assert first not in (shown(epoch=1), shown(seed=2))
    assert first[1:] == shown(start=1)
    shares = [{red for batch in shown(rank=rank, world=2) for red in batch} for rank in range(2)]
    assert not shares[0] & shares[1]
    assert (stream.shape, stream.num_classes, len(stream.train)) == ((3, 4, 4), 2, 10)
    assert stream.train.num_updates(4) == 2


@pytest.mark.parametrize("world", [1, 2, 3])
def test_streams_evaluate_every_image_once(stream, world):
    """timm's readers repeat and lose images when ranks share an evaluation."""
    seen = [batch for rank in range(world) for batch in reds(stream.test.batches(4, rank=rank, world=world))]
    assert sorted(red for batch in seen for red in batch) == list(range(10))
    assert reds(stream.val.subset(6).batches(4)) == [[0, 1, 2, 3], [4, 5]]


def test_streams_that_end_early_are_not_averaged(monkeypatch):
    """Accuracy over the images that happened to be readable would be reported as accuracy."""
    monkeypatch.setattr("timm.data.create_dataset", lambda name, **more: FakeStream(declared=12, **more))
    with pytest.raises(ValueError, match="got 10 images from the stream; expected 12"):
        list(load("timm", **STREAM).test.batches(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "digits", "train_split": "training"}, "digits has splits of its own"),
        (
            STREAM | {"val_split": None},
            "Data.val_split: got wds/x, which is read front to back; expected val",
        ),
        (STREAM | {"max_train": 500}, "Data.max_train: got wds/x, .* expected no max_train"),
        (STREAM | {"in_memory": True}, "Data.max_train: got wds/x, .* expected no max_train"),
    ],
)
def test_settings_that_cannot_hold_are_refused(settings, message):
    """A setting, a subset or a validation cut would silently not happen."""
    with pytest.raises(ValueError, match=message):
        load(**{"source": "timm"} | settings)


def test_streams_refuse_half_of_training(stream):
    """Endless training streams would never end an evaluation; a subset would not bound a shuffled one."""
    training = {"shuffle": True, "drop_last": True}
    for part, settings in [(stream.train, {"shuffle": True}), (stream.train.subset(4), training)]:
        with pytest.raises(ValueError, match="expected both to train on a whole stream or neither"):
            part.batches(2, **settings)
