"""Threat models, projections, steps and attacks against closed forms and independent solvers."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, image_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import kstest

from wcitrain.attacks import (
    ATTACK_LOSSES,
    Attack,
    ThreatModel,
    attack_loss,
    fgsm,
    msd,
    pgd,
    project,
    sparse_step,
    steepest_step,
    uniform_in_ball,
)
from wcitrain.objectives import Standard

NORMS = ["linf", "l2", "l1"]
ORDER = {"linf": math.inf, "l2": 2, "l1": 1}
DUAL = {"linf": 1, "l2": 2, "l1": math.inf}


def norms(delta: torch.Tensor, norm: str) -> torch.Tensor:
    """The norm of every example, [B]."""
    return torch.linalg.vector_norm(delta.flatten(1), ORDER[norm], dim=1)


# Projections ----------------------------------------------------------------------------------------------

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


def closest_by_bisection(z: np.ndarray, low: np.ndarray, high: np.ndarray, threat: ThreatModel) -> np.ndarray:
    """The closest point of a ball and box [low, high] around zero by bisection on the ball's multiplier."""
    if threat.norm == "linf":
        return np.clip(z, np.maximum(low, -threat.eps), np.minimum(high, threat.eps))
    if threat.norm == "l1":

        def point(s):  # threshold s max|z|
            return np.clip(np.sign(z) * np.maximum(np.abs(z) - s * np.abs(z).max(), 0), low, high)
    else:

        def point(s):  # scale 1 - s
            return np.clip((1 - s) * z, low, high)

    def size(s):
        return np.linalg.norm(point(s), ORDER[threat.norm])

    if size(0.0) <= threat.eps:
        return point(0.0)
    left, right = 0.0, 1.0
    for _ in range(100):
        centre = (left + right) / 2
        left, right = (centre, right) if size(centre) > threat.eps else (left, centre)
    return point(right)


@pytest.mark.parametrize("norm", NORMS)
@given(COORDINATES, RADII)
@MANY
def test_projections_are_the_closest_points(norm, coordinates, eps):
    """A projection that is merely inside (rescaled, ball and box in turn) makes an attack weak in silence."""
    z, x = batch_of(coordinates)
    threat = ThreatModel(norm, min(eps, 1.0) if norm == "linf" else eps)
    cases = [(project(z, threat), torch.full_like(x, -torch.inf), torch.full_like(x, torch.inf))]
    if norm == "l1":
        cases.append((project(z, threat, x), -x, 1 - x))
    for found, low, high in cases:
        expected = [
            closest_by_bisection(*row, threat)
            for row in zip(z.numpy(), low.numpy(), high.numpy(), strict=True)
        ]
        # float64 rounding of sums of at most 12 numbers below 6; l2's root halves the digits near zero.
        assert np.allclose(found.numpy(), expected, rtol=0, atol=1e-12 if norm != "l2" else 1e-10)


def test_the_l1_projection_solves_the_quadratic_program():
    """The bisection above shares its formula with the code; this solver knows nothing but the two sets."""
    generator = torch.Generator().manual_seed(3)
    for case in range(8):
        num = 1 + case % 4
        z, x = (
            2 * torch.randn(1, num, generator=generator).double(),
            torch.rand(1, num, generator=generator).double(),
        )
        threat = ThreatModel("l1", 0.1 + 0.3 * float(torch.rand(1, generator=generator)))
        goal = z[0].numpy()
        # delta = up - down with up, down >= 0 makes the l1 constraint linear.
        solved = minimize(
            lambda v, goal=goal, n=num: np.sum((v[:n] - v[n:] - goal) ** 2),
            np.zeros(2 * num),
            jac=lambda v, goal=goal, n=num: 2 * np.concatenate([v[:n] - v[n:] - goal, goal - v[:n] + v[n:]]),
            bounds=[(0, float(1 - p)) for p in x[0]] + [(0, float(p)) for p in x[0]],
            constraints={"type": "ineq", "fun": lambda v, eps=threat.eps: eps - np.sum(v)},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 300},
        )
        delta = solved.x[:num] - solved.x[num:]
        assert np.allclose(project(z, threat, x)[0].numpy(), delta, atol=2e-6)  # the solver's own accuracy


@pytest.mark.parametrize("norm", NORMS)
@given(COORDINATES, RADII, st.integers(0, 1000))
@MANY
def test_projections_are_inside_idempotent_and_never_increase_distances(norm, coordinates, eps, seed):
    """What every projection on a convex set is, also at points where two pieces of the formula meet."""
    z, x = batch_of(coordinates)
    other = z + torch.randn(z.shape, generator=torch.Generator().manual_seed(seed)).double()
    threat = ThreatModel(norm, min(eps, 1.0) if norm == "linf" else eps)
    for onto in (lambda d: project(d, threat), lambda d: project(d, threat, x)):
        point = onto(z)
        assert (norms(point, norm) <= threat.eps * (1 + 1e-12)).all()
        assert torch.allclose(onto(point), point, rtol=0, atol=1e-10)
        assert (norms(point - onto(other), "l2") <= norms(z - other, "l2") + 1e-10).all()
    if norm == "l1":
        moved = x + project(z, threat, x)
        assert moved.clamp(0, 1).equal(moved)


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_float32_images_are_projected_to_float32_precision(norm):
    """A threshold read off a cumulative sum of 2 x 3072 float32 numbers would be off by much more."""
    generator = torch.Generator().manual_seed(0)
    z, x = torch.randn(8, 3, 32, 32, generator=generator), torch.rand(8, 3, 32, 32, generator=generator)
    for eps in (0.5, 12.0):
        threat = ThreatModel(norm, eps)
        for found, exact in (
            (project(z, threat), project(z.double(), threat)),
            (project(z, threat, x), project(z.double(), threat, x.double())),
        ):
            assert found.dtype == torch.float32
            # In |z| - mu both are up to 5, so each moved coordinate is off by up to 2^-22, in l1 a dozen of
            # them at eps = 0.5.
            assert float((found - exact).abs().max()) < 1e-6
            assert torch.allclose(norms(found.double(), norm), torch.full((8,), eps).double(), rtol=6e-6)
    half = project(z.bfloat16(), ThreatModel(norm, 12.0), x.bfloat16())
    assert half.dtype == torch.bfloat16
    sizes = norms(half.double(), norm)
    assert torch.allclose(sizes, torch.full((8,), 12.0).double(), rtol=2**-8)  # one rounding each


# Steps and starts -----------------------------------------------------------------------------------------


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


def test_sparse_steps_move_the_coordinates_that_gain_most():
    """Against a loop over coordinates; a step spent on pixels that cannot move is lost."""
    generator = torch.Generator().manual_seed(0)
    g, x = torch.randn(6, 10, generator=generator).double(), torch.rand(6, 10, generator=generator).double()
    x[:, :3] = torch.tensor([0.0, 1.0, 0.999])
    for share, num in ((0.01, 1), (0.1, 1), (0.25, 3), (1.0, 10)):
        steps = sparse_step(g, share, x=x, step_size=0.2 * num)
        for row, step in enumerate(steps):
            room = [1 - p if v > 0 else p for v, p in zip(g[row].tolist(), x[row].tolist(), strict=True)]
            gain = [abs(v) * min(r, 0.2) for v, r in zip(g[row].tolist(), room, strict=True)]
            chosen = [i for i in sorted(range(10), key=lambda i: -gain[i])[:num] if gain[i] > 0]
            expected = torch.zeros(10).double()
            expected[chosen] = g[row, chosen].sign() / len(chosen)
            assert torch.equal(step, expected)
    outward, border = torch.tensor([[1.0, -2.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.5, 0.5]])
    assert (sparse_step(outward, 0.5, x=border, step_size=1.0) == 0).all(), "nothing can move"
    ties = sparse_step(torch.ones(1, 4), 0.25, x=torch.zeros(1, 4), step_size=1.0)
    assert torch.equal(ties, torch.full((1, 4), 0.25)), "ties share"
    with pytest.raises(ValueError, match="got share=0"):
        sparse_step(g, 0, x=x, step_size=1.0)


@pytest.mark.parametrize("norm", NORMS)
def test_random_starts_are_uniform_in_the_ball(norm):
    """Starts that crowd at the centre (or, in l1, near the axes) make restarts repeat each other."""
    dims, eps = 5, 0.5
    delta = uniform_in_ball(
        torch.zeros(4000, dims).double(), ThreatModel(norm, eps), torch.Generator().manual_seed(0)
    )
    # The share of the ball's volume inside radius r is (r/eps)^D: for uniform points it is uniform. By
    # symmetry all coordinates have one law and fair signs. Seven tests at 1e-3 fail a right sampler in less
    # than 1 % of the seeds.
    assert kstest(((norms(delta, norm) / eps) ** dims).numpy(), "uniform").pvalue > 1e-3
    for i in range(dims):
        assert kstest(delta[:, i].numpy(), -delta[:, (i + 1) % dims].numpy()).pvalue > 1e-3
    if norm == "l1":  # the faces are simplices, on which a coordinate's share is Beta(1, D - 1)
        share = delta[:, 0].abs() / norms(delta, "l1")
        assert kstest((1 - (1 - share) ** (dims - 1)).numpy(), "uniform").pvalue > 1e-3
    same = uniform_in_ball(torch.zeros(3, 1, 2, 2), ThreatModel(norm, eps), torch.Generator().manual_seed(0))
    assert same.shape == (3, 1, 2, 2)
    assert same.dtype == torch.float32


# Losses ---------------------------------------------------------------------------------------------------


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
    expected = [
        losses_by_hand(*row)[name] for row in zip(z.numpy(), y.tolist(), reference.numpy(), strict=True)
    ]
    found = attack_loss(name)(z, y, reference)
    assert np.allclose(found.numpy(), expected, rtol=1e-11, atol=1e-13)
    one_hot = F.one_hot(y, classes)
    for soft in (one_hot.double(), 0.6 * one_hot.float() + 0.4 * one_hot.roll(1, 1).float()):
        # Beyond one-hot targets, a class loss takes the largest; mixed cross-entropy is a mean of two.
        mixed = (
            soft * torch.stack([attack_loss("ce")(z, torch.full_like(y, c)) for c in range(classes)], 1)
        ).sum(1)
        assert torch.allclose(
            attack_loss(name)(z, soft, reference), mixed if name == "ce" else found, rtol=1e-6
        )


@pytest.mark.parametrize("name", list(ATTACK_LOSSES))
def test_attack_losses_are_computed_in_float32_at_least(name):
    """In bfloat16 a margin of 20 is known to 0.125, and most steps would see no change."""
    z, y, reference = 9 * torch.randn(20, 5), torch.randint(0, 5, (20,)), torch.randn(20, 5)
    found = attack_loss(name)(z.bfloat16(), y, reference.bfloat16())
    assert found.dtype == torch.float32
    assert torch.equal(found, attack_loss(name)(z.bfloat16().float(), y, reference.bfloat16().float()))
    assert attack_loss(name)(z.double(), y, reference.double()).dtype == torch.float64
    assert attack_loss(name)(z, F.one_hot(y, 5).double(), reference).dtype == torch.float32


def test_dlr_does_not_see_the_scale_of_the_logits():
    """Its purpose: logits times 1000 leave the cross-entropy without a gradient, and dlr as it was."""
    z, y = torch.randn(10, 5).double(), torch.randint(0, 5, (10,))
    dlr = attack_loss("dlr")
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
    attack_loss("kl")(z, y, clean).sum().backward()
    assert clean.grad is None
    assert torch.allclose(z.grad, z.softmax(1) - clean.softmax(1), rtol=1e-10)
    with pytest.raises(ValueError, match="kl: got no reference_logits"):
        attack_loss("kl")(z, y)


# Attacks --------------------------------------------------------------------------------------------------


def linear_loss(w: torch.Tensor):
    """Logistic loss of a linear model for label +1: rises along −w everywhere."""
    return lambda x: F.softplus(-(x.flatten(1) @ w))


def best_gain(w: torch.Tensor, x: torch.Tensor, threat: ThreatModel) -> torch.Tensor:
    """max <w, delta> over ball and box for w, x [B, D] (linf, l1): fill the steepest pixels first."""
    room = torch.where(w > 0, 1 - x, x)
    if threat.norm == "linf":
        return (w.abs() * room.clamp_max(threat.eps)).sum(1)
    slope, order = w.abs().sort(dim=1, descending=True)
    room = room.gather(1, order)
    left = (threat.eps - room.cumsum(1) + room).clamp_min(0)
    return (slope * torch.minimum(room, left)).sum(1)


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


def test_the_l1_attack_fills_the_steepest_pixels_one_after_the_other():
    """If full pixels go on taking steps, or too many share each, it ends far below the optimum."""
    generator = torch.Generator().manual_seed(0)
    w, x = (torch.randn(16, 24, generator=generator).double() for _ in "wx")
    x = x.sigmoid()
    threat = ThreatModel("l1", 2.0)
    step_size = 0.02
    x_adv = pgd(
        lambda z: (z * w).sum(1), x, threat=threat, num_steps=400, step_size=step_size, generator=generator
    )
    gap = 1 - ((x_adv - x) * w).sum(1) / best_gain(w, x, threat)
    assert (gap > -1e-12).all()
    # Two of 24 pixels move a step, by 0.01 each; about ten (eps over the mean room, doubled) lack a step.
    assert gap.max() < 10 * 0.01 / 2.0


def test_large_l1_steps_use_the_whole_radius():
    """Projecting on the ball first spends the radius on what the box cuts off: the attack ends inside."""
    w, x = torch.linspace(1, 2, 20).double(), torch.full((1, 20), 0.7).double()  # room for 0.3 upwards
    threat = ThreatModel("l1", 2.0)
    for num_steps in (4, 5, 8):  # two pixels a step: full after three steps, then the ball binds
        x_adv = pgd(
            lambda z: (z * w).sum(1),
            x,
            threat=threat,
            num_steps=num_steps,
            step_size=2.0,
            start="none",
            l1_share=0.1,
        )
        assert float(norms(x_adv - x, "l1")) == pytest.approx(2.0, rel=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_the_default_advice_for_the_step_size_reaches_the_optimum(norm):
    """2.5 eps / num_steps, as documented, must do in every norm on a linear model away from the box."""
    w, x = torch.randn(4, 30).double(), torch.full((4, 30), 0.5).double()
    threat = ThreatModel(norm, 0.2)
    x_adv = pgd(
        lambda z: (z * w).sum(1), x, threat=threat, num_steps=20, step_size=2.5 * 0.2 / 20, l1_share=1 / 30
    )
    best = 0.2 * torch.linalg.vector_norm(w, DUAL[norm], dim=1)
    assert (((x_adv - x) * w).sum(1) > 0.95 * best).all()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("loss", "start"),
    [
        (loss, start)
        for loss in ATTACK_LOSSES
        for start in ("uniform", "gaussian", "none")
        if (loss, start) != ("kl", "none")
    ],
)
def test_every_attack_stays_in_ball_and_box_and_raises_its_loss(norm, loss, start):
    """Near the border of [0, 1] the box binds too."""
    model = BatchNormNet().eval()
    x = image_batch(20)[0]
    x[:10] = x[:10].round()  # every pixel on the border
    # all right at first: an example whose class is already last has no way up under dlr
    y = model(x).argmax(1)
    eps = {"linf": 0.2, "l2": 0.6, "l1": 2.0}[norm]
    attack = Attack(ThreatModel(norm, eps), num_steps=6, step_size=eps / 4, start=start, loss=loss)
    x_adv = attack(model, x, y, torch.Generator().manual_seed(0))
    assert not x_adv.requires_grad
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    # float32 rounding of x + delta, summed over 16 pixels in l1
    assert (norms(x_adv - x, norm) <= eps + 2e-6).all()
    if loss != "dlr":
        assert (norms(x_adv - x, norm) > eps / 2).float().mean() > 0.8
    with torch.no_grad():
        before, after = (attack_loss(loss)(model(images), y, model(x)) for images in (x, x_adv))
    assert (after > before).all()


def test_attacks_start_where_they_say():
    """TRADES' start is noise of 0.001, which must not leave a smaller ball during a warm-up."""
    x, y = torch.full((50, 3, 8, 8), 0.5), torch.zeros(50, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    threat = ThreatModel("linf", 0.1)

    def started(**kwargs):
        return (
            Attack(**{"threat": threat, "num_steps": 0, **kwargs})(lambda z: z.flatten(1), x, y, generator)
            - x
        )

    noise = started(start="gaussian")
    assert float(noise.std()) == pytest.approx(0.001, rel=4 / (2 * 9600) ** 0.5)  # four standard errors
    assert float(noise.mean()) == pytest.approx(0, abs=4 * 0.001 / 9600**0.5)
    # rounding at 0.5
    assert started(start="gaussian", threat=ThreatModel("linf", 1e-4)).abs().max() <= 1e-4 + 6e-8
    assert (started(start="none") == 0).all()
    assert 0.09 < started(start="uniform").abs().max() <= 0.1 + 6e-8


@pytest.mark.parametrize("loss", ["ce", "kl"])
@pytest.mark.parametrize("num_restarts", [1, 3])
def test_the_passes_are_counted_truly(loss, num_restarts):
    """The cost of a method is reported as a multiple of plain adversarial training."""
    forwards = backwards = 0

    def model(images):
        nonlocal forwards
        forwards += 1
        if images.requires_grad:
            images.register_hook(count)
        return images.flatten(1)[:, :3] ** 2

    def count(_):
        nonlocal backwards
        backwards += 1

    attack = Attack(ThreatModel(), num_steps=4, num_restarts=num_restarts, loss=loss, start="gaussian")
    attack(model, *image_batch())
    assert (forwards, backwards) == attack.passes()


def test_an_attack_is_pgd_with_its_settings():
    """A setting that is not handed on has no effect and nobody notices."""
    model, (x, y) = BatchNormNet().eval(), image_batch()
    clean = model(x).detach()
    kwargs = {"num_steps": 3, "step_size": 0.1, "num_restarts": 2, "l1_share": 0.3}
    for norm in NORMS:
        for name, loss in ATTACK_LOSSES.items():
            attack = Attack(ThreatModel(norm, 0.3), loss=name, **kwargs)
            expected = pgd(
                lambda z, loss=loss: loss(model(z), y, clean),
                x,
                threat=attack.threat,
                generator=torch.Generator().manual_seed(1),
                **kwargs,
            )
            assert torch.equal(attack(model, x, y, torch.Generator().manual_seed(1)), expected)
    dense, thin = (
        Attack(attack.threat, 3, 0.1, "none", l1_share=share)(model, x, y) - x for share in (1.0, 0.07)
    )
    assert (dense != 0).sum() > 2 * (thin != 0).sum()


def test_an_attack_without_radius_is_the_identity():
    """The warm-up of eps shrinks the ball, and starts at 0."""
    threat = ThreatModel("l1", 12.0)
    assert threat.scaled(1) is threat
    assert str(threat) == "l1 12"
    assert threat.scaled(0.25) == ThreatModel("l1", 3.0)
    model, (x, y) = BatchNormNet().eval(), image_batch()
    for norm in NORMS:
        for start in ("uniform", "gaussian"):
            assert torch.equal(Attack(ThreatModel(norm, 0.5).scaled(0), start=start)(model, x, y), x)
    with pytest.raises(ValueError, match=r"ThreatModel.scaled: got 1.5"):
        threat.scaled(1.5)


# Unions of balls ------------------------------------------------------------------------------------------

UNION = [ThreatModel("linf", 0.1), ThreatModel("l2", 0.5), ThreatModel("l1", 1.0)]


def test_msd_takes_the_best_step_for_each_example():
    """Against a plain loop over examples and threats, each of which is one step of pgd."""
    w, x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0)), torch.rand(8, 3, 4, 4)
    w = torch.cat([w, torch.zeros(18, 8)]).double() * torch.linspace(0.2, 3, 48).double().unsqueeze(1) ** 2
    x = x.double()

    def loss(z):
        return torch.tanh(z.flatten(1) @ w).square().sum(1)

    step_sizes, expected, chosen = [0.02, 0.1, 0.2], x, set()
    for _ in range(3):
        gradient = torch.autograd.grad(loss(leaf := expected.clone().requires_grad_()).sum(), leaf)[0]
        rows = []
        for n in range(8):
            candidates = []
            for threat, size in zip(UNION, step_sizes, strict=True):
                at, g = expected[n : n + 1], gradient[n : n + 1]
                unit = steepest_step(g, threat, x=at, step_size=size, l1_share=0.05)
                delta = project(at + size * unit - x[n : n + 1], threat, x[n : n + 1])
                candidates.append((x[n : n + 1] + delta).clamp(0, 1))
            best = max(range(3), key=lambda t: float(loss(candidates[t])))
            chosen.add(best)
            rows.append(candidates[best])
        expected = torch.cat(rows)
    found = msd(loss, x, threats=UNION, step_sizes=step_sizes, num_steps=3, start="none")
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)
    assert len(chosen) > 1, "the example should need more than one threat"


def test_msd_ends_in_the_union_and_beats_every_single_attack_on_a_linear_model():
    """Greedy choices guarantee nothing for one example; on average the union must not be worse."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 24, generator=generator).double(), torch.rand(64, 24, generator=generator).double()

    def gain(z):
        return ((z - x) * w).sum(1)

    num_steps = 60
    step_sizes = [2.5 * threat.eps / num_steps for threat in UNION]
    x_adv = msd(gain, x, threats=UNION, step_sizes=step_sizes, num_steps=num_steps, generator=generator)
    assert torch.stack([norms(x_adv - x, t.norm) <= t.eps * (1 + 1e-12) for t in UNION]).any(0).all()
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    for threat, size in zip(UNION, step_sizes, strict=True):
        single = pgd(gain, x, threat=threat, num_steps=num_steps, step_size=size, generator=generator)
        assert gain(x_adv).mean() >= gain(single).mean()


def test_msd_with_one_threat_is_pgd_and_costs_what_it_says():
    """The steps are the same lines; num_steps (1 + T) forward and num_steps backward passes."""
    model, (x, y) = BatchNormNet().eval(), image_batch()
    calls = []

    def loss(z):
        calls.append(z.requires_grad)
        return F.cross_entropy(model(z), y, reduction="none")

    for threat in UNION:
        start = {"num_steps": 3, "generator": torch.Generator().manual_seed(2)}
        expected = pgd(loss, x, threat=threat, step_size=0.1, **start)
        start["generator"].manual_seed(2)
        assert torch.equal(msd(loss, x, threats=[threat], step_sizes=[0.1], **start), expected)
    calls.clear()
    starts = msd(loss, x, threats=UNION, step_sizes=[0.1] * 3, num_steps=0)
    assert torch.stack([norms(starts - x, t.norm) <= t.eps + 1e-6 for t in UNION]).any(0).all()
    assert not calls
    msd(loss, x, threats=UNION, step_sizes=[0.1] * 3, num_steps=4)
    assert (len(calls), sum(calls)) == (4 * (1 + 3), 4)
    for threats, sizes in (([], []), (UNION, [0.1])):
        with pytest.raises(ValueError, match="one step size for each"):
            msd(loss, x, threats=threats, step_sizes=sizes)


# What all attacks share -----------------------------------------------------------------------------------


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
        [
            loss(pgd(loss, x, threat=threat, num_steps=2, step_size=0.05, generator=generator))
            for _ in range(4)
        ]
    )
    assert torch.equal(several, singles.max(0).values)
    assert (singles.argmax(0) != singles.argmax(0)[0]).any(), (
        "the worst restart should differ between examples here"
    )


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


def test_the_standard_objective_does_nothing_to_images():
    """No adversary, no cost."""
    x, y = image_batch()
    model = BatchNormNet().eval()
    objective = Standard(label_smoothing=0.1)
    assert objective.perturb(model, x, y) is x
    assert torch.equal(
        objective.loss(model, x, x, y).total, F.cross_entropy(model(x), y, label_smoothing=0.1)
    )


def test_impossible_threats_and_losses_are_refused():
    """eps = 8 on [0, 1] images destroys them silently elsewhere."""
    with pytest.raises(ValueError, match="Did you mean 8/255"):
        ThreatModel("linf", 8)
    with pytest.raises(ValueError, match="got 'l7'; expected"):
        ThreatModel("l7", 0.1)
    for norm, eps in (("l2", 128), ("l1", 20000)):
        with pytest.raises(
            ValueError, match=rf"ThreatModel.eps: got {eps}; expected at most .* under {norm}"
        ):
            ThreatModel(norm, eps)
    with pytest.raises(ValueError, match=r"ThreatModel.eps: got nan"):
        ThreatModel("l2", float("nan"))
    x, y = image_batch()
    model = BatchNormNet().eval()
    with pytest.raises(ValueError, match="one loss per example"):
        pgd(lambda z: F.cross_entropy(model(z), y), x, threat=ThreatModel())
    with pytest.raises(ValueError, match="num_steps"):
        pgd(lambda z: z.flatten(1).sum(1), x, threat=ThreatModel(), num_steps=-1)
    with pytest.raises(ValueError, match=r"expected \[0, 1\]"):
        pgd(lambda z: z.flatten(1).sum(1), torch.randn(3, 1, 4, 4) * 3, threat=ThreatModel())
    with pytest.raises(ValueError, match=r"msd: got images from"):
        msd(
            lambda z: z.flatten(1).sum(1),
            torch.randn(3, 1, 4, 4) * 3,
            threats=[ThreatModel()],
            step_sizes=[0.1],
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "cw"}, "Attack.loss: got 'cw'; expected 'ce', 'margin', 'dlr' or 'kl'"),
        ({"start": "random"}, "Attack.start: got 'random'; expected 'uniform', 'gaussian' or 'none'"),
        ({"num_steps": -1}, "Attack.num_steps: got -1"),
        ({"num_restarts": 0}, "Attack.num_restarts: got 0"),
        ({"l1_share": 0.0}, r"Attack.l1_share: got 0.0"),
        ({"loss": "kl", "start": "none"}, "where the KL's gradient is zero"),
    ],
)
def test_impossible_attacks_are_refused_before_the_first_batch(settings, message):
    """A KL attack from the clean image takes no step at all: training would be clean training, silently."""
    with pytest.raises(ValueError, match=message):
        Attack(ThreatModel(), **settings)
