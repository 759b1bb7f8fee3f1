"""What extra data promise: which images join the labelled ones, how many a batch, with which labels."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from image_files import assert_equal, global_states, write_image, write_two_classes
from PIL import Image
from torch import nn

from wcitrain.data import Augmentation, ImageSet, MixedSet, StreamSet, load_extra, load_splits, pseudo_label
from wcitrain.data.decoding import Decoder
from wcitrain.data.sources import ArraySource

TRAIN = {"shuffle": True, "drop_last": True, "seed": 3}
SHOWN = TRAIN | {"crop_padding": 1, "flip": True}


@pytest.fixture(scope="module")
def splits(tmp_path_factory):
    """Classes ant and cat, RGB images of 6x6 pixels."""
    root = tmp_path_factory.mktemp("data")
    write_two_classes(root, train=12, test=2)
    return load_splits("folder", root=str(root), val_size=4, num_workers=0)


@pytest.fixture(scope="module")
def digits():
    return load_splits("digits", num_workers=0)


def array_set(n, *, shape=(4, 4), classes=3, title="set", seed=0, **settings):
    """Gray images of which each holds its own number, so that it can be recognised."""
    pixels = np.zeros((n, *shape), dtype=np.uint8)
    pixels[:, 0, 0], pixels[:, 0, 1] = np.arange(n) % 256, np.arange(n) // 256
    source = ArraySource(pixels, torch.arange(n) % classes, tuple(map(str, range(classes))), title)
    return ImageSet.load(Decoder(source), torch.arange(n), **{"num_workers": 0} | settings)


def joined(batches):
    return [torch.cat(tensors) for tensors in zip(*batches, strict=True)]


# Arrays ---------------------------------------------------------------------------------------------------

PIXELS = np.random.RandomState(0).randint(0, 256, (10, 6, 6, 3), dtype=np.uint8)


@pytest.mark.parametrize("keys", [("image", "label"), ("images", "labels")])
@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_images_keep_layout_and_labels(tmp_path, splits, keys, channels_first, save):
    """Swapped axes still train: rows would be taken for channels."""
    stored = PIXELS.transpose(0, 3, 1, 2) if channels_first else PIXELS
    labels = np.arange(10, dtype=np.uint8) % 2
    save(tmp_path / "x.npz", **{keys[0]: stored, keys[1]: labels})
    extra = load_extra(tmp_path / "x.npz", like=splits)
    (batch,) = extra.batches(10)
    assert torch.equal(batch.x, torch.from_numpy(PIXELS.transpose(0, 3, 1, 2)).float() / 255)
    assert batch.y.tolist() == labels.tolist()
    assert batch.y.dtype == torch.int64
    assert "x.npz image 3" in extra.decoder.source.locate(3)


@pytest.mark.parametrize("shape", [(10, 8, 8), (10, 8, 8, 1), (10, 1, 8, 8)])
def test_gray_npz_images_are_read(tmp_path, digits, shape):
    """Digits could not be extended, or an axis of 8 would be taken for the channels."""
    pixels = np.random.RandomState(0).randint(0, 256, (10, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "x.npz", image=pixels.reshape(shape), label=np.arange(10))
    (batch,) = load_extra(tmp_path / "x.npz", like=digits).batches(10)
    assert torch.equal(batch.x[:, 0], torch.from_numpy(pixels).float() / 255)


def test_npz_images_can_be_resized_like_training(tmp_path, splits):
    """Extra images sampled by another filter than the training images could be told apart by it."""
    np.savez(
        tmp_path / "x.npz", image=np.kron(PIXELS, np.ones((1, 2, 2, 1), np.uint8)), label=np.arange(10) % 2
    )
    extra = load_extra(tmp_path / "x.npz", like=splits, image_size=6)
    (batch,) = extra.batches(10)
    doubled = Image.fromarray(np.kron(PIXELS[3], np.ones((2, 2, 1), np.uint8)))
    expected = np.array(doubled.resize((6, 6), Image.Resampling.BICUBIC))
    assert torch.equal(batch.x[3], torch.from_numpy(expected).permute(2, 0, 1).float() / 255)


def test_max_images_takes_turns_over_classes(tmp_path, splits):
    """Generated sets are often sorted by class: the first thousand would be of one class."""
    np.savez(tmp_path / "x.npz", image=PIXELS, label=np.array([0] * 7 + [1] * 3))
    extra = load_extra(tmp_path / "x.npz", like=splits, max_images=6)
    assert torch.bincount(extra.y).tolist() == [3, 3]
    (batch,) = extra.batches(6)
    assert torch.equal(
        batch.x, torch.from_numpy(PIXELS[extra.positions.numpy()]).permute(0, 3, 1, 2).float() / 255
    )
    same, other = (
        load_extra(tmp_path / "x.npz", like=splits, max_images=6, seed=s).positions for s in (0, 1)
    )
    assert torch.equal(same, extra.positions)
    assert not torch.equal(other, extra.positions)
    unlabelled = load_extra(tmp_path / "x.npz", like=splits, labels="pseudo", max_images=6)
    assert (unlabelled.y == -1).all()
    assert len(set(unlabelled.positions.tolist())) == 6


@pytest.mark.parametrize(
    ("arrays", "settings", "message"),
    [
        ({"x": PIXELS}, {}, r"extra.path: got arrays x in .*; expected image or images"),
        (
            {"image": PIXELS},
            {},
            r"extra.path: got arrays image in .*expected label or labels.*extra.labels=pseudo",
        ),
        (
            {"image": PIXELS / 255, "label": np.zeros(10, int)},
            {},
            r"got images float64 \[10, 6, 6, 3\].*expected uint8",
        ),
        ({"image": PIXELS[:0], "label": np.zeros(0, int)}, {}, r"got images uint8 \[0, 6, 6, 3\]"),
        (
            {"image": PIXELS[..., :2], "label": np.zeros(10, int)},
            {},
            r"got images \[10, 6, 6, 2\].*expected 3 channels",
        ),
        (
            {"image": PIXELS[..., 0], "label": np.zeros(10, int)},
            {},
            r"got images \[10, 6, 6\].*expected 3 channels",
        ),
        (
            {"image": PIXELS[:, :5], "label": np.zeros(10, int)},
            {},
            r"got images \[3, 5, 6\].*expected \[3, 6, 6\]",
        ),
        (
            {"image": PIXELS, "label": np.zeros(9, int)},
            {},
            r"got labels int64 \[9\].*expected whole numbers \[10\]",
        ),
        ({"image": PIXELS, "label": np.zeros(10)}, {}, r"got labels float64 \[10\]"),
        ({"image": PIXELS, "label": np.full(10, 2)}, {}, r"got labels 2 to 2.*expected 0 to 1"),
        ({"image": PIXELS, "label": np.full(10, -1)}, {}, r"got labels -1 to -1"),
        ({"image": np.array([{}], dtype=object)}, {}, r"extra.path: got .*cannot read without pickle"),
        ({"image": PIXELS}, {"labels": "soft"}, r"extra.labels: got 'soft'; expected given or pseudo"),
        (
            {"image": PIXELS},
            {"labels": "pseudo", "max_images": 11},
            r"extra.max_images: got 11; expected 1 to the 10",
        ),
        ({"image": PIXELS}, {"labels": "pseudo", "max_images": 0}, r"extra.max_images: got 0"),
    ],
)
def test_npz_mistakes_are_named(tmp_path, splits, arrays, settings, message):
    """A run would fail in its first epoch, run a pickle, or train on labels of another data set."""
    np.savez(tmp_path / "x.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        load_extra(tmp_path / "x.npz", like=splits, **settings)


def test_files_that_are_not_there_or_broken_are_named(tmp_path, splits):
    """NumPy says "File is not a zip file" without its name, or asks to allow pickles."""
    (tmp_path / "cut.npz").write_bytes(b"PK\x03\x04 and no more")
    (tmp_path / "text.npz").write_text("no array")
    (tmp_path / "images.tar").write_bytes(b"x")
    for name, message in [
        ("nowhere.npz", r"extra.path: got .*nowhere.npz, which is not there"),
        ("cut.npz", r"extra.path: got .*cut.npz, which NumPy cannot read"),
        ("text.npz", r"extra.path: got .*text.npz, which NumPy cannot read"),
        ("images.tar", r"extra.path: got .*images.tar; expected a .npz or a folder"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_extra(tmp_path / name, like=splits)


# Folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_memory", [True, False])
def test_folder_classes_are_numbered_by_the_training_set(tmp_path, splits, in_memory):
    """A folder that lacks the first class would shift every label by one."""
    pixels = [write_image(tmp_path / "cat" / "deep" / f"{i}.png", seed=i) for i in range(3)]
    extra = load_extra(tmp_path, like=splits, in_memory=in_memory, num_workers=0)
    assert extra.y.tolist() == [splits.class_names.index("cat")] * 3
    (batch,) = extra.batches(3)
    assert torch.equal(batch.x, torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255)


def test_folders_without_labels_take_every_image(tmp_path, splits):
    """Folder names that are no classes would stop the run, or become classes."""
    for name in ("a.png", "web/b.png", "cat/c.png"):
        write_image(tmp_path / name)
    extra = load_extra(tmp_path, like=splits, labels="pseudo")
    assert extra.y.tolist() == [-1] * 3
    assert load_extra(tmp_path, like=splits, labels="pseudo", max_images=2).y.tolist() == [-1] * 2


def test_folder_mistakes_are_named(tmp_path, splits, digits):
    """Images would join with labels of other classes, or fail at some batch of the third epoch."""

    def refuse(folder, message, like=splits, **settings):
        with pytest.raises(ValueError, match=message):
            load_extra(tmp_path / folder, like=like, **settings)

    write_image(tmp_path / "unknown" / "dog" / "a.png")
    refuse(
        "unknown", r"extra.path: got classes dog in .*expected only those of the training folder, ant, cat"
    )
    write_image(tmp_path / "flat" / "a.png")
    refuse("flat", r"extra.path: got .*flat without class folders.*extra.labels=pseudo")
    (tmp_path / "empty").mkdir()
    refuse("empty", r"extra.path: got no images in .*empty", labels="pseudo")
    write_image(tmp_path / "large" / "cat" / "a.png", size=(7, 5))
    refuse("large", r"extra.path: got images \[3, 5, 7\] in .*large; expected \[3, 6, 6\]")
    write_image(tmp_path / "two" / "cat" / "a.png")
    write_image(tmp_path / "two" / "cat" / "b.png", size=(7, 7))
    refuse("two", r"extra.path: data.image_size: got None for images of different sizes.*a\.png.*b\.png")
    (tmp_path / "broken" / "cat").mkdir(parents=True)
    (tmp_path / "broken" / "cat" / "a.png").write_bytes(b"x")
    refuse("broken", r"extra.path: data: got an unreadable image .*a\.png")
    write_image(tmp_path / "rgb" / "a.png", size=(8, 8))
    refuse(
        "rgb", r"extra.path: got images \[3, 8, 8\] .*; expected \[1, 8, 8\]", like=digits, labels="pseudo"
    )


# Pseudo-labels --------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("batch_size", [7, 50])
def test_pseudo_labels_are_the_models_argmax(batch_size):
    """Labels of another image, of train mode, or of a smaller last batch would be trained on for days."""
    model, images = Noisy(), array_set(50).take(torch.arange(3, 43))
    model.drop.eval()  # frozen by the user
    before, states = {k: v.clone() for k, v in model.state_dict().items()}, global_states()
    result = pseudo_label(images, model, batch_size=batch_size)
    assert global_states() == states
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.training, model.drop.training, model.bn.training) == (True, False, True)
    (batch,) = images.batches(40)
    probabilities = model.eval()(batch.x).softmax(1).detach()
    assert torch.equal(result.images.y, probabilities.argmax(1))
    assert result.counts.tolist() == torch.bincount(result.images.y, minlength=3).tolist()
    assert abs(result.mean_confidence - float(probabilities.amax(1).mean())) < 1e-6  # float32 softmax
    assert torch.equal(images.y, torch.arange(3, 43) % 3)
    assert torch.equal(next(result.images.batches(40)).x, batch.x)


def test_labels_can_be_stored_and_given_back(tmp_path, splits):
    """A resumed run on another device would break ties otherwise and train on other labels."""
    np.savez(tmp_path / "x.npz", image=PIXELS)
    extra = load_extra(tmp_path / "x.npz", like=splits, labels="pseudo", max_images=6)
    y = torch.tensor([1, 0, 1, 1, 0, 1])
    again = extra.with_labels(y)
    assert torch.equal(next(again.batches(6)).y, y)
    assert torch.equal(again.take(torch.tensor([2, 4])).y, y[[2, 4]])
    assert (extra.y == -1).all()


@pytest.mark.parametrize(
    "model", [nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), nn.Sequential(nn.Flatten(), nn.Linear(16, 3))]
)
def test_models_that_cannot_label_are_refused(model):
    """A model of other classes gives labels that do not exist; one that diverged gives class 0 to all."""
    if model[1].out_features == 3:
        nn.init.constant_(model[1].bias, float("nan"))
    with pytest.raises(
        ValueError, match=r"extra.labels: got logits \[20, (3|4)\].*expected finite ones \[20, 3\]"
    ):
        pseudo_label(array_set(20), model)


# Mixed batches --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed():
    return MixedSet(array_set(101, title="train"), array_set(64, title="extra"), 0.7)


def num_extra(batch):
    return int((batch.index < 0).sum())


@pytest.mark.parametrize(
    ("fraction", "batch_size"), [(0.7, 10), (0.5, 8), (0.25, 16), (1 / 3, 12), (0.9, 20), (0.1, 10)]
)
def test_every_batch_holds_its_share(fraction, batch_size):
    """Batches of labelled or of extra images only would shake the gradient and the BatchNorm statistics."""
    sets = MixedSet(array_set(101), array_set(64), fraction)
    e = round(batch_size * fraction)
    batches = list(sets.batches(batch_size, **TRAIN))
    assert len(batches) == sets.num_updates(batch_size) == 101 // (batch_size - e)
    assert {num_extra(batch) for batch in batches} == {e}
    assert {len(batch.y) for batch in batches} == {batch_size}


@pytest.mark.parametrize(
    ("n", "fraction", "batch_size"), [(300, 0.7, 128), (300, 0.3, 17), (600, 0.001, 50), (5, 0.999, 64)]
)
def test_shares_that_are_not_whole_are_met_on_average(n, fraction, batch_size):
    """Rounding in every batch would train on 70.3 % instead of 70 %, or on none at all."""
    sets = MixedSet(array_set(n), array_set(64), fraction)
    counts = [num_extra(batch) for batch in sets.batches(batch_size, **TRAIN)]
    exact = Fraction(fraction).limit_denominator(1000) * batch_size
    assert set(counts) <= {int(exact), int(exact) + 1}
    assert abs(sum(counts) - len(counts) * exact) <= 0.5
    assert counts[0] == int(exact + Fraction(1, 2))


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"num_workers": 1, "in_memory": False}])
@pytest.mark.parametrize("augmentation", [None, Augmentation("cutout", cutout_size=2)])
def test_ranks_and_micro_batches_cut_one_sequence(settings, augmentation):
    """Two processes or accumulation would train on other images than one, or one on extra images only."""
    sets = MixedSet(array_set(101, **settings), array_set(64, **settings), 0.7)
    shown = SHOWN | {"augmentation": augmentation, "epoch": 1}
    whole = list(sets.batches(40, **shown))
    assert len(whole) == 8
    if settings["num_workers"]:
        in_memory = MixedSet(array_set(101), array_set(64), 0.7)
        assert_equal(whole, in_memory.batches(40, **shown))
        assert_equal(whole[5:], sets.batches(40, start=5, **shown))
        return
    parts = [list(sets.batches(40, rank=rank, world=4, **shown)) for rank in range(4)]
    assert {num_extra(batch) for part in parts for batch in part} == {7}
    assert_equal(whole, [joined(batches) for batches in zip(*parts, strict=True)])
    micro = list(sets.batches(10, **shown))
    assert {num_extra(batch) for batch in micro} == {7}
    assert_equal(whole, [joined(micro[4 * i : 4 * i + 4]) for i in range(8)])
    ranks_of_micro = [list(sets.batches(20, rank=rank, world=2, start=6, **shown)) for rank in range(2)]
    assert_equal(whole[3:4], [joined([ranks_of_micro[rank][m] for m in (0, 1) for rank in (0, 1)])])
    for start in range(8):
        assert_equal(whole[start:], sets.batches(40, start=start, **shown))


@pytest.mark.parametrize("settings", [{"num_workers": 0}, {"num_workers": 1, "in_memory": False}])
def test_small_parts_may_lack_a_kind(settings):
    """A rank with one image would ask its workers for an empty batch and crash."""
    sets = MixedSet(array_set(4, **settings), array_set(5, **settings), 0.25)
    whole = list(sets.batches(2, **SHOWN))
    parts = [list(sets.batches(2, rank=rank, world=2, **SHOWN)) for rank in range(2)]
    assert {num_extra(batch) for part in parts for batch in part} == {0, 1}
    assert_equal(whole, [joined(batches) for batches in zip(*parts, strict=True)])


def test_labelled_images_are_those_of_training_without_extra(mixed):
    """Adding extra data would also reshuffle and recrop the labelled images: two changes, measured as one."""
    alone = joined(mixed.train.batches(101, **SHOWN, epoch=4))
    together = joined(mixed.batches(10, **SHOWN, epoch=4))
    labelled = together[2] >= 0
    n = int(labelled.sum())
    assert n == 99  # 33 batches of 3
    for tensor, expected in zip(together, alone, strict=True):
        assert torch.equal(tensor[labelled], expected[:n])


def test_extra_images_are_drawn_without_replacement_over_epochs(mixed):
    """Drawing anew in each epoch would show some of a million images often and some never."""
    per_epoch = mixed.num_places - 101
    assert mixed.num_places == 13 * 26  # so that no batch is incomplete
    seen = [
        -1 - batch.index[batch.index < 0]
        for epoch in range(6)
        for batch in mixed.batches(26, **TRAIN, epoch=epoch)
    ]
    drawn = torch.cat(seen).tolist()
    assert len(drawn) == 6 * per_epoch
    passes = [drawn[i : i + 64] for i in range(0, len(drawn), 64)]
    assert all(len(set(one)) == len(one) for one in passes)
    assert len(passes) > 20
    assert len({tuple(one) for one in passes[:-1]}) == len(passes) - 1  # each pass in an order of its own
    other = torch.cat([-1 - b.index[b.index < 0] for b in mixed.batches(26, **TRAIN | {"seed": 4})]).tolist()
    assert other != drawn[:per_epoch]


def test_more_extra_images_than_an_epoch_needs_are_all_seen():
    """Of a million generated images only those of the first epoch would ever be used."""
    sets = MixedSet(array_set(20), array_set(700), 0.5)
    counts = Counter()
    for epoch in range(35):
        counts.update(
            torch.cat([b.index[b.index < 0] for b in sets.batches(4, **TRAIN, epoch=epoch)]).tolist()
        )
    # 20 or 21 of 700 places are drawn in each epoch, 20 of them shown: each at most once in the first pass.
    assert sum(counts.values()) == 700
    assert max(counts.values()) <= 2
    assert len(counts) > 650


def test_index_and_label_belong_to_the_image(mixed):
    """An extra image would get a labelled one's label, or an error name the wrong image."""
    for batch in mixed.batches(20, **TRAIN):
        number = ((batch.x[:, 0, 0, 0] + 256 * batch.x[:, 0, 0, 1]) * 255).round().long()
        position = torch.where(batch.index < 0, -1 - batch.index, batch.index)
        assert torch.equal(number, position)
        assert torch.equal(batch.y, position % 3)


def test_extra_images_are_cropped_and_augmented(mixed):
    """Only the labelled half of each batch would be augmented."""
    for settings in (
        {"crop_padding": 2},
        {"flip": True},
        {"augmentation": Augmentation("cutout", cutout_size=3)},
    ):
        plain, shown = joined(mixed.batches(10, **TRAIN)), joined(mixed.batches(10, **TRAIN, **settings))
        changed = (plain[0] != shown[0]).flatten(1).any(1)
        assert torch.equal(plain[2], shown[2])
        for kind in (plain[2] < 0, plain[2] >= 0):
            assert changed[kind].float().mean() > 0.15


def test_levels_of_either_kind_are_scaled_by_their_own_white(digits, tmp_path):
    """Digits count to 16 and generated images to 255: one of them would be sixteen times too dark."""
    np.savez(tmp_path / "x.npz", image=np.full((5, 8, 8), 255, dtype=np.uint8), label=np.arange(5))
    sets = MixedSet(digits.train, load_extra(tmp_path / "x.npz", like=digits), 0.5)
    batch = next(sets.batches(40, **TRAIN))
    assert (batch.x[batch.index < 0] == 1).all()
    assert batch.x[batch.index >= 0].amax((1, 2, 3)).min() > 0.9
    assert batch.x.max() == 1


def test_measuring_sees_labelled_images_only(mixed):
    """Training accuracy would be measured on generated images, and on pseudo-labels."""
    assert len(mixed) == 101
    assert torch.equal(mixed.y, mixed.train.y)
    assert torch.equal(mixed.subset(9).positions, mixed.train.subset(9).positions)
    assert torch.equal(mixed.take(torch.tensor([4, 2])).positions, torch.tensor([4, 2]))
    assert mixed.decoder is mixed.train.decoder
    assert mixed.positions is mixed.train.positions
    for settings in ({}, {"shuffle": True}, {"drop_last": True}):
        with pytest.raises(ValueError, match="expected both True, as they are for training"):
            mixed.batches(10, **settings)


def test_mixing_in_leaves_global_random_state_alone(mixed):
    """Extra data would change dropout and the attack's random start."""
    before = global_states()
    list(mixed.batches(20, **SHOWN))
    assert global_states() == before


def test_sets_that_do_not_fit_are_refused(splits):
    """Stacking would fail in the first batch, or labels of -1 be taken for the last class."""
    train, unlabelled = array_set(20), array_set(20).with_labels(torch.full((20,), -1))
    stream = StreamSet(lambda: None, 10, 4)
    for first, extra, fraction, message in [
        (train, train, 0.0, "extra.fraction: got 0.0"),
        (train, train, 1.0, "extra.fraction: got 1.0"),
        (train, train, float("nan"), "extra.fraction: got nan"),
        (
            train,
            array_set(20, shape=(5, 4)),
            0.5,
            r"extra.path: got images \[1, 5, 4\]; expected \[1, 4, 4\]",
        ),
        (train, splits.train, 0.5, r"extra.path: got images \[3, 6, 6\]"),
        (train, unlabelled, 0.5, "extra.labels: got labels -1 to -1; expected 0 to 2"),
        (train, array_set(20, classes=4), 0.5, "extra.labels: got labels 0 to 3; expected 0 to 2"),
        (stream, train, 0.5, "extra.path: got training images of type StreamSet"),
    ]:
        with pytest.raises(ValueError, match=message):
            MixedSet(first, extra, fraction)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 339}, "train.batch_size: got 339; expected at most the 338"),
        ({"batch_size": 10, "world": 3}, "train.batch_size: got 10; expected a multiple of the 3"),
        ({"batch_size": 100, "start": 4}, "start: got 4; expected 0 to 3"),
    ],
)
def test_impossible_mixed_batches_are_refused_at_the_call(mixed, settings, message):
    """An epoch without a batch trains nothing, quietly."""
    with pytest.raises(ValueError, match=message):
        mixed.batches(**settings, **TRAIN)


def test_num_updates_counts_the_batches(mixed, digits):
    """The schedule would end before training, or training ask for a batch too many."""
    for images, sizes in ((mixed, (1, 7, 40)), (mixed.train, (1, 7, 40)), (digits.train, (64, 800))):
        for size in sizes:
            assert images.num_updates(size) == len(list(images.batches(size, **TRAIN)))
            assert images.num_updates(size) * 2 <= images.num_updates(size // 2 or 1) or size == 1
    assert StreamSet(lambda: None, 10, 4).num_updates(4) == 2
