"""Attacks against closed forms on a linear model, and what they must leave alone."""

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from hypothesis import given, settings
from hypothesis import strategies as st

from wcitrain.attacks import ThreatModel, fgsm, pgd, project, steepest_step, uniform_in_ball
from wcitrain.objectives import PGDAT, Standard


def linear_loss(w: torch.Tensor):
    """Logistic loss of a linear model for label +1: rises along −w everywhere."""
    return lambda x: F.softplus(-(x.flatten(1) @ w))


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("attack", ["pgd", "fgsm"])
def test_on_a_linear_model_the_attack_is_the_closed_form(norm, attack):
    """Worst linf perturbation −eps sign(w), worst l2 perturbation −eps w/||w||, far from the box."""
    torch.manual_seed(0)
    w = torch.randn(12).double()
    x = torch.full((3, 3, 2, 2), 0.5).double()
    threat = ThreatModel(norm, 0.1)
    worst = -0.1 * (w.sign() if norm == "linf" else w / w.norm())
    if attack == "fgsm":
        x_adv = fgsm(linear_loss(w), x, threat=threat)
    else:
        generator = torch.Generator().manual_seed(0)
        # linf: 2 eps / step steps cross the ball from any start. l2: projection shrinks the error each step.
        x_adv = pgd(linear_loss(w), x, threat=threat, num_steps=200, step_size=0.02, generator=generator)
    assert torch.allclose(x_adv - x, worst.view(1, 3, 2, 2).expand_as(x), atol=1e-6)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_examples_stay_in_the_ball_and_in_the_box(norm):
    """Near the border of [0, 1] the box binds too."""
    x = torch.rand(20, 3, 4, 4)
    w = torch.randn(48)
    threat = ThreatModel(norm, 0.3)
    x_adv = pgd(linear_loss(w), x, threat=threat, num_steps=5, step_size=0.1)
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    delta = (x_adv - x).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
    assert (size <= 0.3 + 1e-6).all()  # float32 rounding of x + delta
    assert (size > 0.2).all()


@given(st.integers(1, 6), st.floats(0.01, 2.0), st.integers(0, 10_000))
@settings(max_examples=50, deadline=None)
def test_projection_is_the_closest_point(dims, eps, seed):
    """Against a direct construction: inside points stay, outside points go to the surface along the right direction."""
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randn(4, dims, generator=generator).double()
    for norm in ("linf", "l2"):
        threat = ThreatModel(norm, min(eps, 1.0))
        found = project(delta, threat)
        if norm == "linf":
            expected = torch.minimum(torch.maximum(delta, -torch.tensor(threat.eps)), torch.tensor(threat.eps))
        else:
            expected = torch.stack([d if d.norm() <= threat.eps else d / d.norm() * threat.eps for d in delta])
        assert torch.allclose(found, expected, atol=1e-12)


def test_steps_are_unit_steps_and_zero_gradients_stay_put():
    """A 0/0 in the l2 step would turn a dead example into NaN."""
    g = torch.stack([torch.randn(3, 2, 2), torch.zeros(3, 2, 2)])
    assert torch.equal(steepest_step(g, ThreatModel("linf", 0.1)), g.sign())
    step = steepest_step(g, ThreatModel("l2", 0.1))
    assert float(step[0].norm()) == pytest.approx(1, abs=1e-6)
    assert (step[1] == 0).all()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_random_starts_are_uniform_in_the_ball(norm):
    """l2: the radius of a uniform point has mean eps D/(D+1), linf: a coordinate has variance eps²/3."""
    delta = uniform_in_ball(torch.zeros(4000, 5), ThreatModel(norm, 0.5), torch.Generator().manual_seed(0))
    if norm == "linf":
        assert float(delta.square().mean()) == pytest.approx(0.25 / 3, rel=4 * 0.9 / 20000**0.5)
        assert delta.abs().max() <= 0.5
    else:
        radius = delta.norm(dim=1)
        assert float(radius.mean()) == pytest.approx(0.5 * 5 / 6, abs=4 * 0.5 * 0.141 / 4000**0.5)
        assert radius.max() <= 0.5 + 1e-6


def test_restarts_keep_the_worst_per_example():
    """With several restarts no example may end with a lower loss than in any single restart."""
    torch.manual_seed(0)
    w = torch.randn(8, 12)
    x = torch.rand(6, 3, 2, 2)

    def loss(z):  # several maxima
        return torch.sin(3 * z.flatten(1) @ w.T).sum(1)

    threat = ThreatModel("linf", 0.2)
    several = loss(pgd(loss, x, threat=threat, num_steps=2, step_size=0.05, num_restarts=4,
                       generator=torch.Generator().manual_seed(1)))  # fmt: skip
    generator = torch.Generator().manual_seed(1)
    singles = torch.stack(
        [loss(pgd(loss, x, threat=threat, num_steps=2, step_size=0.05, generator=generator)) for _ in range(4)]
    )
    assert torch.equal(several, singles.max(0).values)
    assert (singles.argmax(0) != singles.argmax(0)[0]).any(), "the worst restart should differ between examples here"


def test_the_same_generator_gives_the_same_examples():
    """Attacks draw from their own generator and leave the global one alone."""
    x, w = torch.rand(4, 1, 4, 4), torch.randn(16)
    before = torch.get_rng_state()
    first, second = (
        pgd(linear_loss(w), x, threat=ThreatModel(), num_steps=1, generator=torch.Generator().manual_seed(5))
        for _ in "ab"
    )
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("attack_bn", ["eval", "train"])
@pytest.mark.parametrize("fails", [False, True])
def test_the_objective_leaves_the_model_as_it_found_it(attack_bn, fails):
    """Statistics, modes (also of layers frozen by hand), random state, .grad, requires_grad; also on exceptions."""
    model = BatchNormNet()
    model.train()
    model.drop.eval()
    x, y = image_batch()
    F.cross_entropy(model(x), y).backward()
    before, modes = everything(model), [m.training for m in model.modules()]
    grads, rng = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()
    seen = []

    def spy(module, args, out):
        seen.append(module.training)
        if fails and len(seen) == 3:
            raise MemoryError

    model.bn.register_forward_hook(spy)
    objective = PGDAT(ThreatModel("linf", 0.1), num_steps=4, step_size=0.05, attack_bn=attack_bn)
    if fails:
        with pytest.raises(MemoryError):
            objective.perturb(model, x, y)
    else:
        x_adv = objective.perturb(model, x, y)
        assert not x_adv.requires_grad
        assert len(seen) == 4 == objective.attack_passes()[0]
    assert set(seen) == {attack_bn == "train"}
    assert_same(everything(model), before)
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert all(p.requires_grad for p in model.parameters())
    assert torch.equal(rng, torch.get_rng_state())


def test_the_standard_objective_does_nothing_to_images():
    """No adversary, no cost."""
    x, y = image_batch()
    model = BatchNormNet().eval()
    objective = Standard(label_smoothing=0.1)
    assert objective.perturb(model, x, y) is x
    assert torch.equal(objective.loss(model, x, x, y).total, F.cross_entropy(model(x), y, label_smoothing=0.1))


def test_impossible_threats_and_losses_are_refused():
    """eps = 8 on [0, 1] images destroys them silently elsewhere."""
    with pytest.raises(ValueError, match="Did you mean 8/255"):
        ThreatModel("linf", 8)
    with pytest.raises(ValueError, match="got 'l7'; expected"):
        ThreatModel("l7", 0.1)
    with pytest.raises(ValueError, match=r"threat.eps"):
        ThreatModel("l2", float("nan"))
    x, y = image_batch()
    model = BatchNormNet().eval()
    with pytest.raises(ValueError, match="one loss per example"):
        pgd(lambda z: F.cross_entropy(model(z), y), x, threat=ThreatModel())
    with pytest.raises(ValueError, match="num_steps"):
        pgd(lambda z: z.flatten(1).sum(1), x, threat=ThreatModel(), num_steps=-1)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        pgd(lambda z: z.flatten(1).sum(1), torch.randn(3, 1, 4, 4) * 3, threat=ThreatModel())
