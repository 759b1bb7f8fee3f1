"""Linear logistic regression under attack: closed forms against autograd, our own PGD and the theorem."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wcitrain.attacks import ThreatModel, pgd
from wcitrain.curvature import dense_hessian
from wcitrain.measures.logistic import (
    fit_logistic,
    largest_eps,
    logistic_curvature,
    logistic_gradient,
    logistic_hessian,
    logistic_loss,
    normalised_rise,
    random_noise,
    worst_examples,
)


def gaussians(mu: float = 3.0, seed: int = 0, n: int = 400, d: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes with means ±mu e_1 and standard deviation 0.8."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.cat([torch.ones(n // 2), -torch.ones(n // 2)]).double()
    x = 0.8 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    x[:, 0] += mu * y
    return x, y


def small(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [4] away from zero, examples [30, 4] well inside the image box, labels."""
    generator = torch.Generator().manual_seed(seed)
    x = 0.4 + 0.2 * torch.rand(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (30,), generator=generator).double() * 2 - 1
    w = torch.tensor([1.5, -2.0, 0.7, 3.0], dtype=torch.float64)
    return w, x, y


def test_the_point_with_known_numbers():
    """Numbers worked out independently: a slip in one of the Hessian's terms is seen (10 printed digits)."""
    one = torch.ones(1).double()
    found = logistic_curvature(torch.tensor([3.0, 4.0]).double(), torch.ones(1, 2).double(), one, eps=0.5)
    assert found.loss == pytest.approx(0.0110477448, abs=6e-11)
    assert found.trace == pytest.approx(0.0103349895, abs=6e-11)
    assert found.fixed_trace == pytest.approx(0.0092362953, abs=6e-11)
    assert found.trace - found.fixed_trace == pytest.approx(0.0010986943, abs=1.1e-10)
    assert found.wci == pytest.approx(5 * math.sqrt(0.0103349895), rel=1e-8)
    assert found.fixed_wci == pytest.approx(5 * math.sqrt(0.0092362953), rel=1e-8)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_gradient_and_hessian_are_those_of_autograd(norm):
    """The closed forms are derived by hand: autograd twice through the loss gives the answer (float64)."""
    w, x, y = small()
    w = w.requires_grad_()
    loss = logistic_loss(w, x, y, 0.3, norm)
    (gradient,) = torch.autograd.grad(loss, w, create_graph=True)
    hessian = torch.stack([torch.autograd.grad(g, w, retain_graph=True)[0] for g in gradient])
    w = w.detach()
    torch.testing.assert_close(
        logistic_gradient(w, x, y, 0.3, norm), gradient.detach(), rtol=1e-12, atol=1e-14
    )
    torch.testing.assert_close(logistic_hessian(w, x, y, 0.3, norm), hessian, rtol=1e-12, atol=1e-14)
    found = logistic_curvature(w, x, y, 0.3, norm)
    assert found.lambda_max == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_finds_the_worst_case_and_the_dense_hessian_its_fixed_part(norm):
    """The formulas must speak of what the library computes: its attack, its Hessian at stored examples.

    200 steps of eps / 8: a linear model's gradient points the same way everywhere, so linf ends in the corner
    (up to the rounding of clamps), and under l2 what is left of the start shrinks by eps / (eps + step) = 8/9
    each time, to (8/9)^200 < 1e-10.
    """
    w, x, y = small()
    eps = 0.05
    threat = ThreatModel(norm, eps)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w)

    def losses(images):
        return F.softplus(-y * model(images).squeeze(1))

    generator = torch.Generator().manual_seed(0)
    x_adv = pgd(losses, x, threat=threat, num_steps=200, step_size=eps / 8, generator=generator)
    torch.testing.assert_close(x_adv, worst_examples(w, x, y, eps, norm), rtol=0, atol=1e-9)
    loss = losses(x_adv).mean()
    assert float(loss.detach()) == pytest.approx(float(logistic_loss(w, x, y, eps, norm)), rel=1e-9)
    fixed = dense_hessian(loss, {"w": model.weight})["w"]
    torch.testing.assert_close(fixed, logistic_hessian(w, x, y, eps, norm, fixed=True), rtol=1e-7, atol=1e-10)
    extra = logistic_hessian(w, x, y, eps, norm) - fixed
    assert (extra.trace() > 1e-3) == (norm == "l2")  # linf: the attack does not turn with the weights


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.0), ("l2", 0.8), ("linf", 0.4)])
def test_training_ends_at_the_minimum(norm, eps):
    """Half-trained weights make curves depend on the stopping time: no step may improve the objective."""
    x, y = gaussians()

    def objective(v):
        return logistic_loss(v, x, y, eps, norm) + 5e-4 * v.square().sum(-1)

    w = fit_logistic(x, y, eps, norm, weight_decay=1e-3)
    directions = torch.randn(200, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    directions = torch.cat([directions, torch.eye(20).double(), -torch.eye(20).double(), w[None], -w[None]])
    # 1e-4: gradient tolerance 1e-7 · 1e-4 is far below the curvature's 1e-3 · 1e-8
    for size in (1e-4, 1e-2, 1.0):
        assert (objective(w + size * directions) > objective(w)).all()


def test_linf_training_drops_useless_weights_exactly():
    """An optimiser that smooths over the kinks leaves 20 small weights, whose signs cost eps each."""
    x, y = gaussians()
    w = fit_logistic(x, y, 1.0, "linf")
    assert w[0] > 1
    assert (w[1:] == 0).all()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_theorem_separable_classes(seed):
    """Yamada et al.: l2 adversarial training sharpens more the larger eps, and faster than by noise.

    Class margin 3, weight decay 1e-3. λ_max falls a little first, as ‖w‖ grows, and rises from eps = 0.4 on.
    """
    x, y = gaussians(3.0, seed)
    grid = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)
    rows, control = [], []
    for eps in grid:
        w = fit_logistic(x, y, eps)
        c = logistic_curvature(w, x, y, eps)
        rise = normalised_rise(lambda v, e=eps: logistic_loss(v, x, y, e), w)
        rows.append([c.lambda_max, c.trace, c.wci, rise])
    x_noisy, y_noisy = random_noise(x, y, grid[-1], num_draws=5)
    w = fit_logistic(x_noisy, y_noisy)
    c = logistic_curvature(w, x_noisy, y_noisy)
    control = torch.tensor(
        [c.lambda_max, c.trace, c.wci, normalised_rise(lambda v: logistic_loss(v, x_noisy, y_noisy), w)]
    )
    table = torch.tensor(rows)
    assert (table[1:, 1:] > table[:-1, 1:]).all()
    assert (table[3:, 0] > table[2:-1, 0]).all()
    assert (table[-1] / table[0] > 2.5).all()
    assert (control / table[0] < 1.6).all()


def test_the_theorem_overlapping_classes():
    """λ_max and trace rise with eps here too, but the weights shrink: normalised measures turn down."""
    x, y = gaussians(1.5)
    found = []
    for eps in (0.0, 0.4, 0.8, 1.2):
        c = logistic_curvature(fit_logistic(x, y, eps), x, y, eps)
        found.append([c.lambda_max, c.trace, c.wci])
    table = torch.tensor(found)
    assert (table[1:, :2] > table[:-1, :2]).all()
    assert table[2, 2] > table[0, 2]
    assert table[3, 2] < table[2, 2]


def test_rise_is_half_the_squared_index_over_the_dimension():
    """Ties landscape and index: (a²/2) WCI²/d; truncation a² per cent at a = 0.01; 4 standard errors."""
    w, x, y = small()
    a, d, num = 0.01, 4, 4000
    rise = normalised_rise(lambda v: logistic_loss(v, x, y, 0.3), w, relative_size=a, num_directions=num)
    expected = a**2 * logistic_curvature(w, x, y, 0.3).wci ** 2 / (2 * d)
    # uᵀHu/|u|² of a rank-one-like H has a relative deviation of at most sqrt(2 (d − 1)/(d + 2)) = 1.
    assert rise == pytest.approx(expected, rel=4 / math.sqrt(num) + 1e-3)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_noise_has_the_adversarys_size_and_no_direction(norm):
    """A control of another size shows nothing; its mean over the draws is zero within 4 standard errors."""
    x, y = gaussians()
    x_noisy, y_noisy = random_noise(x, y, 0.5, norm, num_draws=4)
    noise = x_noisy - x.repeat(4, 1)
    size = noise.norm(dim=1) if norm == "l2" else noise.abs().amax(1)
    torch.testing.assert_close(size, torch.full((1600,), 0.5).double(), rtol=1e-12, atol=0)
    assert torch.equal(y_noisy, y.repeat(4))
    assert (noise.mean(0).abs() < 4 * noise.std(0) / 40).all()
    assert torch.equal(x_noisy, random_noise(x, y, 0.5, norm, num_draws=4)[0])
    assert not torch.equal(x_noisy, random_noise(x, y, 0.5, norm, num_draws=4, seed=1)[0])


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_beyond_the_largest_eps_zero_is_best(norm):
    """Just below it there is still something to learn, at it the Hessian would divide by zero."""
    x, y = gaussians(1.0)
    limit = largest_eps(x, y, norm)
    w = fit_logistic(x, y, 0.98 * limit, norm)
    assert 0 < w.norm() < 0.2
    with pytest.raises(ValueError, match="from where on w = 0 is best"):
        fit_logistic(x, y, limit, norm)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": torch.arange(400.0) % 2}, "expected −1 and \\+1"),
        ({"y": torch.ones(3)}, "Flatten images"),
        ({"eps": -0.1}, "finite radius >= 0"),
        ({"norm": "l1"}, "'l2' or 'linf'"),
        ({"weight_decay": 0.0}, "weight_decay=0.0; expected a number > 0"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    """Labels 0 and 1 would silently train on half of the data."""
    x, y = gaussians()
    arguments = {"x": x, "y": y, "eps": 0.1, "norm": "l2"} | change
    with pytest.raises(ValueError, match=message):
        fit_logistic(**arguments)


def test_an_unfinished_fit_is_an_error():
    """Curvature of weights that are still moving is that of nothing."""
    x, y = gaussians()
    with pytest.raises(RuntimeError, match="after 2 iterations"):
        fit_logistic(x, y, 0.5, max_iterations=2)
    with pytest.raises(ValueError, match="got w = 0"):
        logistic_curvature(torch.zeros(20), x, y, 0.5)
