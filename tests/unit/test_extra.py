"""What extra data promise: which images join the labelled ones, how many a batch, with which labels."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from image_files import assert_equal, global_states, joined, joined_ranks, load, write_classes, write_image
from torch import nn

from wcitrain.data import Augmentation, Data, Extra, ImageSet, MixedSet, load_extra, pseudo_label
from wcitrain.data.pixels import ArraySource

TRAIN = {"shuffle": True, "drop_last": True, "seed": 3}
SHOWN = TRAIN | {"crop_padding": 1, "flip": True}
PIXELS = np.random.RandomState(0).randint(0, 256, (10, 6, 6, 3), dtype=np.uint8)
PSEUDO = {"labels": "pseudo"}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Classes ant and cat, RGB images of 6x6 pixels."""
    root = tmp_path_factory.mktemp("data")
    write_classes(root, train=12, test=2)
    return load("folder", root=str(root), val_size=4)


@pytest.fixture(scope="module")
def digits():
    return load()


def read_extra(path, like, *, max_images=None, labels="given", **data):
    """Open extra images beside a data set."""
    labeler = None if labels == "given" else "model"
    extra = Extra(str(path), labels=labels, labeler=labeler, max_images=max_images)
    return load_extra(extra, Data(**{"num_workers": 0} | data), like)


def array_set(n, *, shape=(4, 4), classes=3, title="set", **settings):
    """Gray images of which each holds its own number, so that it can be recognised."""
    pixels = np.zeros((n, *shape), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    source = ArraySource(torch.arange(n) % classes, tuple(map(str, range(classes))), title, pixels)
    return ImageSet.load(source, torch.arange(n), **{"num_workers": 0} | settings)


def as_batch(pixels):
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_npz_images_keep_layout_and_labels(tmp_path, splits):
    """Swapped axes still train: rows would be taken for channels."""
    labels = np.arange(10, dtype=np.uint8) % 2
    np.savez_compressed(tmp_path / "x.npz", image=PIXELS, label=labels)
    extra = read_extra(tmp_path / "x.npz", splits)
    (batch,) = extra.batches(10)
    assert torch.equal(batch.x, as_batch(PIXELS))
    assert (batch.y.tolist(), batch.y.dtype) == (labels.tolist(), torch.int64)
    assert "x.npz image 3" in extra.source.locate(3)


def test_max_images_keeps_class_shares(tmp_path, splits):
    """Generated sets are often sorted by class: the first thousand would be of one class."""
    np.savez(tmp_path / "x.npz", image=PIXELS, label=np.array([0] * 5 + [1] * 5))

    def chosen(**settings):
        return read_extra(tmp_path / "x.npz", splits, max_images=6, **settings)

    extra = chosen()
    assert torch.bincount(extra.y).tolist() == [3, 3]
    assert torch.equal(next(extra.batches(6)).x, as_batch(PIXELS[extra.positions.numpy()]))
    assert torch.equal(chosen(split_seed=0).positions, extra.positions)
    assert not torch.equal(chosen(split_seed=1).positions, extra.positions)
    unlabelled = chosen(labels="pseudo")
    assert (unlabelled.y == -1).all()
    assert len(set(unlabelled.positions.tolist())) == 6


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        ({"image": PIXELS}, {}, r"got .*label.* expected a folder, or a .npz of plain arrays image"),
        ({"image": PIXELS / 255}, PSEUDO, r"got images float64 \[10, 6, 6, 3\].*expected uint8"),
        ({"image": PIXELS[:0]}, PSEUDO, r"got images uint8 \[0, 6, 6, 3\]"),
        ({"image": PIXELS.transpose(0, 3, 1, 2)}, PSEUDO, r"got images uint8 \[10, 3, 6, 6\].*'W', 3\]"),
        ({"image": PIXELS[..., 0]}, PSEUDO, r"got images uint8 \[10, 6, 6\]"),
        ({"image": PIXELS, "label": np.zeros(9, int)}, {}, r"got labels int64 \[9\].*whole numbers \[10\]"),
        ({"image": PIXELS, "label": np.zeros(10)}, {}, r"got labels float64 \[10\]"),
        ({"image": PIXELS, "label": np.full(10, 2)}, {}, r"got labels .* from 2 to 2 .*from 0 to 1"),
        ({"image": PIXELS, "label": np.full(10, -1)}, {}, r"got labels .* from -1"),
        ({"image": np.array([{}], dtype=object)}, PSEUDO, r"got .*allow_pickle.*plain arrays image"),
        ({"image": PIXELS}, PSEUDO | {"max_images": 11}, r"got 11; expected 1 to the 10"),
    ],
)
def test_npz_mistakes_are_named(tmp_path, splits, arrays, settings, message):
    """A run would fail in its first epoch, run a pickle, or train on labels of another data set."""
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=rf"extra\.(path|max_images): {message}"):
        read_extra(tmp_path / "x.npz", splits, **settings)


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_classes_are_numbered_by_the_training_set(tmp_path, splits, in_memory):
    """A folder that lacks the first class would shift every label by one."""
    pixels = [write_image(tmp_path / "cat" / "deep" / f"{i}.png", seed=i) for i in range(3)]
    extra = read_extra(tmp_path, splits, in_memory=in_memory)
    assert extra.y.tolist() == [splits.class_names.index("cat")] * 3
    assert torch.equal(next(extra.batches(3)).x, as_batch(np.stack(pixels)))


def test_folders_without_labels_take_every_image(tmp_path, splits):
    """Folder names that are no classes would stop the run, or become classes."""
    for name in ("a.png", "web/b.png", "cat/c.png"):
        write_image(tmp_path / name)
    for max_images, num in ((None, 3), (2, 2)):
        assert read_extra(tmp_path, splits, labels="pseudo", max_images=max_images).y.tolist() == [-1] * num


@pytest.mark.parametrize(
    ("files", "labels", "message"),
    [
        (["dog/a.png"], "given", r"extra.path: got classes dog in .*expected .* training folder, ant, cat"),
        (["a.png"], "given", r"extra.path: got .* without class folders"),
        ([], "pseudo", r"extra.path: got no images in"),
        (["cat/large.png"], "given", r"got \[3, 7, 7\] in .*large.png; expected \[3, 6, 6\] as in .*train"),
    ],
)
def test_folder_mistakes_are_named(tmp_path, splits, files, labels, message):
    """Images would join with labels of other classes, or fail at some batch of the third epoch."""
    for file in files:
        write_image(tmp_path / file, size=(7, 7))
    with pytest.raises(ValueError, match=message):
        read_extra(tmp_path, splits, labels=labels)


class Noisy(nn.Module):
    """Draws random numbers even in eval mode and counts its calls in a buffer: all must be put back."""

    def __init__(self):
        super().__init__()
        self.fc, self.drop, self.bn = nn.Linear(16, 3), nn.Dropout(0.5), nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        torch.rand(3)
        return self.bn(self.drop(self.fc(x.flatten(1))))


def test_pseudo_labels_are_the_models_argmax():
    """Labels of another image, of train mode, or of a smaller last batch would be trained on for days."""
    model, images = Noisy(), array_set(700).take(torch.arange(3, 643))  # two passes, of 500 and 140
    model.drop.eval()  # frozen by the user
    before, states = {k: v.clone() for k, v in model.state_dict().items()}, global_states()
    labelled, confidence = pseudo_label(images, model, "cpu")
    assert global_states() == states
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.training, model.drop.training, model.bn.training) == (True, False, True)
    (batch,) = images.batches(640)
    probabilities = model.eval()(batch.x).softmax(1).detach()
    assert torch.equal(labelled.y, probabilities.argmax(1))
    assert abs(confidence - float(probabilities.amax(1).mean())) < 1e-6  # float32 softmax
    assert torch.equal(images.y, torch.arange(3, 643) % 3)
    assert torch.equal(next(labelled.batches(640)).x, batch.x)
    assert torch.equal(labelled.take(torch.tensor([2, 4])).y, labelled.y[[2, 4]])


@pytest.mark.parametrize(("classes", "bias"), [(4, 0.0), (3, float("nan"))])
def test_models_that_cannot_label_are_refused(classes, bias):
    """A model of other classes gives labels that do not exist; one that diverged gives class 0 to all."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, classes))
    nn.init.constant_(model[1].bias, bias)
    with pytest.raises(ValueError, match=rf"got logits \[20, {classes}\].*expected finite ones \[20, 3\]"):
        pseudo_label(array_set(20), model, "cpu")


@pytest.fixture(scope="module")
def mixed():
    return MixedSet(array_set(101, title="train"), array_set(64, title="extra"), 0.7)


def num_extra(batch):
    return int((batch.index < 0).sum())


def extra_positions(batches):
    index = joined(batches)[2]
    return (-1 - index[index < 0]).tolist()


@pytest.mark.parametrize(
    ("n", "fraction", "batch_size"),
    [(101, 0.7, 10), (101, 1 / 3, 12), (300, 0.7, 128), (300, 0.3, 17), (600, 0.001, 50), (5, 0.999, 64)],
)
def test_every_batch_holds_its_share_and_whole_numbers_meet_it_on_average(n, fraction, batch_size):
    """Batches of one kind would shake BatchNorm; rounding in each would train on 70.3 % instead of 70 %."""
    sets = MixedSet(array_set(n), array_set(64), fraction)
    batches = list(sets.batches(batch_size, **TRAIN))
    counts = [num_extra(batch) for batch in batches]
    exact = Fraction(fraction).limit_denominator(1000) * batch_size
    assert len(batches) == sets.num_updates(batch_size)
    assert {len(batch.y) for batch in batches} == {batch_size}
    assert set(counts) <= {math.floor(exact), math.ceil(exact)}
    assert abs(sum(counts) - len(counts) * exact) <= 0.5
    assert counts[0] == int(exact + Fraction(1, 2))


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation("cutout", cutout_size=2)])
def test_ranks_and_micro_batches_cut_one_sequence(augmentation):
    """Two processes or accumulation would train on other images than one, or one on extra images only."""
    sets = MixedSet(array_set(101), array_set(64), 0.7)
    shown = SHOWN | {"augmentation": augmentation, "epoch": 1}
    whole = list(sets.batches(40, **shown))
    assert len(whole) == 8
    parts = [list(sets.batches(40, rank=rank, world=4, **shown)) for rank in range(4)]
    assert {num_extra(batch) for part in parts for batch in part} == {7}
    assert_equal(whole, joined_ranks(parts))
    micro = list(sets.batches(10, **shown))
    assert {num_extra(batch) for batch in micro} == {7}
    assert_equal(whole, [joined(micro[4 * i : 4 * i + 4]) for i in range(8)])
    ranks_of_micro = [list(sets.batches(20, rank=rank, world=2, start=6, **shown)) for rank in range(2)]
    assert_equal(whole[3:4], [joined([ranks_of_micro[rank][m] for m in (0, 1) for rank in (0, 1)])])
    for start in (1, 5, 7):
        assert_equal(whole[start:], sets.batches(40, start=start, **shown))


@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation("cutout", cutout_size=2)])
def test_workers_read_what_memory_holds(augmentation):
    """Results would depend on the memory; a part of one image would ask workers for an empty batch."""
    memory = MixedSet(array_set(9), array_set(5), 0.25)
    files = MixedSet(*(array_set(n, num_workers=1, in_memory=False) for n in (9, 5)), 0.25)
    shown = SHOWN | {"augmentation": augmentation}
    assert_equal(memory.batches(2, **shown), files.batches(2, **shown))
    parts = [list(files.batches(2, rank=rank, world=2, **shown)) for rank in range(2)]
    assert {num_extra(batch) for part in parts for batch in part} == {0, 1}
    assert_equal(memory.batches(2, **shown), joined_ranks(parts))


def test_labelled_images_are_those_of_training_without_extra(mixed):
    """Adding extra data would also reshuffle and recrop the labelled images: two changes, measured as one."""
    before = global_states()
    alone = joined(mixed.train.batches(101, **SHOWN, epoch=4))
    together = joined(mixed.batches(10, **SHOWN, epoch=4))
    assert global_states() == before
    labelled = together[2] >= 0
    n = int(labelled.sum())
    assert n == 99  # 33 batches of 3
    for tensor, expected in zip(together, alone, strict=True):
        assert torch.equal(tensor[labelled], expected[:n])


def test_extra_images_are_drawn_without_replacement_over_epochs(mixed):
    """Drawing anew in each epoch would show some of a million images often and some never."""
    assert mixed.num_places == 13 * 26  # so that no batch is incomplete
    epochs = [extra_positions(mixed.batches(26, **TRAIN, epoch=epoch)) for epoch in range(6)]
    drawn = [position for epoch in epochs for position in epoch]
    assert len(drawn) == 6 * (mixed.num_places - 101)
    passes = [tuple(drawn[i : i + 64]) for i in range(0, len(drawn), 64)]
    assert all(len(set(one)) == len(one) for one in passes)
    assert len(set(passes)) == len(passes) > 20  # each pass in an order of its own
    assert extra_positions(mixed.batches(26, **TRAIN | {"seed": 4})) != epochs[0]


def test_index_and_label_belong_to_the_image(mixed):
    """An extra image would get a labelled one's label, or an error name the wrong image."""
    x, y, index = joined(mixed.batches(20, **TRAIN))
    number = ((x[:, 0, 0, 0] + 256 * x[:, 0, 0, 1]) * 255).round().long()
    assert torch.equal(number, torch.where(index < 0, -1 - index, index))
    assert torch.equal(y, number % 3)


CHANGES = [{"crop_padding": 2, "flip": True}, {"augmentation": Augmentation("cutout", cutout_size=3)}]


@pytest.mark.parametrize("settings", CHANGES)
def test_extra_images_are_cropped_and_augmented(mixed, settings):
    """Only the labelled half of each batch would be augmented."""
    plain, shown = joined(mixed.batches(10, **TRAIN)), joined(mixed.batches(10, **TRAIN, **settings))
    changed = (plain[0] != shown[0]).flatten(1).any(1)
    assert torch.equal(plain[2], shown[2])
    for kind in (plain[2] < 0, plain[2] >= 0):
        assert changed[kind].float().mean() > 0.15


def test_gray_levels_of_either_kind_are_scaled_by_their_own_white(digits, tmp_path):
    """Digits count to 16 and generated images to 255: one of them would be sixteen times too dark."""
    pixels = np.random.RandomState(0).randint(0, 256, (5, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", image=pixels, label=np.arange(5))
    batch = next(MixedSet(digits.train, read_extra(tmp_path / "x.npz", digits), 0.5).batches(40, **TRAIN))
    extra = batch.index < 0
    assert torch.equal(batch.x[extra, 0], torch.from_numpy(pixels)[-1 - batch.index[extra]].float() / 255)
    assert 0.9 < batch.x[~extra].amax((1, 2, 3)).min() <= batch.x.max() == 1


def test_measuring_sees_labelled_images_only_and_a_share_of_no_image_is_refused(mixed):
    """Training accuracy would be measured on generated images and their labels; no image does nothing."""
    assert len(mixed) == 101
    assert torch.equal(mixed.subset(9).positions, mixed.train.subset(9).positions)
    for settings in ({}, {"shuffle": True}, {"drop_last": True}):
        with pytest.raises(ValueError, match="expected both, as for training"):
            mixed.batches(10, **settings)
    with pytest.raises(ValueError, match=r"extra.fraction: got 0.001 with 20 training images"):
        MixedSet(array_set(20), array_set(20), 0.001)
