"""Threat models, projections, steps and attacks against closed forms and independent solvers."""

import copy
import math
import threading
from functools import partial
from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kstest
from torch import nn

from wcitrain import APGD, ATTACK_LOSSES, Attack, ThreatModel, fgsm, msd, pgd
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


def closest_by_brute_force(z: np.ndarray, x: np.ndarray, eps: float) -> np.ndarray:
    """The closest point to z [D] in the l1 ball and the box around x: every set of active constraints.

    Each coordinate of the solution is zero, at the border, or in between, where it is |z_i| - mu.
    """
    size, room = np.abs(z), np.where(z > 0, 1 - x, x)
    best, least = np.zeros_like(z), np.inf
    for kinds in product("0bm", repeat=len(z)):  # zero, border, moved
        kind = np.array(kinds)
        moved, fixed = kind == "m", np.where(kind == "b", room, 0.0)
        spare = eps - fixed.sum()
        on_sphere = (size[moved].sum() - spare) / max(moved.sum(), 1)
        for mu in {0.0, max(on_sphere, 0.0)}:
            p = np.where(moved, size - mu, fixed)
            is_inside = (p >= -1e-12).all() and (p <= room + 1e-12).all() and p.sum() <= eps + 1e-12
            if is_inside and ((p - size) ** 2).sum() < least:
                best, least = np.sign(z) * p, ((p - size) ** 2).sum()
    return best


def test_the_l1_projection_is_the_brute_force_solution():
    """Rescaling, or box and ball in turn, leaves budget unused: attacks look weak, models robust."""
    generator = np.random.default_rng(0)
    for case in range(40):
        z, x = generator.normal(size=5) * 10 ** generator.uniform(-1, 1), generator.uniform(size=5)
        x[:2] = x[:2].round() if case % 2 else x[:2]  # on the border
        z[3] = z[4] if case % 3 else 0.0  # equal magnitudes, and none
        eps = float(generator.uniform(0.05, 3))
        found = project(torch.tensor(z)[None], ThreatModel("l1", eps), torch.tensor(x)[None])[0].numpy()
        assert np.allclose(found, closest_by_brute_force(z, x, eps), rtol=0, atol=1e-11)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_the_steepest_step_reaches_the_dual_norm(norm):
    """No direction of unit norm gains more, and a dead example stays put."""
    threat = ThreatModel(norm, 0.1)
    g = torch.randn(5, 3, 2, 2).double()
    g[1] = g[1].sign()  # every coordinate ties
    step = steepest_step(g, threat, x=g, x_adv=g)
    dual = torch.linalg.vector_norm(g.flatten(1), DUAL[norm], dim=1)
    assert torch.allclose((g * step).flatten(1).sum(1), dual, rtol=1e-14)
    assert torch.allclose(norms(step, norm), torch.ones(5).double(), rtol=1e-14)
    others = torch.randn(200, *g.shape).double()
    others = others / torch.linalg.vector_norm(others.flatten(2), ORDER[norm], dim=2).reshape(200, 5, 1, 1, 1)
    assert ((g * others).flatten(2).sum(2) <= dual * (1 + 1e-14)).all()
    assert (steepest_step(torch.zeros_like(g), threat, x=g, x_adv=g) == 0).all()


@pytest.mark.parametrize(("threat", "step_size"), [(ThreatModel(), 2 / 255), (ThreatModel("l2", 0.5), 0.125)])
def test_steps_fit_the_radius_unless_they_are_given(threat, step_size):
    """Steps of 2/255 in an l2 ball of 0.5 end at a sixth of the radius, and the model looks robust."""
    attack, x, y = Attack(threat, start="none"), torch.full((4, 1, 4, 4), 0.5), torch.zeros(4).long()
    assert attack.step_size == step_size
    delta = attack(nn.Sequential(nn.Flatten(), nn.Linear(16, 3)), x, y) - x
    order = {"linf": torch.inf, "l2": 2}[threat.norm]
    assert torch.allclose(delta.flatten(1).norm(order, dim=1), torch.full((4,), threat.eps), rtol=1e-4)


def test_sparse_steps_move_the_steepest_coordinates_and_fewer_as_the_perturbation_grows_sparse():
    """Against a loop over coordinates: a fixed share of them left 24 % right where APGD left 16 %."""
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.randn(6, 30, generator=generator).double() for _ in "gx")
    x = x.sigmoid()
    x[:, :5] = torch.tensor([0.0, 1.0, 0.999, 0.0, 1.0])
    counts = set()
    for eps in (0.1, 2.0, 4.0, 100.0):
        for moved in (0, 1, 9, 30):
            x_adv = x.clone()
            x_adv[:, :moved] += 0.01
            steps = steepest_step(g, ThreatModel("l1", eps), x=x, x_adv=x_adv)
            for row, step in enumerate(steps):
                order = sorted(range(30), key=lambda i: -abs(float(g[row, i])))
                room = [float(1 - x[row, i] if g[row, i] > 0 else x[row, i]) for i in order]
                fill = next((k + 1 for k in range(30) if sum(room[: k + 1]) >= eps), 31)
                left = [float(1 - z[i] if g[row, i] > 0 else z[i]) for z in [x_adv[row]] for i in order]
                first = next(k + 1 for k in range(30) if left[k] > 1e-6)
                num = min(30, max(first, min(2 * fill, math.ceil(moved / 1.5) if moved else 30)))
                expected = torch.zeros(30).double()
                expected[order[:num]] = g[row, order[:num]].sign() / num
                assert torch.allclose(step, expected, rtol=1e-14, atol=0)
                counts.add(num)
    assert {1, 30} < counts, "the cases should differ"
    threat, half = ThreatModel("l1", 0.1), torch.full((2, 4), 0.5)
    ties = torch.tensor([[1.0, -1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.equal(steepest_step(ties, threat, x=half, x_adv=half), ties / 4), "ties share, none stays"


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


@pytest.mark.parametrize("num_steps", [10, 100])
def test_the_l1_attack_finds_all_that_a_linear_loss_can_gain(num_steps):
    """If pixels at the border go on taking steps, or too many share each, it ends far below the optimum."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(16, 24, generator=generator).double() for _ in "wx")
    x = x.sigmoid()
    threat = ThreatModel("l1", 2.0)
    x_adv = pgd(lambda z: (z * w).sum(1), x, threat=threat, num_steps=num_steps, generator=generator)
    gap = 1 - ((x_adv - x) * w).sum(1) / best_gain(w, x, threat)
    assert (gap.abs() < 1e-12).all()


def test_an_l1_attack_is_not_held_at_the_border_by_the_steepest_pixels():
    """Two pixels at the border that would step outwards took every step, and the attack stood still."""
    w, x = torch.tensor([[3.0, 2.0, 1.0, 1.0]]).double(), torch.tensor([[1.0, 1.0, 0.5, 0.2]]).double()
    threat = ThreatModel("l1", 0.5)
    x_adv = x + torch.tensor([[0.0, 0.0, -0.25, -0.1]])
    step = steepest_step(w, threat, x=x, x_adv=x_adv)
    assert torch.equal(step, torch.full((1, 4), 0.25).double()), "the third, and who ties with it"


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
    attack = Attack(ThreatModel(norm, eps), 6, eps if norm == "l1" else eps / 4, start=start, loss=loss)
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

    balls = {ThreatModel("linf", 0.1): 0.02, ThreatModel("l2", 0.5): 0.1, ThreatModel("l1", 1.0): 1.0}
    expected, chosen = x, set()
    for _ in range(3):
        gradient = torch.autograd.grad(loss(leaf := expected.clone().requires_grad_()).sum(), leaf)[0]
        rows = []
        for n in range(8):
            candidates, one = [], slice(n, n + 1)
            for threat, size in balls.items():
                unit = steepest_step(gradient[one], threat, x=x[one], x_adv=expected[one])
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


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "targeted-dlr"])
def test_apgd_stays_in_ball_and_box_fools_what_it_can_and_costs_what_it_says(norm, loss):
    """Larger balls come first in l1, and momentum leaves any ball: the last word is a projection's."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Flatten(), nn.Linear(16, 5)), torch.rand(20, 1, 4, 4)
    x[:10] = x[:10].round()
    y = model(x).argmax(1)
    y[0] = (y[0] + 1) % 5  # wrong as it is: no attack is needed
    eps, calls = {"linf": 0.1, "l2": 0.3, "l1": 0.8}[norm], []
    model.register_forward_hook(lambda *_: calls.append(1))
    attack = APGD(ThreatModel(norm, eps), 10, 2, loss, num_targets=3)
    x_adv = attack(model, x, y, torch.Generator().manual_seed(0))
    assert x_adv.clamp(0, 1).equal(x_adv)
    assert (norms(x_adv - x, norm) <= eps + 1e-6).all()
    assert len(calls) <= attack.passes()[0]
    assert torch.equal(x_adv[0], x[0])
    is_fooled = model(x_adv).argmax(1) != y
    assert 1 < is_fooled.sum() < 20
    harmless = APGD(ThreatModel(norm, 1e-6), 10, 2, loss, num_targets=3)
    calls.clear()
    harmless(model, x[1:], y[1:], torch.Generator().manual_seed(0))
    assert len(calls) == harmless.passes()[0], "nothing is fooled, so nothing is left out"
    raised = APGD(ThreatModel(norm, eps), 10, 3).maximise(
        ce_of(model, y), x, torch.Generator().manual_seed(1)
    )
    assert (ce_of(model, y)(raised) >= ce_of(model, y)(x_adv) - 1e-4).float().mean() > 0.8
    with pytest.raises(ValueError, match=r"APGD: got labels \(20, 5\)"):
        attack(model, x, F.one_hot(y, 5).float())
    with pytest.raises(ValueError, match="got 2 classes; expected at least"):
        APGD(ThreatModel(norm, eps), loss="dlr" if loss == "ce" else loss)(lambda z: model(z)[:, :2], x, y)


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
    "APGD": lambda model, x, y, **own: APGD(**SHORT)(model, x, y, **own),
    "APGD, train mode": lambda model, x, y, **own: APGD(**AGAIN)(model, x, y, attack_bn="train", **own),
    "APGD of a loss": lambda model, x, y, **own: APGD(**AGAIN).maximise(
        ce_of(model, y), x, model=model, **own
    ),
}
BARE = {
    "pgd": lambda loss, x: pgd(loss, x, generator=torch.Generator(), **SHORT),
    "fgsm": lambda loss, x: fgsm(loss, x, threat=SHORT["threat"]),
    "msd": lambda loss, x: msd(loss, x, attacks=PAIR, generator=torch.Generator()),
    "APGD": lambda loss, x: APGD(**SHORT).maximise(loss, x, torch.Generator()),
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
