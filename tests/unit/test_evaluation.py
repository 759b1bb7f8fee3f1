"""Evaluations: names, flags, restarts, corruptions, checks of the model, files, tables and comparisons."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
from PIL import Image
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.evaluation import (
    COMMON,
    AttackResult,
    Corruptions,
    Evaluation,
    PreflightWarning,
    bootstrap_interval,
    compare,
    evaluate,
    mcnemar,
    parse_attack,
)
from wcitrain.evaluation.autoattack import EnsemblePlan
from wcitrain.evaluation.checks import check_results
from wcitrain.evaluation.plans import GradientPlan
from wcitrain.report.figures import accuracy_curve
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
    settings = {"preflight": "off", "attacks": "pgd-5"} | settings
    return evaluate(model, [(x, y)], threats, **settings)


# Names


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("fgsm", GradientPlan("fgsm", "ce", 1)),
        ("pgd-20x1", GradientPlan("pgd-20", "ce", 20)),
        ("pgd-50x10", GradientPlan("pgd-50x10", "ce", 50, 10)),
        ("cw-100x5", GradientPlan("margin-100x5", "margin", 100, 5)),
        ("dlr-20", GradientPlan("dlr-20", "dlr", 20)),
        ("autoattack", EnsemblePlan("autoattack")),
        ("autoattack-rand", EnsemblePlan("autoattack-rand", "rand")),
        ("autoattack:square+fab", EnsemblePlan("autoattack:square+fab", components=("square", "fab"))),
    ],
)
def test_a_name_stands_for_one_attack(name, plan):
    """The name is what a table prints; two attacks under one name cannot be told apart."""
    assert parse_attack(name) == plan


@pytest.mark.parametrize(
    "name", ["pgd", "pgd-0", "pgd-20x0", "autoattack:", "autoattack:pgd", "autoattack:fab+fab"]
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


def test_an_example_that_any_restart_broke_is_broken():
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
    torch.testing.assert_close(result.losses, losses[0])  # of the first restart
    shares = list(result.after.values())
    assert shares == [float(torch.stack(survives[: k + 1]).all(0).double().mean()) for k in range(6)]
    assert shares[0] > shares[5]
    by_loss = torch.stack(survives).gather(0, torch.stack(losses).argmax(0)[None])[0]
    assert int(by_loss.sum()) > int(result.is_robust.sum())  # the case was met


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
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(144, 4)
    model = nn.Sequential(*layers)
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
    run(model, x, y, attacks=["pgd-2x2", "autoattack:fab-t"])
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
        result = run(Broken(value), x, y, attacks=["pgd-2", "fgsm"])
        for flags in (result.is_clean, *(r.is_robust for r in result.attacks)):
            assert torch.equal(flags, ~bad)
        with pytest.raises(ValueError, match=r"preflight: not_finite: .* on 10 of 40 clean images"):
            run(Broken(value), x, y, preflight="raise", batch_size=30)
        assert "not_finite" in found(Broken(value), x, y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attacks": "pgd"}, "attacks: got 'pgd'"),
        ({"attacks": "dlr-2", "model": small_model(2)}, "dlr: got 2 classes; expected at least 3"),
        ({"threats": ()}, "threats: got none"),
        (
            {"threats": "linf"},
            "threats: got 'linf'; expected a ThreatModel, or several",
        ),
        ({"num_examples": 0}, "num_examples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"data": []}, "got no images"),
        ({"data": [(torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2).long())]}, "Divide levels by 255"),
        (
            {"data": [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]))]},
            "labels 0 to 4 for a model of 4 classes",
        ),
        ({"model": small_model().double()}, "parameters in torch.float64"),
        ({"model": nn.Flatten(2)}, r"got shape \(2, 3, 64\) .*for 2 images"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change, message):
    """Hours later is too late, and a wrong label or precision is not seen in a number."""
    data = [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]
    settings = {"model": small_model(), "data": data, "threats": LINF, "attacks": "pgd-2"}
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(**(settings | {"preflight": "off"} | change))


def test_a_missing_package_is_named(monkeypatch):
    """An ImportError in the middle of an evaluation does not say which extra to install."""
    import sys

    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "wcitrain\[eval\]"'):
        run(small_model(), torch.rand(2, 3, 8, 8), torch.zeros(2).long(), attacks="autoattack")


# Corruptions: released files


def released(x, y, root, names=("fog", "snow"), layout="arrays", severities=5):
    """Write images in the layout of CIFAR-10-C or of ImageNet-C: darker at every severity."""
    levels = (255 * x).round().byte().permute(0, 2, 3, 1).numpy()
    root.mkdir()
    for name in names:
        images = [(levels * (1 - 0.15 * s)).astype(np.uint8) for s in range(severities)]
        if layout == "arrays":
            np.save(root / f"{name}.npy", np.concatenate(images))
            np.save(root / "labels.npy", np.tile(y.numpy(), severities))
            continue
        for s, part in enumerate(images):
            for k, (image, label) in enumerate(zip(part, y.tolist(), strict=True)):
                folder = root / name / str(s + 1) / f"n{label}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(folder / f"ILSVRC2012_val_{k:08}.png")
    return root


def eight_bit_examples(num=40):
    model = small_model()
    x = (255 * examples(model, num)[0]).round() / 255
    y = model(x).argmax(1)
    y[:4] = torch.arange(4)  # every class
    return model, x, y


@pytest.mark.parametrize("layout", ["arrays", "folders"])
def test_corrupted_images_are_those_of_the_files_at_the_examples_places(layout, tmp_path):
    """Another severity, order or scale would be another benchmark under its name."""
    model, x, y = eight_bit_examples()
    order = torch.arange(40) if layout == "arrays" else y.sort(stable=True).indices  # folders go by class
    root = released(x, y, tmp_path / "C", layout=layout)
    places = torch.tensor([7, 3, 30, 12, 21])
    here = order[places]
    corruptions = replace(Corruptions.find(root, ["snow", "fog"]), places=places)
    result = run(model, x[here], y[here], attacks=(), corruptions=corruptions, batch_size=2)
    assert list(result.corrupted) == [(name, s) for name in ("snow", "fog") for s in range(1, 6)]
    assert torch.equal(result.corrupted["fog", 1], result.is_clean)  # as they were
    for s in range(5):
        darker = ((255 * x[here]).round() * (1 - 0.15 * s)).double().add(1e-9).floor().float() / 255
        assert torch.equal(result.corrupted["fog", s + 1], model(darker).argmax(1) == y[here])
    whole = run(model, x[order], y[order], attacks=(), corruptions=Corruptions.find(root, "fog"))
    assert torch.equal(whole.corrupted["fog", 4][places], result.corrupted["fog", 4])
    flags = torch.stack(list(whole.corrupted.values())).double()
    assert whole.corrupted_accuracy() == pytest.approx(float(flags.mean()), rel=1e-12)


def test_all_corruptions_are_the_fifteen_of_the_benchmark(tmp_path):
    """A mean with the four extra ones in it, or over those that happen to be there, is another number."""
    _, x, y = eight_bit_examples(4)
    root = released(x, y, tmp_path / "C", (*COMMON, "spatter"))
    assert Corruptions.find(root).names == COMMON
    assert len(COMMON) == 15
    assert Corruptions.find(root, ["spatter", "fog"]).names == ("spatter", "fog")
    (root / "frost.npy").unlink()
    with pytest.raises(
        ValueError, match=r"corruptions: got frost; expected some of what .*C has whole: bright"
    ):
        Corruptions.find(root)
    with pytest.raises(ValueError, match="got all fog; expected all alone"):
        Corruptions.find(root, ["all", "fog"])
    folders = released(x, y, tmp_path / "D", layout="folders", severities=4)
    for incomplete in (tmp_path / "none", folders):
        with pytest.raises(ValueError, match=r"has whole: nothing\. CIFAR-10-C .*zenodo"):
            Corruptions.find(incomplete, "fog")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, y, root: (x, (y + 1) % 4), "with other labels; expected the whole test set in order"),
        (lambda x, y, root: (torch.cat([x, x]), torch.cat([y, y])), "got fog of 40 images .* other labels"),
        (lambda x, y, root: (x[:, :, :4], y), r"of shape \(3, 8, 8\); expected \(3, 4, 8\)"),
        (lambda x, y, root: np.save(root / "labels.npy", y.numpy()) or (x, y), r"labels \[5 M\], five"),
        (lambda x, y, root: np.save(root / "fog.npy", x.numpy()) or (x, y), "got float32"),
    ],
)
def test_files_of_other_images_are_refused(change, message, tmp_path):
    """Images that do not belong to the labels give an accuracy, too."""
    _, x, y = eight_bit_examples()
    root = released(x, y, tmp_path / "C")
    x, y = change(x, y, root)
    model = nn.Sequential(nn.Flatten(), nn.Linear(x[0].numel(), 4))
    with pytest.raises(ValueError, match=message):
        run(model, x, y, attacks=(), corruptions=Corruptions.find(root, "fog"))


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
    with pytest.raises(ValueError, match="got 1 values that are not finite"):
        bootstrap_interval([1.0, float("nan")])


# Files, tables, comparisons


def test_a_saved_evaluation_is_the_same(tmp_path):
    """Flags outlive the model: unions and comparisons are made of the files."""
    model, x, y = eight_bit_examples()
    corruptions = Corruptions.find(released(x, y, tmp_path / "C"), ["fog", "snow"])
    threats, attacks = [LINF, ThreatModel("l2", 0.2)], ["pgd-3", "autoattack:apgd-ce"]
    made = run(model, x, y, threats, attacks=attacks, corruptions=corruptions)
    made = replace(made, findings=tuple(check_results(made, 4)))
    read = Evaluation.load(made.save(tmp_path / "x.npz"))
    assert read.as_dict() == made.as_dict()
    assert read.table() == made.table()
    assert torch.equal(read.worst(), made.worst())
    assert torch.equal(read.labels, y)
    assert read.index.tolist() == list(range(40))
    places = torch.randperm(40)
    assert torch.equal(Evaluation.load(replace(made, index=places).save(tmp_path / "y.npz")).index, places)


@pytest.mark.parametrize("kind", ["text", "truncated", "keys", "format"])
def test_files_that_are_no_evaluation_are_named(kind, tmp_path):
    """A traceback of zipfile or numpy does not say which file is wrong."""
    path, model = tmp_path / "other.npz", small_model()
    run(model, *examples(model)).save(path)
    expected = r"got another file .*; expected one of Evaluation\.save"
    if kind == "text":
        path.write_bytes(b"no archive")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-200])
    else:
        expected = "got format 99; expected 1" if kind == "format" else expected
        with np.load(path) as saved:
            header = '{"format": 1}' if kind == "keys" else '{"format": 99}'
            np.savez(path, **(dict(saved) | {"header": np.array(header)}))
    with pytest.raises(ValueError, match=rf"other\.npz: {expected}"):
        Evaluation.load(path)


def test_the_table_has_a_row_an_attack_and_the_worst_case():
    """What is printed must be the flags' shares with their intervals."""
    model = small_model()
    x, y = examples(model)
    result = run(model, x, y, [LINF, ThreatModel("linf", 0.02)], attacks=["pgd-3", "margin-3"])
    fog = {("fog", s): torch.arange(40) < 8 * (6 - s) for s in (1, 2, 3, 4, 5)}
    lines = replace(result, corrupted=fog).table().splitlines()
    assert len(lines) == 1 + 1 + 2 * 3 + 1 + 1 + 3
    assert lines[-2].split() == ["fog", "100.0", "80.0", "60.0", "40.0", "20.0", "60.0"]
    assert lines[1].split() == ["clean", "90.0", "76.9", "to", "96.0", *lines[1].split()[5:]]
    assert lines[4].split()[:4] == ["linf", "0.05", "worst", "case"]
    assert f"{100 * result.robust_accuracy(LINF):.1f}" in lines[4]
    assert len(set(map(len, lines[:3]))) == 1


def test_the_loss_column_is_that_of_attacks_on_the_cross_entropy():
    """Cross-entropy after an attack on the margin, or one restart of ten, is not the maximum it seems."""
    model = small_model()
    x, y = examples(model)
    result = run(model, x, y, attacks=["pgd-3", "margin-3", "dlr-3", "fgsm"])
    lines = [line for line in result.table().splitlines() if line.startswith("linf")]
    assert [line.count(" to ") for line in lines] == [2, 1, 1, 2, 1]  # intervals; the last is the worst case
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


class Around(nn.Module):
    """A model with something in front of it and something behind it."""

    def __init__(self, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.model, self.before, self.after = small_model(), before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def softmax() -> nn.Module:
    """Return a model with probabilities where logits are expected."""
    return Around(after=lambda z: z.softmax(1))


class EverySecondPair:
    """Noise that two passes in a row miss: none in the first two over the checked images, then some."""

    calls = 0

    def __call__(self, x):
        self.calls += 1
        return x.flip(3) if self.calls > 3 else x  # pass 1 is the clean one


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
        (softmax(), "probabilities", "error"),
        (Around(after=torch.sigmoid), "probabilities", "warning"),
        (Around(after=lambda z: z.log_softmax(1)), "probabilities", "warning"),
        (Around(lambda x: x + 0.1 * torch.randn_like(x)), "randomised", "error"),
        (Around(EverySecondPair()), "randomised", "error"),
        (Around(lambda x: (8 * x).round() / 8), "zero_gradient", "error"),
        (Around(after=lambda z: 1e4 * z), "zero_gradient", "warning"),
    ],
)
def test_models_that_fool_attacks_are_noticed(model, name, severity):
    """Each of these has been published as a defence."""
    assert found(model)[name] == severity


def test_attacks_that_do_nothing_are_noticed():
    """Gradients that point nowhere: robust accuracy equals clean accuracy, even within a huge radius."""
    shattered = Around(lambda x: x.detach() - 1e-3 * (x - x.detach()))  # the gradient leads the wrong way
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
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.Flatten(), nn.Linear(144, 4)
    model = nn.Sequential(*layers)
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
        ([result("pgd-10x2", 40), result("pgd-50", 60)], set()),  # neither includes the other
        ([result("pgd-10", 40), result("autoattack", 60)], {"stronger_is_weaker"}),
        ([result("pgd-10", 40), result("autoattack:square", 60)], set()),
        ([result("pgd-10", 40), result("pgd-10", 60, ThreatModel("linf", 0.1))], {"stronger_is_weaker"}),
        ([result("pgd-10", 90)], {"no_effect"}),
        ([result("pgd-10", 50, furthest=0.06)], {"outside_ball"}),
        ([result("autoattack", 40, after={"apgd-ce": 0.5, "square": 0.4})], {"square_helps"}),
        ([result("autoattack", 40, after={"apgd-ce": 0.41, "square": 0.4})], set()),
    ],
)
def test_results_that_contradict_each_other_are_noticed(results, names):
    """The sanity checks of Carlini et al. 2019: a stronger attack is no weaker, a larger ball no safer."""
    evaluation = Evaluation(torch.zeros(100).long(), torch.arange(100) < 90, torch.zeros(100), tuple(results))
    assert {finding.name for finding in check_results(evaluation, 10)} == names


def test_findings_raise_warn_or_are_not_looked_for():
    """Meaningless numbers stop before the attack; doubtful ones must be seen and kept in the file."""
    x, y = examples(small_model())
    for model, message in (
        (softmax(), "probabilities: .*Remove the softmax"),
        (Around(lambda x: x.detach()), "no_gradient: "),
        (Around(lambda x: x / 0), "not_finite: "),
        (Around(lambda x: (x - x).sqrt() + x), "gradient_not_finite: "),
    ):
        with pytest.raises(ValueError, match=f"preflight: {message}"):
            run(model, x, y, preflight="raise")
    with pytest.raises(ValueError, match="preflight: images_outside_box: got images from"):
        run(small_model(), 2 * x - 1, y, preflight="raise")
    with pytest.warns(PreflightWarning, match="probabilities"):
        assert run(softmax(), x, y, preflight="warn").findings[0].name == "probabilities"
    assert run(softmax(), x, y, preflight="off").findings == ()
