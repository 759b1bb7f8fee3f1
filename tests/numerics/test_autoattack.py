"""AutoAttack stage by stage against ``pyautoattack`` itself, example by example; kills; few classes."""

import copy
from functools import partial
from typing import ClassVar

import pyautoattack
import pytest
import torch
from pyautoattack import autopgd_base
from sklearn.datasets import load_digits
from torch import nn

from wcitrain.attacks import APGD, ThreatModel
from wcitrain.evaluation import evaluate
from wcitrain.evaluation.attacking import AttackState, Stage, Victim, run_stages
from wcitrain.evaluation.plans import NORMS

LINF = ThreatModel("linf", 0.08)
STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")


class Quick(pyautoattack.AutoAttack):
    """The attack with few iterations and an early checkpoint of APGD, for both sides of a comparison."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for part in (self.apgd, self.apgd_targeted, self.fab):
            part.n_iter = part.n_iter_orig = 5
            part.n_iter_2 = 2
        self.square.n_queries = 10
        for part in (self.apgd, self.apgd_targeted, self.fab, self.square):
            part.perturb = partial(self.noted, part, part.perturb)

    @staticmethod
    def noted(part, perturb, x, y):
        """Note how a part was set up when its turn came."""
        targeted = getattr(part, "targeted", None)
        Quick.log.append((type(part).__name__, part.seed, part.n_restarts, targeted, len(x)))
        return perturb(x, y)

    log: ClassVar[list] = []


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(pyautoattack, "AutoAttack", Quick)


@pytest.fixture(scope="module")
def digits():
    """A perceptron with batch normalisation, trained to about 90 % on digits, and 40 images."""
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(40):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x[60:]), y[60:]).backward()
        optimizer.step()
    return model.eval(), x[:40], y[:40]


def direct(model, x, y, threat, *, batch_size, seed=0, version="standard", parts=None, num_classes=10):
    """Return the flags of upstream's own loop: right without an attack, and on what it returns."""
    options = {"norm": NORMS[threat.norm], "eps": threat.eps, "seed": seed, "version": version}
    adversary = pyautoattack.AutoAttack(model, **options)
    adversary.verbose = False
    if parts is not None:
        adversary.attacks_to_run = list(parts)
    for part in (adversary.apgd_targeted, adversary.fab):
        part.n_target_classes = min(part.n_target_classes, num_classes - 1)
    required = [p.requires_grad for p in model.parameters()]
    x_adv, _ = adversary.run_standard_evaluation(x, y, batch_size=batch_size)
    model.zero_grad(set_to_none=True)
    assert required == [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        return model(x_adv).max(1).indices == y


def ours(model, x, y, threat, name, *, batch_size, **settings):
    settings |= {"attacks": name, "batch_size": batch_size, "preflight": "off"}
    return evaluate(model, [(x, y)], threat, **settings).attacks[0]


@pytest.mark.parametrize(
    ("threat", "name", "version", "parts"),
    [
        (LINF, "autoattack", "standard", None),
        (ThreatModel("l2", 0.4), "autoattack", "standard", None),
        (ThreatModel("l1", 1.0), "autoattack", "standard", None),
        (LINF, "autoattack-plus", "plus", None),
        (LINF, "autoattack-rand", "rand", None),
        (LINF, "autoattack:fab-t+fab+apgd-dlr", "standard", ("fab-t", "fab", "apgd-dlr")),
    ],
)
def test_every_flag_on_digits_is_upstreams(threat, name, version, parts, digits, quick):
    """Another order, seed, batch cut or restart count would give other numbers under AutoAttack's name."""
    model, x, y = digits
    Quick.log.clear()
    expected = direct(model, x, y, threat, batch_size=25, version=version, parts=parts)
    theirs = list(Quick.log)
    Quick.log.clear()
    result = ours(model, x, y, threat, name, batch_size=25)
    assert torch.equal(result.is_robust, expected)
    assert Quick.log == theirs  # restarts that change no flag here would change one elsewhere
    # the attack had something to do and to leave
    assert 0 < int(expected.sum()) < 0.9 * int((model(x).argmax(1) == y).sum())
    assert result.furthest <= 1.001 * threat.eps


@pytest.mark.parametrize("name", ["autoattack", "pgd-4x3"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_killed_evaluation_goes_on_to_the_same_flags(name, share, digits, quick, tmp_path, monkeypatch):
    """Hours of AutoAttack must survive a kill; a stage repeated or skipped would change flags in silence."""
    model, x, y = digits
    calls, limit = 0, 10**9
    forward = type(model).forward

    def counted(self, images):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(type(model), "forward", counted)
    whole = ours(model, x, y, LINF, name, batch_size=20)
    total, calls, limit = calls, 0, int(share * calls)
    with pytest.raises(KeyboardInterrupt):
        ours(model, x, y, LINF, name, batch_size=20, folder=tmp_path)
    assert all(p.requires_grad for p in model.parameters())  # put back although it was killed
    limit = 10**9
    # What was finished is not repeated; then only two batches without an attack, and gradients that name it.
    for most in (total - 1, 3):
        calls = 0
        resumed = ours(model, x, y, LINF, name, batch_size=20, folder=tmp_path)
        assert calls <= most
        assert torch.equal(resumed.is_robust, whole.is_robust)
        assert torch.equal(resumed.losses.nan_to_num(), whole.losses.nan_to_num())
        assert dict(resumed.after) == dict(whole.after)


def test_a_resumed_stage_keeps_the_batches_it_began_with(tmp_path):
    """Cut anew from what is still robust, batches after a kill would skip examples, which count as robust."""
    seen, limit = [], 3

    def attack(x, y, places):
        seen.append(places.tolist())
        if len(seen) == limit:
            raise KeyboardInterrupt
        return 1 - x

    x = torch.arange(12.0).reshape(12, 1, 1, 1) % 2  # the attack breaks all of the first batches, none later
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.copy_(torch.tensor([-0.5, 0.5]))
        y = torch.where(torch.arange(12) < 6, model(x).argmax(1), model(1 - x).argmax(1))
    victim, stages = Victim(model, x, y, batch_size=3), [Stage("one", attack), Stage("two", attack)]
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, victim, LINF, AttackState(torch.ones(12).bool(), tmp_path / "state.npz"), "")
    del seen[2:]  # the interrupted batch
    limit, state = 99, AttackState(torch.ones(12).bool(), tmp_path / "state.npz")
    run_stages(stages, victim, LINF, state, "")
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [6, 7, 8], [9, 10, 11]]
    assert state.is_robust.tolist() == [False] * 6 + [True] * 6


class Scaled(nn.Module):
    """Weights and class names do not say what its forward pass does."""

    def __init__(self, model, scale=1.0, noise=0.0):
        super().__init__()
        self.model, self.scale, self.noise = model, scale, noise

    def forward(self, x):
        return self.scale * self.model(x + self.noise * torch.randn_like(x))


def test_a_state_is_taken_up_by_the_same_attack_on_the_same_model_only(digits, tmp_path, monkeypatch):
    """Another's state would report the wrong model; one that is not found again costs hours."""
    model, x, y = digits
    moved = copy.deepcopy(model)
    with torch.no_grad():
        moved[4].bias += 1e-3 * torch.eye(10)[0]
    calls = [
        (model, x, LINF, "pgd-2", 0),
        (model, x, LINF, "pgd-2", 1),
        (model, x.flip(0), LINF, "pgd-2", 0),
        (model, x, ThreatModel("linf", 0.081), "pgd-2", 0),
        (model, x, LINF, "pgd-3", 0),
        (moved, x, LINF, "pgd-2", 0),
        (nn.Sequential(*list(model)[:3], nn.SiLU(), model[4]).eval(), x, LINF, "pgd-2", 0),
        (Scaled(model), x, LINF, "pgd-2", 0),
        (Scaled(model, 2.0), x, LINF, "pgd-2", 0),  # an edited forward pass has the old weights and names
        (Scaled(model, noise=0.1), x, LINF, "pgd-2", 0),  # randomised, yet the same after a kill
    ]
    for number, (other, images, threat, name, seed) in enumerate(2 * calls):
        ours(other, images, y, threat, name, batch_size=60, folder=tmp_path, seed=seed)
        assert len(list(tmp_path.glob("*.npz"))) == min(number + 1, len(calls))
    monkeypatch.setattr("wcitrain.evaluation.evaluating.version", lambda _: "0.0")
    ours(model, x, y, LINF, "pgd-2", batch_size=60, folder=tmp_path)
    assert len(list(tmp_path.glob("*.npz"))) == len(calls) + 1


@pytest.mark.parametrize("num_classes", [2, 3, 10])
def test_models_of_few_classes_are_attacked_by_what_can_run(num_classes, quick):
    """Upstream stops with an index error: nine target classes are too many, the DLR needs third logits."""
    torch.manual_seed(1)
    parts = nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 64, num_classes)
    model = nn.Sequential(*parts).eval()
    x = torch.rand(24, 3, 16, 16)  # three channels take other paths in the square attack
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % num_classes
    few = ["apgd-ce", *["apgd-dlr"] * (num_classes > 2), "fab", "square", "fab-t"]
    name, parts = (f"autoattack:{'+'.join(few)}", few) if num_classes < 4 else ("autoattack", STANDARD)
    threat = ThreatModel("linf", 0.004)
    result = ours(model, x, y, threat, name, batch_size=16, seed=5)
    expected = direct(model, x, y, threat, batch_size=16, seed=5, parts=parts, num_classes=num_classes)
    assert torch.equal(result.is_robust, expected)
    assert list(result.after) == list(parts)
    assert 0 < int(result.is_robust.sum()) < 21
    if num_classes < 4:
        with pytest.raises(ValueError, match=f"got {num_classes} classes with .*apgd-t; expected 3"):
            ours(model, x, y, LINF, "autoattack", batch_size=24)


def test_images_of_other_strides_are_attacked_in_l1_too(quick):
    """The package's l1 projection stops on images in channels-last order, as decoders leave them."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).eval(), torch.rand(8, 3, 4, 4)
    y, threat = model(x).argmax(1), ThreatModel("l1", 0.5)
    orders = [x, x.contiguous(memory_format=torch.channels_last)]
    flags = [ours(model, z, y, threat, "autoattack:apgd-ce", batch_size=8).is_robust for z in orders]
    assert torch.equal(*flags)
    assert 0 < int(flags[0].sum()) < 8


BALLS = {"linf": ThreatModel("linf", 0.08), "l2": ThreatModel("l2", 0.4), "l1": ThreatModel("l1", 1.2)}


@pytest.fixture
def package(monkeypatch):
    """The package's APGD on all images, its l1 without two accidents, as ``(x_adv)`` of a call.

    Every l1 ball draws a start that is not used, which moves the random state for the next restart; and its
    count of moved pixels has those that are off by a rounding.
    """
    run = autopgd_base.APGDAttack.attack_single_run

    def without_draws(self, x, y, x_init=None):
        with torch.random.fork_rng(enabled=x_init is not None):
            return run(self, x, y, x_init=x_init)

    monkeypatch.setattr(autopgd_base.APGDAttack, "attack_single_run", without_draws)
    monkeypatch.setattr(autopgd_base, "L0_norm", lambda delta: (delta.abs() > 1e-6).flatten(1).sum(1))

    def attack(model, x, y, threat, loss, num_steps, num_restarts, seed):
        settings = {"n_iter": num_steps, "n_restarts": num_restarts, "eps": threat.eps, "seed": seed}
        settings |= {"norm": NORMS[threat.norm], "use_largereps": threat.norm == "l1", "device": x.device}
        if loss == "targeted-dlr":
            made = autopgd_base.APGDAttack_targeted(model, n_target_classes=3, **settings)
        else:
            made = autopgd_base.APGDAttack(model, loss=loss, **settings)
        return made.perturb(x, y)

    return attack


@pytest.mark.filterwarnings("ignore:.*zero gradient")
@pytest.mark.parametrize("norm", BALLS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted-dlr"])
@pytest.mark.parametrize(("num_steps", "num_restarts"), [(10, 3), (60, 1)])
def test_native_apgd_is_the_packages_image_by_image(norm, loss, num_steps, num_restarts, digits, package):
    """A missed checkpoint, momentum or restart makes a weaker attack under the published name."""
    model, x, y = digits
    theirs = package(model, x, y, BALLS[norm], loss, num_steps, num_restarts, seed=1)
    attack = APGD(BALLS[norm], num_steps, num_restarts, loss, num_targets=3)
    ours = attack(model, x, y, torch.Generator().manual_seed(1))
    with torch.no_grad():
        flags, fooled = (model(images).argmax(1) == y for images in (ours, theirs))
        clean = model(x).argmax(1) == y
    assert torch.equal(flags, fooled)
    assert 0 < int(flags.sum()) < int(clean.sum())
    # Where the package has an image it is the same; rounding, through 60 steps, moves a few by more.
    same = (ours - theirs).flatten(1).abs().amax(1)[clean & ~fooled] < 1e-5
    assert same.float().mean() > 0.8


@pytest.mark.parametrize("norm", BALLS)
def test_apgd_by_name_does_not_depend_on_the_batch_size(norm, digits):
    """The package draws for a batch, so its flags depend on how a set is cut."""
    model, x, y = digits
    for name in ("apgd-ce-10x2", "apgd-t-10"):
        results = [ours(model, x, y, BALLS[norm], name, batch_size=size) for size in (40, 7)]
        assert torch.equal(results[0].is_robust, results[1].is_robust)
        assert 0 < int(results[0].is_robust.sum()) < 36
        assert results[0].furthest <= BALLS[norm].eps + 1e-5
        restarts = (
            ["restart 1", "restart 2"] if "ce" in name else [f"target {k}, restart 1" for k in range(1, 10)]
        )
        assert list(results[0].after) == restarts[: 5 if norm == "l1" and "-t" in name else None]


@pytest.fixture(scope="module")
def many_digits(digits):
    """The same model on all images that it has right."""
    model, (images, labels) = digits[0], load_digits(return_X_y=True)
    x, y = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16, torch.tensor(labels)
    is_right = model(x).argmax(1) == y
    return model, x[is_right][:600], y[is_right][:600]


@pytest.mark.filterwarnings("ignore:.*zero gradient")
@pytest.mark.parametrize("seed", [0, 1])
def test_l1_pgd_is_as_strong_as_the_packages_apgd_at_the_same_budget(seed, many_digits, package):
    """With a fixed share of the pixels a step, 10 x 10 steps left 16 points more right."""
    model, x, y = many_digits
    theirs = package(model, x, y, BALLS["l1"], "ce", 10, 10, seed)
    result = ours(model, x, y, BALLS["l1"], "pgd-10x10", batch_size=600, seed=seed)
    with torch.no_grad():
        expected = float((model(theirs).argmax(1) == y).float().mean())
    assert 0.05 < expected < 0.8
    assert float(result.is_robust.float().mean()) <= expected + 0.01
