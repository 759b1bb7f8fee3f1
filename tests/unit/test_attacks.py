"""Threat models, projections, steps and attacks against closed forms and independent solvers."""

import copy
import math
import threading
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn

from wcitrain import ATTACK_LOSSES, Attack, ThreatModel, fgsm, msd, pgd
from wcitrain.attacks import project, steepest_step, uniform_in_ball
from wcitrain.preserve import is_undisturbed, undisturbed

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}


def norms(delta: torch.Tensor, norm: str) -> torch.Tensor:
    """The norm of every example, [B]."""
    return torch.linalg.vector_norm(delta.flatten(1), ORDER[norm], dim=1)


# Coordinates (z, x) with the cases in which sorting goes wrong: equal and zero magnitudes, pixels on the
# border (no room).
COORDINATES = st.lists(
    st.tuples(
        st.sampled_from([0.0, 0.1, -0.1, 0.5, -3.0]) | st.floats(-3, 3),
        st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1),
    ),
    min_size=1,
    max_size=12,
)
RADII = st.sampled_from([0.0, 0.1, 1.0]) | st.floats(1e-3, 4)
MANY = settings(max_examples=60, deadline=None, derandomize=True)


def batch_of(coordinates: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Three examples z, x [3, D] of different sizes, so that treating a batch as one example shows."""
    z, x = (torch.tensor(column, dtype=torch.float64) for column in zip(*coordinates, strict=True))
    return torch.stack([z, z.flip(0) / 3, 2 * z]), torch.stack([x, x.flip(0), x])


def best_gain(w: torch.Tensor, x: torch.Tensor | None, threat: ThreatModel) -> torch.Tensor:
    """max <w, delta> over the ball and, for l1, the box around x [B, D]: fill the steepest first."""
    if x is None:
        return threat.eps * torch.linalg.vector_norm(w, DUAL[threat.norm], dim=1)
    slope, order = w.abs().sort(dim=1, descending=True)
    room = torch.where(w > 0, 1 - x, x).gather(1, order)
    left = (threat.eps - room.cumsum(1) + room).clamp_min(0)
    return (slope * torch.minimum(room, left)).sum(1)


@pytest.mark.parametrize("norm", NORMS)
@given(COORDINATES, RADII)
@MANY
def test_projections_are_the_closest_points(norm, coordinates, eps):
    """A projection that is merely inside (rescaled, ball and box in turn) makes an attack weak in silence.

    p in a convex set is its closest to z if and only if no q of it has <z - p, q> above <z - p, p>.
    """
    z, x = batch_of(coordinates)
    threat = ThreatModel(norm, min(eps, 1.0) if norm == "linf" else eps)
    for images in (None, x) if norm == "l1" else (None,):
        p = project(z, threat, images)
        gap = best_gain(z - p, images, threat) - ((z - p) * p).sum(1)
        assert (gap.abs() < 1e-10).all()  # float64 rounding of sums of at most 12 products below 36
        assert (norms(p, norm) <= threat.eps * (1 + 1e-12)).all()
        if images is not None:
            assert (x + p).clamp(0, 1).equal(x + p)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_float32_images_are_projected_to_float32_precision(norm):
    """A threshold read off a cumulative sum of 2 x 3072 float32 numbers would be off by much more."""
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(8, 3, 32, 32, generator=generator), torch.rand(8, 3, 32, 32, generator=generator)
    for eps in (0.5, 12.0):
        threat = ThreatModel(norm, eps)
        for images, wide in ((None, None), (x, x.double())):
            found, exact = project(z, threat, images), project(z.double(), threat, wide)
            assert found.dtype == torch.float32
            # In |z| - mu both are up to 5, so each moved coordinate is off by up to 2^-22, in l1 a dozen of
            # them at eps = 0.5.
            assert float((found - exact).abs().max()) < 1e-6
            assert torch.allclose(norms(found.double(), norm), torch.full((8,), eps).double(), rtol=6e-6)
    half = project(z.bfloat16(), ThreatModel(norm, 12.0), x.bfloat16())
    assert half.dtype == torch.bfloat16
    sizes = norms(half.double(), norm)
    assert torch.allclose(sizes, torch.full((8,), 12.0).double(), rtol=2**-8)  # one rounding each


@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_step_reaches_the_dual_norm(norm):
    """No direction of unit norm gains more; ties in l1 are shared, and a dead example stays put."""
    threat = ThreatModel(norm, 0.1)
    g = torch.randn(5, 3, 2, 2).double()
    g[1] = g[1].sign()  # every coordinate ties
    # In the middle of the box, and one coordinate a step in l1.
    settings = {"x": torch.full_like(g, 0.5), "step_size": 0.1, "l1_share": 1 / 12}
    step = steepest_step(g, threat, **settings)
    dual = torch.linalg.vector_norm(g.flatten(1), DUAL[norm], dim=1)
    assert torch.allclose((g * step).flatten(1).sum(1), dual, rtol=1e-14)
    assert torch.allclose(norms(step, norm), torch.ones(5).double(), rtol=1e-14)
    others = torch.randn(200, *g.shape).double()
    others = others / torch.linalg.vector_norm(others.flatten(2), ORDER[norm], dim=2).reshape(200, 5, 1, 1, 1)
    assert ((g * others).flatten(2).sum(2) <= dual * (1 + 1e-14)).all()
    assert (steepest_step(torch.zeros_like(g), threat, **settings) == 0).all()
    if norm == "l1":
        assert torch.equal(step[1], g[1] / 12), "ties share"


@pytest.mark.parametrize(("threat", "step_size"), [(ThreatModel(), 2 / 255), (ThreatModel("l2", 0.5), 0.125)])
def test_steps_fit_the_radius_unless_they_are_given(threat, step_size):
    """Steps of 2/255 in an l2 ball of 0.5 end at a sixth of the radius, and the model looks robust."""
    attack, x, y = Attack(threat, start="none"), torch.full((4, 1, 4, 4), 0.5), torch.zeros(4).long()
    assert attack.step_size == step_size
    delta = attack(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), x, y) - x
    order = {"linf": torch.inf, "l2": 2}[threat.norm]
    assert torch.allclose(delta.flatten(1).norm(order, dim=1), torch.full((4,), threat.eps), rtol=1e-4)


def sparse(g: torch.Tensor, share: float, x: torch.Tensor, step_size: float) -> torch.Tensor:
    """The l1 step."""
    return steepest_step(g, ThreatModel("l1", 1.0), x=x, step_size=step_size, l1_share=share)


def test_sparse_steps_move_the_coordinates_that_gain_most():
    """Against a loop over coordinates; a step spent on pixels that cannot move is lost."""
    generator = torch.Generator().manual_seed(0)
    g, x = torch.randn(6, 10, generator=generator).double(), torch.rand(6, 10, generator=generator).double()
    x[:, :3] = torch.tensor([0.0, 1.0, 0.999])
    for share, num in ((0.01, 1), (0.1, 1), (0.25, 3), (1.0, 10)):
        steps = sparse(g, share, x, 0.2 * num)
        for row, step in enumerate(steps):
            room = [1 - p if v > 0 else p for v, p in zip(g[row].tolist(), x[row].tolist(), strict=True)]
            gain = [abs(v) * min(r, 0.2) for v, r in zip(g[row].tolist(), room, strict=True)]
            chosen = [i for i in sorted(range(10), key=lambda i: -gain[i])[:num] if gain[i] > 0]
            expected = torch.zeros(10).double()
            expected[chosen] = g[row, chosen].sign() / len(chosen)
            assert torch.equal(step, expected)
    outward, border = torch.tensor([[1.0, -2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.5, 0.5]])
    assert (sparse(outward, 0.5, border, 1.0) == 0).all(), "nothing can move"
    ties = sparse(torch.ones(1, 4), 0.25, torch.zeros(1, 4), 1.0)
    assert torch.equal(ties, torch.full((1, 4), 0.25)), "ties share"


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_uniform_in_the_ball(norm):
    """Starts that crowd at the centre (or, in l1, near the axes) make restarts repeat each other."""
    dims, eps = 5, 0.5
    threat, generator = ThreatModel(norm, eps), torch.Generator().manual_seed(0)
    delta = uniform_in_ball(torch.zeros(4000, dims).double(), threat, generator)
    # The share of the ball's volume inside radius r is (r/eps)^D: for uniform points it is uniform. By
    # symmetry all coordinates have one law and fair signs. Seven tests at 1e-3 fail a right sampler in less
    # than 1 % of the seeds.
    assert kstest(((norms(delta, norm) / eps) ** dims).numpy(), "uniform").pvalue > 1e-3
    for i in range(dims):
        assert kstest(delta[:, i].numpy(), -delta[:, (i + 1) % dims].numpy()).pvalue > 1e-3
    if norm == "l1":  # the faces are simplices, on which a coordinate's share is Beta(1, D - 1)
        share = delta[:, 0].abs() / norms(delta, "l1")
        assert kstest((1 - (1 - share) ** (dims - 1)).numpy(), "uniform").pvalue > 1e-3
    same = uniform_in_ball(torch.zeros(3, 1, 2, 2), threat)
    assert (same.shape, same.dtype) == ((3, 1, 2, 2), torch.float32)


def losses_by_hand(z: np.ndarray, y: int, reference: np.ndarray) -> dict[str, float]:
    """Every attack loss of one example, from its definition."""
    others = max(v for k, v in enumerate(z) if k != y)
    p, q = np.exp(z) / np.exp(z).sum(), np.exp(reference) / np.exp(reference).sum()
    first, _, third = sorted(z, reverse=True)[:3]
    return {
        "ce": -math.log(p[y]),
        "margin": others - z[y],
        "dlr": (others - z[y]) / (first - third),
        "kl": float(np.sum(q * np.log(q / p))),
    }


@pytest.mark.parametrize("classes", [3, 7])
@pytest.mark.parametrize("name", list(ATTACK_LOSSES))
def test_attack_losses_are_their_definitions(name, classes):
    """A wrong sign or third logit gives an attack that only looks weak; dlr needs three classes."""
    z, reference = 2 * torch.randn(20, classes).double(), torch.randn(20, classes).double()
    y = torch.randint(0, classes, (20,))
    assert (z.argmax(1) == y).any(), "both signs of the margin are needed"
    rows = zip(z.numpy(), y.tolist(), reference.numpy(), strict=True)
    loss, found = ATTACK_LOSSES[name], ATTACK_LOSSES[name](z, y, reference)
    assert np.allclose(found.numpy(), [losses_by_hand(*row)[name] for row in rows], rtol=1e-11, atol=1e-13)
    one_hot = F.one_hot(y, classes)
    for soft in (one_hot.double(), 0.6 * one_hot.float() + 0.4 * one_hot.roll(1, 1).float()):
        # Beyond one-hot targets, a class loss takes the largest; mixed cross-entropy is a mean of two.
        mixed = sum(soft[:, c] * ATTACK_LOSSES["ce"](z, torch.full_like(y, c)) for c in range(classes))
        assert torch.allclose(loss(z, soft, reference), mixed if name == "ce" else found, rtol=1e-6)


@pytest.mark.parametrize("name", list(ATTACK_LOSSES))
def test_attack_losses_are_computed_in_float32_at_least(name):
    """In bfloat16 a margin of 20 is known to 0.125, and most steps would see no change."""
    z, reference, y = 9 * torch.randn(20, 5).bfloat16(), torch.randn(20, 5), torch.randint(0, 5, (20,))
    loss = ATTACK_LOSSES[name]
    assert loss(z, y, reference).dtype == torch.float32
    assert torch.equal(loss(z, y, reference), loss(z.float(), y, reference.float()))
    assert loss(z.double(), y, reference.double()).dtype == torch.float64
    assert loss(z.float(), F.one_hot(y, 5).double(), reference).dtype == torch.float32


def test_dlr_does_not_see_the_scale_of_the_logits():
    """Its purpose: logits times 1000 leave the cross-entropy without a gradient, and dlr as it was."""
    z, y = torch.randn(10, 5).double(), torch.randint(0, 5, (10,))
    dlr = ATTACK_LOSSES["dlr"]
    assert torch.allclose(dlr(1000 * z + 7, y), dlr(z, y), rtol=1e-10)
    assert (dlr(z, z.argmax(1)).abs() <= 1).all()
    gradient = torch.autograd.grad(dlr(leaf := z.clone().requires_grad_(), y).sum(), leaf)[0]
    # Scale and shift invariant functions have no slope along z or all ones. A detached denominator has one.
    assert torch.allclose((gradient * z).sum(1), torch.zeros(10).double(), atol=1e-11)
    assert torch.allclose(gradient.sum(1), torch.zeros(10).double(), atol=1e-12)
    assert torch.equal(dlr(torch.ones(2, 3), torch.tensor([0, 1])), torch.zeros(2))
    with pytest.raises(ValueError, match="dlr: got 2 classes; expected at least 3"):
        dlr(z[:, :2], y.clamp_max(1))


def test_kl_holds_the_clean_prediction_fixed():
    """A gradient through the clean branch changes what the inner attack climbs; at x there is none."""
    clean = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    z = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(4, dtype=torch.long)
    ATTACK_LOSSES["kl"](z, y, clean).sum().backward()
    assert clean.grad is None
    assert torch.allclose(z.grad, z.softmax(1) - clean.softmax(1), rtol=1e-10)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_on_a_linear_model_the_attacks_are_the_closed_form(norm):
    """Worst linf perturbation −eps sign(w), worst l2 perturbation −eps w/||w||, far from the box."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(12, generator=generator).double(), torch.full((3, 3, 2, 2), 0.5).double()

    def loss(z):  # logistic, label +1: rises along −w everywhere
        return F.softplus(-(z.flatten(1) @ w))

    threat = ThreatModel(norm, 0.1)
    worst = -0.1 * (w.sign() if norm == "linf" else w / w.norm())
    # linf: 2 eps / step steps cross the ball from any start. l2: projection shrinks the error each step.
    found = pgd(loss, x, threat=threat, num_steps=200, step_size=0.02, generator=generator)
    for x_adv in (found, fgsm(loss, x, threat=threat)):
        assert torch.allclose(x_adv - x, worst.view(1, 3, 2, 2).expand_as(x), atol=1e-6)


def test_the_l1_attack_fills_the_steepest_pixels_one_after_the_other():
    """If full pixels go on taking steps, or too many share each, it ends far below the optimum."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(16, 24, generator=generator).double() for _ in "wx")
    x = x.sigmoid()
    threat = ThreatModel("l1", 2.0)
    settings = {"threat": threat, "num_steps": 400, "step_size": 0.02}
    x_adv = pgd(lambda z: (z * w).sum(1), x, generator=generator, **settings)
    gap = 1 - ((x_adv - x) * w).sum(1) / best_gain(w, x, threat)
    assert (gap > -1e-12).all()
    # Two of 24 pixels move a step, by 0.01 each; about ten (eps over the mean room, doubled) lack a step.
    assert gap.max() < 10 * 0.01 / 2.0


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ATTACK_LOSSES)
@pytest.mark.parametrize("start", ["uniform", "gaussian", "none"])
def test_every_attack_stays_in_ball_and_box_and_raises_its_loss(norm, loss, start):
    """Near the border of [0, 1] the box binds too."""
    if (loss, start) == ("kl", "none"):
        with pytest.raises(ValueError, match="where the KL's gradient is zero"):
            Attack(ThreatModel(), loss="kl", start="none")
        return
    model, x = BatchNormNet().eval(), image_batch(20)[0]
    x[:10] = x[:10].round()  # every pixel on the border
    # all right at first: an example whose class is already last has no way up under dlr
    y = model(x).argmax(1)
    eps = {"linf": 0.2, "l2": 0.6, "l1": 2.0}[norm]
    attack = Attack(ThreatModel(norm, eps), num_steps=6, step_size=eps / 4, start=start, loss=loss)
    x_adv = attack(model, x, y, torch.Generator().manual_seed(0))
    assert not x_adv.requires_grad
    assert x_adv.clamp(0, 1).equal(x_adv)
    # float32 rounding of x + delta, summed over 16 pixels in l1
    assert (norms(x_adv - x, norm) <= eps + 2e-6).all()
    if loss != "dlr":
        assert (norms(x_adv - x, norm) > eps / 2).float().mean() > 0.8
    with torch.no_grad():
        before, after = (ATTACK_LOSSES[loss](model(images), y, model(x)) for images in (x, x_adv))
    assert (after > before).all()


def test_attacks_start_where_they_say():
    """TRADES' start is noise of 0.001, which must not leave a smaller ball during a warm-up."""
    x, y = torch.full((50, 3, 8, 8), 0.5), torch.zeros(50, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    threat = ThreatModel("linf", 0.1)

    def started(**kwargs):
        attack = Attack(**{"threat": threat, "num_steps": 0, **kwargs})
        return attack(lambda z: z.flatten(1), x, y, generator) - x

    noise = started(start="gaussian")
    assert float(noise.std()) == pytest.approx(0.001, rel=4 / (2 * 9600) ** 0.5)  # four standard errors
    assert float(noise.mean()) == pytest.approx(0, abs=4 * 0.001 / 9600**0.5)
    # rounding at 0.5
    assert started(start="gaussian", threat=ThreatModel("linf", 1e-4)).abs().max() <= 1e-4 + 6e-8
    assert (started(start="none") == 0).all()
    assert 0.09 < started(start="uniform").abs().max() <= 0.1 + 6e-8


def test_msd_takes_the_best_step_for_each_example():
    """Against a plain loop over examples and threats, each of which is one step of pgd."""
    w, x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), torch.rand(8, 3, 4, 4)
    w = torch.cat([w, torch.zeros(18, 8)]).double() * torch.linspace(0.2, 3, 48).double().unsqueeze(1) ** 2
    x = x.double()

    def loss(z):
        return torch.tanh(z.flatten(1) @ w).square().sum(1)

    balls = {ThreatModel("linf", 0.1): 0.02, ThreatModel("l2", 0.5): 0.1, ThreatModel("l1", 1.0): 0.2}
    expected, chosen = x, set()
    for _ in range(3):
        gradient = torch.autograd.grad(loss(leaf := expected.clone().requires_grad_()).sum(), leaf)[0]
        rows = []
        for n in range(8):
            candidates, one = [], slice(n, n + 1)
            for threat, size in balls.items():
                unit = steepest_step(gradient[one], threat, x=expected[one], step_size=size, l1_share=0.05)
                delta = project(expected[one] + size * unit - x[one], threat, x[one])
                candidates.append((x[one] + delta).clamp(0, 1))
            best = max(range(3), key=lambda t: float(loss(candidates[t])))
            chosen.add(best)
            rows.append(candidates[best])
        expected = torch.cat(rows)
    found = msd(loss, x, attacks=[Attack(ball, 3, size, "none") for ball, size in balls.items()])
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert len(chosen) > 1, "the example should need more than one threat"


def test_restarts_keep_the_worst_per_example():
    """With several restarts no example may end with a lower loss than in any single restart."""
    torch.manual_seed(0)
    w = torch.randn(8, 12)
    x = torch.rand(6, 3, 2, 2)

    def loss(z):  # several maxima
        return torch.sin(3 * z.flatten(1) @ w.T).sum(1)

    settings = {"threat": ThreatModel("linf", 0.2), "num_steps": 2, "step_size": 0.05}
    several = loss(pgd(loss, x, num_restarts=4, generator=torch.Generator().manual_seed(1), **settings))
    generator = torch.Generator().manual_seed(1)
    singles = torch.stack([loss(pgd(loss, x, generator=generator, **settings)) for _ in range(4)])
    assert torch.equal(several, singles.max(0).values)
    assert len(singles.argmax(0).unique()) > 1, "the worst restart should differ between examples here"


def test_impossible_threats_and_losses_are_refused():
    """eps = 8 on [0, 1] images destroys them silently elsewhere."""
    for norm, eps in (("linf", 8), ("l2", 128), ("l1", 20000)):
        text = rf"ThreatModel.eps: got {eps}; expected at most .* under {norm}.*Did you mean {eps}/255"
        with pytest.raises(ValueError, match=text):
            ThreatModel(norm, eps)
    x = image_batch()[0]
    with pytest.raises(ValueError, match="one loss per example"):
        pgd(lambda z: z.sum(), x, threat=ThreatModel())
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        pgd(lambda z: z.flatten(1).sum(1), torch.randn(3, 1, 4, 4) * 3, threat=ThreatModel())


SHORT = {"threat": ThreatModel("linf", 0.2), "num_steps": 2}
IN_TRAIN_MODE, AGAIN = {"loss": "kl", "attack_bn": "train", **SHORT}, {"num_restarts": 2, **SHORT}
PAIR = [Attack(ThreatModel("linf", 0.2), 2), Attack(ThreatModel("l2", 0.5), 2)]


def ce_of(model, y):
    """The closure that a user would write."""
    return lambda z: F.cross_entropy(model(z), y, reduction="none")


ATTACKS = {
    "pgd": lambda model, x, y, **own: pgd(model, x, y, **SHORT, **own),
    "pgd, kl, train mode": lambda model, x, y, **own: pgd(model, x, y, **IN_TRAIN_MODE, **own),
    "pgd of a loss": lambda model, x, y, **own: pgd(ce_of(model, y), x, model=model, **AGAIN, **own),
    "fgsm": lambda model, x, y, **own: fgsm(model, x, y, threat=SHORT["threat"], start="uniform", **own),
    "msd": lambda model, x, y, **own: msd(model, x, y, PAIR, **own),
    "Attack": lambda model, x, y, **own: Attack(**SHORT)(model, x, y, **own),
}
BARE = {
    "pgd": lambda loss, x: pgd(loss, x, generator=torch.Generator(), **SHORT),
    "fgsm": lambda loss, x: fgsm(loss, x, threat=SHORT["threat"]),
    "msd": lambda loss, x: msd(loss, x, attacks=PAIR, generator=torch.Generator()),
}


def trained() -> nn.Module:
    """A model in train mode but for a frozen part, with statistics and gradients of its own."""
    model = BatchNormNet()
    model.bn.running_var.uniform_(0.5, 2)
    model.fc.eval()
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    model.fc.bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_on_a_model_leave_no_trace(name):
    """In a plain loop an attack would move BatchNorm's statistics ten times a step, and nobody would see."""
    model, (x, y) = trained(), image_batch()
    before, modes, state = everything(model), [m.training for m in model.modules()], torch.get_rng_state()
    x_adv = ATTACKS[name](model, x, y)
    assert_same(everything(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all((p.grad == 0.5).all() for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ATTACKS[name](model, x, y), x_adv), "a function of the random state"
    seeded = [torch.Generator().manual_seed(0) for _ in "12"]
    first = ATTACKS[name](model, x, y, generator=seeded[0])
    other = model if "train" in name else copy.deepcopy(model).eval()
    assert torch.equal(ATTACKS[name](other, x, y, generator=seeded[1]), first)


def test_other_images_have_other_starts_though_no_state_moves():
    """The state is put back, so the starts of a whole epoch would be the same noise."""
    model, (x, y) = BatchNormNet(), image_batch()
    noise = [pgd(model, z, y, threat=SHORT["threat"], num_steps=0) - z for z in (0.3 + x / 3, 0.4 + x / 3)]
    assert not torch.allclose(*noise, atol=0.01)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_the_same_without_gradients(name, mode):
    """Under inference_mode every tensor is one that autograd refuses, the batch of a loader too."""
    model, (x, y) = trained(), image_batch()
    expected = ATTACKS[name](model, x, y)
    with mode():
        x, y = x.clone(), y.clone()
        if "of a loss" in name:  # what a closure holds is its own
            with torch.inference_mode(False):
                y = y.clone()
        assert torch.equal(ATTACKS[name](model, x, y), expected)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", BARE)
def test_a_loss_whose_module_would_be_changed_is_refused(name, compiled):
    """The loop that README once showed: clean accuracy in eval mode fell from 61 to 20 % on digits."""
    model, (x, y) = BatchNormNet(), image_batch()
    wrap = partial(torch.compile, backend="eager", disable=not compiled)
    before, state, called = everything(model), torch.get_rng_state(), wrap(model)
    text = r"got a loss that calls .* in train mode, which moves .*bn.running_mean and the random state"
    with pytest.raises(ValueError, match=text + ".*model=model"):
        BARE[name](ce_of(called, y), x)
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="calls Dropout in train mode, which moves the random state"):
        BARE[name](lambda z: nn.functional.relu(model.drop(z)).flatten(1).sum(1), x)
    model.eval()
    assert BARE[name](ce_of(called, y), x).shape == x.shape
    plain = nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.Dropout(0.0))
    plain.register_buffer("mean", torch.zeros(1))
    assert BARE[name](ce_of(wrap(plain), y), x).shape == x.shape, "nothing moves"
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert not any(m._forward_hooks for m in [*model.modules(), *plain.modules()])


def test_a_model_comes_with_labels_and_a_loss_without():
    """Labels that are ignored, or logits taken for losses, would be an attack on something else."""
    model, (x, y) = BatchNormNet(), image_batch()
    for target, labels in ((model, None), (ce_of(model, y), y)):
        for attack in (lambda *a: pgd(*a, **SHORT), lambda *a: msd(*a, PAIR)):
            with pytest.raises(TypeError, match="expected a module with labels, or a loss"):
                attack(target, x, labels)
    with pytest.raises(ValueError, match="msd: got no attacks"):
        msd(model, x, y)
    with pytest.raises(ValueError, match="attack_bn: got 'Train'; expected eval or train"):
        pgd(model, x, y, attack_bn="Train", **SHORT)


def test_protection_of_one_thread_does_not_end_that_of_another():
    """One list for all threads: the first to end took the other's model off it."""
    models, inside, over = [nn.Linear(2, 2), nn.Linear(2, 2)], threading.Event(), threading.Event()

    def attack() -> None:
        with undisturbed(models[1], training=False):
            inside.set()
            over.wait()

    other = threading.Thread(target=attack)
    with undisturbed(models[0], training=False):
        other.start()
        inside.wait()
        assert [is_undisturbed(model) for model in models] == [True, False]
    assert not is_undisturbed(models[0])
    over.set()
    other.join()
