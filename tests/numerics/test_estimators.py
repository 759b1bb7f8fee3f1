"""The ladder of answers in float64: closed forms, dense Hessians, differences; every estimator against them.

Where few signs are drawn, all of them are enumerated: means and variances over the 2^d sign sets are then
exact, and the tolerance is rounding. Elsewhere: seeded draws, within so many standard errors.
"""

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from cases import image_batch
from oracles import dense_hessian, exact_gauss_newton_trace, exact_trace
from torch import Tensor, nn

from wcitrain.curvature import Hutchinson, Loss, Output, TraceEstimate, binary_cross_entropy, cross_entropy
from wcitrain.curvature import hutchinson as hutchinson_module
from wcitrain.curvature import passes as passes_module
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.hutchinson import hutchinson_samples
from wcitrain.curvature.loss import mean_squared_error, signs
from wcitrain.curvature.passes import Passes
from wcitrain.params import Layers
from wcitrain.seeding import generator_from


class ResidualNet(nn.Module):
    """Convolutions, BatchNorm with running statistics of its own, a skip connection, ReLU, pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(2), nn.BatchNorm2d(2)
        self.fc = nn.Linear(8, 3)
        for bn in (self.bn1, self.bn2):
            nn.init.uniform_(bn.running_mean, -0.5, 0.5)
            nn.init.uniform_(bn.running_var, 0.2, 0.6)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.bn1(self.stem(x)))
        h = torch.relu(h + self.bn2(self.branch(h)))
        return self.fc(F.max_pool2d(h, 2).flatten(1))


class AttentionNet(nn.Module):
    """One head of attention over the rows of an image; its fused projection counts as three layers."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 6, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x.squeeze(1)).chunk(3, -1)
        return self.out(((q @ k.transpose(1, 2)).softmax(-1) @ v).mean(1))


class OddNet(nn.Module):
    """A tensor the loss does not depend on, and one it is linear in."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.unused = nn.Linear(16, 3, bias=False), nn.Linear(2, 2)
        self.shift = nn.Parameter(torch.ones(2, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


def sequence(*modules: nn.Module) -> nn.Module:
    """A network on flattened images, unless it begins with a convolution."""
    return nn.Sequential(*[nn.Flatten()] * isinstance(modules[0], nn.Linear), *modules)


def normalised() -> nn.Module:
    norm = nn.BatchNorm2d(2, track_running_stats=False)
    return sequence(nn.Conv2d(1, 2, 3, bias=False), norm, nn.Flatten(), nn.Linear(8, 3, bias=False))


MODELS = {
    "softmax regression": lambda: sequence(nn.Linear(16, 3)),
    "linear regression": lambda: sequence(nn.Linear(16, 2)),
    "tanh, label smoothing": lambda: sequence(nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)),
    "GELU, BCE": lambda: sequence(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 3, bias=False)),
    "ReLU, residual, BatchNorm in eval mode": lambda: ResidualNet().eval(),
    "BatchNorm in train mode": normalised,
    "attention, split projection": AttentionNet,
    "unused and linear tensors": OddNet,
}


@dataclass(frozen=True)
class Case:
    """A model, its layers, and its loss on fixed data as a function of its parameters by name."""

    model: nn.Module
    layers: Layers
    loss_at: Callable[[dict[str, Tensor]], Loss]

    def loss_fn(self) -> Loss:
        return self.loss_at(dict(self.model.named_parameters()))


def make_case(name: str) -> Case:
    """A row of the table, the same at every call."""
    torch.manual_seed(11)
    x, y = image_batch(6)
    x, hot = x.double(), F.one_hot(y, 3).double()
    model = MODELS[name]().double()
    parts = {"qkv.weight": ("q", "k", "v")} if "attention" in name else None
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)  # away from the flat start, where every estimator is easy

    def loss_at(parameters: dict[str, Tensor]) -> Loss:
        z = torch.func.functional_call(model, parameters, x)
        if name == "linear regression":
            return mean_squared_error(z, hot[:, :2])
        if name == "GELU, BCE":
            return binary_cross_entropy(z, hot)
        loss = cross_entropy(z, y, label_smoothing=0.2 if "smoothing" in name else 0.0)
        if isinstance(model, OddNet):
            return loss._replace(total=loss.total + parameters["shift"].sum())
        return loss

    return Case(model, Layers({n: p for n, p in model.named_parameters() if p.ndim > 1}, parts), loss_at)


@pytest.fixture(params=MODELS)
def case(request) -> Case:
    return make_case(request.param)


def full_hessian(case: Case) -> Tensor:
    """The Hessian over all layers together [n, n], forward over reverse: another path than ours."""
    parameters = {n: p.detach() for n, p in case.model.named_parameters()}
    names = [n for n, p in case.model.named_parameters() if any(p is t for t in case.layers.tensors)]

    def of(vector: Tensor) -> Tensor:
        parts = vector.split([parameters[n].numel() for n in names])
        moved = {n: part.view_as(parameters[n]) for n, part in zip(names, parts, strict=True)}
        return case.loss_at(parameters | moved).total

    with warnings.catch_warnings():
        # forward mode compiles its rules with torch.jit.script
        warnings.simplefilter("ignore", FutureWarning)
        return torch.func.hessian(of)(flat(parameters[n] for n in names))


def slices(layers: Layers) -> list[slice]:
    """Where each layer lies in the concatenation of all."""
    ends = [0, *torch.tensor([t.numel() for t in layers.values()]).cumsum(0).tolist()]
    return [slice(a, b) for a, b in pairwise(ends)]


def flat(tensors) -> Tensor:
    return torch.cat([t.flatten() for t in tensors])


def close(left: Tensor, right: Tensor, relative: float) -> bool:
    """Whether two tensors differ by at most ``relative`` of the larger one's size."""
    left, right = left.detach(), right.detach()
    return float((left - right).norm()) <= relative * float(torch.maximum(left.norm(), right.norm()))


def penalty_gradient(
    estimator: Hutchinson, model: nn.Module, layers: Layers, loss_fn: Callable[[], Loss | Tensor], c: Tensor
) -> tuple[Tensor, Tensor]:
    """What the estimator adds to the gradient of the loss, ∇ Σ c_l t_l, and its estimates of t_l."""
    passes, found = Passes(model, layers, loss_fn), []
    for step in (lambda: estimator.add_gradient(passes, 2 * c, 0.5).traces, passes.plain):
        model.zero_grad()
        traces = step()
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]
        found.append((flat(gradients), traces))
    model.zero_grad()
    (both, traces), (plain, _) = found
    return both - plain, traces


ROUNDING = 1e-10  # float64 sums of up to 10^4 terms of mixed sign, each with a relative error near 1e-15


def test_dense_blocks_are_those_of_forward_over_reverse_differentiation(case):
    """Every other test leans on these blocks; a wrong slice of a split tensor would go unnoticed."""
    H = full_hessian(case)
    blocks = dense_hessian(case.loss_fn(), case.layers)
    assert list(blocks) == list(case.layers)
    for block, place in zip(blocks.values(), slices(case.layers), strict=True):
        assert torch.allclose(block, H[place, place], rtol=0, atol=1e-12 * float(H.norm()))


def sign_sets(num: int) -> list[Tensor]:
    """All 2^num vectors of signs."""
    return [torch.tensor(s).double() for s in product((-1.0, 1.0), repeat=num)]


def enumerated(monkeypatch, vectors: list[Tensor], module=hutchinson_module) -> None:
    """Make the signs that an estimator draws these vectors, one after the other."""
    waiting = iter(vectors)

    def fake(tensors, generator=None):
        parts = next(waiting).split([t.numel() for t in tensors])
        return [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)]

    monkeypatch.setattr(module, "signs", fake)


@pytest.fixture
def tiny() -> Case:
    """Eight weights, so 256 sign sets, in three layers; the first two are parts of one tensor."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0])
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    layers = Layers(weights, {"0.weight": ("top", "bottom")})
    return Case(model, layers, lambda at: cross_entropy(torch.func.functional_call(model, at, x), y))


def test_hutchinson_has_its_mean_and_its_variance_over_all_sign_sets(tiny, monkeypatch):
    """Mean Tr(H_ll); variance 2 (‖H_ll‖² − Σ diag²) + Σ ‖H_lm‖² over the other layers m: exactly."""
    H, places = full_hessian(tiny), slices(tiny.layers)
    enumerated(monkeypatch, sign_sets(8))
    draws = hutchinson_samples(tiny.loss_fn(), tiny.layers, num_probes=256)
    mean = torch.stack([H[p, p].trace() for p in places])
    assert torch.allclose(draws.mean(0), mean, rtol=0, atol=1e-12)
    assert torch.allclose(draws.var(0, correction=0), hutchinson_variance(H, places), rtol=ROUNDING)


def hutchinson_variance(H: Tensor, places: list[slice]) -> Tensor:
    """The variance [L] of one draw."""
    own = torch.stack([H[p, p].square().sum() - 2 * H[p, p].diagonal().square().sum() for p in places])
    return own + torch.stack([H[p].square().sum() for p in places])


def test_the_gradient_is_that_of_the_exact_traces_over_all_sign_sets(tiny, monkeypatch):
    """∇ Σ c_l t_l over all parameters, with unequal c: two published codes pass no gradient at all."""
    c = torch.tensor([0.3, 2.0, 1.0]).double()
    parameters = list(tiny.model.parameters())
    exact = exact_trace(tiny.loss_fn(), tiny.layers, create_graph=True)
    truth = flat(torch.autograd.grad(c @ exact, parameters))
    enumerated(monkeypatch, sign_sets(8), passes_module)
    # truncation 1e-10 and rounding 1e-16 / 1e-5, each times higher derivatives
    estimator = Hutchinson(256, radius=1e-5)
    gradient, draws = penalty_gradient(estimator, tiny.model, tiny.layers, tiny.loss_fn, c)
    assert close(gradient, truth, 1e-7)
    assert close(draws, exact, 1e-7)


def test_a_layer_without_coefficient_is_not_perturbed_and_has_no_draw(tiny):
    """Its trace cannot be read off: zero would pull the running average down."""
    c = torch.tensor([0.0, 0.0, 1.0]).double()
    gradient, traces = penalty_gradient(Hutchinson(), tiny.model, tiny.layers, tiny.loss_fn, c)
    assert traces.isnan().tolist() == [True, True, False]
    assert gradient.isfinite().all()


def test_differences_replay_the_dropout_mask():
    """With another mask on each side the difference would be noise divided by a small step."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    layers, state, results = Layers({"a": model[0].weight, "b": model[3].weight}), torch.get_rng_state(), []
    args = (model, layers, lambda: F.cross_entropy(model(x), y), torch.ones(2).double())
    for radius in (1e-4, 1e-5):
        torch.set_rng_state(state)
        results.append(penalty_gradient(Hutchinson(radius=radius), *args))
    # truncation 1e-8, rounding 1e-11: two radii agree, and noise over them would differ tenfold
    assert all(close(left, right, 1e-6) for left, right in zip(*results, strict=True))


def gauss_newton_losses() -> dict[str, Callable[[nn.Module, Tensor], Loss]]:
    """Losses on two examples, so all sign sets of their outputs can be enumerated."""
    y, soft = torch.tensor([0, 2]), torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]).double()
    weight = torch.tensor([0.5, 3.0]).double()

    def trades(model: nn.Module, x: Tensor) -> Loss:
        """Clean cross-entropy plus 2 KL(p ‖ p_adv), p held constant; two classes (4 + 4 signs)."""
        z, z_adv = model(x)[:, :2], model(x + 0.3)[:, :2]
        p = z.detach().softmax(1)
        total = F.cross_entropy(z, y // 2) + 2 * F.kl_div(z_adv.log_softmax(1), p, reduction="batchmean")
        return Loss(total, {}, (Output(z), Output(z_adv, weight=2.0)))

    def weighted(model: nn.Module, x: Tensor) -> Loss:
        z = model(x)
        total = (weight * F.cross_entropy(z, y, reduction="none")).mean()
        return Loss(total, {}, (Output(z, weight=weight),))

    return {
        "label smoothing": lambda m, x: cross_entropy(m(x), y, label_smoothing=0.1),
        "soft targets": lambda m, x: cross_entropy(m(x), soft),
        "binary cross-entropy": lambda m, x: binary_cross_entropy(m(x), (soft > 0.3).double()),
        "squared error": lambda m, x: mean_squared_error(m(x), soft),
        "example weights": weighted,
        "TRADES": trades,
    }


@pytest.mark.parametrize("name", gauss_newton_losses())
def test_gauss_newton_is_unbiased_in_value_and_gradient_over_all_sign_sets(name, monkeypatch):
    """Sampled labels would have the right mean and a wrong gradient; a lost weight would scale both."""
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(2, 3).double()
    layers = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    loss = gauss_newton_losses()[name](model, x)
    parameters = list(model.parameters())
    shapes = [output.logits.shape for output in loss.outputs]
    num = sum(s.numel() for s in shapes)
    bits = [part for s in sign_sets(num) for part in ((s + 1) / 2).long().split([t.numel() for t in shapes])]
    waiting = iter(bits)
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randint", lambda low, high, size, **_: next(waiting).view(size))
        draws = gauss_newton_samples(loss, layers, num_probes=2**num, create_graph=True)
    assert next(waiting, None) is None, "the estimator draws other numbers than one sign an output"
    exact = exact_gauss_newton_trace(loss, layers, create_graph=True)
    assert (draws >= 0).all()
    assert torch.allclose(draws.mean(0), exact, rtol=ROUNDING)
    c = torch.tensor([0.3, 2.0]).double()
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    totals = (c @ draws.mean(0), c @ exact)
    gradient, truth = (torch.autograd.grad(total, parameters, **options) for total in totals)
    assert flat(truth).norm() > 1e-3
    assert close(flat(gradient), flat(truth), ROUNDING)


@pytest.mark.parametrize("name", gauss_newton_losses())
def test_the_exact_gauss_newton_trace_is_the_hessians_for_the_linearised_network(name):
    """On a linear model both are the Hessian: the declared outputs must match the total."""
    model = nn.Linear(3, 3).double()
    x = torch.randn(2, 3).double()
    loss = gauss_newton_losses()[name](model, x)
    layers = dict(model.named_parameters())
    # TRADES holds the clean prediction constant, as its Hessian by autograd does.
    assert torch.allclose(exact_gauss_newton_trace(loss, layers), exact_trace(loss, layers), rtol=ROUNDING)


@pytest.mark.parametrize("name", MODELS)
def test_draws_agree_with_the_exact_trace(name):
    """Mean within 4 standard errors on every network; variance within 6 of its formula."""
    case = make_case(name)
    H, places, num = full_hessian(case), slices(case.layers), 150
    generator = generator_from("cpu", "hutchinson")
    samples = hutchinson_samples(case.loss_fn(), case.layers, num_probes=num, generator=generator)
    exact = torch.stack([H[p, p].trace() for p in places])
    estimate = TraceEstimate.from_samples(samples)
    allowed = 4 * estimate.stderr + ROUNDING * float(H.norm())
    assert ((estimate.mean - exact).abs() <= allowed).all(), (estimate, exact)
    centred = samples - samples.mean(0)
    # Var(s²) = (m4 − s⁴) / n for n independent draws.
    error = ((centred**4).mean(0) - centred.square().mean(0).square()).clamp(min=0).sqrt() / num**0.5
    difference = (samples.var(0) - hutchinson_variance(H, places)).abs()
    assert (difference <= 6 * error + ROUNDING * float(H.norm()) ** 2).all()
    if name == "unused and linear tensors":
        assert list(case.layers) == ["shift", "fc.weight", "unused.weight"]
        assert (samples[:, [0, 2]].abs() <= ROUNDING).all()


@pytest.mark.parametrize("name", ["ReLU, residual, BatchNorm in eval mode", "softmax regression"])
def test_piecewise_linear_networks_have_gauss_newton_blocks(name):
    """H_ll = G_ll almost everywhere: the fact that lets the cheap estimator stand for the index."""
    case = make_case(name)
    loss = case.loss_fn()
    exact, gauss_newton = exact_trace(loss, case.layers), exact_gauss_newton_trace(loss, case.layers)
    assert torch.allclose(exact, gauss_newton, rtol=ROUNDING)
    assert (exact > 1e-3).all()


def test_second_derivatives_through_weight_norm_are_wrong_without_a_word_and_are_refused():
    """If the first assertion fails, PyTorch has mended it, and ``loss._WRONG`` can go."""
    torch.manual_seed(0)
    inner = nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))
    model = sequence(nn.Linear(16, 6), inner, nn.Linear(6, 3)).double()
    parameters, x = list(model.parameters()), image_batch(5)[0].double()
    v = signs(parameters, generator_from("cpu", 0))

    def loss_fn() -> Loss:
        return cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))

    found = [torch.autograd.grad(loss_fn().total, parameters, create_graph=True)]
    by_autograd = flat(torch.autograd.grad(found[0], parameters, v, materialize_grads=True))
    for side in (+1, -2):
        with torch.no_grad():
            torch._foreach_add_(parameters, v, alpha=side * 1e-5)
        found.append(torch.autograd.grad(loss_fn().total, parameters))
    # truncation 1e-10, rounding 1e-11
    assert not close(by_autograd, flat(found[1]) / 2e-5 - flat(found[2]) / 2e-5, 1e-2)
    with pytest.raises(ValueError, match=r"got WeightNormInterfaceBackward0.*Remove"):
        hutchinson_samples(loss_fn(), dict(model.named_parameters()))


def test_the_default_radius_is_fine_in_both_precisions():
    """Too small a step drowns in rounding, too large a one in truncation; float32 is what training uses."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(64, 3))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    x, y = image_batch(5)
    gradients = []
    for dtype, radius in ((torch.float32, 0.01), (torch.float64, 0.01), (torch.float64, 1e-5)):
        net, images = copy.deepcopy(model).to(dtype), x.to(dtype)
        layers = Layers({n: p for n, p in net.named_parameters() if p.ndim > 1})
        args = (net, layers, lambda net=net, images=images: F.cross_entropy(net(images), y))
        c = torch.tensor([1.0, 0.5]).to(dtype)
        gradients.append(penalty_gradient(Hutchinson(radius=radius), *args, c)[0].double())
    # Truncation 1e-4 and, in float32, rounding 6e-8 / 0.01, each times higher derivatives (ten or so).
    assert all(close(gradient, gradients[-1], 2e-3) for gradient in gradients)


def test_probes_differ_and_repeat_with_a_generator():
    """Restoring the random state must not give every probe the same signs: the error bar would be zero."""
    case = make_case("tanh, label smoothing")
    samples = hutchinson_samples(case.loss_fn(), case.layers, num_probes=4)
    assert (samples.shape, samples.dtype) == ((4, 2), torch.float64)
    assert len(set(samples[:, 0].tolist())) > 1
    passes, sigma = Passes(case.model, case.layers, case.loss_fn, key=(1, 2)), torch.ones(2)
    directions = [flat(passes.random_direction(sigma, probe)[0]).tolist() for probe in (0, 1, 2, 0)]
    assert len(set(map(tuple, directions))) == 3
    assert directions[0] == directions[3]
