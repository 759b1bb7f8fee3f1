"""What the data promise: which images, in which order, with which pixels; and which mistakes they refuse."""

from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_files import assert_equal, write_image, write_two_classes
from PIL import Image
from sklearn.datasets import load_digits
from torch.utils.data import IterableDataset

from wcitrain.data import decoding, load_splits, loader
from wcitrain.data.loader import class_order, crop_and_mirror, draw_augmentation

AUGMENTED = {"shuffle": True, "seed": 3, "epoch": 2, "crop_padding": 2, "flip": True, "drop_last": True}


@pytest.fixture
def folder(tmp_path):
    """Two classes, 20 training and 6 test PNGs of 6x6 pixels."""
    write_two_classes(tmp_path, train=10, test=3)
    return tmp_path


def load_folder(root, **settings):
    return load_splits("folder", root=str(root), **{"val_size": 4, "num_workers": 0} | settings)


@pytest.fixture(scope="module")
def digits():
    return load_splits("digits")


# Digits ---------------------------------------------------------------------------------------------------


def test_digits_pixels_are_exactly_sixteenths(digits):
    """Rounding through 0..255 would move every gray level, and stored numbers would depend on how."""
    batch = next(digits.test.batches(797))
    assert batch.x.shape == (797, 1, 8, 8)
    assert batch.x.dtype == torch.float32
    originals = {image.tobytes() for image in load_digits().images}
    assert all((x.double() * 16).numpy().tobytes() in originals for x in batch.x[:, 0])


def test_digits_splits_partition_the_data(digits):
    """An image in two splits would make robust test accuracy a training accuracy."""
    assert (len(digits.train), len(digits.val), len(digits.test)) == (800, 200, 797)
    assert not set(digits.train.positions.tolist()) & set(digits.val.positions.tolist())
    images = [x for part in (digits.train, digits.val, digits.test) for x in next(part.batches(1000)).x]
    seen = Counter((x[0].double() * 16).numpy().tobytes() for x in images)
    assert seen == Counter(image.tobytes() for image in load_digits().images)


def test_digits_test_images_never_change(digits):
    """Numbers of two versions could not be compared if the test split moved."""
    other = load_splits("digits", split_seed=7, max_train=300)
    assert_equal(digits.test.batches(100), other.test.batches(100))
    assert digits.test.y[:12].tolist() == [7, 3, 6, 7, 1, 4, 7, 8, 0, 9, 5, 5]
    # with the labels above: the split of version 0.1
    assert int(digits.test.y @ torch.arange(797)) == 1422448


def test_digits_can_be_resized():
    """A backbone that needs 16 pixels would fail, or see images of 17 coarse levels, or out of [0, 1]."""
    splits = load_splits("digits", image_size=16)
    x = next(splits.train.batches(64)).x
    assert x.shape == (64, 1, 16, 16)
    assert splits.image_size == 16
    assert 0 <= x.min() < 0.01
    assert 0.95 < x.max() <= 1
    assert len(x.unique()) > 17


# Choosing images ------------------------------------------------------------------------------------------


def test_class_order_takes_turns():
    """A subset of few images would lack classes, and accuracies on it would be of another distribution."""
    labels = torch.tensor([0] * 7 + [1] * 2 + [2] * 4)
    order = class_order(labels, seed=5)
    assert sorted(order.tolist()) == list(range(13))
    assert torch.bincount(labels[order[:6]]).tolist() == [2, 2, 2]
    assert torch.bincount(labels[order[:10]]).tolist() == [4, 2, 4]
    assert not torch.equal(order, class_order(labels, seed=6))


def test_class_order_can_keep_proportions():
    """A balanced validation cut would take all the images of a rare class away from training."""
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    order = class_order(labels, seed=0, proportional=True)
    assert torch.bincount(labels[order[:20]]).tolist() == [12, 6, 2]


def test_max_train_is_balanced_and_cut_before_validation():
    """A budget of labelled images would silently grow by the validation images."""
    splits = load_splits("digits", max_train=100, val_size=20, max_test=50)
    assert (len(splits.train), len(splits.val), len(splits.test)) == (80, 20, 50)
    assert torch.bincount(splits.train.y).tolist() == [8] * 10
    assert torch.bincount(splits.val.y).tolist() == [2] * 10
    assert torch.bincount(splits.test.y).tolist() == [5] * 10


def test_split_seed_alone_chooses_the_images():
    """A run could not be repeated, or a study over splits would repeat one split."""
    first, same, other = (load_splits("digits", max_train=100, val_size=20, split_seed=s) for s in (0, 0, 1))
    assert torch.equal(first.val.positions, same.val.positions)
    assert not torch.equal(first.val.positions, other.val.positions)
    assert set(first.train.positions.tolist()) != set(other.train.positions.tolist())


def test_subset_is_balanced_fixed_and_nested(digits):
    """Training accuracy measured on changing or lopsided images would move without the model moving."""
    small, large = digits.train.subset(50), digits.train.subset(100)
    assert torch.bincount(small.y).tolist() == [5] * 10
    assert torch.equal(small.positions, large.positions[:50])
    assert torch.equal(next(large.batches(50)).x, next(small.batches(50)).x)
    assert len(digits.train.subset(10**6)) == 800
    with pytest.raises(ValueError, match="subset: got 0"):
        digits.train.subset(0)


# Batches --------------------------------------------------------------------------------------------------


def test_same_arguments_give_the_same_bits(digits):
    """A run would not repeat, and a resumed one would diverge."""
    assert_equal(digits.train.batches(64, **AUGMENTED), digits.train.batches(64, **AUGMENTED))


@pytest.mark.parametrize("change", [{"seed": 4}, {"epoch": 3}])
def test_seed_and_epoch_change_order_and_augmentation(digits, change):
    """Every epoch would show the images in one order, or crop each of them at one place for ever."""
    first, other = (next(digits.train.batches(800, **AUGMENTED | extra)) for extra in ({}, change))
    assert not torch.equal(first.index, other.index)
    in_order = [
        next(digits.train.batches(800, **AUGMENTED | extra | {"shuffle": False})) for extra in ({}, change)
    ]
    assert torch.equal(in_order[0].index, in_order[1].index)
    assert not torch.equal(in_order[0].x, in_order[1].x)


def test_start_continues_an_interrupted_epoch_bitwise(digits):
    """Resuming in the middle of an epoch would train on other images, or crop them elsewhere."""
    whole = list(digits.train.batches(96, **AUGMENTED))
    assert len(whole) == 8
    assert_equal(whole[5:], digits.train.batches(96, start=5, **AUGMENTED))
    assert list(digits.train.batches(96, start=8, **AUGMENTED)) == []
    with pytest.raises(ValueError, match="start: got 9; expected 0 to 8"):
        digits.train.batches(96, start=9, **AUGMENTED)


def test_training_ranks_share_one_global_batch_bitwise(digits):
    """Two processes would train on other images than one, or augment them differently."""
    whole = list(digits.train.batches(60, **AUGMENTED))
    parts = [list(digits.train.batches(60, rank=rank, world=3, **AUGMENTED)) for rank in range(3)]
    assert all(len(batch.y) == 20 for part in parts for batch in part)
    joined = [
        [torch.cat(tensors) for tensors in zip(*batches, strict=True)] for batches in zip(*parts, strict=True)
    ]
    assert_equal(whole, joined)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_evaluation_ranks_see_every_image_once(folder, world):
    """Padding to equal parts counts images twice; dropping the last batch loses some: accuracy changes."""
    test = load_folder(folder).test
    seen = [batch for rank in range(world) for batch in test.batches(4, rank=rank, world=world)]
    assert all(len(batch.y) > 0 for batch in seen)
    assert sorted(torch.cat([batch.index for batch in seen]).tolist()) == list(range(6))


def test_shuffling_reorders_and_loses_nothing(digits):
    """An epoch would miss images and repeat others."""
    index = torch.cat([batch.index for batch in digits.train.batches(100, shuffle=True)])
    assert not torch.equal(index, digits.train.positions)
    assert torch.equal(index.sort().values, digits.train.positions)


def test_index_and_label_belong_to_the_image(digits):
    """An error would name the wrong file, or images would be trained with labels of others."""
    source = digits.train.decoder.source
    for batch in digits.train.batches(64, shuffle=True):
        assert torch.equal(batch.y, source.labels[batch.index])
        assert np.array_equal((batch.x[:, 0] * 16).numpy(), source.pixels[batch.index.numpy()])


@pytest.mark.parametrize("in_memory", [True, False])
def test_batches_leave_global_random_state_alone(folder, in_memory):
    """Looking at data would change dropout and the attack's start: an evaluation would alter training."""
    train = load_folder(folder, in_memory=in_memory).train
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(train.batches(4, **AUGMENTED))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"batch_size": 801, "drop_last": True},
            "train.batch_size: got 801; expected at most the 800 training images",
        ),
        (
            {"batch_size": 10, "world": 3, "drop_last": True},
            "train.batch_size: got 10; expected a multiple of the 3",
        ),
        ({"batch_size": 0}, "batch_size: got 0"),
        ({"batch_size": 8, "rank": 2, "world": 2}, "rank: got 2"),
        ({"batch_size": 8, "crop_padding": -1}, "data.crop_padding: got -1"),
    ],
)
def test_impossible_batches_are_refused_at_the_call(digits, settings, message):
    """An epoch without a batch trains nothing, a batch ranks cannot share loses images, both quietly."""
    with pytest.raises(ValueError, match=message):
        digits.train.batches(**settings)


# Augmentation ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(9, 3, 5, 7), (9, 1, 8, 8)])
def test_augmentation_equals_a_loop_over_images(shape):
    """Swapped axes, a crop of the mirrored image or a shared shift would go unnoticed in a loss curve."""
    padding = 3
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    shift, mirror = draw_augmentation(len(pixels), padding, True, "place")
    mirror[:2] = torch.tensor([True, False])
    result = crop_and_mirror(pixels, shift, mirror, padding)
    h, w = shape[2:]
    for image, (top, left), flip, out in zip(
        pixels.numpy(), shift.tolist(), mirror.tolist(), result.numpy(), strict=True
    ):
        padded = np.pad(image, [(0, 0), (padding, padding), (padding, padding)])
        expected = padded[:, top : top + h, left : left + w]
        assert np.array_equal(out, expected[:, :, ::-1] if flip else expected)


def test_augmentation_covers_all_places_evenly():
    """An off-by-one draw would never reach one border, or never mirror."""
    shift, mirror = draw_augmentation(9000, 2, True, 0)
    counts = torch.bincount(shift[:, 0] * 5 + shift[:, 1], minlength=25)
    # 25 places, mean 360, standard deviation sqrt(9000 * 1/25 * 24/25) = 18.6; 5 of them allowed.
    assert (counts - 360).abs().max() < 93
    assert abs(int(mirror.sum()) - 4500) < 5 * 47.5  # sqrt(9000 / 4) = 47.4


def test_no_augmentation_is_the_identity(digits):
    """Evaluation would see cropped or mirrored images."""
    plain = next(digits.train.batches(800))
    assert_equal([plain], digits.train.batches(800, seed=9, epoch=9))
    _, mirror = draw_augmentation(100, 4, False, 0)
    assert not mirror.any()


# Folders --------------------------------------------------------------------------------------------------


def test_folder_reads_the_files_it_names(folder):
    """Wrong channel order, scale or label would train on other images than those on disk."""
    splits = load_folder(folder)
    assert splits.class_names == ("ant", "cat")
    assert (splits.num_classes, splits.in_chans, splits.image_size) == (2, 3, 6)
    for part in (splits.train, splits.val, splits.test):
        source = part.decoder.source
        for batch in part.batches(3):
            for x, y, index in zip(*batch, strict=True):
                path = source.locate(int(index))
                assert f"/{splits.class_names[y]}/" in path
                expected = np.array(Image.open(path)).transpose(2, 0, 1)
                assert torch.equal(x, torch.from_numpy(expected).float() / 255)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("image_size", [None, 9])
def test_streamed_and_memory_pixels_are_equal(folder, num_workers, image_size):
    """Results would depend on how much memory the machine has."""
    memory = load_folder(folder, in_memory=True, image_size=image_size)
    streamed = load_folder(folder, in_memory=False, image_size=image_size, num_workers=num_workers)
    assert memory.train.pixels is not None
    assert streamed.train.pixels is None
    assert_equal(memory.train.batches(8, **AUGMENTED), streamed.train.batches(8, **AUGMENTED))
    assert_equal(memory.test.batches(4, rank=1, world=2), streamed.test.batches(4, rank=1, world=2))
    assert_equal(memory.train.subset(5).batches(4), streamed.train.subset(5).batches(4))


def test_auto_streams_what_is_too_large(folder, monkeypatch):
    """A large set would fill the memory of the machine before the first batch."""
    monkeypatch.setattr(loader, "MEMORY_LIMIT", 16 * 3 * 6 * 6)
    splits = load_folder(folder)
    assert splits.train.pixels is not None  # 16 images: exactly the limit
    monkeypatch.setattr(loader, "MEMORY_LIMIT", 16 * 3 * 6 * 6 - 1)
    assert load_folder(folder).train.pixels is None


def test_only_the_images_used_are_decoded(folder, monkeypatch):
    """A trial with 8 images of ImageNet would first decode all of it, and training would read test images."""
    read = []
    monkeypatch.setattr(
        decoding.Image, "open", lambda path, original=Image.open: (read.append(str(path)), original(path))[1]
    )
    splits = load_folder(folder, max_train=8, val_size=2, max_test=2)
    assert len(set(read)) == 8
    assert not any("/test/" in path for path in read)
    assert len(splits.test) == 2
    assert sum("/test/" in path for path in read) == 2
    assert splits.test is splits.test


def test_folder_may_have_a_validation_split(folder):
    """A published validation split would be ignored and training images be held out instead."""
    for name in ("ant", "cat"):
        write_image(folder / "validation" / name / "a.png", seed=77)
    splits = load_folder(folder, val_split="validation")
    assert (len(splits.train), len(splits.val)) == (20, 2)
    assert all("/validation/" in splits.val.decoder.source.locate(i) for i in range(2))


def test_folder_ignores_files_that_are_not_images(folder):
    """A thumbnail database or a macOS resource fork would stop the run or become a class."""
    (folder / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (folder / "train" / "cat" / "._00.png").write_bytes(b"x")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "labels.csv").write_text("x")
    assert len(load_folder(folder).train) == 16


@pytest.mark.parametrize("in_memory", [True, False])
def test_images_of_different_sizes_name_two_files(folder, in_memory):
    """Stacking would fail with shapes only, and nobody would know which of a million files to look at."""
    write_image(folder / "train" / "cat" / "zz.png", size=(7, 5))
    with pytest.raises(
        ValueError, match=r"(?s)6x6 in .*\.png and 7x5 in .*zz\.png; expected one size. Set data.image_size"
    ):
        list(load_folder(folder, in_memory=in_memory, val_size=1).train.batches(19))
    assert load_folder(folder, image_size=6, in_memory=in_memory).image_size == 6


def test_test_images_of_another_size_are_refused(folder):
    """A model trained at one size would be tested at another without a word."""
    for path in (folder / "test").rglob("*.png"):
        write_image(path, size=(8, 8))
    splits = load_folder(folder)
    with pytest.raises(ValueError, match=r"6x6 in .*train.* and 8x8 in .*test"):
        _ = splits.test


@pytest.mark.parametrize("source", [{"source": "folder"}, {"source": "timm", "name": "folder"}])
def test_corrupt_images_are_named(folder, source):
    """PIL says "cannot identify image file" of a nameless buffer; timm silently takes the next image."""
    path = folder / "train" / "cat" / "03.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"unreadable image .*train/cat/03\.png"):
        load_splits(**source, root=str(folder), val_size=4, num_workers=2)


def test_sixteen_bit_images_are_refused(folder):
    """PIL clips 16-bit gray to white when it converts to RGB: the class would be all white."""
    Image.fromarray(np.full((6, 6), 40000, dtype=np.uint16)).save(folder / "train" / "cat" / "00.png")
    with pytest.raises(ValueError, match=r"cat/00\.png \(mode I.* has more than 8 bits"):
        load_folder(folder)


def break_nothing(root):
    pass


def break_no_test(root):
    (root / "test").rename(root / "holdout")


def break_empty_class(root):
    (root / "train" / "dog").mkdir()


def break_flat(root):
    (root / "flat").mkdir()
    write_image(root / "flat" / "a.png")


def break_extra_test_class(root):
    write_image(root / "test" / "dog" / "a.png")


@pytest.mark.parametrize(
    ("damage", "settings", "message"),
    [
        (break_nothing, {"root": "nowhere"}, r"data.root: got no folder nowhere \(nowhere holds nothing\)"),
        (break_no_test, {}, r"got no folder .*test \(.* holds holdout, train\).*data.test_split"),
        (break_empty_class, {}, r"got no images in .*train/dog"),
        (
            break_flat,
            {"train_split": "flat"},
            r"flat without folders; expected one folder of images per class",
        ),
        (
            break_extra_test_class,
            {},
            r"got classes dog in .*test; expected only those of the training folder, ant, cat",
        ),
        (break_nothing, {"root": None}, r"data.root: got None"),
        (
            break_nothing,
            {"val_split": "test"},
            r"data.test_split: got splits train, test, test; expected different",
        ),
        (break_nothing, {"val_size": 20}, r"data.val_size: got 20; .*fewer than the 20 training images"),
        (break_nothing, {"val_size": 0}, r"data.val_size: got 0"),
        (break_nothing, {"max_train": 21}, r"data.max_train: got 21; expected 1 to the 20"),
        (break_nothing, {"max_test": 7}, r"data.max_test: got 7; expected 1 to the 6"),
        (break_nothing, {"max_train": 1, "val_split": "test2"}, r"got no folder .*test2"),
        (break_nothing, {"val_size": 19}, r"data.val_size: got 1 training images, none of class (ant|cat)"),
        (break_nothing, {"num_classes": 3}, r"data.num_classes: got 3; expected 2.*ant, cat"),
        (break_nothing, {"num_workers": -1}, r"data.num_workers: got -1"),
    ],
)
def test_folder_mistakes_are_named_before_the_first_batch(folder, damage, settings, message):
    """A run would fail hours later, in another file, or be scored on the images that selected it."""
    damage(folder)
    with pytest.raises(ValueError, match=message):
        load_folder(**{"root": folder} | settings) if settings.get("root", 1) else load_splits(
            "folder", **settings
        )


# Other sources --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"source": "cifar"}, r"data.source: got 'cifar'; expected one of digits, cifar10"),
        ({"val_split": "val"}, r"digits has splits of its own"),
        ({"train_split": "training"}, r"digits has splits of its own"),
        ({"max_train": 9, "val_size": 1}, r"data.max_train: got 8 training images, none of class"),
        ({"max_test": 798}, r"data.max_test: got 798; expected 1 to the 797"),
        ({"source": "timm", "root": "x"}, r"data.name: got None"),
    ],
)
def test_settings_that_cannot_hold_are_refused(settings, message):
    """A setting would silently have no effect."""
    with pytest.raises(ValueError, match=message):
        load_splits(**settings)


@pytest.mark.parametrize("source", ["cifar10", "cifar100", "svhn"])
def test_missing_torchvision_data_say_where_and_how(tmp_path, source):
    """torchvision names neither the folder nor our key that downloads."""
    with pytest.raises(ValueError, match=rf"{tmp_path.name}.*data.download=true"):
        load_splits(source, root=str(tmp_path))


@pytest.mark.parametrize(("source", "kind"), [("cifar10", "CIFAR10"), ("svhn", "SVHN")])
def test_torchvision_arrays_keep_their_layout(monkeypatch, source, kind):
    """SVHN stores channels first and CIFAR last: mixed up, images become stripes and still train."""
    pixels = np.random.RandomState(0).randint(0, 256, (40, 3, 4, 4), dtype=np.uint8)  # channels first
    labels = np.arange(40) % 10
    stored = {"data": pixels, "labels": labels} if kind == "SVHN" else {"data": pixels.transpose(0, 2, 3, 1)}
    stored |= {"targets": labels.tolist(), "classes": list("abcdefghij")} if kind != "SVHN" else {}
    monkeypatch.setattr(f"torchvision.datasets.{kind}", lambda *args, **kwargs: SimpleNamespace(**stored))
    splits = load_splits(source, root="x", val_size=10)
    for batch in splits.train.batches(30):
        assert torch.equal(batch.x, torch.from_numpy(pixels)[batch.index].float() / 255)
        assert torch.equal(batch.y, batch.index % 10)


def test_timm_folders_equal_folders(folder):
    """Two ways to open one folder would give different numbers."""
    timm = load_splits("timm", name="folder", root=str(folder), val_size=4, num_workers=0)
    assert_equal(timm.train.batches(8, **AUGMENTED), load_folder(folder).train.batches(8, **AUGMENTED))
    assert_equal(timm.test.batches(4), load_folder(folder).test.batches(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"train_split": "trian"},
            r"data.test_split: got 'test', which shares images with data.train_split='trian'",
        ),
        (
            {"val_split": "valid"},
            r"data.val_split: got 'valid', which shares images with data.train_split='train'",
        ),
        ({"name": "hfds/no-such-set"}, r"data.name: got 'hfds/no-such-set'.*It said: "),
        ({"name": "torch/cifar10"}, r"data.name: got 'torch/cifar10'.*It said: RuntimeError"),
    ],
)
def test_timm_split_names_are_checked(folder, settings, message):
    """timm reads all of root when it finds no folder for a split: a typo would train on the test images."""
    with pytest.raises(ValueError, match=message):
        load_splits("timm", **{"name": "folder", "root": str(folder)} | settings)


def test_timm_splits_must_number_classes_alike(folder):
    """timm numbers each split's classes by itself: one missing in test shifts all labels after it."""
    for path in (folder / "test" / "ant").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"data.test_split: got classes cat; expected .* ant, cat"):
        load_splits("timm", name="folder", root=str(folder))


def test_timm_names_of_torchvision_splits_are_checked(monkeypatch):
    """timm opens CIFAR-10's test split for every name but train: "val" would select on the test images."""

    def create(name, *, root, split, download):
        return SimpleNamespace(train=split == "train", targets=[0, 1, 0, 1])

    monkeypatch.setattr("timm.data.create_dataset", create)
    with pytest.raises(
        ValueError, match=r"data.val_split: got 'val', which is the test split of torch/cifar10"
    ):
        load_splits("timm", name="torch/cifar10", root="x", val_split="val")
    with pytest.raises(ValueError, match=r"data.train_split: got 'trainval', which is the test split"):
        load_splits("timm", name="torch/cifar10", root="x", train_split="trainval")


@pytest.mark.parametrize("unlabelled", ["test", "val"])
def test_unlabelled_splits_are_refused(monkeypatch, unlabelled):
    """Hidden labels are published as -1: accuracy would be zero, and validation would select at random."""

    class Images(list):
        class_to_idx = {"a": 0, "b": 1}  # noqa: RUF012
        targets = (0, 1, 0, 1)

    def create(name, *, root, split, download):
        images = Images([(Image.new("RGB", (4, 4)), 0)] * 4)
        images.targets = (-1,) * 4 if split == unlabelled else Images.targets
        return images

    monkeypatch.setattr("timm.data.create_dataset", create)
    with pytest.raises(ValueError, match=r"data.name: got labels -1 to -1; expected 0 to 1"):
        _ = load_splits("timm", name="hfds/x", val_split="val", num_workers=0).test


# Data sets that are read front to back --------------------------------------------------------------------


class FakeStream(IterableDataset):
    """Stands in for timm's IterableImageDataset: 10 images of one gray value each, endless when training."""

    def __init__(self, is_training=False, seed=0, declared=10, **_):
        self.reader = SimpleNamespace(num_samples=declared, dist_rank=0, dist_num_replicas=1)
        self.is_training, self.seed, self.epoch = is_training, seed, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def set_loader_cfg(self, num_workers=None):
        pass

    def __iter__(self):
        order = np.arange(10)
        while True:
            if self.is_training:
                order = np.random.RandomState((self.seed + self.epoch) % 2**31).permutation(10)
            for i in order[self.reader.dist_rank :: self.reader.dist_num_replicas]:
                yield self.transform(Image.new("RGB", (5, 5), (int(i), 0, 0))), int(i) % 2
            if not self.is_training:
                return


STREAM = {
    "source": "timm",
    "name": "wds/x",
    "root": "x",
    "val_split": "val",
    "image_size": 4,
    "num_classes": 2,
}


@pytest.fixture
def stream(monkeypatch):
    monkeypatch.setattr("timm.data.create_dataset", lambda name, **settings: FakeStream(**settings))
    return load_splits(**STREAM, num_workers=0)


def reds(batches):
    return [(batch.x[:, 0, 0, 0] * 255).round().int().tolist() for batch in batches]


def test_streams_train_and_repeat(stream):
    """A stream would show one order for ever, or another one at every start."""
    settings = {"shuffle": True, "drop_last": True, "crop_padding": 0}
    first = reds(stream.train.batches(4, seed=1, epoch=0, **settings))
    assert [len(batch) for batch in first] == [4, 4]
    assert first == reds(stream.train.batches(4, seed=1, epoch=0, **settings))
    assert first != reds(stream.train.batches(4, seed=1, epoch=1, **settings))
    assert first != reds(stream.train.batches(4, seed=2, epoch=0, **settings))
    assert first[1:] == reds(stream.train.batches(4, seed=1, epoch=0, start=1, **settings))
    parts = [reds(stream.train.batches(4, rank=rank, world=2, seed=1, **settings)) for rank in range(2)]
    assert not {red for batch in parts[0] for red in batch} & {red for batch in parts[1] for red in batch}
    assert (stream.in_chans, stream.image_size, stream.num_classes, len(stream.train)) == (3, 4, 2, 10)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_streams_evaluate_every_image_once(stream, world):
    """timm's readers repeat and lose images when ranks share an evaluation."""
    seen = [
        red
        for rank in range(world)
        for batch in reds(stream.test.batches(4, rank=rank, world=world))
        for red in batch
    ]
    assert sorted(seen) == list(range(10))
    assert reds(stream.val.subset(6).batches(4)) == [[0, 1, 2, 3], [4, 5]]


def test_streams_that_end_early_are_not_averaged(monkeypatch):
    """Accuracy over the images that happened to be readable would be reported as accuracy."""
    monkeypatch.setattr(
        "timm.data.create_dataset", lambda name, **settings: FakeStream(declared=12, **settings)
    )
    with pytest.raises(ValueError, match="got 10 images from the stream; expected 12"):
        list(load_splits(**STREAM, num_workers=0).test.batches(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"val_split": None, "num_classes": None}, "data.val_split, data.num_classes: got None"),
        ({"image_size": None}, "data.image_size: got None"),
        ({"max_train": 5}, "max_train=5"),
        ({"in_memory": True}, "in_memory=True"),
    ],
)
def test_streams_need_what_cannot_be_looked_up(settings, message):
    """A subset or a validation cut of a stream would silently not happen."""
    with pytest.raises(ValueError, match=message):
        load_splits(**STREAM | settings)


def test_streams_refuse_half_of_training(stream):
    """Endless training streams would never end an evaluation; a subset would not bound a shuffled one."""
    for part, settings in [
        (stream.train, {"shuffle": True}),
        (stream.train.subset(4), {"shuffle": True, "drop_last": True}),
    ]:
        with pytest.raises(ValueError, match="expected both to train on a whole stream or neither"):
            part.batches(2, **settings)
