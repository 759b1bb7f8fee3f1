"""The objectives' losses against formulas in float64, finite differences, and the dense curvature."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, image_batch
from objective_cases import FEW, LINF, OBJECTIVE_CASES, SmallNet
from oracles import exact_gauss_newton_trace, exact_trace
from torch import nn

from wcitrain.attacks import uniform_in_ball
from wcitrain.curvature import Output
from wcitrain.objectives import ALP, CURE, MART, TRADES, GradAlign, InputGradient
from wcitrain.objectives.pairing import kl_output

SEED = 11


def small_net(activation=torch.tanh) -> SmallNet:
    torch.manual_seed(0)
    return SmallNet(activation, scale=3.0).double()


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p for n, p in model.named_parameters() if p.ndim == 2}


def batch(n: int = 8):
    """Images, images beside them, classes and soft targets."""
    x, y = image_batch(n)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).sign()).clamp(0, 1)
    soft = torch.rand(n, 3, generator=torch.Generator().manual_seed(3)).double()
    return x.double(), x_adv.double(), y, soft / soft.sum(1, keepdim=True)


@pytest.mark.parametrize("is_soft", [False, True])
def test_losses_are_their_formulas(is_soft):
    """Reductions, signs, which branch is which."""
    model, (x, x_adv, y, soft) = small_net(), batch()
    targets = soft if is_soft else F.one_hot(y, 3).double()
    p, q = model(x).softmax(1), model(x_adv).softmax(1)
    kl = (p * (p / q).log()).sum(1)
    wrong = torch.stack([q[:, [k for k in range(3) if k != c]].amax(1) for c in range(3)], 1)
    ce, ce_adv = -(targets * p.log()).sum(1), -(targets * q.log()).sum(1)
    bce = ce_adv - (targets * (1.0001 - wrong).log()).sum(1)
    formulas = {
        TRADES(beta=4.0): ce + 4 * kl,
        MART(beta=5.0): bce + 5 * kl * (1 - (targets * p).sum(1)),
        ALP(weight=0.7): (ce + ce_adv) / 2 + 0.7 * (model(x) - model(x_adv)).square().mean(1),
    }
    for objective, formula in formulas.items():
        total = objective.loss(model, x, x_adv, soft if is_soft else y).total
        assert total.item() == pytest.approx(formula.mean().item(), rel=1e-12)


@pytest.mark.parametrize("name", [name for name, case in OBJECTIVE_CASES.items() if case.is_gradient])
def test_gradients_are_those_of_the_value(name):
    """Central differences: a detached clean branch would be another method; also through input gradients."""
    objective, model = OBJECTIVE_CASES[name].make(), small_net()
    x, x_adv, _, soft = batch()
    x_adv = torch.cat([x_adv, x, x]) if name == "union, average" else x_adv
    weights, generator = list(model.parameters()), torch.Generator().manual_seed(5)
    directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in weights]

    def value() -> torch.Tensor:
        torch.manual_seed(SEED)
        return objective.loss(model, x, x_adv, soft).total

    gradients = torch.autograd.grad(value(), weights, allow_unused=True, materialize_grads=True)
    slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
    h = 1e-6  # truncation h², rounding 1e-16 / h: about 1e-10; no kink of sign and max is crossed within it
    values = []
    for step in (h, -2 * h):
        with torch.no_grad():
            torch._foreach_add_(weights, directions, alpha=step)
        values.append(value().item())
    assert slope == pytest.approx((values[0] - values[1]) / (2 * h), rel=1e-6)


def input_gradients(model, x, y, create_graph):
    """One example at a time: the gradient of its own loss."""
    gradients = []
    for image, target in zip(x, y, strict=True):
        image = image.clone().requires_grad_()
        loss = F.cross_entropy(model(image[None]), target[None])
        gradients.append(torch.autograd.grad(loss, image, create_graph=create_graph)[0].flatten())
    return gradients


def test_grad_align_is_its_formula():
    """One minus the cosine with the gradient at the image, held fixed; the other one is differentiated."""
    model, (x, x_adv, y, _) = small_net(), batch()
    torch.manual_seed(SEED)
    loss = GradAlign(LINF, weight=0.3).loss(model, x, x_adv, y)
    torch.manual_seed(SEED)
    moved = x + uniform_in_ball(x, LINF)
    here, there = input_gradients(model, x, y, False), input_gradients(model, moved, y, True)
    cosines = [a @ b / (a.norm() * b.norm()) for a, b in zip(here, there, strict=True)]
    expected = F.cross_entropy(model(x_adv), y) + 0.3 * (1 - torch.stack(cosines)).mean()
    assert loss.total.item() == pytest.approx(expected.item(), rel=1e-12)
    assert float(loss.parts["alignment"]) > 1e-3  # the network is curved, the claim is not empty
    weights = [model.first.weight, model.second.weight]
    pairs = zip(*(torch.autograd.grad(total, weights) for total in (loss.total, expected)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)


def test_cure_is_its_formula():
    """Gradients of each example's own loss, a step of l2 length h along their sign."""
    model, (x, _, y, _) = small_net(), batch()
    here = input_gradients(model, x, y, True)
    signs = [g.detach().sign() for g in here]
    moved = torch.stack([i + 0.5 * (s / s.norm()).view(1, 4, 4) for i, s in zip(x, signs, strict=True)])
    squares = [(a - b) @ (a - b) for a, b in zip(input_gradients(model, moved, y, True), here, strict=True)]
    expected = torch.stack(squares).mean().item()
    assert CURE(h=0.5).penalty(model, x, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("norm", "order"), [("l2", 2), ("l1", 1)])
def test_input_gradient_of_a_linear_model_is_the_closed_form(norm, order):
    """For logits W x the input gradient is Wᵀ (p − y)."""
    torch.manual_seed(0)
    model, (x, _, y, _) = nn.Sequential(nn.Flatten(), nn.Linear(16, 3)).double(), batch()
    error = model(x).softmax(1) - F.one_hot(y, 3)
    gradient = (error @ model[1].weight).detach().numpy()
    expected = np.mean([np.linalg.norm(g, order) ** order for g in gradient])
    assert InputGradient(norm=norm).penalty(model, x, y).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", [name for name, case in OBJECTIVE_CASES.items() if case.is_exact])
def test_outputs_describe_the_loss(name):
    """With one Output missing, or a wrong weight, the index would be that of another loss."""
    objective, model = OBJECTIVE_CASES[name].make(), small_net(torch.relu)
    x, x_adv, y, _ = batch()
    x_adv = torch.cat([x_adv, x, x]) if name == "union, average" else x_adv
    loss, layers = objective.loss(model, x, x_adv, y), matrices(model)
    found, expected = (trace(loss, layers) for trace in (exact_gauss_newton_trace, exact_trace))
    assert torch.allclose(found, expected, rtol=1e-9)


@pytest.mark.parametrize("objective", [TRADES(**FEW), MART(**FEW)], ids=["trades", "mart"])
def test_the_divergence_has_no_curvature_where_nothing_is_perturbed(objective):
    """At x_adv = x the KL is zero for all weights; the adversarial branch alone would give it an index."""
    model, (x, _, y, _) = small_net(torch.relu), batch()
    loss, layers = objective.loss(model, x, x, y), matrices(model)
    cross_entropy = exact_gauss_newton_trace(Output(model(x)), layers)
    assert torch.allclose(exact_gauss_newton_trace(loss, layers), cross_entropy, rtol=1e-9)
    if isinstance(objective, TRADES):
        assert torch.allclose(exact_trace(loss, layers), cross_entropy, rtol=1e-9)


def test_the_divergence_is_described_by_its_joint_hessian():
    """In both branches' logits, p = q: blocks H, −H, −H, H with H = diag(p) − p pᵀ, times the weight."""
    z = torch.tensor([[0.3, -1.2, 0.8]], dtype=torch.float64)
    pair = torch.cat([z, z], 1).requires_grad_()

    def divergence(both):
        log_p, log_q = both[:, :3].log_softmax(1), both[:, 3:].log_softmax(1)
        return 2.5 * (log_p.exp() * (log_p - log_q)).sum()

    expected = torch.autograd.functional.hessian(divergence, pair.detach()).reshape(6, 6)
    J = torch.autograd.functional.jacobian(
        lambda both: kl_output(both[:, :3], both[:, 3:], 2.5).logits[0], pair.detach()
    )
    output = kl_output(pair[:, :3], pair[:, 3:], 2.5)
    assert output.kind == "mse"
    J = J.reshape(3, 6)
    assert torch.allclose(2 * output.weight * J.T @ J, expected, atol=1e-12)  # the mse's own Hessian is 2 I


def test_marts_margin_is_bounded():
    """The authors' 1.0001: without it a confidently wrong example has an infinite loss and gradient."""
    model = nn.Linear(3, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
    x = torch.tensor([[0.0, 500.0, 0.0]], dtype=torch.float64)
    loss = MART(beta=0.0).loss(model, x, x, torch.tensor([0]))
    assert loss.total.item() == pytest.approx(500 - math.log(1e-4), rel=1e-6)
    assert all(bool(torch.isfinite(o.logits).all()) for o in loss.outputs)
    certain = MART().loss(model, x.float().double(), x, torch.tensor([1]))  # p_y rounds to one
    assert all(bool((torch.as_tensor(o.weight) >= 0).all()) for o in certain.outputs)


@pytest.mark.parametrize(
    ("objective", "order"),
    [
        (TRADES(beta=4.0, clean_passes=2), ["clean", "adversarial", "clean"]),  # yaodongyu/TRADES, trades.py
        (MART(beta=5.0), ["clean", "adversarial"]),  # YisenWang/MART, mart.py
        (TRADES(beta=4.0), ["clean", "adversarial"]),
    ],
)
def test_gradient_and_running_statistics_are_those_of_the_authors_passes(objective, order):
    """The loss from separate train-mode passes in the authors' order; r <- (1 - m) r + m s for every pass.

    A network is tested with these statistics: one clean pass less moves them towards adversarial images.
    """
    torch.manual_seed(0)
    model, (x, x_adv, y, _) = BatchNormNet().double().train(), batch()
    model.drop.p = 0.0
    torch.nn.init.normal_(model.bn.weight)
    features = {"clean": model.conv(x).detach(), "adversarial": model.conv(x_adv).detach()}
    mean, var = model.bn.running_mean.clone(), model.bn.running_var.clone()
    for name in order:
        h = features[name].transpose(0, 1).flatten(1)  # [channels, B H W]
        mean, var = 0.9 * mean + 0.1 * h.mean(1), 0.9 * var + 0.1 * h.var(1, correction=1)

    def logits(name):  # batch statistics by hand
        h = model.conv(x if name == "clean" else x_adv)
        centre, spread = h.mean((0, 2, 3), keepdim=True), h.var((0, 2, 3), correction=0, keepdim=True)
        h = (h - centre) / (spread + model.bn.eps).sqrt() * model.bn.weight[:, None, None]
        return model.fc(torch.relu(h + model.bn.bias[:, None, None]).flatten(1))

    z, *others = [logits(name) for name in order]
    p, q = others[-1].softmax(1) if len(others) > 1 else z.softmax(1), others[0].softmax(1)
    kl, rows = (p * (p / q).log()).sum(1), torch.arange(len(y))
    if isinstance(objective, TRADES):
        expected = F.cross_entropy(z, y) + 4 * kl.mean()
    else:
        others_first = torch.where(F.one_hot(y, 3).bool(), 0.0, q).amax(1)
        bce = -q[rows, y].log() - (1.0001 - others_first).log()
        expected = (bce + 5 * kl * (1 - p[rows, y])).mean()
    weights = list(model.parameters())
    found = objective.loss(model, x, x_adv, y).total
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    pairs = zip(*(torch.autograd.grad(total, weights) for total in (found, expected)), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs)
    torch.testing.assert_close(model.bn.running_mean, mean, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.bn.running_var, var, rtol=1e-12, atol=1e-14)
    assert model.bn.num_batches_tracked == len(order)
    clean, adversarial = (0.181, 0.09) if len(order) == 3 else (0.09, 0.1)  # the docstring's, m = 0.1
    means = {name: h.mean((0, 2, 3)) for name, h in features.items()}
    mean = clean * means["clean"] + adversarial * means["adversarial"]
    torch.testing.assert_close(model.bn.running_mean, mean, rtol=1e-12, atol=1e-14)
    before = model.eval().bn.running_mean.clone()
    objective.loss(model, x, x_adv, y)
    assert torch.equal(model.bn.running_mean, before)
