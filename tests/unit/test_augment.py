"""What augmentation, mixing and label noise promise: torchvision's operations, fair draws, a seed."""

import random
from collections import Counter

import numpy as np
import pytest
import torch
from image_files import FakeStream, assert_equal, global_states, joined, joined_ranks, load, write_image
from PIL import Image
from timm.data.auto_augment import rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torchvision.transforms import v2

from wcitrain.data import Augmentation, LabelNoise, Mixing, StreamSet
from wcitrain.data.augment import _uniform, crop, draw_crops, seeded
from wcitrain.seeding import generator_from, seed_from

POLICIES = {
    "cutout": Augmentation("cutout", cutout_size=3),
    "autoaugment": Augmentation("autoaugment"),
    "randaugment": Augmentation("randaugment", num_ops=3, magnitude=20),
    "trivialaugment": Augmentation("trivialaugment"),
    "idbh": Augmentation("idbh"),
    "autoaugment and cutout": Augmentation("autoaugment", cutout_size=3),
}
TRAIN = {"shuffle": True, "seed": 3, "epoch": 2, "crop_padding": 1, "flip": True, "drop_last": True}


def load_digits(**settings):
    return load(max_train=116, val_size=20, **settings).train


def some_pixels(shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 8, 8), (3, 7, 5)])
@pytest.mark.parametrize("name", POLICIES)
def test_policies_change_images_as_a_function_of_the_seed_and_keep_their_form(name, shape):
    """Workers, ranks, resumed runs would augment otherwise, disturb dropout, or not augment at all."""
    pixels, trials = some_pixels(shape), []
    for state in (0, 1):
        torch.manual_seed(state), np.random.seed(state), random.seed(state)
        before = global_states()
        trials.append([POLICIES[name].apply(pixels, seed) for seed in range(24)])
        assert global_states() == before
    results = trials[0]
    assert all(torch.equal(a, b) for a, b in zip(*trials, strict=True))
    assert torch.equal(pixels, some_pixels(shape))
    assert all(result.shape == shape and result.dtype == torch.uint8 for result in results)
    # Some draws are the identity (a color change of a gray image, an invisible shift); most are not.
    assert sum(not torch.equal(result, pixels) for result in results) >= 6
    assert len({result.numpy().tobytes() for result in results}) >= 5


@pytest.mark.parametrize(
    ("augmentation", "direct"),
    [
        (Augmentation("autoaugment"), v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
        (Augmentation("randaugment"), v2.RandAugment(num_ops=2, magnitude=9)),
        (Augmentation("randaugment", magnitude=0), v2.RandAugment(num_ops=2, magnitude=0)),
        (Augmentation("trivialaugment"), v2.TrivialAugmentWide()),
    ],
)
def test_policies_are_those_of_torchvision(augmentation, direct):
    """A setting that does not arrive, or ImageNet's policy on CIFAR-10, looks like any augmentation."""
    pixels = some_pixels((3, 16, 16))
    for seed in range(20):
        with seeded(seed):
            torch.rand(1)  # whether to augment at all
            expected = direct(pixels)
        assert torch.equal(augmentation.apply(pixels, seed), expected)


def test_policy_timm_is_the_transform_that_its_config_names_in_timm():
    """A part that does not arrive looks like any augmentation; draws of Python and NumPy would not repeat."""
    config = "rand-m9-n3-p0.7-mstd0.5-inc1"
    augmentation = Augmentation("timm", config=config)
    direct = rand_augment_transform(config, {"translate_const": 7, "img_mean": (0, 0, 0)})  # 0.45 of 16
    pixels, changed, refused = some_pixels((3, 16, 16)), 0, 0
    image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    for seed in range(30):
        random.seed(seed), np.random.seed(seed)
        try:
            expected = torch.from_numpy(np.array(direct(image))).permute(2, 0, 1)
        except ValueError:  # Pillow 13 refuses to posterize to no bits
            refused += 1
            expected = augmentation.apply(pixels, seed)
        random.seed(3), np.random.seed(4), torch.manual_seed(5)
        before = global_states()
        assert torch.equal(augmentation.apply(pixels, seed), expected)
        assert global_states() == before
        changed += not torch.equal(expected, pixels)
    assert changed > 15
    assert refused < 5
    with pytest.raises(ValueError, match="got timm for images of 1 channels"):
        augmentation.check((1, 8, 8))


CROPPED = Augmentation(crop_scale=(0.2, 0.6))


@pytest.mark.parametrize("in_memory", [False, True])
def test_random_resized_crops_are_those_of_timm_on_the_image_as_it_is_stored(in_memory, tmp_path):
    """Cropped after the resize to data.image_size, small parts of large images would be a blur."""
    for number in range(12):
        size = (20 + number, 31 - number)
        write_image(tmp_path / f"{('train', 'test')[number % 2]}/{'ab'[number // 6]}/{number}.png", size=size)
    images = load("folder", root=str(tmp_path), image_size=6, val_size=2, in_memory=in_memory).train
    (batch,) = images.batches(4, **TRAIN | {"crop_padding": 0}, augmentation=CROPPED)
    transform = RandomResizedCropAndInterpolation((6, 6), (0.2, 0.6), interpolation="bicubic")
    mirror = draw_crops(4, 0, True, 3, "augment", 2)[:, 2]
    assert 0 < mirror.sum() < 4
    for place, (x, position) in enumerate(zip(batch.x, batch.index.tolist(), strict=True)):
        random.seed(seed_from(3, "augment", 2, "crop", place))
        image = transform(Image.open(images.source.place[position]))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        assert torch.equal(x, (pixels.flip(2) if mirror[place] else pixels) / 255)
    (measured,) = images.batches(4)  # whole images
    assert torch.equal(measured.x, torch.from_numpy(np.stack([images[row] for row in range(4)])) / 255)


def test_crops_of_few_levels_are_interpolated_in_255_and_streams_crop_too(digits):
    """Between 17 levels a resize rounds to whole sixteenths, and its overshoot would wrap around."""
    (batch,) = digits.batches(96, **TRAIN | {"crop_padding": 0}, augmentation=CROPPED)
    assert float(batch.x.max()) == 1
    assert len(batch.x.unique()) > 200
    transform = RandomResizedCropAndInterpolation((8, 8), (0.2, 0.6), interpolation="bicubic")
    mirror = draw_crops(96, 0, True, 3, "augment", 2)[:, 2]
    for place, (x, position) in enumerate(zip(batch.x, batch.index.tolist(), strict=True)):
        random.seed(seed_from(3, "augment", 2, "crop", place))
        levels = np.round(digits.source.pixels[position] * (255 / 16)).astype(np.uint8)
        pixels = torch.from_numpy(np.array(transform(Image.fromarray(levels))))[None]
        assert torch.equal(x, (pixels.flip(2) if mirror[place] else pixels) / 255)
    stream = [
        joined(StreamSet(FakeStream, 10, 4).batches(4, **TRAIN | {"crop_padding": 0}, augmentation=CROPPED))
    ]
    stream += [
        joined(StreamSet(FakeStream, 10, 4).batches(4, **TRAIN | {"crop_padding": 0}, augmentation=CROPPED))
    ]
    assert stream[0][0].shape == (8, 3, 4, 4)
    assert torch.equal(stream[0][0], stream[1][0])


@pytest.mark.parametrize("side", [2, 3])
def test_cutout_centres_are_uniform_and_clipped(side):
    """A square that stays inside erases the middle more than the rim, stronger than published."""
    height, width, draws, half = 4, 5, 1500, side // 2
    places = Counter()
    cutout = Augmentation("cutout", cutout_size=side)
    white = torch.full((1, height, width), 9, dtype=torch.uint8)
    for seed in range(draws):
        rows, columns = torch.nonzero(cutout.apply(white, seed)[0] == 0, as_tuple=True)
        box = (int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1)
        assert len(rows) == (box[1] - box[0]) * (box[3] - box[2])
        places[box] += 1
    # The first row runs from -(s//2); what is clipped above 0 and below H remains.
    tops, lefts = (range(-half, size + half - side + 1) for size in (height, width))
    rows = [(max(top, 0), min(top + side, height)) for top in tops]
    expected = {(*row, max(left, 0), min(left + side, width)) for row in rows for left in lefts}
    assert set(places) == expected
    assert len(expected) == len(tops) * len(lefts)
    # 30 (s=2) or 20 (s=3) equally likely places, deviation below sqrt(1500 / 20) = 8.7; 5 of them allowed.
    assert max(abs(count - draws / len(expected)) for count in places.values()) < 44


def test_probability_leaves_the_others_as_they_are():
    """Half the images augmented, or all of them by half, would both be called probability 1/2."""
    pixels = torch.full((1, 8, 8), 7, dtype=torch.uint8)
    augmentation = Augmentation("cutout", cutout_size=4, probability=0.3)
    changed = sum(not torch.equal(augmentation.apply(pixels, seed), pixels) for seed in range(1000))
    assert abs(changed - 300) < 5 * 14.5  # sqrt(1000 * 0.3 * 0.7) = 14.5


def test_order_is_crop_mirror_policy(digits):
    """Before the crop, erased squares may be moved out; any change of order changes every number."""
    augmentation = POLICIES["autoaugment and cutout"]
    order = torch.randperm(96, generator=generator_from("cpu", 3, "order", 2))
    levels = (digits.pixels[order] * (255 / 16)).round().to(torch.uint8)
    cropped = crop(levels, draw_crops(96, 1, True, 3, "augment", 2), 1)
    seeds = [seed_from(3, "augment", 2, "policy", k) for k in range(96)]
    expected = torch.stack([augmentation.apply(*pair) for pair in zip(cropped, seeds, strict=True)])
    (batch,) = digits.batches(96, **TRAIN, augmentation=augmentation)
    assert torch.equal(batch.x, expected.float() / 255)
    assert torch.equal(batch.y, digits.y[order])


@pytest.mark.parametrize("name", ["idbh", "timm"])
def test_workers_ranks_and_resume_augment_alike(name):
    """The number of processes or an interruption would change the training images, or random states."""
    timm = Augmentation("timm", config="rand-m9-mstd0.5-inc1", crop_scale=(0.3, 1))
    settings = TRAIN | {"augmentation": POLICIES.get(name, timm)}
    digits = load_digits(channels=3)
    whole = list(digits.batches(32, **settings))
    before = global_states()
    for workers in ({"num_workers": 2}, {"num_workers": 1, "in_memory": False}):
        assert_equal(whole, load_digits(channels=3, **workers).batches(32, **settings))
    assert_equal(whole[2:], digits.batches(32, start=2, **settings))
    micro = list(digits.batches(16, **settings))
    assert_equal(whole, [joined(micro[i : i + 2]) for i in (0, 2, 4)])
    assert_equal(whole, joined_ranks([digits.batches(32, rank=rank, world=2, **settings) for rank in (0, 1)]))
    assert global_states() == before


@pytest.mark.parametrize("name", POLICIES)
def test_augmented_digits_stay_in_range(digits, name):
    """Policies count on 255 levels: images of 17 would be inverted to 15.9 and solarised to nothing."""
    (batch,) = digits.batches(96, **TRAIN, augmentation=POLICIES[name])
    assert batch.x.dtype == torch.float32
    assert float(batch.x.min()) == 0
    assert float(batch.x.max()) == 1
    if name == "cutout":  # rounding to 255ths moves a sixteenth by at most half a 255th; float32 adds 1e-7
        assert ((batch.x * 16).round() / 16 - batch.x).abs().max() <= 0.5 / 255 + 1e-6


def test_images_that_do_not_fit_are_refused_at_the_call(digits):
    """The first batch would fail inside torchvision, in another process."""
    with pytest.raises(ValueError, match=r"augment.cutout_size: got 9 for images of 8x8 pixels"):
        digits.batches(8, augmentation=Augmentation("cutout", cutout_size=9))
    with pytest.raises(ValueError, match=r"augment.policy: got idbh for images of 4 channels"):
        Augmentation("idbh").check((4, 8, 8))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_streams_augment_and_repeat(num_workers):
    """Data that are read front to back would silently not be augmented, or never twice alike."""

    def shown(num_workers=num_workers, **settings):
        settings = {"augmentation": Augmentation("cutout", cutout_size=4)} | settings
        return list(StreamSet(FakeStream, 10, 6, num_workers).batches(4, **TRAIN | settings))

    before = global_states()
    first = shown()
    assert global_states() == before
    assert_equal(first, shown())
    assert_equal(first[1:], shown(start=1))
    assert_equal(first, shown(num_workers=0))  # one worker counts like none
    x = joined(first)[0]
    assert len(set(x.amax((1, 2, 3)).tolist())) == 8
    assert len({tuple((image == 0).flatten().tolist()) for image in x}) > 4
    assert not torch.equal(x, joined(shown(epoch=3))[0])


def image_batch(n=6, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator), torch.randint(0, classes, (n,), generator=generator)


MIXED = [(Mixing(mixup_alpha=0.4), v2.MixUp(alpha=0.4, num_classes=4))]
MIXED += [(Mixing(cutmix_alpha=1.0), v2.CutMix(alpha=1.0, num_classes=4))]


@pytest.mark.parametrize(("mixing", "direct"), MIXED)
def test_mixing_is_that_of_torchvision(mixing, direct):
    """An alpha that does not arrive would only show as a slightly different accuracy."""
    x, y = image_batch()
    original = x.clone()
    for seed in range(10):
        before = torch.get_rng_state()
        mixed, soft = mixing.apply(x, y, 4, seed)
        assert torch.equal(torch.get_rng_state(), before)
        with seeded(seed):
            torch.rand(())  # whether to mix at all
            expected = direct(x, y)
        assert torch.equal(mixed, expected[0])
        assert torch.equal(soft, expected[1])
        assert torch.equal(x, original)
        assert soft.shape == (6, 4)
        assert (soft.sum(1) - 1).abs().max() <= 2**-23  # two float32 products of λ and 1-λ, added
        assert mixed.min() >= 0
        assert mixed.max() <= 1


def test_unmixed_batches_are_one_hot():
    """The loss would meet two kinds of labels, and a run without mixing not equal one that never had it."""
    x, y = image_batch()
    for mixing in (Mixing(), Mixing(mixup_alpha=1.0, probability=1e-9)):
        mixed, soft = mixing.apply(x, y, 4, 0)
        assert mixed is x
        assert torch.equal(soft, torch.eye(4)[y])


def test_probabilities_choose_how_a_batch_is_mixed():
    """Swapped probabilities would cut where one asked to blend."""
    x, y = image_batch(n=2)
    mixing = Mixing(mixup_alpha=1.0, cutmix_alpha=1.0, probability=0.6, switch_probability=0.25)
    kinds = Counter()
    for seed in range(600):
        mixed, _ = mixing.apply(x, y, 4, seed)
        if mixed is x:
            kinds["none"] += 1
        else:
            is_cut = ((mixed == x) | (mixed == x.roll(1, 0))).all()
            kinds["cut" if is_cut else "blend"] += 1
    # Of 600: 40 % not mixed, 15 % cut, 45 % blended; deviations 12.0, 8.7 and 12.2, 5 of them allowed.
    assert abs(kinds["none"] - 240) < 60
    assert abs(kinds["cut"] - 90) < 44
    assert abs(kinds["blend"] - 270) < 61


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_mixing_on_the_device_draws_the_same():
    """A GPU run would mix other pairs by other shares than a CPU run."""
    x, y = image_batch()
    for mixing in (Mixing(mixup_alpha=1.0), Mixing(cutmix_alpha=1.0)):
        before = torch.cuda.get_rng_state()
        mixed, soft = mixing.apply(x.cuda(), y.cuda(), 4, 3)
        assert torch.equal(torch.cuda.get_rng_state(), before)
        expected, labels = mixing.apply(x, y, 4, 3)
        # a fused multiply-add rounds once less
        assert torch.allclose(mixed.cpu(), expected, atol=2**-23, rtol=0)
        assert torch.allclose(soft.cpu(), labels, atol=2**-23, rtol=0)


N, C = 20_000, 10
INDEX = torch.arange(N) - N // 2  # extra images have negative ones
LABELS = torch.arange(N) % C


def noisy(share, y=LABELS, index=INDEX, *, seed=5, epoch=None, exclude_true=False):
    """Return labels with noise that is fixed unless an epoch is given."""
    noise = LabelNoise(share, resample=epoch is not None, exclude_true=exclude_true)
    return noise.apply(y, index, C, seed=seed, epoch=epoch or 0)


@pytest.mark.parametrize("exclude_true", [False, True])
def test_the_share_of_wrong_labels_is_as_announced_and_classes_are_uniform(exclude_true):
    """The two readings of "40 % noise" differ by a tenth; noise that prefers a class is not symmetric."""
    wrong = int((noisy(0.4, exclude_true=exclude_true) != LABELS).sum())
    assert abs(wrong - N * 0.4 * (1 if exclude_true else 0.9)) < 5 * 69.3  # sqrt(20000 * 0.4 * 0.6) = 69.3
    counts = torch.zeros(C, C)
    counts.index_put_((LABELS, noisy(1.0, exclude_true=exclude_true)), torch.ones(N), accumulate=True)
    mean = N / C / (C - exclude_true)  # 200 or 222 of 2000; standard deviation below 14.1, 5 of them allowed
    expected = torch.full((C, C), mean).fill_diagonal_(0 if exclude_true else mean)
    assert (counts - expected).abs().max() < 71
    assert not (exclude_true and counts.diagonal().any())


def test_noise_belongs_to_the_image_and_grows_with_the_share():
    """Order, ranks or a resume would change which labels are wrong; a study over shares would vary both."""
    whole, small, large = noisy(0.5), noisy(0.2, exclude_true=True), noisy(0.4, exclude_true=True)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))[:300]
    assert torch.equal(noisy(0.5, LABELS[order], INDEX[order]), whole[order])
    assert torch.equal(large[small != LABELS], small[small != LABELS])


@pytest.mark.parametrize("change", [{"seed": 6}, {"epoch": 0}, {"epoch": 1}])
def test_seed_and_epoch_draw_anew(change):
    """Noise announced as fresh in each epoch would be one fixed noise, or the seed would not matter."""
    results = [noisy(0.5), noisy(0.5, **change)]
    flipped = [result != LABELS for result in results]
    # Wrong with probability 0.45; wrong in both by chance 0.2025: standard deviation sqrt(20000 * 0.16) = 57.
    assert abs(int((flipped[0] & flipped[1]).sum()) - N * 0.2025) < 5 * 57
    assert torch.equal(noisy(0.5, **change), results[1])


def test_hash_equals_unsigned_arithmetic():
    """Shifts that repeat the sign and products that do not wrap hash poorly, and differ between devices."""

    def splitmix(index, seed):
        mask = 2**64 - 1
        z = (index * 0x9E3779B97F4A7C15 + seed) & mask
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return (z ^ z >> 31) >> 2

    index = torch.tensor([0, 1, -1, 12345, -(2**40), 2**62])
    expected = [splitmix(i, seed_from("place", 3)) % 1000 for i in index.tolist()]
    assert _uniform(index, 1000, "place", 3).tolist() == expected
