"""AutoAttack stage by stage against ``pyautoattack`` itself, example by example; kills; few classes."""

from functools import partial
from typing import ClassVar

import pyautoattack
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.evaluation import evaluate
from wcitrain.evaluation.autoattack import NORMS
from wcitrain.evaluation.stages import AttackState, Stage, run_stages
from wcitrain.evaluation.victim import Victim

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
        Quick.log.append(
            (type(part).__name__, part.seed, part.n_restarts, getattr(part, "targeted", None), len(x))
        )
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


def conv(num_classes: int, channels: int = 3, side: int = 16):
    """A random convolutional model, and 24 images with the labels it gives to all but three."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(channels, 6, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * (side // 2) ** 2, num_classes)
    ).eval()
    x = torch.rand(24, channels, side, side)
    y = model(x).argmax(1)
    y[:3] = (y[:3] + 1) % num_classes
    return model, x, y


def direct(model, x, y, threat, *, batch_size, seed=0, version="standard", parts=None, num_classes=10):
    """Return the flags of upstream's own loop: right without an attack, and on what it returns."""
    adversary = pyautoattack.AutoAttack(
        model, norm=NORMS[threat.norm], eps=threat.eps, seed=seed, version=version
    )
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


def test_every_flag_on_a_convolutional_model_is_upstreams(quick):
    """Images of three channels take other paths in the square attack; another seed must change something."""
    model, x, y = conv(10)
    threat = ThreatModel("linf", 0.004)
    expected = direct(model, x, y, threat, batch_size=16, seed=5)
    result = ours(model, x, y, threat, "autoattack", batch_size=16, seed=5)
    assert torch.equal(result.is_robust, expected)
    assert not result.is_robust[:3].any()
    assert list(result.after) == list(STANDARD)
    assert 0 < int(expected.sum()) < 21


@pytest.mark.slow
def test_the_whole_attack_is_upstreams_too(digits):
    """Fewer iterations could hide a schedule that is set up wrongly."""
    model, x, y = digits[0], digits[1][:24], digits[2][:24]
    assert torch.equal(
        ours(model, x, y, LINF, "autoattack", batch_size=10).is_robust,
        direct(model, x, y, LINF, batch_size=10),
    )


@pytest.mark.parametrize("name", ["autoattack", "pgd-4x3"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_killed_evaluation_goes_on_to_the_same_flags(name, share, digits, quick, tmp_path, monkeypatch):
    """Hours of AutoAttack must survive a kill; a stage repeated or skipped would change flags in silence."""
    model, x, y = digits
    calls, limit = 0, None
    forward = type(model).forward

    def counted(self, images):
        nonlocal calls
        calls += 1
        if limit is not None and calls > limit:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(type(model), "forward", counted)
    whole = ours(model, x, y, LINF, name, batch_size=20)
    total, calls, limit = calls, 0, int(share * calls)
    with pytest.raises(KeyboardInterrupt):
        ours(model, x, y, LINF, name, batch_size=20, folder=tmp_path)
    assert all(p.requires_grad for p in model.parameters())  # put back although it was killed
    calls, limit = 0, None
    resumed = ours(model, x, y, LINF, name, batch_size=20, folder=tmp_path)
    assert torch.equal(resumed.is_robust, whole.is_robust)
    assert torch.equal(resumed.losses.nan_to_num(), whole.losses.nan_to_num())
    assert dict(resumed.after) == dict(whole.after)
    assert calls < total  # not from the start: what was finished is not repeated
    calls = 0
    ours(model, x, y, LINF, name, batch_size=20, folder=tmp_path)
    assert calls == 2  # finished: two batches without an attack


def test_a_resumed_stage_keeps_the_batches_it_began_with(tmp_path):
    """Cut anew from what is still robust, batches after a kill would skip examples, which count as robust."""

    def stopped(at):
        seen = []

        def attack(x, y, places):
            seen.append(places.tolist())
            if len(seen) == at:
                raise KeyboardInterrupt
            return 1 - x

        return seen, [Stage("one", attack), Stage("two", attack)]

    x = torch.arange(12.0).reshape(12, 1, 1, 1) % 2  # the attack breaks all of the first batches, none later
    model = nn.Sequential(nn.Flatten(), nn.Linear(1, 2))
    with torch.no_grad():
        model[1].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[1].bias.copy_(torch.tensor([-0.5, 0.5]))
        y = torch.where(torch.arange(12) < 6, model(x).argmax(1), model(1 - x).argmax(1))
    victim, path = Victim(model, x, y, batch_size=3), tmp_path / "state.npz"
    seen, stages = stopped(at=3)
    with pytest.raises(KeyboardInterrupt):
        run_stages(stages, victim, LINF, AttackState(torch.ones(12).bool(), path), "")
    again, stages = stopped(at=99)
    state = AttackState(torch.ones(12).bool(), path)
    run_stages(stages, victim, LINF, state, "")
    assert [*seen[:2], *again] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [6, 7, 8], [9, 10, 11]]
    assert state.is_robust.tolist() == [False] * 6 + [True] * 6


class Scaled(nn.Module):
    """Weights and class names do not say what its forward pass does."""

    def __init__(self, model, scale=1.0, noise=0.0):
        super().__init__()
        self.model, self.scale, self.noise = model, scale, noise

    def forward(self, x):
        return self.scale * self.model(x + self.noise * torch.randn_like(x))


@pytest.mark.filterwarnings("ignore::wcitrain.evaluation.PreflightWarning")
def test_a_state_is_taken_up_by_the_same_attack_on_the_same_model_only(digits, tmp_path, monkeypatch):
    """Another's state would report the wrong model; one that is not found again costs hours."""
    model, x, y = digits
    moved = nn.Sequential(*model)
    moved[4] = nn.Linear(32, 10)
    with torch.no_grad():
        moved[4].weight.copy_(model[4].weight)
        moved[4].bias.copy_(model[4].bias + 1e-3 * torch.eye(10)[0])
    calls = [
        (model, x, LINF, "pgd-2", {}),
        (model, x, LINF, "pgd-2", {"seed": 1}),
        (model, x.flip(0), LINF, "pgd-2", {}),
        (model, x, ThreatModel("linf", 0.081), "pgd-2", {}),
        (model, x, LINF, "pgd-3", {}),
        (moved.eval(), x, LINF, "pgd-2", {}),
        (nn.Sequential(*list(model)[:3], nn.SiLU(), model[4]).eval(), x, LINF, "pgd-2", {}),
        (Scaled(model), x, LINF, "pgd-2", {}),
        (Scaled(model, 2.0), x, LINF, "pgd-2", {}),  # an edited forward pass has the old weights and names
        (Scaled(model, noise=0.1), x, LINF, "pgd-2", {}),  # randomised, yet the same after a kill
    ]

    def count():
        return len(list(tmp_path.glob("*.npz")))

    for number, (other, images, threat, name, settings) in enumerate(2 * calls):
        ours(other, images, y, threat, name, batch_size=60, folder=tmp_path, **settings)
        assert count() == min(number + 1, len(calls))
    model.train()  # the check of train mode runs a pass in it: statistics must not move
    try:
        evaluate(model, [(x, y)], LINF, attacks="pgd-2", folder=tmp_path, batch_size=60)
    finally:
        model.eval()
    assert count() == len(calls)
    monkeypatch.setattr("wcitrain.evaluation.evaluating.version", lambda _: "0.0")
    ours(model, x, y, LINF, "pgd-2", batch_size=60, folder=tmp_path)
    assert count() == len(calls) + 1


@pytest.mark.parametrize(("num_classes", "left_out"), [(2, ["apgd-dlr", "apgd-t"]), (3, ["apgd-t"]), (4, [])])
def test_models_of_few_classes_are_attacked_by_what_can_run(num_classes, left_out, quick):
    """Upstream stops with an index error: nine target classes are too many, the DLR needs third logits."""
    model, x, y = conv(num_classes, channels=1, side=8)
    threat = ThreatModel("linf", 0.05)
    result = ours(model, x, y, threat, "autoattack-plus", batch_size=24)
    parts = [p for p in ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t") if p not in left_out]
    assert [note.split()[0] for note in result.notes] == left_out
    expected = direct(
        model, x, y, threat, batch_size=24, version="plus", parts=parts, num_classes=num_classes
    )
    assert torch.equal(result.is_robust, expected)
    assert int(result.is_robust.sum()) < 21


def test_a_subset_that_no_model_of_two_classes_can_meet_is_refused():
    """No attack at all would be reported as robust."""
    model, x, y = conv(2)
    with pytest.raises(ValueError, match="apgd-t left out: it needs 4 classes, here are 2"):
        ours(model, x, y, LINF, "autoattack:apgd-t+apgd-dlr", batch_size=24)
