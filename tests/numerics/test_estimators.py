"""The ladder of answers in float64: closed forms, dense Hessians, differences; every estimator against them.

Where few signs are drawn, all of them are enumerated: means and variances over the 2^d sign sets are then
exact, and the tolerance is rounding. Elsewhere: seeded draws, within so many standard errors.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import Tensor, nn

from wcitrain.curvature import Hutchinson, TraceEstimate
from wcitrain.curvature import hutchinson as hutchinson_module
from wcitrain.curvature import passes as passes_module
from wcitrain.curvature.dense import dense_hessian, exact_gauss_newton_trace, exact_trace
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.hutchinson import hutchinson_samples
from wcitrain.curvature.hvp import gradients_with_graph, hvp, signs
from wcitrain.curvature.loss import Loss, Output, binary_cross_entropy, cross_entropy, mean_squared_error
from wcitrain.curvature.passes import Passes
from wcitrain.params import Layers
from wcitrain.seeding import generator_from

# The cases ------------------------------------------------------------------------------------------------


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
        self.fc, self.unused, self.shift = (
            nn.Linear(16, 3, bias=False),
            nn.Linear(2, 2),
            nn.Parameter(torch.ones(2, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x.flatten(1))


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
    parts = None
    model: nn.Module
    if name == "softmax regression":
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    elif name == "linear regression":
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    elif name == "tanh, label smoothing":
        model = nn.Sequential(nn.Flatten(), nn.Linear(16, 4), nn.Tanh(), nn.Linear(4, 3, bias=False))
    elif name == "GELU, BCE":
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.GELU(), nn.Flatten(), nn.Linear(12, 3, bias=False))
    elif name == "ReLU, residual, BatchNorm in eval mode":
        model = ResidualNet().eval()
    elif name == "BatchNorm in train mode":
        norm = nn.BatchNorm2d(2, track_running_stats=False)
        model = nn.Sequential(nn.Conv2d(1, 2, 3, bias=False), norm, nn.Flatten(), nn.Linear(8, 3, bias=False))
    elif name == "attention, split projection":
        model, parts = AttentionNet(), {"qkv.weight": ("q", "k", "v")}
    elif name == "unused and linear tensors":
        model = OddNet()
    else:
        raise KeyError(name)
    model.double()
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


CASES = [
    "softmax regression",
    "linear regression",
    "tanh, label smoothing",
    "GELU, BCE",
    "ReLU, residual, BatchNorm in eval mode",
    "BatchNorm in train mode",
    "attention, split projection",
    "unused and linear tensors",
]
SMOOTH = [name for name in CASES if "ReLU" not in name]


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return make_case(request.param)


def full_hessian(case: Case) -> Tensor:
    """The Hessian over all layers together [n, n], forward over reverse: another path than ours."""
    names = [n for n, p in case.model.named_parameters() if any(p is t for t in case.layers.tensors)]
    parameters = {n: p.detach() for n, p in case.model.named_parameters()}

    def of(*tensors: Tensor) -> Tensor:
        return case.loss_at(parameters | dict(zip(names, tensors, strict=True))).total

    tensors = tuple(parameters[n] for n in names)
    with warnings.catch_warnings():
        # forward mode compiles its rules with torch.jit.script
        warnings.simplefilter("ignore", FutureWarning)
        blocks = torch.func.hessian(of, argnums=tuple(range(len(tensors))))(*tensors)
    return torch.cat(
        [
            torch.cat([b.reshape(p.numel(), q.numel()) for b, q in zip(row, tensors, strict=True)], 1)
            for row, p in zip(blocks, tensors, strict=True)
        ]
    )


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


def difference_of_gradients(loss_fn: Callable[[], Loss], tensors, vectors, rows) -> Tensor:
    """H v by a central difference of gradients; truncation and rounding of order ε^(2/3) = 4e-11."""
    h, sides = 6e-6 * float(flat(tensors).detach().norm() / flat(vectors).detach().norm()), []
    weights = [t.detach().clone() for t in tensors]
    for side in (+1, -1):
        with torch.no_grad():
            for t, w, v in zip(tensors, weights, vectors, strict=True):
                t.copy_(w + side * h * v)
        sides.append(
            flat(torch.autograd.grad(loss_fn().total, rows, materialize_grads=True, allow_unused=True))
        )
    with torch.no_grad():
        for t, w in zip(tensors, weights, strict=True):
            t.copy_(w)
    return (sides[0] - sides[1]) / (2 * h)


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


# Closed forms ---------------------------------------------------------------------------------------------


@pytest.fixture
def worked_example() -> tuple[nn.Linear, Tensor, Tensor]:
    """Two examples of three classes, small enough for pencil and paper."""
    model = nn.Linear(2, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]))
    return model, torch.tensor([[1.0, 2.0], [3.0, -1.0]]).double(), torch.tensor([0, 2])


def test_the_worked_example_has_its_known_numbers(worked_example):
    """Loss, trace, largest eigenvalue and index, computed independently with more digits than needed."""
    model, x, y = worked_example
    layers = {"w": model.weight}
    loss = cross_entropy(model(x), y)
    block = dense_hessian(loss, layers)["w"]
    trace = exact_trace(loss, layers)
    assert float(loss.total.detach()) == pytest.approx(2.236744934100905, abs=1e-12)
    assert float(block.trace()) == pytest.approx(1.8285859402617057, abs=1e-12)
    assert float(torch.linalg.eigvalsh(block)[-1]) == pytest.approx(0.9351099610702933, abs=1e-12)
    assert float(trace.mean) == pytest.approx(1.8285859402617057, abs=1e-12)
    assert float(trace.stderr) == 0
    assert trace.num_probes == 1
    assert float(exact_gauss_newton_trace(loss, layers).mean) == pytest.approx(1.8285859402617057, abs=1e-12)


# Dense blocks and vector products -------------------------------------------------------------------------


def test_dense_blocks_and_exact_traces_are_those_of_forward_over_reverse_differentiation(case):
    """Every other test leans on these blocks; a wrong slice of a split tensor would go unnoticed."""
    H = full_hessian(case)
    blocks = dense_hessian(case.loss_fn(), case.layers)
    assert list(blocks) == list(case.layers)
    for block, place in zip(blocks.values(), slices(case.layers), strict=True):
        assert torch.allclose(block, H[place, place], rtol=0, atol=1e-12 * float(H.norm()))
    exact = exact_trace(case.loss_fn(), case.layers)
    assert torch.allclose(exact.mean, torch.stack([b.trace() for b in blocks.values()]), rtol=0, atol=1e-12)


def test_hessian_products_are_the_dense_matrix_times_the_vector(case):
    """For two vectors from one set of gradients, and from the loss itself; unused tensors too."""
    H = full_hessian(case)
    tensors = case.layers.tensors
    gradients = gradients_with_graph(case.loss_fn(), tensors)
    v = [torch.randn_like(t) for t in tensors]
    for _ in range(2):
        assert close(flat(hvp(gradients, tensors, v)), H @ flat(v), 1e-12)
        v = signs(tensors)
    assert close(flat(hvp(case.loss_fn(), tensors, v)), H @ flat(v), 1e-12)


# Estimators, all sign sets --------------------------------------------------------------------------------


def sign_sets(num: int) -> list[Tensor]:
    """All 2^num vectors of signs."""
    return [torch.tensor(s).double() for s in product((-1.0, 1.0), repeat=num)]


def enumerated(monkeypatch, vectors: list[Tensor], module=hutchinson_module) -> None:
    """Make the signs that an estimator draws these vectors, one after the other."""
    waiting = iter(vectors)

    def fake(tensors, generator=None):
        return [
            part.view(t.shape)
            for part, t in zip(next(waiting).split([t.numel() for t in tensors]), tensors, strict=True)
        ]

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
    return Case(
        model, layers, lambda parameters: cross_entropy(torch.func.functional_call(model, parameters, x), y)
    )


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
    variance = []
    for p in places:
        block = H[p, p]
        own = 2 * (block.square().sum() - block.diagonal().square().sum())
        variance.append(own + H[p].square().sum() - block.square().sum())
    return torch.stack(variance)


def test_the_gradient_is_that_of_the_exact_traces_over_all_sign_sets(tiny, monkeypatch):
    """∇ Σ c_l t_l over all parameters, with unequal c: two published codes pass no gradient at all."""
    c = torch.tensor([0.3, 2.0, 1.0]).double()
    parameters = list(tiny.model.parameters())
    exact = exact_trace(tiny.loss_fn(), tiny.layers, create_graph=True).mean
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
        results += penalty_gradient(Hutchinson(radius=radius), *args)
    # truncation 1e-8, rounding 1e-11: two radii agree, and noise over them would differ tenfold
    assert close(results[0], results[2], 1e-6)
    assert close(results[1], results[3], 1e-6)


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
        return Loss(
            (weight * F.cross_entropy(z, y, reduction="none")).mean(), {}, (Output(z, weight=weight),)
        )

    return {
        "cross-entropy": lambda m, x: cross_entropy(m(x), y),
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
    assert torch.allclose(draws.mean(0), exact.mean, rtol=ROUNDING)
    c = torch.tensor([0.3, 2.0]).double()
    gradient, truth = (
        torch.autograd.grad(c @ t, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        for t in (draws.mean(0), exact.mean)
    )
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
    assert torch.allclose(
        exact_gauss_newton_trace(loss, layers).mean, exact_trace(loss, layers).mean, rtol=ROUNDING
    )


# Estimators, seeded draws ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_every_estimator_agrees_with_the_exact_trace(name):
    """Mean within 4 standard errors on every network; variance within 6 of its formula."""
    case = make_case(name)
    H, places = full_hessian(case), slices(case.layers)
    num, generator = 150, generator_from("cpu", "hutchinson")
    samples = hutchinson_samples(case.loss_fn(), case.layers, num_probes=num, generator=generator)
    exact = torch.stack([H[p, p].trace() for p in places])
    estimate = TraceEstimate.from_samples(samples)
    allowed = 4 * estimate.stderr + ROUNDING * float(H.norm())
    assert ((estimate.mean - exact).abs() <= allowed).all(), (estimate, exact)
    variance = hutchinson_variance(H, places)
    centred = samples - samples.mean(0)
    # Var(s²) = (m4 − s⁴) / n for n independent draws.
    error = ((centred**4).mean(0) - centred.square().mean(0).square()).clamp(min=0).sqrt() / num**0.5
    assert ((samples.var(0) - variance).abs() <= 6 * error + ROUNDING * float(H.norm()) ** 2).all()
    if name == "unused and linear tensors":
        assert list(case.layers) == ["shift", "fc.weight", "unused.weight"]
        assert (samples[:, [0, 2]].abs() <= ROUNDING).all()


@pytest.mark.parametrize("name", ["ReLU, residual, BatchNorm in eval mode", "softmax regression"])
def test_piecewise_linear_networks_have_gauss_newton_blocks(name):
    """H_ll = G_ll almost everywhere: the fact that lets the cheap estimator stand for the index."""
    case = make_case(name)
    loss = case.loss_fn()
    tensors = case.layers.tensors
    for block, tensor in zip(dense_hessian(loss, case.layers).values(), tensors, strict=True):
        G = torch.zeros_like(block)
        for z in loss.outputs[0].logits:
            J = torch.stack([torch.autograd.grad(z_c, tensor, retain_graph=True)[0].flatten() for z_c in z])
            p = z.detach().softmax(0)
            G += J.T @ (p.diag() - torch.outer(p, p)) @ J / len(loss.outputs[0].logits)
        assert float((block - G).abs().max()) < 1e-13
        assert block.norm() > 1e-3
    exact, gauss_newton = exact_trace(loss, case.layers), exact_gauss_newton_trace(loss, case.layers)
    assert torch.allclose(exact.mean, gauss_newton.mean, rtol=ROUNDING)


# Derivatives that are wrong, and the step ------------------------------------------------------------------


def activation_net(middle: nn.Module, *, is_convolution: bool = False) -> tuple[nn.Module, Tensor]:
    first = nn.Conv2d(1, 4, 3, padding=1) if is_convolution else nn.Linear(16, 6)
    shape: list[nn.Module] = [] if is_convolution else [nn.Flatten()]
    last = nn.Linear(64 if is_convolution else 6, 3)
    model = nn.Sequential(*shape, first, middle, nn.Flatten(), last).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, image_batch(5)[0].double()


def test_third_derivatives_through_layer_norm_are_wrong_without_a_word_and_are_refused():
    """If the first assertion fails, PyTorch has mended it, and ``hvp._WRONG_FROM_ORDER`` can forget it."""
    model, x = activation_net(nn.LayerNorm(6))
    parameters, y = list(model.parameters()), torch.tensor([0, 1, 2, 0, 1])
    v, values = signs(parameters, generator_from("cpu", 0)), []

    def form(create_graph: bool) -> Tensor:
        g = torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True)
        products = torch.autograd.grad(g, parameters, v, create_graph=create_graph, materialize_grads=True)
        return flat(products) @ flat(v)

    by_autograd = flat(torch.autograd.grad(form(True), parameters, materialize_grads=True)) @ flat(v)
    for side in (+1, -2):
        with torch.no_grad():
            torch._foreach_add_(parameters, v, alpha=side * 1e-5)
        values.append(form(False))
    # truncation 1e-10, rounding 1e-11
    assert abs(float((values[0] - values[1]) / 2e-5 / by_autograd) - 1) > 1e-2
    layers, loss = dict(model.named_parameters()), cross_entropy(model(x), y)
    with pytest.raises(ValueError, match=r"order 3: got NativeLayerNormBackward0.*Take differences"):
        exact_trace(loss, layers, create_graph=True)
    assert hutchinson_samples(loss, layers).isfinite().all()  # order two is right


def test_second_derivatives_through_weight_norm_are_wrong_without_a_word_and_are_refused():
    """If the first assertion fails, PyTorch has mended it, and ``hvp._WRONG_FROM_ORDER`` can forget it."""
    model, x = activation_net(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    parameters = list(model.parameters())
    v = signs(parameters, generator_from("cpu", 0))

    def loss_fn() -> Loss:
        return cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))

    gradients = torch.autograd.grad(loss_fn().total, parameters, create_graph=True)
    by_autograd = flat(torch.autograd.grad(gradients, parameters, v, materialize_grads=True))
    assert not close(by_autograd, difference_of_gradients(loss_fn, parameters, v, parameters), 1e-2)
    with pytest.raises(ValueError, match=r"order 2: got WeightNormInterfaceBackward0.*Remove"):
        hutchinson_samples(loss_fn(), dict(model.named_parameters()))


def test_the_default_radius_is_fine_in_both_precisions():
    """Too small a step drowns in rounding, too large a one in truncation; float32 is what training uses."""
    torch.manual_seed(0)
    double, x = activation_net(nn.GELU(), is_convolution=True)
    y, gradients = torch.tensor([0, 1, 2, 0, 1]), []
    for dtype in (torch.float64, torch.float32):
        model = activation_net(nn.GELU(), is_convolution=True)[0]
        model.load_state_dict(double.state_dict())
        model, inputs = model.to(dtype), x.to(dtype)
        layers = Layers({n: p for n, p in model.named_parameters() if p.ndim > 1})
        args = (model, layers, lambda model=model, inputs=inputs: F.cross_entropy(model(inputs), y))
        c = torch.tensor([1.0, 0.5]).to(dtype)
        for radius in (1e-5, 0.01) if dtype == torch.float64 else (0.01,):
            gradients.append(penalty_gradient(Hutchinson(radius=radius), *args, c)[0].double())
    # Truncation 1e-4 and, in float32, rounding 6e-8 / 0.01, each times higher derivatives (ten or so).
    assert all(close(gradient, gradients[0], 2e-3) for gradient in gradients[1:])


# Nothing is left ------------------------------------------------------------------------------------------


def test_nothing_is_left_behind():
    """Weights, gradients, buffers, modes, random state as before, and a loss still differentiable."""
    model = BatchNormNet().double()
    x, y = image_batch()
    x = x.double()
    layers = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)

    generator = torch.Generator().manual_seed(0)
    vectors = [torch.ones_like(p) for p in layers.values()]
    loss = cross_entropy(model(x), y)
    before, state = everything(model), torch.get_rng_state()
    hvp(loss, list(layers.values()), vectors)
    hutchinson_samples(loss, layers, num_probes=2, generator=generator)
    dense_hessian(loss, layers)
    exact_trace(loss, layers)
    exact_gauss_newton_trace(loss, layers)
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in parameters)
    assert all(p.requires_grad and p.is_leaf for p in parameters)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.total, parameters))


def test_probes_differ_without_a_generator_and_repeat_with_one():
    """Restoring the random state must not give every probe the same signs: the error bar would be zero."""
    case = make_case("tanh, label smoothing")
    samples = hutchinson_samples(case.loss_fn(), case.layers, num_probes=4)
    assert samples.shape == (4, 2)
    assert samples.dtype == torch.float64
    assert len(set(samples[:, 0].tolist())) > 1
    first, second = (
        hutchinson_samples(case.loss_fn(), case.layers, generator=generator_from("cpu", 7)) for _ in range(2)
    )
    assert torch.equal(first, second)
    passes, sigma = Passes(case.model, case.layers, case.loss_fn, key=(1, 2)), torch.ones(2)
    directions = [flat(passes.random_direction(sigma, probe)[0]).tolist() for probe in (0, 1, 2, 0)]
    assert len(set(map(tuple, directions))) == 3
    assert directions[0] == directions[3]


# Errors ---------------------------------------------------------------------------------------------------


def test_impossible_settings_are_refused():
    """Each names what it got."""
    case = make_case("tanh, label smoothing")
    with pytest.raises(ValueError, match=r"layer 1\.weight with 64 elements"):
        dense_hessian(case.loss_fn(), case.layers, max_elements=63)
