"""Evaluations: names, flags, restarts, corruptions, checks of the model, files, tables and comparisons."""

import sys
import warnings
from argparse import Namespace
from dataclasses import replace
from types import SimpleNamespace

import cheats
import numpy as np
import pytest
import scipy.stats
import torch
from cases import BatchNormNet, assert_same, everything, image_batch
from PIL import Image
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.commands.evaluate import _source
from wcitrain.digest import digest
from wcitrain.evaluation import AttackResult, Corruptions, Evaluation, PreflightWarning, compare, evaluate
from wcitrain.evaluation.accuracy import measure_accuracy
from wcitrain.evaluation.attacking import Victim, stand_ins
from wcitrain.evaluation.checks import check_results, random_squares
from wcitrain.evaluation.corruptions import COMMON
from wcitrain.evaluation.intervals import bootstrap_interval, mcnemar
from wcitrain.evaluation.plans import AdaptivePlan, EnsemblePlan, GradientPlan, parse_attack
from wcitrain.objectives import CatastrophicOverfittingGuard
from wcitrain.params import select_layers
from wcitrain.seeding import generator_from

LINF = ThreatModel("linf", 0.05)
SOFTMAX = nn.Softmax(1)


def small_model(num_classes: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 24), nn.Tanh(), nn.Linear(24, num_classes)).eval()


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


def test_a_name_stands_for_one_attack_and_others_list_what_there_is():
    """The name is what a table prints; a misspelt attack must not be left out."""
    names = {
        "fgsm": GradientPlan("fgsm", "ce", 1),
        "pgd-50x10": GradientPlan("pgd-50x10", "ce", 50, 10),
        "cw-100x5": GradientPlan("margin-100x5", "margin", 100, 5),
        "dlr-20x1": GradientPlan("dlr-20", "dlr", 20),
        "apgd-t": AdaptivePlan("apgd-t-100", "apgd-t"),
        "apgd-ce-50x5": AdaptivePlan("apgd-ce-50x5", "apgd-ce", 50, 5),
        "autoattack-rand": EnsemblePlan("autoattack-rand", "rand"),
        "autoattack:square+fab": EnsemblePlan("autoattack:square+fab", components=("square", "fab")),
    }
    assert {name: parse_attack(name) for name in names} == names
    for name in (
        "pgd",
        "pgd-0",
        "pgd-20x0",
        "apgd",
        "apgd-t-0",
        "apgd-tx2",
        "autoattack:",
        "autoattack:fab+fab",
    ):
        with pytest.raises(ValueError, match=r"expected fgsm; pgd-STEPS.*apgd-ce\+apgd-dlr"):
            parse_attack(name)


def test_flags_are_those_of_the_attack_run_one_example_at_a_time():
    """The stages unroll ``Attack``: from the same start they must end at the same image in any batch."""
    model = small_model()
    x, y = examples(model, 12)
    for threat in (LINF, ThreatModel("l2", 0.4), ThreatModel("l1", 3.0)):
        attack = Attack(threat, 5, loss="margin")
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
    model = small_model()
    model[1].weight.data.mul_(12)  # anything but linear in the ball: restarts find different things
    x, y = examples(model, 60, 0)
    threat = ThreatModel("linf", 0.1)
    result = run(model, x, y, threat, attacks="pgd-1x6").attacks[0]
    survives, losses, one = [], [], Attack(threat, 1, 0.25)
    for restart in range(6):
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


def test_later_l1_restarts_come_from_wider_balls():
    """PGD's own find the same coordinates again: of digits at 32 pixels they left 2 points more than APGD."""
    model, (x, y), ball = cheats.honest(), cheats.digits(20), ThreatModel("l1", 3.0)
    victim, places = Victim(model, x, y), torch.arange(20)

    def restarts(name):
        return [stage.attack(x, y, places) for stage in parse_attack(name).stages(victim, ball)]

    for name, other in (("pgd-6", "apgd-ce-6x2"), ("dlr-6", "apgd-dlr-6x2")):
        first, second = restarts(f"{name}x2")
        assert torch.equal(first, restarts(name)[0])
        assert torch.equal(second, restarts(other)[1])
        assert not torch.equal(first, restarts(other)[0])


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
        return modes, grads, digest([*model.state_dict().values(), torch.get_rng_state()])

    def stop(*_):
        raise KeyboardInterrupt

    before = state()
    run(model, x, y, attacks=["pgd-2x2", "autoattack:fab-t"])
    hook = model[3].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(model, x, y)
    hook.remove()
    assert state() == before


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
        ({"num_examples": 0}, "got num_examples=0"),
        ({"batch_size": 0}, "batch_size=0; expected at least 1"),
        ({"data": [(torch.zeros(2, 3, 8, 8).byte(), torch.zeros(2).long())]}, "Divide levels by 255"),
        ({"data": [(torch.zeros(2, 3, 8, 8), torch.tensor([0, 4]))]}, r"outputs \(2, 4\) .*labels 0 to 4"),
        ({"model": small_model().double()}, "parameters in torch.float64"),
        ({"model": nn.Flatten(2)}, r"got outputs \(2, 3, 64\) for 2 images"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(change, message):
    """Hours later is too late, and a wrong label or precision is not seen in a number."""
    data = [(torch.zeros(2, 3, 8, 8), torch.zeros(2).long())]
    settings = {"model": small_model(), "data": data, "threats": LINF, "attacks": "pgd-2"}
    with pytest.raises(ValueError, match=message):
        evaluate(**(settings | {"preflight": "off"} | change))


def test_a_missing_package_is_named(monkeypatch):
    """An ImportError in the middle of an evaluation does not say which extra to install."""
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "wcitrain\[eval\]"'):
        run(small_model(), torch.rand(2, 3, 8, 8), torch.zeros(2).long(), attacks="autoattack")


def released(x, y, root, names=("fog", "snow"), layout="arrays", severities=5):
    """Write images in the layout of CIFAR-10-C or of ImageNet-C: darker at every severity."""
    levels = (255 * x).round().byte().permute(0, 2, 3, 1).numpy()
    images = [(levels * (1 - 0.15 * s)).astype(np.uint8) for s in range(severities)]
    root.mkdir()
    np.save(root / "labels.npy", np.tile(y.numpy(), severities))
    for name in names:
        if layout == "arrays":
            np.save(root / f"{name}.npy", np.concatenate(images))
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
    assert (Corruptions.find(root).names, len(COMMON)) == (COMMON, 15)
    assert Corruptions.find(root, ["spatter", "fog"]).names == ("spatter", "fog")
    (root / "frost.npy").unlink()
    with pytest.raises(ValueError, match=r"corruptions: got frost; .* some of what .*C has whole: bright"):
        Corruptions.find(root)
    folders = released(x, y, tmp_path / "D", layout="folders", severities=4)
    with pytest.raises(ValueError, match=r"has whole: nothing\. CIFAR-10-C .*zenodo"):
        Corruptions.find(folders, "fog")


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


@pytest.mark.parametrize("counts", [(0, 0), (1, 0), (3, 3), (2, 9), (40, 61), (700, 811)])
def test_mcnemar_is_the_exact_binomial_test(counts):
    """The chi-square form is wrong where few examples differ, which is where it matters."""
    b, c = counts
    a_flags = torch.tensor([True] * b + [False] * c + [True, True, False])
    b_flags = torch.tensor([False] * b + [True] * c + [True, True, False])
    expected = scipy.stats.binomtest(b, b + c, 0.5).pvalue if b + c else 1.0
    assert mcnemar(a_flags, b_flags) == (*counts, pytest.approx(expected, rel=1e-10))


def test_the_bootstrap_interval_is_the_normal_one_for_many_values():
    """A quantile of the wrong side or a resample of the wrong size would change its length."""
    values = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 3 + 10
    half = 1.96 * float(values.std()) / 20
    # standard error of a 2.5 % quantile of 2000 means: sqrt(.025 .975 / 2000) / phi(1.96) = 0.06 sigma; four
    ends = [float(values.mean()) + sign * half for sign in (-1, 1)]
    assert bootstrap_interval(values) == pytest.approx(ends, abs=4 * 0.06 * half / 1.96)


def test_a_saved_evaluation_is_the_same(tmp_path):
    """Flags outlive the model: unions and comparisons are made of the files."""
    model, x, y = eight_bit_examples()
    corruptions = Corruptions.find(released(x, y, tmp_path / "C"), ["fog", "snow"])
    balls, attacks = [LINF, ThreatModel("l2", 0.2)], ["pgd-3", "autoattack:apgd-ce"]
    made = run(model, x, y, balls, attacks=attacks, corruptions=corruptions)
    made = replace(made, findings=tuple(check_results(made, 4)), index=torch.randperm(40))
    read = Evaluation.load(made.save(tmp_path / "x.npz"))
    assert read.as_dict() == made.as_dict()
    assert read.table() == made.table()
    assert_same(read.corrupted, made.corrupted)
    for kind in ("labels", "is_clean", "clean_losses", "index"):
        assert torch.equal(getattr(read, kind), getattr(made, kind))
    assert torch.equal(read.worst(), made.worst())
    first = Evaluation.load(replace(made, index=None).save(tmp_path / "y.npz"))
    assert first.index.tolist() == list(range(40))


@pytest.mark.parametrize("kind", ["truncated", "keys"])
def test_files_that_are_no_evaluation_are_named(kind, tmp_path):
    """A traceback of zipfile or numpy does not say which file is wrong."""
    path = run(small_model(), *examples(small_model())).save(tmp_path / "other.npz")
    path.write_bytes(path.read_bytes()[:-200])
    if kind == "keys":
        np.savez(path, header=np.array('{"format": 1}'))
    with pytest.raises(ValueError, match=r"other\.npz: got another .*; expected one of Evaluation\.save"):
        Evaluation.load(path)


def test_the_table_has_a_row_an_attack_and_the_worst_case():
    """What is printed must be the flags' shares, and a loss only where the attack raised it."""
    model = small_model()
    x, y = examples(model)
    attacks = ["pgd-3", "margin-3", "dlr-3", "fgsm"]
    result = run(model, x, y, [LINF, ThreatModel("linf", 0.02)], attacks=attacks)
    fog = {("fog", s): torch.arange(40) < 8 * (6 - s) for s in (1, 2, 3, 4, 5)}
    lines = replace(result, corrupted=fog).table().splitlines()
    assert len(lines) == 1 + 1 + 2 * 5 + 1 + 1 + 3
    assert lines[-2].split() == ["fog", "100.0", "80.0", "60.0", "40.0", "20.0", "60.0"]
    assert lines[1].split()[:5] == ["clean", "90.0", "76.9", "to", "96.0"]
    assert lines[6].split()[:4] == ["linf", "0.05", "worst", "case"]
    assert f"{100 * result.robust_accuracy(LINF):.1f}" in lines[6]
    assert len(set(map(len, lines[:3]))) == 1
    assert [line.count(" to ") for line in lines[2:7]] == [2, 1, 1, 2, 1]  # intervals; the last: worst case
    assert [row["loss"] is None for row in result.as_dict()["attacks"][:4]] == [False, True, True, False]
    assert "first restart" not in result.table()
    assert "CE, first restart" in run(model, x, y, attacks="pgd-3x2").table()


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
    assert rows[1][4:] == mcnemar(a.result(LINF, "pgd-3").is_robust, b.result(LINF, "pgd-3").is_robust)
    assert [row[1] for row in compare(a, a).rows].count("worst case") == 2
    assert "p (McNemar)" in compare(a, b).table()
    for images, labels in ((x.flip(3), y), (x[:20], y[:20])):
        with pytest.raises(ValueError, match="not the same images"):
            compare(a, run(model, images, labels, LINF))
    with pytest.raises(ValueError, match="expected a shared one"):
        compare(a, run(model, x, y, LINF, attacks="dlr-2"))


class Around(nn.Module):
    """A model with something in front of it and something behind it."""

    def __init__(self, before=lambda x: x, after=lambda z: z) -> None:
        super().__init__()
        self.model, self.before, self.after = small_model(), before, after

    def forward(self, x):
        return self.after(self.model(self.before(x)))


def found(model, x=None, y=None, **settings):
    """Return the names of the findings, evaluated nevertheless."""
    x, y = examples(small_model()) if x is None else (x, y)
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
        (Around(after=SOFTMAX), "probabilities", "error"),
        (Around(after=torch.sigmoid), "probabilities", "warning"),
        (Around(lambda x: x + 0.1 * torch.randn_like(x)), "randomised", "error"),
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
    shattered.model = nn.Sequential(nn.Flatten(), nn.Linear(192, 4, bias=False)).eval()
    halves = torch.arange(192) < 96
    with torch.no_grad():
        shattered.model[1].weight.copy_(torch.stack([halves, ~halves, 0 * halves, 0 * halves]))
    y = torch.tensor([0] * 10 + [1] * 10)
    x = 0.5 + 0.2 * torch.stack([halves, ~halves])[y].float().reshape(20, 3, 8, 8)
    findings = found(shattered, x, y)
    assert findings["huge_radius"] == findings["no_effect"] == "warning"


def cheated(name: str, **settings) -> Evaluation:
    """A cheat's evaluation, taken anyway."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)
        model = cheats.honest() if name == "honest" else cheats.cheat(name)
        ball = ThreatModel("linf", cheats.EPS)
        return run(model, *cheats.digits(), ball, **{"attacks": "pgd-20", "preflight": "warn"} | settings)


@pytest.mark.parametrize("name", cheats.NAMED)
def test_every_cheat_is_named_and_its_number_carries_the_name(name, tmp_path):
    """Each prints too high a robust accuracy, or one that depends on the batch; none may stay silent."""
    finding, severity = cheats.NAMED[name]
    if severity == "error":
        with pytest.raises(ValueError, match=f"preflight: .*{finding}"):
            cheated(name, preflight="raise")
    if name == "detached":  # no attack can follow a gradient that is not there: none is taken anyway
        with pytest.raises(ValueError, match=r"preflight: no_gradient.*--bpda MODULE\.$"):
            cheated(name)
        return
    result = cheated(name)
    assert (finding, severity) in {(one.name, one.severity) for one in result.findings}
    assert f"{severity}: {finding}: " in result.table()
    assert finding in {one["name"] for one in result.as_dict()["findings"]}
    assert Evaluation.load(result.save(tmp_path / "x.npz")).findings == result.findings


def test_what_the_cheats_print():
    """The values behind the names: the honest model's 76 %, and what hides it."""
    shares = {name: cheated(name).robust_accuracy() for name in ("honest", "flipped", "partial", "wavy")}
    assert shares["honest"] < 0.8
    assert min(shares[name] for name in ("flipped", "partial", "wavy")) > 0.9
    by_size = [cheated("batch", batch_size=size).robust_accuracy() for size in (200, 8)]
    assert by_size[0] - by_size[1] > 0.02


class Attending(nn.Module):
    """A vision transformer of one block on patches of four pixels, or in bfloat16 any other model."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 16, 2, 2)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, 0.0, "gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        return self.head(self.block(self.patches(x).flatten(2).mT).mean(1))


class InBfloat16(nn.Module):
    def __init__(self, model) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x).float()


def net(*layers, scale=1.0, steps=30):
    """A network trained on digits for a moment, its logits times ``scale``."""
    torch.manual_seed(0)
    model, (x, y) = nn.Sequential(*layers), cheats.digits(300)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    for p in model[-1].parameters():
        p.data *= scale
    return model.eval()


def convolutional(activation=nn.ReLU, **settings):
    layers = nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), activation(), nn.MaxPool2d(2), nn.Flatten()
    return net(*layers, nn.Linear(72, 10), **settings)


HONEST = {
    "ReLU": lambda: net(nn.Flatten(), nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10)),
    "BatchNorm": convolutional,
    "GELU": lambda: convolutional(nn.GELU),
    "attention": lambda: net(Attending(), nn.Identity()),
    "nearly perfect": lambda: convolutional(steps=80, scale=4.0),
    "bfloat16": lambda: InBfloat16(convolutional()),
    "attention in bfloat16": lambda: InBfloat16(net(Attending(), nn.Identity())),
    "straight through": lambda: cheats.Cheat(
        cheats.honest(), cheats.Part(lambda x: x + ((255 * x).round() / 255 - x).detach())
    ),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_models_have_no_findings(name):
    """Kinks, curvature, rounding, saturation and tiny radii are no cheating: false alarms cost trust."""
    model, (x, y) = HONEST[name](), cheats.digits()
    for num, eps, batch_size in ((60, 0.1, 60), (32, 0.1, 16), (16, 1e-5, 16)):
        settings = {"threats": ThreatModel("linf", eps), "batch_size": batch_size}
        names = found(model, x[:num], y[:num], attacks=["pgd-20", "margin-20"], **settings)
        assert names.keys() <= ({"no_effect"} if eps < 0.1 else set())


def test_the_gradient_behind_eot_is_the_mean_of_its_draws():
    """One draw more or less, or a mean of logits, would be another attack."""
    model, (x, y) = cheats.cheat("noise").eval(), cheats.digits(6)
    loss = nn.functional.cross_entropy

    def one(images):
        return loss(model(images), y, reduction="none")

    images = x.clone().requires_grad_()
    torch.manual_seed(3)
    draws = [one(images) for _ in range(5)]
    expected = torch.stack(draws).mean(0).detach(), torch.autograd.grad(sum(draws).sum(), images)[0] / 5
    torch.manual_seed(3)
    mean = Victim(model, x, y, eot=5).expected(one)(images)
    torch.testing.assert_close(mean.detach(), expected[0])
    torch.testing.assert_close(torch.autograd.grad(mean.sum(), images)[0], expected[1])
    torch.manual_seed(3)
    assert torch.equal(mean.detach(), Victim(model, x, y, eot=5).expected(one)(x))  # without autograd
    assert Victim(model, x, y).expected(one) is one


def test_eot_breaks_what_single_draws_leave():
    """The fix that the finding names must be one; the package's attack has it, too."""
    with pytest.raises(ValueError, match=r"randomised: .*use --eot \d+\. \("):
        cheated("noise", preflight="raise")
    single, mean = (cheated("noise", attacks="pgd-10", eot=eot) for eot in (1, 16))
    assert mean.robust_accuracy() < single.robust_accuracy() - 0.05
    assert [(one.name, one.severity) for one in mean.findings] == [("randomised", "warning")]
    assert (mean.attacks[0].attack, mean.settings["eot"]) == ("pgd-10 eot-16", 16)
    assert "eot_without_noise" in {one.name for one in cheated("honest", eot=2).findings}
    victim = Victim(cheats.honest(), *cheats.digits(8), eot=5)
    for name in ("autoattack", "autoattack-rand"):
        adversary = parse_attack(name).stages(victim, LINF)[0].attack.args[0]
        assert adversary.apgd.eot_iter == adversary.apgd_targeted.eot_iter == 5


def test_a_stand_in_changes_gradients_and_no_value():
    """BPDA goes around what has no gradient; a changed output would be another model's robustness."""
    model, (x, _) = cheats.cheat("quantised"), cheats.digits(4)
    plain = model(x)
    images = x.clone().requires_grad_()
    rounded = (16 * x).round() / 16
    inner = rounded.clone().requires_grad_()
    expected = torch.autograd.grad(model.model(inner).square().sum(), inner)[0]
    for parts, factor in ((["front"], 1.0), ({"front": lambda x: 3 * x}, 3.0)):
        with stand_ins(model, parts):
            assert torch.equal(model(images), plain)
            gradient = torch.autograd.grad(model(images).square().sum(), images)[0]
        torch.testing.assert_close(gradient, factor * expected)
    assert not torch.autograd.grad(model(images).square().sum(), images)[0].any()  # taken away again
    with pytest.raises(ValueError, match=r"bpda: got 'font'; expected .*Did you mean front\?"):
        run(model, *cheats.digits(4), bpda=["font"])
    with pytest.raises(ValueError, match=r"bpda: got 'model' with outputs \(4, 10\) and .*\(4, 1, 8, 8\)"):
        run(model, *cheats.digits(4), bpda=["model"])


def test_bpda_breaks_what_rounding_hid():
    """Nobody is robust for having no gradient: around the module is the honest model."""
    for name in ("quantised", "flipped", "detached"):
        result = cheated(name, bpda=["front"], preflight="raise" if name != "flipped" else "warn")
        assert result.robust_accuracy() < 0.82
        assert result.attacks[0].attack == "pgd-20 bpda-front"
        assert result.settings["bpda"] == ["front"]
        assert {one.severity for one in result.findings} <= {"warning"}


def test_images_of_another_model_break_what_masked_gradients_left():
    """The check that needs no gradient of the model at all; on an honest one it finds nothing."""
    result = cheated("wavy", transfer=cheats.honest())
    own, other = (r.is_robust.float().mean() for r in result.attacks)
    assert result.attacks[1].attack.startswith("transfer pgd-20 of ")
    assert other < own - 0.1
    assert "transfer_helps" in {one.name for one in result.findings}
    assert result.robust_accuracy() <= other
    assert cheated("honest", transfer=HONEST["ReLU"]()).findings == ()


@pytest.mark.parametrize("threat", [ThreatModel("linf", 0.1), ThreatModel("l2", 0.8), ThreatModel("l1", 4.0)])
def test_random_squares_stay_in_the_ball_and_raise_the_margin(threat):
    """A search that leaves the ball or the box would call an honest model masked."""
    model, (x, y) = cheats.honest(), cheats.digits()
    with torch.no_grad():
        x_adv = random_squares(Victim(model, x, y), x, y, threat)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[threat.norm]
    lengths = torch.linalg.vector_norm((x_adv - x).flatten(1), order, dim=1)
    assert lengths.max() <= threat.eps * (1 + 1e-5)
    assert lengths.median() > 0.9 * threat.eps
    assert 0 <= x_adv.min() <= x_adv.max() <= 1
    assert (model(x_adv).argmax(1) == y).sum() < (model(x).argmax(1) == y).sum()


def test_an_attack_of_too_few_steps_is_noticed():
    """A number that falls when the steps are doubled is not the attack's, but that of its patience."""
    x, y = cheats.digits()
    model = net(nn.Flatten(), nn.Linear(64, 48), nn.Tanh(), nn.Linear(48, 10), steps=100)
    assert found(model, x, y, threats=ThreatModel("l2", 0.8), attacks="pgd-2")["more_steps"] == "warning"
    assert found(model, x, y, threats=ThreatModel("l2", 0.8), attacks="pgd-40") == {}


@pytest.mark.parametrize(
    ("how", "eps", "epochs", "names"),
    [
        ("FGSM", 0.2, 30, {"targeted_helps"}),
        ("PGD", 0.1, 10, set()),
        pytest.param("TRADES", 0.1, 10, set(), marks=pytest.mark.slow),
        pytest.param("plain", 0.1, 10, set(), marks=pytest.mark.slow),
    ],
)
def test_what_training_against_one_step_hides_is_named_and_honest_models_are_not(how, eps, epochs, names):
    """PGD and margin leave 37 % of the first, of which targeted steps break a sixth; random ones few."""
    settings = {"threats": ThreatModel("linf", eps), "attacks": ["pgd-20", "margin-20"]}
    assert found(cheats.trained(how, eps, epochs), *cheats.digits(400), **settings).keys() == names


def test_a_model_in_train_mode_is_checked_and_measured_in_eval_mode():
    """A pass in train mode moves the running statistics: checked and unchecked, it would be two models."""
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=1.0), nn.Flatten(), nn.Linear(144, 4)
    model, x = nn.Sequential(*layers), torch.rand(40, 3, 8, 8)
    y = model.eval()(x).argmax(1)
    plain, checked = (run(model.train(), x, y, preflight=preflight) for preflight in ("off", "raise"))
    assert model.training
    assert checked.clean_accuracy == 1
    assert torch.equal(checked.attacks[0].losses, plain.attacks[0].losses)
    assert torch.equal(model[1].running_mean, torch.zeros(4))
    assert "chance" in found(model, x, (y + 1) % 4)


def result(attack: str, num: int, threat: ThreatModel = LINF, **parts) -> AttackResult:
    """A hundred examples of which the first ``num`` survive."""
    return AttackResult(threat, attack, torch.arange(100) < num, torch.full((100,), torch.nan), **parts)


@pytest.mark.parametrize(
    ("results", "names"),
    [
        ([result("pgd-10", 40), result("pgd-50", 60)], {"stronger_is_weaker"}),
        ([result("pgd-10", 40), result("pgd-50", 42)], set()),  # chance
        ([result("pgd-10x2", 40), result("pgd-50", 60)], set()),  # neither includes the other
        ([result("pgd-10", 40), result("autoattack", 60)], {"stronger_is_weaker"}),
        ([result("pgd-10", 40), result("autoattack:square", 60)], set()),
        ([result("pgd-10", 40), result("pgd-10", 60, ThreatModel("linf", 0.1))], {"stronger_is_weaker"}),
        ([result("pgd-10", 90)], {"no_effect"}),
        ([result("pgd-10", 50, furthest=0.06)], {"outside_ball"}),
        ([result("autoattack", 40, after={"apgd-ce": 0.5, "square": 0.4})], {"square_helps"}),
    ],
)
def test_results_that_contradict_each_other_are_noticed(results, names):
    """The sanity checks of Carlini et al. 2019: a stronger attack is no weaker, a larger ball no safer."""
    evaluation = Evaluation(torch.zeros(100).long(), torch.arange(100) < 90, torch.zeros(100), tuple(results))
    assert {finding.name for finding in check_results(evaluation, 10)} == names


@pytest.mark.filterwarnings("ignore:targeted_helps")  # of few steps
def test_findings_raise_warn_or_are_not_looked_for():
    """Meaningless numbers stop before the attack; doubtful ones must be seen and kept in the file."""
    x, y = examples(small_model())
    for model, message in (
        (Around(after=SOFTMAX), "probabilities: .*Remove the softmax"),
        (Around(lambda x: x.detach()), "no_gradient: "),
        (Around(lambda x: x / 0), "not_finite: "),
        (Around(lambda x: (x - x).sqrt() + x), "gradient_not_finite: "),
    ):
        with pytest.raises(ValueError, match=f"preflight: {message}"):
            run(model, x, y, preflight="raise")
    with pytest.raises(ValueError, match="preflight: images_outside_box: got images from"):
        run(small_model(), 2 * x - 1, y, preflight="raise")
    assert found(small_model(), 2 * x - 1, y)["images_outside_box"] == "error"  # and evaluates nevertheless
    with pytest.warns(PreflightWarning, match="probabilities"):
        assert run(Around(after=SOFTMAX), x, y, preflight="warn").findings[0].name == "probabilities"
    assert run(Around(after=SOFTMAX), x, y, preflight="off").findings == ()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_evaluations_are_the_same_without_gradients(mode):
    """A notebook evaluates under either; the batches made there are tensors that autograd refuses."""
    torch.manual_seed(0)
    model, ball = BatchNormNet().train(), ThreatModel("linf", 0.1)

    def numbers() -> list[object]:
        x, y = image_batch(40)
        found = evaluate(model, [(x, y)], ball, attacks=("pgd-2", "fgsm"), preflight="off")
        layers = select_layers(model)
        accuracy = measure_accuracy(model, [(x, y, y)], Attack(ball, 2), layers=layers)
        guard = CatastrophicOverfittingGuard()
        guard.check(model, x, y, ball, torch.Generator().manual_seed(0))
        return [found.table(), str(accuracy.summary()), str(accuracy.wci), guard.last]

    before, expected = everything(model), numbers()
    with mode():
        assert numbers() == expected
    assert_same(everything(model), before)


def test_a_model_to_transfer_from_has_the_same_classes_and_weights_of_its_own(monkeypatch):
    """By number its labels were other classes: attacks began at images it had wrong, and broke few."""
    options, opened = Namespace(transfer="runs/other", checkpoint="w.pt", recipe=["own"]), []

    def found(given, path, at):
        opened.append(given.checkpoint)
        return SimpleNamespace(class_names=("bear", "cat"))

    monkeypatch.setattr("wcitrain.commands.evaluate.opened", found)
    own = _source(options, SimpleNamespace(class_names=("bear", "cat")))
    assert (own.class_names, opened) == (("bear", "cat"), [None])
    with pytest.raises(ValueError, match="--transfer: got runs/other with the classes bear, cat; expected"):
        _source(options, SimpleNamespace(class_names=("apple", "bear")))
