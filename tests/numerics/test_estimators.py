"""The ladder of answers in float64: closed forms, dense Hessians, finite differences; then every estimator against them.

Where few signs are drawn, all of them are enumerated: means and variances over the 2^d sign sets are then exact, and the
tolerance is rounding. Elsewhere: seeded draws, within so many standard errors.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, SmoothNet, assert_same, everything, image_batch
from torch import Tensor, nn

from wcitrain.curvature import TraceEstimate
from wcitrain.curvature import hutchinson as hutchinson_module
from wcitrain.curvature import hutchpp as hutchpp_module
from wcitrain.curvature.dense import dense_hessian, exact_gauss_newton_trace, exact_trace
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.hutchinson import hutchinson_penalty_gradient, hutchinson_samples, hutchinson_trace
from wcitrain.curvature.hutchpp import hutchpp_samples, hutchpp_trace
from wcitrain.curvature.hvp import finite_difference_hvp, gradients_with_graph, hvp
from wcitrain.curvature.loss import (
    Loss,
    Output,
    binary_cross_entropy,
    cross_entropy,
    mean_squared_error,
)
from wcitrain.curvature.probes import signs
from wcitrain.curvature.two_point import two_point_samples
from wcitrain.params import Layers, squared_norms
from wcitrain.preserve import undisturbed
from wcitrain.seeding import generator_from

# ---------------------------------------------------------------------------------------------------------------- the cases


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
    """One head of attention over the rows of an image, with a fused projection that counts as three layers."""

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
        self.fc, self.unused, self.shift = nn.Linear(16, 3, bias=False), nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))

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
    """The Hessian over all layers together [n, n] by forward-over-reverse differentiation, another path than ours."""
    names = [n for n, p in case.model.named_parameters() if any(p is t for t in case.layers.tensors)]
    parameters = {n: p.detach() for n, p in case.model.named_parameters()}

    def of(*tensors: Tensor) -> Tensor:
        return case.loss_at(parameters | dict(zip(names, tensors, strict=True))).total

    tensors = tuple(parameters[n] for n in names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # forward mode compiles its rules with torch.jit.script
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


ROUNDING = 1e-10  # float64 sums of up to 10^4 terms of mixed sign, each with a relative error near 1e-15


# ------------------------------------------------------------------------------------------------------------- closed forms


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
    assert float((squared_norms(layers) * trace.mean).sqrt()) == pytest.approx(1.9123733632644573, abs=1e-12)
    assert float(exact_gauss_newton_trace(loss, layers).mean) == pytest.approx(1.8285859402617057, abs=1e-12)
    # Six elements: six Hessian products capture the Hessian completely, whatever the signs.
    assert float(hutchpp_trace(loss, layers, num_matvecs=18).mean) == pytest.approx(1.8285859402617057, abs=1e-12)


def test_zero_weights_of_softmax_regression_have_the_trace_of_uniform_predictions(worked_example):
    """mean ‖x‖² (1 − 1/C) = 7.5 · 2/3."""
    model, x, y = worked_example
    nn.init.zeros_(model.weight)
    assert float(exact_trace(cross_entropy(model(x), y), {"w": model.weight}).mean) == pytest.approx(5, abs=1e-12)
    # Also a point where the relative size of a step would be 0/0: ‖W‖ = 0.
    vector = torch.arange(6.0).double().view(3, 2)
    by_difference = finite_difference_hvp(lambda: cross_entropy(model(x), y), [model.weight], [vector])
    # Truncation h² ~ 4e-11, rounding 1e-16 / 6e-6: 1e-8 leaves two digits.
    assert close(by_difference[0], hvp(cross_entropy(model(x), y), [model.weight], [vector])[0], 1e-8)


@pytest.mark.parametrize("family", ["linear regression", "logistic regression", "softmax regression"])
def test_dense_hessians_of_linear_models_are_their_textbook_formulas(family):
    """(2/N) XᵀX, (1/N) Xᵀ diag(q (1−q)) X, and the mean of (diag p − p pᵀ) ⊗ x xᵀ: no autograd on the right-hand side."""
    num_outputs = 3 if family == "softmax regression" else 1
    model = nn.Linear(4, num_outputs, bias=False).double()
    x, y = torch.randn(9, 4).double(), torch.randint(0, 3, (9,))
    z = model(x)
    if family == "linear regression":
        loss, expected = mean_squared_error(z, torch.randn(9, 1).double()), 2 * x.T @ x / 9
    elif family == "logistic regression":
        q = z.detach().sigmoid()
        loss, expected = binary_cross_entropy(z, (y > 0).double()[:, None]), x.T @ (q * (1 - q) * x) / 9
    else:
        p = z.detach().softmax(1)
        loss = cross_entropy(z, y)
        pairs = zip(p, x, strict=True)
        expected = sum(torch.kron(a.diag() - torch.outer(a, a), torch.outer(b, b)) for a, b in pairs) / 9
    assert close(dense_hessian(loss, {"w": model.weight})["w"], expected, 1e-13)


# -------------------------------------------------------------------------------------------- dense blocks and vector products


def test_dense_blocks_and_exact_traces_are_those_of_forward_over_reverse_differentiation(case):
    """Every other test leans on these blocks; a wrong slice of a split tensor would go unnoticed elsewhere."""
    H = full_hessian(case)
    blocks = dense_hessian(case.loss_fn(), case.layers)
    assert list(blocks) == list(case.layers)
    for block, place in zip(blocks.values(), slices(case.layers), strict=True):
        assert torch.allclose(block, H[place, place], rtol=0, atol=1e-12 * float(H.norm()))
    exact = exact_trace(case.loss_fn(), case.layers)
    assert torch.allclose(exact.mean, torch.stack([b.trace() for b in blocks.values()]), rtol=0, atol=1e-12)


def test_hessian_products_are_the_dense_matrix_times_the_vector(case):
    """Symmetric or not, unused or not: for two vectors from one set of gradients, and one with a part left out."""
    H = full_hessian(case)
    tensors = case.layers.tensors
    gradients = gradients_with_graph(case.loss_fn(), tensors)
    v = [torch.randn_like(t) for t in tensors]
    for _ in range(2):
        assert close(flat(hvp(gradients, tensors, v)), H @ flat(v), 1e-12)
        v = signs(tensors)
    without_first = [torch.zeros_like(v[0]), *v[1:]]
    assert close(flat(hvp(case.loss_fn(), tensors, [None, *v[1:]])), H @ flat(without_first), 1e-12)


@pytest.mark.parametrize("name", SMOOTH)
def test_hessian_products_are_differences_of_gradients(name):
    """The second derivatives that autograd returns are those of the function it evaluates; over all parameters' rows."""
    case = make_case(name)
    tensors, rows = case.layers.tensors, list(case.model.parameters())
    v = [torch.randn_like(t) for t in tensors]
    by_difference = flat(finite_difference_hvp(case.loss_fn, tensors, v, rows=rows))
    # Truncation and rounding are both of order ε^(2/3) = 4e-11 times the size of higher derivatives.
    assert close(flat(hvp(case.loss_fn(), tensors, v, rows=rows)), by_difference, 1e-7)


def test_a_quadratic_needs_no_small_step():
    """Differences of a linear gradient are exact for every h: the step and its restoration are accounted for rightly."""
    A = torch.randn(5, 5).double()
    A = A + A.T
    w, v = torch.randn(5).double().requires_grad_(), torch.randn(5).double()
    for relative_step in (1e-3, 1.0, 100.0):
        product_ = finite_difference_hvp(lambda: 0.5 * w @ A @ w, [w], [v], relative_step=relative_step)[0]
        assert close(product_, A @ v, ROUNDING)


def test_differences_replay_the_dropout_mask():
    """With another mask on each side the difference would be noise divided by a small step."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randint(0, 3, (5,))
    tensors = [model[0].weight, model[3].weight]
    v = signs(tensors, generator_from("cpu", 0))
    c = torch.ones(2).double()
    state = torch.get_rng_state()

    def loss_fn() -> Tensor:
        return F.cross_entropy(model(x), y)

    by_difference = finite_difference_hvp(loss_fn, tensors, v)
    gradient, _ = hutchinson_penalty_gradient(
        loss_fn, {"a": tensors[0], "b": tensors[1]}, tensors, c, generator=generator_from("cpu", 0)
    )
    assert torch.equal(torch.get_rng_state(), state)
    exact = hvp(loss_fn(), tensors, v, create_graph=True)
    assert close(flat(by_difference), flat(exact), 1e-7)
    assert close(flat(gradient), flat(torch.autograd.grad(flat(exact) @ flat(v), tensors)), 1e-7)


# ------------------------------------------------------------------------------------------------- estimators, all sign sets


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
    """Eight weights in three layers, so all 256 sign sets can be enumerated; the first two are parts of one tensor."""
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2)).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    x, y = torch.randn(4, 2).double(), torch.tensor([0, 1, 1, 0])
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    layers = Layers(weights, {"0.weight": ("top", "bottom")})
    return Case(model, layers, lambda parameters: cross_entropy(torch.func.functional_call(model, parameters, x), y))


GROUPS = {
    "full": (1, [{0, 1, 2}]),
    "two": (2, [{0}, {1, 2}]),
    "by name": ([["2.weight", "0.weight[top]"], ["0.weight[bottom]"]], [{0, 2}, {1}]),
    "layers": ("layers", [{0}, {1}, {2}]),
}


@pytest.mark.parametrize("name", GROUPS)
def test_hutchinson_has_its_mean_and_its_variance_over_all_sign_sets(name, tiny, monkeypatch):
    """Mean Tr(H_ll); variance 2 (‖H_ll‖² − Σ diag²) + Σ ‖H_lm‖² over the other layers m of the same group: exactly.

    Groups that leak, or split a tensor in the wrong place, would keep the mean and change the variance.
    """
    groups, members = GROUPS[name]
    H, places = full_hessian(tiny), slices(tiny.layers)
    enumerated(monkeypatch, sign_sets(8))
    draws = hutchinson_samples(tiny.loss_fn(), tiny.layers, num_probes=256, groups=groups)
    mean = torch.stack([H[p, p].trace() for p in places])
    assert torch.allclose(draws.mean(0), mean, rtol=0, atol=1e-12)
    assert torch.allclose(draws.var(0, correction=0), hutchinson_variance(H, places, members), rtol=ROUNDING)


def hutchinson_variance(H: Tensor, places: list[slice], groups: list[set[int]], scale: Tensor | None = None) -> Tensor:
    """The variance [L] of one draw for groups of layers; ``scale`` [L] where layer l is perturbed by s_l v_l.

    ⟨v_l, (H s v)_l⟩ / s_l has cross terms s_m / s_l times as large.
    """
    s = torch.ones(len(places)).double() if scale is None else scale
    variance = []
    for place, p in enumerate(places):
        block = H[p, p]
        own = 2 * (block.square().sum() - block.diagonal().square().sum())
        group = next(g for g in groups if place in g)
        variance.append(own + sum((s[m] / s[place] * H[p, places[m]]).square().sum() for m in group - {place}))
    return torch.stack(variance)


@pytest.mark.parametrize("method", ["autograd", "finite differences"])
def test_hutchinsons_gradient_is_that_of_the_exact_traces_over_all_sign_sets(method, tiny, monkeypatch):
    """∇ Σ c_l t_l over all parameters, biases too, with unequal c: two published codes pass no gradient at all."""
    c = torch.tensor([0.3, 2.0, 1.0]).double()
    parameters = list(tiny.model.parameters())
    exact = torch.autograd.grad(c @ exact_trace(tiny.loss_fn(), tiny.layers, create_graph=True).mean, parameters)
    enumerated(monkeypatch, sign_sets(8))
    if method == "autograd":
        draws = hutchinson_samples(tiny.loss_fn(), tiny.layers, num_probes=256, create_graph=True)
        gradient = torch.autograd.grad(c @ draws.mean(0), parameters)
        assert close(flat(gradient), flat(exact), ROUNDING)
    else:
        gradient, draws = hutchinson_penalty_gradient(tiny.loss_fn, tiny.layers, parameters, c, num_probes=256)
        # Truncation h² = 4e-11 and rounding 1e-16 / 6e-6 = 2e-11 times higher derivatives.
        assert close(flat(gradient), flat(exact), 1e-7)
        assert close(draws.mean(0), exact_trace(tiny.loss_fn(), tiny.layers).mean, 1e-7)


def test_a_layer_without_coefficient_is_not_perturbed_and_has_no_draw(tiny):
    """Its trace cannot be read off: zero would pull the running average down."""
    c = torch.tensor([0.0, 0.0, 1.0]).double()
    gradient, draws = hutchinson_penalty_gradient(
        tiny.loss_fn, tiny.layers, list(tiny.model.parameters()), c, generator=generator_from("cpu", 1)
    )
    assert draws.isnan().tolist() == [[True, True, False]]
    assert all(g.isfinite().all() for g in gradient)


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
        return Loss((weight * F.cross_entropy(z, y, reduction="none")).mean(), {}, (Output(z, weight=weight),))

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
    """Sampled labels instead of signs would have the right mean and a wrong gradient; a lost weight would scale both."""
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
    """The Gauss–Newton matrix is the Hessian of the loss of a linear model: the declared outputs must match the total."""
    model = nn.Linear(3, 3).double()
    x = torch.randn(2, 3).double()
    loss = gauss_newton_losses()[name](model, x)
    layers = dict(model.named_parameters())
    # TRADES holds the clean prediction constant, as its Hessian by autograd does.
    assert torch.allclose(exact_gauss_newton_trace(loss, layers).mean, exact_trace(loss, layers).mean, rtol=ROUNDING)


# ------------------------------------------------------------------------------------------------- estimators, seeded draws


def estimator_samples(name: str, case: Case, num: int) -> Tensor:
    """Independent draws [num, L] of one estimator."""
    generator = generator_from("cpu", name)
    if name == "hutchinson":
        return hutchinson_samples(case.loss_fn(), case.layers, num_probes=num, generator=generator)
    if name == "block probes":
        return hutchinson_samples(case.loss_fn(), case.layers, num_probes=num, groups="layers", generator=generator)
    if name == "two-point":
        return two_point_samples(case.loss_fn, case.layers, radius=1e-4, num_probes=num, generator=generator)
    assert name == "hutch++"  # a new sketch each time: only then is a wrong captured part seen
    loss = case.loss_fn()
    return torch.stack([hutchpp_trace(loss, case.layers, num_matvecs=6, generator=generator).mean for _ in range(num)])


@pytest.mark.parametrize("estimator", ["hutchinson", "block probes", "two-point", "hutch++"])
@pytest.mark.parametrize("name", CASES)
def test_every_estimator_agrees_with_the_exact_trace(name, estimator):
    """Mean within 4 standard errors on every kind of network; a draw's variance within 6 standard errors of its formula."""
    case = make_case(name)
    if estimator == "two-point" and name not in SMOOTH:
        pytest.skip("second differences count the kinks of ReLU: another quantity")
    H, places = full_hessian(case), slices(case.layers)
    num = 40 if estimator == "hutch++" else 150
    samples = estimator_samples(estimator, case, num)
    if estimator == "two-point":
        samples = samples.nan_to_num()  # its sign that a layer has no gradient
    exact = torch.stack([H[p, p].trace() for p in places])
    estimate = TraceEstimate.from_samples(samples)
    # two-point: truncation of relative order radius² = 1e-8, rounding 1e-16 / 1e-8 of the gradients.
    floor = 1e-6 if estimator == "two-point" else ROUNDING
    assert ((estimate.mean - exact).abs() <= 4 * estimate.stderr + floor * float(H.norm())).all(), (estimate, exact)
    if estimator != "hutch++":
        together = estimator != "block probes"
        groups = [set(range(len(places)))] if together else [{i} for i in range(len(places))]
        scale = (squared_norms(case.layers) / case.layers.sizes()).sqrt() if estimator == "two-point" else None
        variance = hutchinson_variance(H, places, groups, scale)
        centred = samples - samples.mean(0)
        # Var(s²) = (m4 − s⁴) / n for n independent draws.
        error = ((centred**4).mean(0) - centred.square().mean(0).square()).clamp(min=0).sqrt() / num**0.5
        assert ((samples.var(0) - variance).abs() <= 6 * error + floor * float(H.norm()) ** 2).all()
    if name == "unused and linear tensors":
        assert list(case.layers) == ["shift", "fc.weight", "unused.weight"]
        assert (samples[:, [0, 2]].abs() <= floor).all()


@pytest.mark.parametrize("name", CASES)
def test_one_full_probe_sums_to_the_global_quadratic_form(name):
    """The layers' draws are pieces of one vᵀHv with the v that the generator gives."""
    case = make_case(name)
    v = flat(signs(case.layers.tensors, generator_from("cpu", 3)))
    draw = hutchinson_samples(case.loss_fn(), case.layers, generator=generator_from("cpu", 3))
    H = full_hessian(case)
    assert float(draw.sum()) == pytest.approx(float(v @ H @ v), rel=ROUNDING, abs=1e-12)
    one_group = hutchinson_samples(
        case.loss_fn(), case.layers, groups=[list(case.layers)], generator=generator_from("cpu", 3)
    )
    assert torch.equal(one_group, draw)


def test_a_diagonal_hessian_is_exact_in_every_draw():
    """Signs square to one: what is left of the variance is off the diagonal. Gaussian probes would not do this."""
    w = {"a": torch.randn(3).double().requires_grad_(), "b": torch.randn(4, 2).double().requires_grad_()}
    loss = sum((p**3).sum() for p in w.values())
    exact = torch.stack([6 * p.detach().sum() for p in w.values()])
    assert torch.allclose(hutchinson_samples(loss, w, num_probes=5), exact.expand(5, 2), rtol=1e-12)


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


def test_curved_units_have_more_than_gauss_newton():
    """The converse: with GELU the two differ, so the test above can fail."""
    case = make_case("GELU, BCE")
    loss = case.loss_fn()
    exact, gauss_newton = (f(loss, case.layers).mean.detach() for f in (exact_trace, exact_gauss_newton_trace))
    assert abs(float(exact[0] - gauss_newton[0])) > 0.01 * float(gauss_newton[0])
    assert float(exact[1]) == pytest.approx(float(gauss_newton[1]), rel=ROUNDING)  # the last layer is linear


def test_the_full_batch_is_the_weighted_average_of_ragged_micro_batches():
    """Weighted by examples: a plain mean over batches would count those of the short one more."""
    torch.manual_seed(4)
    model = SmoothNet().double()
    x, y = torch.randn(7, 4).double(), torch.randint(0, 3, (7,))
    layers = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    full = exact_trace(cross_entropy(model(x), y), layers).mean
    halves = [exact_trace(cross_entropy(model(x[i]), y[i]), layers).mean for i in (slice(0, 5), slice(5, 7))]
    assert torch.allclose((5 * halves[0] + 2 * halves[1]) / 7, full, rtol=ROUNDING)
    samples = TraceEstimate.from_samples(torch.stack(halves), weights=torch.tensor([5, 2]))
    assert torch.allclose(samples.mean, full, rtol=ROUNDING)


def test_rescaling_a_layer_leaves_the_index_and_changes_the_trace():
    """(α W_1, W_2 / α) is the same function for a linear inner unit; draw by draw, since t_l scales as 1/α_l²."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False)).double()
    x, y = torch.randn(8, 4).double(), torch.randint(0, 3, (8,))
    layers = {n: p for n, p in model.named_parameters() if p.ndim > 1}

    def measured() -> tuple[float, float]:
        t = hutchinson_trace(cross_entropy(model(x), y), layers, num_probes=64, groups="layers").mean
        return float((squared_norms(layers) * t).sqrt().sum()), float(t.sum())

    torch.manual_seed(0)
    index, trace = measured()
    with torch.no_grad():
        model[0].weight *= 4
        model[2].weight /= 4
    torch.manual_seed(0)
    rescaled, rescaled_trace = measured()
    assert rescaled == pytest.approx(index, rel=ROUNDING)
    assert abs(rescaled_trace - trace) > 0.5 * trace


# --------------------------------------------------------------------------------------------------------------- Hutch++


def spectrum(num: int) -> tuple[Layers, Tensor, Tensor]:
    """½ wᵀAw with eigenvalues 1/i² in a random basis, w cut into two layers: the layers, the loss, the exact traces."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(num, num).double()).Q
    A = basis @ torch.diag(1 / torch.arange(1, num + 1).double().square()) @ basis.T
    w = torch.randn(num).double().requires_grad_()
    return Layers({"w": w}, {"w": ("a", "b")}), 0.5 * w @ A @ w, A.diagonal().view(2, -1).sum(1)


def test_hutchpp_beats_hutchinson_at_equal_cost_where_few_directions_matter():
    """In a random basis: a diagonal matrix is exact for signs and would hide everything."""
    layers, loss, exact = spectrum(40)
    errors = []
    for estimate in (
        lambda g: hutchpp_trace(loss, layers, num_matvecs=30, generator=g),
        lambda g: hutchinson_trace(loss, layers, num_probes=30, generator=g),
    ):
        means = torch.stack([estimate(generator_from("cpu", repetition)).mean for repetition in range(20)])
        errors.append((means - exact).square().mean(0).sqrt())
    assert (errors[0] < 0.2 * errors[1]).all(), errors


def test_hutchpp_is_unbiased_for_every_layer_given_its_sketch(monkeypatch):
    """The mean over all residual signs, the sketch fixed: PHQQᵀ adds up to zero over all layers, but not over each."""
    layers, loss, exact = spectrum(8)
    sketch, residuals = sign_sets(8)[100:102], sign_sets(8)
    pairs = zip(residuals[::2], residuals[1::2], strict=True)
    enumerated(monkeypatch, [v for pair in pairs for v in (*sketch, *pair)], hutchpp_module)
    draws = torch.cat([hutchpp_samples(loss, layers, num_matvecs=6) for _ in range(128)])
    assert torch.allclose(draws.mean(0), exact, rtol=ROUNDING)


def test_hutchpps_error_bar_is_its_spread_over_sketches():
    """The draws share a sketch; were its part uncertain, the spread of the residual would be too small an error."""
    layers, loss, _ = spectrum(12)
    estimates = [hutchpp_trace(loss, layers, num_matvecs=9, generator=generator_from("cpu", r)) for r in range(100)]
    spread = torch.stack([e.mean for e in estimates]).var(0)
    claimed = torch.stack([e.stderr for e in estimates]).square().mean(0)
    # Sample variances over 100 repetitions: 14 % for Gaussian errors, more for heavy tails; a wrong 1/K would be a factor of 3.
    assert torch.allclose(claimed, spread, rtol=0.5)


@pytest.mark.parametrize("num_matvecs", [3, 5])
def test_hutchpp_with_one_column_has_no_error_bar(num_matvecs):
    """One residual draw: unbiased, of unknown error."""
    layers, loss, _ = spectrum(12)
    estimate = hutchpp_trace(loss, layers, num_matvecs=num_matvecs)
    assert estimate.num_probes == 1
    assert estimate.stderr.isinf().all()


# ------------------------------------------------------------------------------------------------------- third derivatives


def activation_net(middle: nn.Module, *, is_convolution: bool = False) -> tuple[nn.Module, Tensor]:
    first = nn.Conv2d(1, 4, 3, padding=1) if is_convolution else nn.Linear(16, 6)
    shape: list[nn.Module] = [] if is_convolution else [nn.Flatten()]
    last = nn.Linear(64 if is_convolution else 6, 3)
    model = nn.Sequential(*shape, first, middle, nn.Flatten(), last).double()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model, image_batch(5)[0].double()


class ThroughVariance(nn.Module):
    """Layer norm by primitive operations."""

    def forward(self, h: Tensor) -> Tensor:
        return (h - h.mean(-1, keepdim=True)) / (h.var(-1, keepdim=True, unbiased=False) + 1e-5).sqrt()


RIGHT_AT_ORDER_THREE: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "tanh": (nn.Tanh, False),
    "GELU": (nn.GELU, False),
    "GELU, tanh form": (lambda: nn.GELU(approximate="tanh"), False),
    "SiLU": (nn.SiLU, False),
    "softmax": (lambda: nn.Softmax(-1), False),
    "RMSNorm": (lambda: nn.RMSNorm(6), False),
    "layer norm by primitive operations": (ThroughVariance, False),
    "GroupNorm": (lambda: nn.GroupNorm(2, 4), True),
    "BatchNorm in eval mode": (lambda: nn.BatchNorm2d(4).eval(), True),
}


def order_three(model: nn.Module, x: Tensor, guarded: bool = True) -> tuple[Tensor, Tensor]:
    """The gradient of vᵀHv for one v by autograd (unless refused), and by central differences of Hessian products."""
    y = torch.tensor([0, 1, 2, 0, 1])
    layers = dict(model.named_parameters())
    parameters = list(layers.values())
    by_difference, _ = hutchinson_penalty_gradient(
        lambda: F.cross_entropy(model(x), y),
        layers,
        parameters,
        torch.ones(len(layers)).double(),
        generator=generator_from("cpu", 0),
    )
    loss = F.cross_entropy(model(x), y)
    if guarded:
        draw = hutchinson_samples(loss, layers, generator=generator_from("cpu", 0), create_graph=True).sum()
    else:
        v = signs(parameters, generator_from("cpu", 0))
        g = torch.autograd.grad(loss, parameters, create_graph=True)
        draw = flat(torch.autograd.grad(g, parameters, v, create_graph=True)) @ flat(v)
    return flat(torch.autograd.grad(draw, parameters, materialize_grads=True, allow_unused=True)), flat(by_difference)


@pytest.mark.parametrize("name", RIGHT_AT_ORDER_THREE)
def test_autograd_agrees_with_differences_of_products_at_order_three(name):
    """Which networks may use ``create_graph``; and the differences against an answer for the same probe."""
    make, is_convolution = RIGHT_AT_ORDER_THREE[name]
    by_autograd, by_difference = order_three(*activation_net(make(), is_convolution=is_convolution))
    assert close(by_autograd, by_difference, 1e-6)  # truncation and rounding near 1e-9, times large fifth derivatives


def test_third_derivatives_through_layer_norm_are_wrong_without_a_word_and_are_refused():
    """If the first assertion fails, PyTorch has mended it, and ``hvp._WRONG_FROM_ORDER`` can forget it."""
    model, x = activation_net(nn.LayerNorm(6))
    by_autograd, by_difference = order_three(model, x, guarded=False)
    assert not close(by_autograd, by_difference, 1e-2)
    layers = dict(model.named_parameters())
    loss = cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))
    for refused in (
        lambda: hutchinson_samples(loss, layers, create_graph=True),
        lambda: exact_trace(loss, layers, create_graph=True),
        lambda: hvp(loss, list(layers.values()), list(layers.values()), create_graph=True),
    ):
        with pytest.raises(ValueError, match=r"order 3: got NativeLayerNormBackward0.*hutchinson_penalty_gradient"):
            refused()
    assert hutchinson_samples(loss, layers).isfinite().all()  # order two is right


def test_second_derivatives_through_weight_norm_are_wrong_without_a_word_and_are_refused():
    """If the first assertion fails, PyTorch has mended it, and ``hvp._WRONG_FROM_ORDER`` can forget it."""
    model, x = activation_net(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)))
    parameters = list(model.parameters())
    v = signs(parameters, generator_from("cpu", 0))

    def loss_fn() -> Tensor:
        return F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1]))

    by_autograd = torch.autograd.grad(
        torch.autograd.grad(loss_fn(), parameters, create_graph=True), parameters, v, materialize_grads=True
    )
    assert not close(flat(by_autograd), flat(finite_difference_hvp(loss_fn, parameters, v)), 1e-2)
    with pytest.raises(ValueError, match=r"order 2: got WeightNormInterfaceBackward0.*two_point"):
        hutchinson_samples(loss_fn(), dict(model.named_parameters()))


def test_third_derivatives_through_batch_norm_in_train_mode_raise_and_differences_do_not():
    """The reason why differences of products are the default gradient."""
    model, x = activation_net(nn.BatchNorm2d(4), is_convolution=True)
    with pytest.raises(RuntimeError, match="3rd"):
        order_three(model, x)
    with undisturbed(model, training=None):
        gradient, _ = hutchinson_penalty_gradient(
            lambda: F.cross_entropy(model(x), torch.tensor([0, 1, 2, 0, 1])),
            {"w": model[0].weight},
            list(model.parameters()),
            torch.ones(1).double(),
        )
    assert flat(gradient).norm() > 0


def test_the_default_step_is_near_the_best_in_both_precisions():
    """Too small a step drowns in rounding, too large a one in truncation; float32 is what training uses."""
    torch.manual_seed(0)
    double, x = activation_net(nn.GELU(), is_convolution=True)
    gradients = {}
    for dtype in (torch.float64, torch.float32):
        model = activation_net(nn.GELU(), is_convolution=True)[0]
        model.load_state_dict(double.state_dict())
        model, inputs = model.to(dtype), x.to(dtype)
        gradients[dtype], _ = hutchinson_penalty_gradient(
            lambda model=model, inputs=inputs: F.cross_entropy(model(inputs), torch.tensor([0, 1, 2, 0, 1])),
            {n: p for n, p in model.named_parameters() if p.ndim > 1},
            list(model.parameters()),
            torch.tensor([1.0, 0.5]),
            generator=generator_from("cpu", 0),
        )
    # ε^(2/3) is 2e-5 in float32, times the size of fifth derivatives (a hundred or so).
    assert close(flat(gradients[torch.float32]).double(), flat(gradients[torch.float64]), 2e-3)


# --------------------------------------------------------------------------------------------------------- nothing is left


def test_nothing_is_left_behind():
    """Weights bit for bit, gradients, buffers, modes, random state, and a loss that can still be differentiated."""
    model = BatchNormNet().double()
    x, y = image_batch()
    x = x.double()
    layers = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    parameters = list(model.parameters())
    for p in parameters:
        p.grad = torch.full_like(p, 0.5)

    def loss_fn() -> Loss:
        return cross_entropy(model(x), y)

    before, state = everything(model), torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    vectors = [torch.ones_like(p) for p in layers.values()]
    with undisturbed(model, training=None):
        finite_difference_hvp(loss_fn, list(layers.values()), vectors)
        hutchinson_penalty_gradient(
            loss_fn, layers, parameters, torch.ones(2), num_probes=2, relative_step=0.3, generator=generator
        )
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    loss = loss_fn()  # after the moves: they make a graph that was built before unusable
    before, state = everything(model), torch.get_rng_state()
    hvp(loss, list(layers.values()), vectors)
    hutchinson_samples(loss, layers, num_probes=2, groups="layers", generator=generator)
    hutchpp_samples(loss, layers, num_matvecs=6, generator=generator)
    dense_hessian(loss, layers)
    exact_trace(loss, layers)
    exact_gauss_newton_trace(loss, layers)
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(p.grad, torch.full_like(p, 0.5)) for p in parameters)
    assert all(p.requires_grad and p.is_leaf for p in parameters)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss.total, parameters))


@pytest.mark.parametrize("which", ["product", "penalty"])
def test_weights_and_random_state_come_back_after_an_exception(which):
    """An out-of-memory error at W + h u must not leave the model there."""
    model = SmoothNet().double()
    layers = {n: p for n, p in model.named_parameters() if p.ndim > 1}
    calls = []

    def loss_fn() -> Tensor:
        calls.append(torch.rand(1))
        if len(calls) == 2:
            raise MemoryError
        return F.cross_entropy(model(torch.ones(2, 4).double()), torch.tensor([0, 1]))

    tensors = list(layers.values())
    vectors = [torch.ones_like(p) for p in tensors]
    generator = generator_from("cpu", 0)
    run = {
        "product": lambda: finite_difference_hvp(loss_fn, tensors, vectors, relative_step=0.1),
        "penalty": lambda: hutchinson_penalty_gradient(loss_fn, layers, tensors, torch.ones(2), generator=generator),
    }[which]
    before, state = everything(model), torch.get_rng_state()
    with pytest.raises(MemoryError):
        run()
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_probes_differ_without_a_generator_and_repeat_with_one():
    """Restoring the random state must not give every probe the same signs: the error bar would be zero."""
    case = make_case("tanh, label smoothing")
    _, draws = hutchinson_penalty_gradient(
        case.loss_fn, case.layers, case.layers.tensors, torch.ones(2).double(), num_probes=4
    )
    for samples in (
        draws,
        hutchinson_samples(case.loss_fn(), case.layers, num_probes=4),
        hutchpp_samples(case.loss_fn(), case.layers, num_matvecs=12),
    ):
        assert samples.shape == (4, 2)
        assert samples.dtype == torch.float64
        assert len(set(samples[:, 0].tolist())) > 1
    first, second = (
        hutchinson_samples(case.loss_fn(), case.layers, generator=generator_from("cpu", 7)) for _ in range(2)
    )
    assert torch.equal(first, second)


# ------------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (0, "expected 1 to 2"),
        (3, "expected 1 to 2"),
        ("layer", "got 'layer'"),
        ([["1.weight"]], r"missing \['3.weight'\]"),
        ([["1.weight", "3.weight"], ["1.weight"]], r"repeated \['1.weight'\]"),
        ([["1.weight", "3.weight", "x"]], r"unknown \['x'\]"),
        ([["1.weight", "3.weight"], []], "no empty group"),
    ],
)
def test_groups_must_be_a_partition_of_the_layers(groups, message):
    """A forgotten layer would silently count as flat."""
    case = make_case("tanh, label smoothing")
    with pytest.raises(ValueError, match=message):
        hutchinson_samples(case.loss_fn(), case.layers, groups=groups)


def test_impossible_settings_are_refused():
    """Each names what it got."""
    case = make_case("tanh, label smoothing")
    tensors = case.layers.tensors
    with pytest.raises(ValueError, match="num_matvecs: got 2"):
        hutchpp_samples(case.loss_fn(), case.layers, num_matvecs=2)
    with pytest.raises(ValueError, match=r"layer 1\.weight with 64 elements"):
        dense_hessian(case.loss_fn(), case.layers, max_elements=63)
    with pytest.raises(ValueError, match=r"layer 1\.weight with 64 elements"):
        exact_trace(case.loss_fn(), case.layers, max_elements=63)
    with pytest.raises(ValueError, match=r"relative_step: got 0\.0"):
        finite_difference_hvp(case.loss_fn, tensors, tensors, relative_step=0.0)
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match=r"coefficients: got \[1.0, "):
            hutchinson_penalty_gradient(case.loss_fn, case.layers, tensors, torch.tensor([1.0, bad]))
