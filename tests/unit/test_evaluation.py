"""Evaluations: names, flags, restarts, corruptions, checks of the model, files, tables and comparisons."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.evaluation import (
    CORRUPTIONS,
    AttackResult,
    Evaluation,
    PreflightWarning,
    bootstrap_interval,
    compare,
    corrupt,
    evaluate,
    mcnemar,
    parse_attack,
)
from wcitrain.evaluation.drawing import accuracy_curve
from wcitrain.evaluation.naming import EnsemblePlan, GradientPlan
from wcitrain.evaluation.preflight import after
from wcitrain.seeding import generator_from

LINF = ThreatModel("linf", 0.05)


def small_model(num_classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 24), nn.Tanh(), nn.Linear(24, num_classes)).eval()


def rough_model() -> nn.Module:
    """One whose loss is anything but linear in the ball: restarts find different things."""
    model = small_model()
    with torch.no_grad():
        model[1].weight.mul_(12)
    return model


def examples(model: nn.Module, num: int = 40, num_wrong: int = 4):
    """Images with the labels the model gives to all but the first few."""
    x = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:num_wrong] = (y[:num_wrong] + 1) % 4
    return x, y


def run(model, x, y, threats=LINF, **settings):
    settings = {"preflight": "off", "progress": False, "attacks": "pgd-5"} | settings
    return evaluate(model, [(x, y)], threats, **settings)


# Names


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("fgsm", GradientPlan("fgsm", "ce", 1)),
        ("pgd-20", GradientPlan("pgd-20", "ce", 20)),
        ("pgd-20x1", GradientPlan("pgd-20", "ce", 20)),
        ("pgd-50x10", GradientPlan("pgd-50x10", "ce", 50, 10)),
        ("cw-100x5", GradientPlan("margin-100x5", "margin", 100, 5)),
        ("dlr-20", GradientPlan("dlr-20", "dlr", 20)),
        ("autoattack", EnsemblePlan("autoattack")),
        ("autoattack-plus", EnsemblePlan("autoattack-plus", "plus")),
        ("autoattack-rand", EnsemblePlan("autoattack-rand", "rand")),
        (
            "autoattack:square+apgd-ce",
            EnsemblePlan("autoattack:square+apgd-ce", "standard", ("square", "apgd-ce")),
        ),
    ],
)
def test_a_name_stands_for_one_attack(name, plan):
    """The name is what a table prints; two attacks under one name cannot be told apart."""
    assert parse_attack(name) == plan


@pytest.mark.parametrize(
    "name",
    [
        "pgd",
        "pgd-0",
        "pgd-20x0",
        "PGD-20",
        "autoattack-standard",
        "autoattack:",
        "autoattack:pgd",
        "autoattack:fab+fab",
    ],
)
def test_other_names_list_what_there_is(name):
    """A misspelt attack must not be left out, and the message must say how it is spelt."""
    with pytest.raises(ValueError, match=r"expected fgsm; pgd-STEPS.*apgd-ce\+apgd-dlr"):
        parse_attack(name)


# Attacks


def test_flags_are_those_of_the_attack_run_one_example_at_a_time():
    """The stages unroll ``Attack``: from the same start they must end at the same image in any batch."""
    model = small_model()
    x, y = examples(model, 12)
    for threat in (LINF, ThreatModel("l2", 0.4), ThreatModel("l1", 3.0)):
        attack = Attack(threat, 5, 2.5 * threat.eps / 5, loss="margin")
        survives, losses = [], []
        for k in range(12):
            x_adv = attack(model, x[k : k + 1], y[k : k + 1], generator_from("cpu", 7, "evaluation", 0, k))
            logits = model(x_adv).detach()
            survives.append(bool(model(x[k : k + 1]).argmax() == y[k]) and bool(logits.argmax() == y[k]))
            losses.append(float(nn.functional.cross_entropy(logits, y[k : k + 1])))
        result = run(model, x, y, threat, attacks="margin-5", seed=7, batch_size=5).attacks[0]
        assert result.is_robust.tolist() == survives
        # float32 sums of 192 terms in another order, over five steps whose sign can flip: 1e-4 is ample
        np.testing.assert_allclose(result.losses, losses, rtol=1e-4)


def test_batches_cuts_and_seeds():
    """An accuracy that depends on the batch size cannot be repeated; one without the seed is not random."""
    model = small_model()
    x, y = examples(model)
    whole, cut = (run(model, x, y, attacks=["pgd-3x2", "fgsm"], batch_size=size) for size in (40, 7))
    for a, b in zip(whole.attacks, cut.attacks, strict=True):
        assert torch.equal(a.is_robust, b.is_robust)
    first = run(model, x, y, attacks=["pgd-3x2", "fgsm"], num_examples=11)
    assert torch.equal(first.attacks[0].is_robust, whole.attacks[0].is_robust[:11])
    other = run(model, x, y, attacks=["pgd-3x2", "fgsm"], seed=1)
    assert not torch.equal(other.attacks[0].losses, whole.attacks[0].losses)
    assert torch.equal(other.attacks[1].losses, whole.attacks[1].losses)  # FGSM starts at the image


def test_an_example_stays_broken_whatever_later_restarts_do():
    """By the restart of highest loss alone, an example that another one broke could count as robust."""
    model = rough_model()
    x, y = examples(model, 120)
    threat = ThreatModel("linf", 0.1)
    shares = [run(model, x, y, threat, attacks=f"pgd-1x{n}").attacks[0] for n in (1, 2, 8)]
    for fewer, more in pairwise(shares):
        assert not (more.is_robust & ~fewer.is_robust).any()
        assert torch.equal(more.losses, fewer.losses)  # of the first restart
    assert shares[0].is_robust.sum() > shares[2].is_robust.sum()
    assert list(shares[2].after.values()) == sorted(shares[2].after.values(), reverse=True)
    assert not shares[2].is_robust[:4].any()  # wrong without an attack


def test_a_misclassified_iterate_counts_although_its_loss_is_low():
    """The model can be right on the restart of highest cross-entropy: with four classes from log 2 up."""
    model = rough_model()
    x, y = examples(model, 60, 0)
    threat = ThreatModel("linf", 0.1)
    result = run(model, x, y, threat, attacks="pgd-1x6").attacks[0]
    survives, losses = [], []
    for restart in range(6):
        one = Attack(threat, 1, 0.25)
        generators = [generator_from("cpu", 0, "evaluation", restart, k) for k in range(60)]
        x_adv = torch.cat([one(model, x[k : k + 1], y[k : k + 1], generators[k]) for k in range(60)])
        logits = model(x_adv).detach()
        survives.append(logits.argmax(1) == y)
        losses.append(nn.functional.cross_entropy(logits, y, reduction="none"))
    assert torch.equal(result.is_robust, torch.stack(survives).all(0))
    by_loss = torch.stack(survives).gather(0, torch.stack(losses).argmax(0)[None])[0]
    assert not (result.is_robust & ~by_loss).any()


def test_a_curve_falls_and_its_worst_case_is_the_union():
    """Unions are read off the flags; a curve that rises by chance would be no curve."""
    model = small_model()
    x, y = examples(model, 60)
    threats = [ThreatModel("linf", eps) for eps in (0.0, 0.01, 0.03, 0.09)] + [ThreatModel("l2", 0.3)]
    result = run(model, x, y, threats, attacks=["pgd-5", "margin-5"])
    curve = [result.robust_accuracy(threat) for threat in threats[:4]]
    assert curve == sorted(curve, reverse=True)
    assert curve[0] == result.clean_accuracy == 56 / 60
    flags = torch.stack([r.is_robust for r in result.attacks if r.threat == threats[2]])
    assert torch.equal(result.worst(threats[2]), flags.all(0))
    assert torch.equal(result.worst(), torch.stack([r.is_robust for r in result.attacks]).all(0))
    with pytest.raises(KeyError):
        result.result(LINF, "pgd-5")


def test_the_model_is_left_as_it_was_also_when_stopped():
    """A model in train mode with batch statistics: evaluation between epochs must not move it."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 4)
    )
    model[1].eval()
    model[4].bias.requires_grad_(False)
    x, y = torch.rand(8, 3, 8, 8), torch.arange(8) % 4

    def state():
        modes = [m.training for m in model.modules()]
        grads = [(p.grad, p.requires_grad) for p in model.parameters()]
        return modes, grads, {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()

    def stop(*_):
        raise KeyboardInterrupt

    before = state()
    run(model, x, y, attacks=["pgd-2x2", "autoattack:fab-t"], corruptions="fog", preflight="off")
    hook = model[3].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, x, y)
    hook.remove()
    now = state()
    assert before[:2] == now[:2]
    assert all(torch.equal(before[2][k], now[2][k]) for k in before[2])
    assert torch.equal(before[3], now[3])


def test_data_parallel_and_compiled_models_are_looked_through():
    """Wrappers may synchronise processes, compile for minutes or cast: the module itself is evaluated."""
    model = small_model()
    x, y = examples(model)

    def refuse(*_):
        raise AssertionError("the wrapper was called")

    parallel = nn.DataParallel(model)
    parallel.register_forward_pre_hook(refuse)
    for wrapped in (parallel, torch.compile(model, backend=refuse)):
        assert torch.equal(run(wrapped, x, y).worst(), run(model, x, y).worst())


def test_rows_that_are_not_finite_are_wrong_everywhere():
    """The largest of NaNs is the first: a broken model would be right on class 0."""

    class Broken(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.value = value

        def forward(self, x):
            z = torch.eye(4)[0] + 0 * x.mean((1, 2, 3))[:, None]
            return torch.cat([torch.where(x[:, 0, 0, :1] > 0.5, self.value, z[:, :1]), z[:, 1:]], 1)

    x, y = torch.full((40, 3, 8, 8), 0.1), torch.zeros(40).long()
    bad = torch.arange(40) >= 30  # none of the first batch
    x[bad] = 0.9
    for value in (torch.nan, torch.inf):
        result = run(Broken(value), x, y, attacks=["pgd-2", "fgsm"], corruptions="brightness")
        for flags in (result.is_clean, *(r.is_robust for r in result.attacks), *result.corrupted.values()):
            assert torch.equal(flags, ~bad)
        with pytest.raises(
            ValueError, match=r"preflight: not_finite: .* on 10 of 40 clean images, which count as wrong"
        ):
            run(Broken(value), x, y, preflight="raise", batch_size=30)
        assert "not_finite" in found(Broken(value), x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": "pgd"}, "attacks: got 'pgd'"),
        ({"corruptions": "frost"}, "corruptions: got 'frost'"),
        ({"corruptions": ["all", "fog"]}, "got all fog; expected all alone"),
        ({"threats": ()}, "threats: got none"),
        ({"num_examples": 0}, "num_examples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"preflight": "no"}, "preflight: got 'no'"),
        ({"data": []}, "got no images"),
        (
            {"data": [(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2).long())]},
            "Divide levels by 255",
        ),
        (
            {"data": [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]))]},
            "labels 0 to 4 for a model of 4 classes",
        ),
        ({"model": small_model().double()}, "parameters in torch.float64"),
        ({"model": nn.Flatten(2)}, r"got shape \(2, 3, 64\) for 2 images"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change, message):
    """Hours later is too late, and a wrong label or precision is not seen in a number."""
    arguments = {
        "model": small_model(),
        "data": [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())],
        "threats": LINF,
    }
    settings = {"attacks": "pgd-2", "preflight": "off", "progress": False}
    with pytest.raises(ValueError, match=message):
        evaluate(**(arguments | settings | change))


@pytest.mark.parametrize("threats", ["linf", [0.03], [LINF, "l2"]])
def test_threats_that_are_none_are_refused(threats):
    """A text is a sequence of letters, none of which has a radius."""
    with pytest.raises(
        TypeError, match=r'threats: got .*; expected a ThreatModel, or several\. Give ThreatModel\("linf"'
    ):
        run(small_model(), torch.rand(2, 3, 8, 8), torch.zeros(2).long(), threats)


def test_a_missing_package_is_named(monkeypatch):
    """An ImportError in the middle of an evaluation does not say which extra to install."""
    import sys

    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "wcitrain\[eval\]"'):
        run(small_model(), torch.rand(2, 3, 8, 8), torch.zeros(2).long(), attacks="autoattack")


# Corruptions


def smooth_images(num: int = 64) -> torch.Tensor:
    """Coloured 32x32 images with edges and shades, as photographs have; noise a blur would only shrink."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(num, 3, 5, 5, generator=generator)
    return nn.functional.interpolate(coarse, (32, 32), mode="bicubic").clamp(0, 1)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corruption_is_a_function_of_seed_and_example_and_grows(name):
    """Other images each time, or a severity 4 milder than 3, would make two models' numbers incomparable."""
    x = smooth_images()
    kept = x.clone()
    results = [corrupt(x, name, s, seed=5) for s in range(1, 6)]
    assert torch.equal(x, kept)
    for images in results:
        assert images.shape == x.shape
        assert images.isfinite().all()
        assert images.min() >= 0
        assert images.max() <= 1
    assert torch.equal(results[2], corrupt(x, name, 3, seed=5))
    # a convolution over other groups may sum in another order: 1e-6 is 8 roundings of a value of at most 1
    torch.testing.assert_close(
        corrupt(x[9:11], name, 3, places=[9, 10], seed=5), results[2][9:11], rtol=0, atol=1e-6
    )
    distance = [float((images - x).square().mean()) for images in results]
    assert distance[0] > 0
    if name == "saturate":  # severities 1 and 2 take colour away, 3 to 5 add it
        assert distance[0] < distance[1]
        assert distance[2] < distance[3] < distance[4]
    elif name == "pixelate":  # 28 of 32 pixels fall into a pattern of 8 to 7, which loses more than 27 do
        assert distance[0] < distance[2] < distance[3] < distance[4]
    else:
        assert distance == sorted(distance)
    is_random = name in ("gaussian_noise", "shot_noise", "impulse_noise", "motion_blur", "fog")
    assert torch.equal(corrupt(x, name, 3, seed=6), results[2]) != is_random
    twice = corrupt(x[:1].repeat(2, 1, 1, 1), name, 3, seed=5)
    assert torch.equal(twice[0], twice[1]) != is_random  # each example has numbers of its own


def test_constants_do_what_they_say():
    """Each corruption has a fact that can be computed by hand."""
    x = smooth_images(200)
    gray = torch.full_like(x, 0.5)
    noise = corrupt(gray, "gaussian_noise", 5) - gray
    num = noise.numel()
    # 614,400 values: the standard error of a standard deviation c is c / sqrt(2n), four of them
    assert abs(float(noise.std()) - 0.10) < 4 * 0.10 / np.sqrt(2 * num)
    shot = corrupt(gray, "shot_noise", 5)
    # Poisson(25)/50, cut at 1 (6e-6 of them)
    assert abs(float(shot.var()) - 0.5 / 50) < 5 * 0.5 / 50 * np.sqrt(2 / num) + 1e-4
    share = float((corrupt(gray, "impulse_noise", 5) != 0.5).float().mean())
    assert abs(share - 0.07) < 4 * np.sqrt(0.07 * 0.93 / num)
    torch.testing.assert_close(corrupt(gray, "brightness", 2), gray + 0.1)
    flat = corrupt(x, "contrast", 5)
    torch.testing.assert_close(flat.std((2, 3)), 0.15 * x.std((2, 3)), rtol=1e-3, atol=1e-5)
    for name in ("defocus_blur", "gaussian_blur", "motion_blur", "zoom_blur", "pixelate", "contrast"):
        # kernels sum to one, also at the border
        torch.testing.assert_close(corrupt(gray, name, 5), gray, msg=name)
    top = 2 / 3 * 1.5  # fog: (0.5 + 1.5 p) 0.5 / (0.5 + 1.5), p from 0 to 1
    fog = corrupt(gray, "fog", 5)
    assert float(fog.min()) >= 0.125 - 1e-6
    torch.testing.assert_close(fog.amax((1, 2, 3)), torch.full((200,), 0.5), rtol=0, atol=1e-6 * top)
    torch.testing.assert_close(fog[:, 0], fog[:, 2])


def test_saturation_and_brightness_keep_the_hue():
    """The colour formulas stand in for a conversion to HSV and back."""
    import colorsys

    colours = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
    x = colours[:, :, None, None].expand(-1, -1, 8, 8)
    for name, s, change in (
        ("saturate", 2, lambda h, s, v: (h, 0.1 * s, v)),
        ("saturate", 5, lambda h, s, v: (h, min(1, 2.5 * s + 0.2), v)),
        ("brightness", 5, lambda h, s, v: (h, s, min(1, v + 0.3))),
    ):
        expected = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb))) for rgb in colours.tolist()]
        torch.testing.assert_close(corrupt(x, name, s)[:, :, 0, 0], torch.tensor(expected), rtol=0, atol=1e-5)
    gray = torch.full((1, 3, 8, 8), 0.5)
    assert corrupt(gray, "saturate", 5)[0, :, 0, 0].tolist() == pytest.approx([0.5, 0.4, 0.4])


def test_pixels_and_jpegs_are_pillows():
    """The authors use Pillow's box filter and JPEG: an average or a shift would be another image."""
    from io import BytesIO

    levels = (smooth_images(4) * 255).round().to(torch.uint8)
    for s, c, quality in ((1, 0.95, 80), (4, 0.75, 50), (5, 0.65, 40)):
        for image in levels:
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            small = picture.resize((int(32 * c), int(32 * c)), Image.Resampling.BOX)
            expected = torch.tensor(np.array(small.resize((32, 32), Image.Resampling.BOX))).permute(2, 0, 1)
            # Pillow rounds to 8 bits after each of its two passes down: at most one level in all
            assert (255 * corrupt(image[None] / 255, "pixelate", s)[0] - expected).abs().max() <= 1.01
            file = BytesIO()
            picture.save(file, "JPEG", quality=quality)
            expected = torch.tensor(np.array(Image.open(file))).permute(2, 0, 1)
            assert torch.equal(
                (255 * corrupt(image[None] / 255, "jpeg", s)[0]).round().to(torch.uint8), expected
            )


def test_gray_images_get_every_corruption_they_can_have():
    """Digits have one channel and eight pixels a side: paddings and conversions must not stop there."""
    x = smooth_images(3)[:, :1, :8, :8]
    with pytest.raises(ValueError, match="'saturate' of images with 1 channels"):
        corrupt(x, "saturate", 1)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).eval()
    result = run(model, x, torch.arange(3), attacks=(), corruptions="all")
    assert len(result.corrupted) == 5 * (len(CORRUPTIONS) - 1)
    assert 0 <= result.corrupted_accuracy() <= 1
    flags = model(corrupt(x, "fog", 4)).argmax(1) == torch.arange(3)
    assert torch.equal(result.corrupted["fog", 4], flags)


# Intervals and tests


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (3, 3), (2, 9), (40, 61), (700, 811)])
def test_mcnemar_is_the_exact_binomial_test(counts):
    """The chi-square form is wrong where few examples differ, which is where it matters."""
    b, c = counts
    a_flags = torch.tensor([True] * b + [False] * c + [True, True, False])
    b_flags = torch.tensor([False] * b + [True] * c + [True, True, False])
    expected = scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    result = mcnemar(a_flags, b_flags)
    assert (result.only_a, result.only_b) == counts
    assert result.p_value == pytest.approx(expected, rel=1e-10)


def test_the_bootstrap_interval_is_the_normal_one_for_many_values():
    """A quantile of the wrong side or a resample of the wrong size would change its length."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 10
    low, high = bootstrap_interval(values, num_resamples=4000, seed=1)
    half = 1.96 * float(values.std()) / 20
    # standard error of a 2.5 % quantile of 4000 means: sqrt(.025 .975 / 4000) / phi(1.96) = 0.042 sigma; four
    assert low == pytest.approx(float(values.mean()) - half, abs=4 * 0.042 * half / 1.96)
    assert high == pytest.approx(float(values.mean()) + half, abs=4 * 0.042 * half / 1.96)
    first, again, other = (bootstrap_interval(values, seed=seed) for seed in (1, 1, 2))
    assert first == again != other
    with pytest.raises(ValueError, match="1 of them not finite"):
        bootstrap_interval([1.0, float("nan")])


# Files, tables, comparisons


def test_a_saved_evaluation_is_the_same(tmp_path):
    """Flags outlive the model: unions and comparisons are made of the files."""
    model = small_model()
    x, y = examples(model)
    made = run(
        model,
        x,
        y,
        [LINF, ThreatModel("l2", 0.2)],
        attacks=["pgd-3", "autoattack:apgd-ce"],
        corruptions=["fog", "jpeg"],
    )
    made = Evaluation(**(vars(made) | {"findings": tuple(after(made, 4))}))
    read = Evaluation.load(made.save(tmp_path / "x.npz"))
    assert read.as_dict() == made.as_dict()
    assert read.table() == made.table()
    assert torch.equal(read.worst(), made.worst())
    assert torch.equal(read.labels, y)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as saved:
        assert saved["index"].tolist() == list(range(40))
    places = torch.randperm(40)
    with np.load(Evaluation(**(vars(made) | {"index": places})).save(tmp_path / "y.npz")) as saved:
        assert saved["index"].tolist() == places.tolist()
    assert torch.equal(Evaluation.load(tmp_path / "y.npz").index, places)


@pytest.mark.parametrize(
    "kind", ["text", "empty", "npy", "truncated", "foreign", "list", "keys", "threat", "format"]
)
def test_files_that_are_no_evaluation_are_named(kind, tmp_path):
    """A traceback of zipfile or numpy does not say which file is wrong."""
    path, model = tmp_path / "other.npz", small_model()
    run(model, *examples(model)).save(path)
    headers = {
        "list": "[1]",
        "keys": '{"format": 1}',
        "format": '{"format": 99}',
        "threat": '{"format": 1, "attacks": [1]}',
    }
    if kind in ("text", "empty"):
        path.write_bytes(b"no archive" if kind == "text" else b"")
    elif kind == "npy":
        with path.open("wb") as file:
            np.save(file, np.arange(3))
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    elif kind == "foreign":
        np.savez(path, x=np.arange(3))
    else:
        with np.load(path) as saved:
            np.savez(path, **(dict(saved) | {"header": np.array(headers[kind])}))
    expected = (
        "got format 99; expected 1"
        if kind == "format"
        else r"got another file .*; expected one of Evaluation\.save"
    )
    with pytest.raises(ValueError, match=rf"other\.npz: {expected}"):
        Evaluation.load(path)


def test_the_table_has_a_row_an_attack_and_the_worst_case():
    """What is printed must be the flags' shares with their intervals."""
    model = small_model()
    x, y = examples(model)
    result = run(
        model, x, y, [LINF, ThreatModel("linf", 0.02)], attacks=["pgd-3", "margin-3"], corruptions="fog"
    )
    lines = result.table().splitlines()
    assert len(lines) == 1 + 1 + 2 * 3 + 1 + 1 + 3
    assert lines[1].split() == ["clean", "90.0", "76.9", "to", "96.0", *lines[1].split()[5:]]
    assert lines[4].split()[:4] == ["linf", "0.05", "worst", "case"]
    assert f"{100 * result.robust_accuracy(LINF):.1f}" in lines[4]
    assert len(set(map(len, lines[:3]))) == 1


def test_the_loss_column_is_that_of_attacks_on_the_cross_entropy():
    """Cross-entropy after an attack on the margin, or one restart of ten, is not the maximum it seems."""
    model = small_model()
    x, y = examples(model)
    result = run(model, x, y, attacks=["pgd-3", "margin-3", "dlr-3", "fgsm"])
    losses = {
        line.split()[2]: line.count(" to ") for line in result.table().splitlines() if line.startswith("linf")
    }
    assert losses == {"pgd-3": 2, "margin-3": 1, "dlr-3": 1, "fgsm": 2, "worst": 1}
    assert [row["loss"] is None for row in result.as_dict()["attacks"]] == [False, True, True, False]
    assert "first restart" not in result.table()
    assert "CE, first restart" in run(model, x, y, attacks="pgd-3x2").table()


def test_the_curve_shows_every_share_from_radius_zero():
    """Points on top of another's, or colour alone, hide a method; labels on each other cannot be read."""
    model = small_model()
    x, y = examples(model)
    threats = [ThreatModel("linf", eps / 255) for eps in (0, 1, 2, 3, 4, 16, 32, 64)] + [
        ThreatModel("l2", 0.1)
    ]
    result = run(model, x, y, threats, attacks=["pgd-2", "margin-2"])
    (ax,) = accuracy_curve(result, "linf", "title").axes
    lines = {c.get_label(): c.lines[0] for c in ax.containers}
    assert list(lines) == ["pgd-2", "margin-2", "worst case"]
    radii = np.array([0, *(t.eps for t in threats[1:8])])
    for name, line in lines.items():
        flags = [
            result.worst(t) if name == "worst case" else result.result(t, name).is_robust
            for t in threats[1:8]
        ]
        shares = [100 * float(f.double().mean()) for f in (result.is_clean, *flags)]
        np.testing.assert_allclose(line.get_ydata(), shares)
        assert np.abs(line.get_xdata() - radii).max() < 0.5 / 255  # nearer to its own radius than to the next
    for style in ("get_marker", "get_linestyle"):
        assert len({getattr(line, style)() for line in lines.values()}) == 3
    assert len({float(line.get_xdata()[3]) for line in lines.values()}) == 3
    labels = dict(zip(ax.get_xticks(), (t.get_text() for t in ax.get_xticklabels()), strict=True))
    assert list(labels.values()) == ["0", "16/255", "32/255", "64/255"]
    assert list(labels) == pytest.approx([0, 16 / 255, 32 / 255, 64 / 255])


def test_two_models_are_compared_example_by_example():
    """Overlapping intervals say little about two models on the same images; other images say nothing."""
    model, other = small_model(), small_model()
    with torch.no_grad():
        other[3].bias[0] += 0.3
    x, y = examples(model)
    a = run(model, x, y, [LINF, ThreatModel("l2", 0.2)], attacks=["pgd-3", "margin-3"])
    b = run(other, x, y, [LINF], attacks=["pgd-3", "margin-4"])
    rows = compare(a, b).rows
    assert [row[:2] for row in rows] == [("", "clean"), ("linf 0.05", "pgd-3")]
    assert rows[1][4] == mcnemar(a.result(LINF, "pgd-3").is_robust, b.result(LINF, "pgd-3").is_robust)
    assert [row[1] for row in compare(a, a).rows].count("worst case") == 2
    assert "p (McNemar)" in compare(a, b).table()
    with pytest.raises(ValueError, match="not the same images"):
        compare(a, run(model, x.flip(3), y, LINF))
    with pytest.raises(ValueError, match="not the same images"):
        compare(a, run(model, x[:20], y[:20], LINF))
    with pytest.raises(ValueError, match="expected a shared one"):
        compare(a, run(model, x, y, LINF, attacks="dlr-2"))


# Checks of the model under attack


class Softmax(nn.Module):
    """Probabilities where logits are expected."""

    def __init__(self) -> None:
        super().__init__()
        self.model = small_model()

    def forward(self, x):
        return self.model(x).softmax(1)


class Wrapped(nn.Module):
    """A model with something in front of it."""

    def __init__(self, before, scale=1.0) -> None:
        super().__init__()
        self.model, self.before, self.scale = small_model(), before, scale

    def forward(self, x):
        return self.scale * self.model(self.before(x))


class After(nn.Module):
    """A model with something behind it."""

    def __init__(self, function) -> None:
        super().__init__()
        self.model, self.function = small_model(), function

    def forward(self, x):
        return self.function(self.model(x))


class EverySecondPair:
    """Noise that two passes in a row miss: none in the first two over the checked images, then some."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        return x.flip(3) if self.calls > 4 else x  # passes 1 and 2: to count the classes, and the clean one


def found(model, x=None, y=None, **settings):
    """Return the names of the findings, evaluated nevertheless."""
    good = small_model()
    given = examples(good)
    x, y = (given[0] if x is None else x), (given[1] if y is None else y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)
        result = run(model, x, y, preflight="warn", **settings)
    return {finding.name: finding.severity for finding in result.findings}


def test_a_sound_model_has_no_findings():
    """A check that always warns is switched off."""
    attacks = ["pgd-5", "pgd-10", "margin-5", "autoattack:apgd-ce"]
    assert found(small_model(), attacks=attacks, threats=[LINF]) == {}


@pytest.mark.parametrize(
    ("model", "name", "severity"),
    [
        (Softmax(), "probabilities", "error"),
        (After(torch.sigmoid), "probabilities", "warning"),
        (After(lambda z: z.log_softmax(1)), "probabilities", "warning"),
        (Wrapped(lambda x: x + 0.1 * torch.randn_like(x)), "randomised", "error"),
        (Wrapped(EverySecondPair()), "randomised", "error"),
        (Wrapped(lambda x: (8 * x).round() / 8), "zero_gradient", "error"),
        (Wrapped(lambda x: x, scale=1e4), "zero_gradient", "warning"),
    ],
)
def test_models_that_fool_attacks_are_noticed(model, name, severity):
    """Each of these has been published as a defence."""
    assert found(model)[name] == severity


def test_attacks_that_do_nothing_are_noticed():
    """Gradients that point nowhere: robust accuracy equals clean accuracy, even within a huge radius."""
    shattered = Wrapped(lambda x: x.detach() - 1e-3 * (x - x.detach()))  # the gradient leads the wrong way
    shattered.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4)).eval()
    with torch.no_grad():
        shattered.model[1].weight.zero_()
        shattered.model[1].bias.zero_()
        shattered.model[1].weight[0, :96], shattered.model[1].weight[1, 96:] = 1.0, 1.0
    x = torch.full((20, 3, 8, 8), 0.5)
    x.flatten(1)[:10, :96] += 0.2
    x.flatten(1)[10:, 96:] += 0.2
    y = torch.tensor([0] * 10 + [1] * 10)
    findings = found(shattered, x, y)
    assert findings["huge_radius"] == "warning"
    assert findings["no_effect"] == "warning"


def test_no_path_to_the_image_and_broken_outputs_are_errors():
    """autograd's own message does not say what is wrong with the model."""
    with pytest.raises(ValueError, match="preflight: no_gradient: "):
        run(Wrapped(lambda x: x.detach()), *examples(small_model()), preflight="raise")
    with pytest.raises(ValueError, match="preflight: not_finite: "):
        run(Wrapped(lambda x: x / 0), *examples(small_model()), preflight="raise")
    with pytest.raises(ValueError, match="preflight: gradient_not_finite: "):
        run(Wrapped(lambda x: (x - x).sqrt() + x), *examples(small_model()), preflight="raise")
    x, y = examples(small_model())
    with pytest.raises(ValueError, match="preflight: images_outside_box: got images from"):
        run(small_model(), 2 * x - 1, y, preflight="raise")


def test_train_mode_and_chance_are_mentioned():
    """Accuracies of a model in train mode are others; labels that are shifted look like a robust failure."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(192, 4)).train()
    x = torch.rand(40, 3, 8, 8)
    y = (model.eval()(x).argmax(1) + 1) % 4
    assert found(model.train(), x, y).keys() >= {"train_mode", "chance"}
    assert model.training
    assert "train_mode" not in found(model.eval(), x, y)
    # nothing in it depends on the mode
    assert "train_mode" not in found(nn.Sequential(nn.Flatten(), model[2]).train(), x, y)


def test_checks_leave_batch_statistics_alone():
    """One pass in train mode moves the running statistics: checked and unchecked, it would be two models."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.Flatten(), nn.Linear(144, 4)
    ).train()
    x = torch.rand(40, 3, 8, 8)
    y = model.eval()(x).argmax(1)
    model.train()
    with pytest.warns(PreflightWarning, match="train_mode"):
        checked = run(model, x, y, preflight="raise")
    plain = run(model, x, y)
    assert checked.clean_accuracy == 1
    assert torch.equal(checked.clean_losses, plain.clean_losses)
    assert torch.equal(checked.attacks[0].losses, plain.attacks[0].losses)
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def result(attack: str, num: int, threat: ThreatModel = LINF, **parts) -> AttackResult:
    """A hundred examples of which the first ``num`` survive."""
    return AttackResult(threat, attack, torch.arange(100) < num, torch.full((100,), torch.nan), **parts)


@pytest.mark.parametrize(
    ("results", "names"),
    [
        ([result("pgd-10", 40), result("pgd-50", 60)], {"stronger_is_weaker"}),
        ([result("pgd-10", 60), result("pgd-50", 40)], set()),
        ([result("pgd-10", 40), result("pgd-50", 42)], set()),  # chance
        ([result("pgd-10", 40), result("margin-50", 60)], set()),  # another loss
        ([result("pgd-10x2", 40), result("pgd-50", 60)], set()),  # neither includes the other
        ([result("pgd-10", 40), result("autoattack", 60)], {"stronger_is_weaker"}),
        ([result("pgd-10", 40), result("autoattack:square", 60)], set()),
        ([result("pgd-10", 40), result("pgd-10", 60, ThreatModel("linf", 0.1))], {"stronger_is_weaker"}),
        ([result("pgd-10", 90)], {"no_effect"}),
        ([result("pgd-10", 90, ThreatModel("linf", 0.0))], set()),
        ([result("pgd-10", 50, furthest=0.06)], {"outside_ball"}),
        ([result("autoattack", 40, after={"apgd-ce": 0.5, "square": 0.4})], {"square_helps"}),
        ([result("autoattack", 40, after={"apgd-ce": 0.41, "square": 0.4})], set()),
    ],
)
def test_results_that_contradict_each_other_are_noticed(results, names):
    """The sanity checks of Carlini et al. 2019: a stronger attack is no weaker, a larger ball no safer."""
    evaluation = Evaluation(torch.zeros(100).long(), torch.arange(100) < 90, torch.zeros(100), tuple(results))
    assert {finding.name for finding in after(evaluation, 10)} == names


def test_findings_raise_warn_or_are_not_looked_for():
    """Meaningless numbers stop before the attack; doubtful ones must be seen and kept in the file."""
    x, y = examples(small_model())
    with pytest.raises(ValueError, match=r"preflight: probabilities: .*Remove the softmax"):
        run(Softmax(), x, y, preflight="raise")
    with pytest.warns(PreflightWarning, match="probabilities"):
        assert run(Softmax(), x, y, preflight="warn").findings[0].name == "probabilities"
    assert run(Softmax(), x, y, preflight="off").findings == ()
