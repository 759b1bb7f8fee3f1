"""Linear logistic regression under attack: closed forms against autograd, our own PGD and the theorem."""

import pytest
import torch
import torch.nn.functional as F
from logistic import RobustLogistic
from oracles import dense_hessian
from torch import nn

from wcitrain.attacks import ThreatModel, pgd


def gaussians(mu: float = 3.0, n: int = 400, d: int = 20) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes with means ±mu e_1 and standard deviation 0.8."""
    generator = torch.Generator().manual_seed(0)
    y = torch.cat([torch.ones(n // 2), -torch.ones(n // 2)]).double()
    x = 0.8 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    x[:, 0] += mu * y
    return x, y


def small() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights [4] away from zero, examples [30, 4] well inside the image box, labels."""
    generator = torch.Generator().manual_seed(0)
    x = 0.4 + 0.2 * torch.rand(30, 4, generator=generator, dtype=torch.float64)
    y = torch.randint(0, 2, (30,), generator=generator).double() * 2 - 1
    w = torch.tensor([1.5, -2.0, 0.7, 3.0], dtype=torch.float64)
    return w, x, y


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_hessian_is_that_of_autograd(norm):
    """The closed forms are derived by hand: autograd twice through the loss gives the answer (float64)."""
    w, x, y = small()
    problem = RobustLogistic(x, y, 0.3, norm)
    hessian = torch.autograd.functional.hessian(problem.loss, w)
    torch.testing.assert_close(problem.hessian(w), hessian, rtol=1e-12, atol=1e-14)
    largest = float(torch.linalg.eigvalsh(hessian)[-1])
    assert problem.curvature(w).lambda_max == pytest.approx(largest, rel=1e-12)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_pgd_finds_the_worst_case_and_the_dense_hessian_its_fixed_part(norm):
    """The formulas must speak of what the library computes: its attack, its Hessian at stored examples.

    200 steps of eps / 8: a linear model's gradient points the same way everywhere, so linf ends in the corner
    (up to the rounding of clamps), and under l2 what is left of the start shrinks by eps / (eps + step) = 8/9
    each time, to (8/9)^200 < 1e-10.
    """
    w, x, y = small()
    eps = 0.05
    threat, problem = ThreatModel(norm, eps), RobustLogistic(x, y, eps, norm)
    model = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w)

    def losses(images):
        return F.softplus(-y * model(images).squeeze(1))

    generator = torch.Generator().manual_seed(0)
    x_adv = pgd(losses, x, threat=threat, num_steps=200, step_size=eps / 8, generator=generator)
    torch.testing.assert_close(x_adv, problem.worst_examples(w), rtol=0, atol=1e-9)
    loss = losses(x_adv).mean()
    assert float(loss.detach()) == pytest.approx(float(problem.loss(w)), rel=1e-9)
    fixed = dense_hessian(loss, {"w": model.weight})["w"]
    torch.testing.assert_close(fixed, problem.hessian(w, fixed=True), rtol=1e-7, atol=1e-10)
    extra = problem.hessian(w) - fixed
    assert (extra.trace() > 1e-3) == (norm == "l2")  # linf: the attack does not turn with the weights


@pytest.mark.parametrize(("norm", "eps"), [("l2", 0.0), ("l2", 0.8), ("linf", 0.4)])
def test_training_ends_at_the_minimum(norm, eps):
    """Half-trained weights make curves depend on the stopping time: no step may improve the objective."""
    problem = RobustLogistic(*gaussians(), eps, norm)

    def objective(v):
        return problem.loss(v) + 5e-4 * v.square().sum(-1)

    w = problem.fit(weight_decay=1e-3)
    directions = torch.randn(200, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    directions = torch.cat([directions, torch.eye(20).double(), -torch.eye(20).double(), w[None], -w[None]])
    # 1e-4: gradient tolerance 1e-7 · 1e-4 is far below the curvature's 1e-3 · 1e-8
    for size in (1e-4, 1e-2, 1.0):
        assert (objective(w + size * directions) > objective(w)).all()


def test_the_theorem_separable_classes():
    """Yamada et al.: l2 adversarial training sharpens more the larger eps, and faster than by noise.

    Class margin 3, weight decay 1e-3. λ_max falls a little first, as ‖w‖ grows, and rises from eps = 0.4 on.
    """
    x, y = gaussians()
    problems = [RobustLogistic(x, y, eps) for eps in (0.0, 0.2, 0.4, 0.6, 0.8, 1.0, 1.2)]
    rows = []
    for problem in (*problems, problems[-1].noisy(num_draws=5)):
        w = problem.fit()
        c = problem.curvature(w)
        rows.append([c.lambda_max, c.trace, c.wci, problem.rise(w)])
    table, control = torch.tensor(rows).split([len(problems), 1])
    assert (table[1:, 1:] > table[:-1, 1:]).all()
    assert (table[3:, 0] > table[2:-1, 0]).all()
    assert (table[-1] / table[0] > 2.5).all()
    assert (control / table[0] < 1.6).all()
