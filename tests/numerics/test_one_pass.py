"""Rules of one pass and the posterior family, in float64: exact traces, whole sums over signs, closed forms.

Legend: a_l, d_l, t_l, q_l, r_l, u_l, σ_l, p, λ as in `random_directions`, whose (7) is the family.
"""

from dataclasses import replace

import pytest
import torch
from cases import BatchNormNet, SmoothNet, image_batch, wrapped
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import exact_trace, gradients
from scipy.stats import t as student
from torch import nn

from wcitrain.curvature import cross_entropy
from wcitrain.optim import UniformNoise, WCIPosterior, record
from wcitrain.params import Layers, select_layers

COPIES, PAIRS, SHAPES = 200, 30, ((4, 3), (4, 4), (3, 4))
ONE_PASS = [UniformNoise(0.3, passes=1), WCIPosterior(0.3, passes=1)]


# ---- the traces of the running average, and their stated errors --------------------------------------------


def network_and_losses(kind: str):
    """Weights of three layers, and the losses [M] of M copies of them [M, out, in] on examples i [M, B]."""
    g = torch.Generator().manual_seed(3)
    weights = [torch.randn(shape, generator=g).double() for shape in SHAPES]
    x, b = torch.randn(12, 3, generator=g).double(), torch.randn(12, 40, generator=g).double()

    def outputs(copies, i):
        h = x[i]
        for w in copies[:-1]:
            z = h @ w.mT
            # The kinks are far: zero is z only where all inputs are off
            assert kind != "relu" or (z[z != 0].abs() > 1e-4).all()
            h = torch.tanh(z) if kind == "tanh" else torch.relu(z)
        return h @ copies[-1].mT

    y = outputs([w[None] for w in weights], torch.arange(12)[None])[0].argmax(-1)  # positive traces

    def losses(copies, i):
        if kind == "quadratic":  # ½ wᵀAw + ⟨b_n, w⟩
            w = torch.cat([w.flatten(1) for w in copies], 1)
            return 0.5 * (w @ (b.T @ b / 12) * w).sum(1) + (b[i].mean(1) * w).sum(1)
        return -outputs(copies, i).log_softmax(-1).gather(-1, y[i][..., None])[..., 0].mean(1)

    return weights, losses


def smoothed_traces(weights, losses, r: float, n: int = 20_000):
    """v·Hv of n independent pairs of points, [L, n]: the curvature that noise of relative size r sees."""
    g, found, i = torch.Generator().manual_seed(9), 0, torch.arange(12).expand(n, 12)
    sigma = [r * w.norm() / w.numel() ** 0.5 for w in weights]
    v = [torch.randint(0, 2, (n, *w.shape), generator=g) * 2.0 - 1 for w in weights]
    for sign in (1, -1):
        copies = [(w + sign * s * e).requires_grad_() for w, s, e in zip(weights, sigma, v, strict=True)]
        slopes = torch.autograd.grad(losses(copies, i).sum(), copies)
        products = [(e * h).flatten(1).sum(1) for e, h in zip(v, slopes, strict=True)]
        found = found + sign * torch.stack(products)
    return found / (2 * torch.stack(sigma)[:, None])


# Examples of a step, drawn anew (so that first-order noise is left in a pair); 0: always all of them. Without
# it the radius may be so small that no kink is crossed; at a large one kinks smooth the curvature.
ROWS = {
    "quadratic, noise": ("quadratic", UniformNoise(0.3, passes=1), 4),
    "quadratic, wci": ("quadratic", WCIPosterior(0.3, passes=1), 4),
    "tanh, noise": ("tanh", UniformNoise(0.1, passes=1), 12),
    "tanh, wci": ("tanh", WCIPosterior(0.1, passes=1), 12),
    "relu, noise": ("relu", UniformNoise(1e-6, passes=1), 0),
    "relu, wci": ("relu", WCIPosterior(1e-6, passes=1), 0),
    "relu, smoothed": ("relu smoothed", UniformNoise(0.5, passes=1), 4),
}


@pytest.mark.parametrize("row", ROWS)
def test_averages_are_right_within_their_stated_errors(row, monkeypatch):
    """A bias, or errors too small or too large, would make the logged traces and their bars decoration.

    Copies of one network side by side, each with signs and examples of its own, are as many experiments.
    """
    kind, rule, batch = ROWS[row]
    weights, losses = network_and_losses(kind)
    everything, one = torch.arange(12)[None], {str(w.shape): w.clone().requires_grad_() for w in weights}
    exact = exact_trace(losses([w[None] for w in one.values()], everything).sum(), one)
    oracle_variance = 0.0
    if kind == "relu smoothed":
        draws = smoothed_traces(weights, losses, rule.relative_size)
        oracle_variance = draws.var(1) / draws.shape[1]
        assert ((draws.mean(1) - exact).abs() > 0.2 * exact).any()  # it is not Tr(H)
        exact = draws.mean(1)
    names, sizes = [str(c) for c in range(COPIES)], torch.tensor([w.numel() for w in weights]).double()
    monkeypatch.setattr("wcitrain.params._qkv_parts", lambda model, chosen: dict.fromkeys(chosen, names))
    monkeypatch.setattr(Layers, "sizes", lambda self: sizes.repeat_interleave(COPIES))  # its own is slow
    net = nn.ModuleList(nn.Linear(w.shape[1], w.shape[0] * COPIES, bias=False).double() for w in weights)
    for layer, w in zip(net, weights, strict=True):
        layer.weight.data.copy_(w.repeat(COPIES, 1))
    optimizer, g = wrapped(net, perturbation=rule, split_qkv=True), torch.Generator().manual_seed(5)
    for _ in range(2 * PAIRS):
        i = torch.randint(0, 12, (COPIES, batch), generator=g) if batch else everything.expand(COPIES, 12)
        optimizer.zero_grad()
        with optimizer.perturbed():
            copies = [m.weight.view(COPIES, *w.shape) for m, w in zip(net, weights, strict=True)]
            losses(copies, i).sum().backward()
        optimizer.step()
    mean, error = (column.view(3, COPIES) for column in record.averages(optimizer._record))
    assert optimizer.metrics()["curvature/trace_stderr/1.weight[7]"] == error[1, 7]
    # Unbiased, up to the truncation on a smooth net: O(r²), with a constant near one here.
    truncation = rule.relative_size**2 * exact.abs() if kind == "tanh" else 1e-8
    bound = 4 * (mean.var(1) / COPIES + oracle_variance).sqrt() + truncation
    assert ((mean.mean(1) - exact).abs() < bound).all()
    # The errors have the size of the spread. The spread of copies has a relative error of
    # sqrt((2 + excess kurtosis) / 4 COPIES) = .06 for an excess of 1.
    assert ((error.square().mean(1).sqrt() / mean.std(1) - 1).abs() < 4 * 0.06).all()
    # Coverage of ±2 errors: Student's with as many pairs as the weights p leave, 1 / Σ p² (of 30: 27). A
    # skewness γ of v·Hv costs .25 γ² / 27 more (Hall 1992), .04 for 2 (that of one χ² is 2.8). Four
    # binomial errors; all layers together: their mean varies at most as one. Too large: see the spread.
    p = 0.98 ** (2 * torch.arange(PAIRS).double())
    pairs = float(p.sum() ** 2 / p.square().sum())
    nominal = 2 * student.cdf(2, pairs - 1) - 1
    width = 4 * (nominal * (1 - nominal) / COPIES) ** 0.5
    covered = ((mean - exact[:, None]).abs() < 2 * error).double().mean(1)
    for share in (*covered, covered.mean()):
        assert share > nominal - width - 0.04


def test_the_average_weighs_pairs_by_decay_squared_and_states_their_spread():
    """trace_decay counts steps: by decay a pair the average would be twice as slow as documented."""
    model, x, y, found = SmoothNet().double(), torch.randn(10, 4).double(), torch.arange(10) % 3, []
    optimizer, layers = wrapped(model, perturbation=UniformNoise(0.3, passes=1)), select_layers(model)
    assert optimizer.trace_decay == 0.98
    for _ in range(12):
        at = [w.detach().clone() for w in layers.values()]
        optimizer.zero_grad()
        with optimizer.perturbed():
            u = [w.detach() - w0 for w, w0 in zip(layers.values(), at, strict=True)]
            cross_entropy(model(x), y).total.backward()
        pairs = zip(u, layers.values(), strict=True)
        found.append(torch.stack([(v * w.grad).sum() / v.square().mean() for v, w in pairs]))
        optimizer.step()
    samples = torch.stack(found).view(6, 2, 2).mean(1)
    p = 0.98 ** (2 * torch.arange(5, -1, -1).double())[:, None]
    p = p / p.sum()
    mean = (p * samples).sum(0)
    variance = (p * (samples - mean).square()).sum(0) / (1 - p.square().sum())  # unbiased
    expected = mean, (p.square().sum() * variance).sqrt()
    for got, right in zip(record.averages(optimizer._record), expected, strict=True):
        assert torch.allclose(got, right, rtol=1e-9)  # u = (W + u) − W has lost 1e-15 of W


# ---- the gradient ------------------------------------------------------------------------------------------


@pytest.fixture
def quartic(monkeypatch):
    """A loss of degree four, whose traces move with the weights; the six signs are the bits of a number."""
    model, bits = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False)).double(), [0]
    x, y = torch.randn(5, 2).double(), torch.randn(5).double()

    def signs(tensors, generator=None):
        v = (bits[0] >> torch.arange(6) & 1).double() * 2 - 1
        return [part.view(t.shape) for part, t in zip(v.split([4, 2]), tensors, strict=True)]

    monkeypatch.setattr("wcitrain.curvature.passes.signs", signs)
    return model, lambda: (model(x)[:, 0] - y).square().mean(), bits


def test_a_pair_of_steps_averages_to_two_passes_exactly(quartic):
    """With the sign not turned first-order noise stays; u first, -u then, for the same u."""
    model, loss_fn, bits = quartic
    two, one = (wrapped(model, perturbation=UniformNoise(0.4, passes=passes)) for passes in (2, 1))
    for bits[0] in (5, 40):
        means = [torch.zeros_like(p) for p in model.parameters()]
        for sign in (1, -1):
            w = model[1].weight.detach().clone()
            v = (bits[0] >> torch.arange(4, 6) & 1) * 2 - 1
            with one.perturbed():
                u = model[1].weight.detach() - w
            assert torch.equal(u.sign()[0], sign * v)
            assert torch.equal(model[1].weight, w)
            one.zero_grad()
            one.backward(loss_fn)
            torch._foreach_add_(means, [p.grad / 2 for p in model.parameters()])
            one.step()
        two.zero_grad()
        two.backward(loss_fn)
        two.step()
        assert all(torch.equal(p.grad, m) for p, m in zip(model.parameters(), means, strict=True))
    assert torch.allclose(two.traces() / one.traces(), torch.ones(2).double(), rtol=0.02)  # other decays


@pytest.mark.parametrize("power", [1.0, 1.5, 3.0, None])
def test_the_expected_gradient_is_that_of_the_loss_and_the_family(power, quartic):
    """A wrong σ, λ or share of a layer: over all 64 signs odd terms vanish, and no term is of order five."""
    model, loss_fn, bits = quartic
    layers, weights = select_layers(model), list(model.parameters())
    t = exact_trace(loss_fn(), layers, create_graph=True)
    a, d = torch.stack([w.square().sum() for w in weights]), torch.tensor([4.0, 2.0]).double()
    if power is None:
        rule, added = UniformNoise(1.0, passes=1), 0.5 * (a.detach() / d * t).sum()
    else:
        rule = WCIPosterior(strength=0.5, power=power, cap=None, frobenius=True, passes=1)
        added = 0.5 * (d ** (1 - power) * (a * t) ** (power / 2)).sum()
    truth, mean = gradients(loss_fn() + added, weights), [torch.zeros_like(w) for w in weights]
    optimizer = wrapped(model, perturbation=rule)
    for step in range(64):
        bits[0] = step // 2
        known = {"trace_sum": t.detach().clone(), "trace_weight": torch.ones(2).double()}
        optimizer._record.update(is_measured=True, **known)
        optimizer.zero_grad()
        optimizer.backward(loss_fn)
        torch._foreach_add_(mean, [w.grad / 64 for w in weights])
        optimizer.step()
    plain = gradients(loss_fn(), weights)
    for m, g, g0 in zip(mean, truth, plain, strict=True):
        assert (g - g0).norm() > 0.01 * g0.norm()  # the term is seen
        assert torch.allclose(m, g, rtol=1e-10, atol=1e-12)  # rounding of 64 sums


def trained(rule, way: str, parts: int, dropout: bool = False):
    """Gradients of four steps and the record, by ``backward`` or ``perturbed``, in micro-batches."""
    torch.manual_seed(0)
    smooth = nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Tanh(), nn.Linear(6, 3))
    model = (BatchNormNet() if dropout else smooth).double()
    optimizer, found = wrapped(model, 0.1, perturbation=rule, num_micro_batches=parts), []
    for step in range(4):
        x, y = image_batch(seed=step)
        optimizer.zero_grad()
        for x_part, y_part in zip(x.double().chunk(parts), y.chunk(parts), strict=True):
            if way == "backward":
                optimizer.backward(lambda x=x_part, y=y_part: cross_entropy(model(x), y))
                continue
            with optimizer.perturbed():
                (cross_entropy(model(x_part), y_part).total / parts).backward()
        found += [p.grad.clone() for p in model.parameters()]
        optimizer.step()
    return found + [v for v in optimizer._record.values() if isinstance(v, torch.Tensor)], optimizer


@pytest.mark.parametrize("way", ["backward", "perturbed"])
@pytest.mark.parametrize("rule", ONE_PASS, ids=str)
def test_micro_batches_equal_one_large_batch(rule, way):
    """Shares counted twice or not at all, or a u of its own for each: another rule by the memory at hand."""
    large, optimizer = trained(rule, way, parts=1)
    assert optimizer._record["num_estimates"].tolist() == [2.0, 2.0]
    for parts in (2, 3):
        for one, many in zip(large, trained(rule, way, parts)[0], strict=True):
            # Sums of 12 terms in another order, 1e-15; times ||g|| / (σ² t), at most 100, four steps on
            assert torch.allclose(one.double(), many.double(), rtol=1e-11, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("rule", ONE_PASS, ids=str)
def test_perturbed_equals_backward_bitwise(rule, parts):
    """Two ways in that drift apart: the trainer's rule would not be that of other people's loops."""
    ways = [trained(rule, way, parts, dropout=True)[0] for way in ("backward", "perturbed")]
    assert len(ways[0]) == len(ways[1]) > 20
    for left, right in zip(*ways, strict=True):
        assert torch.equal(left.nan_to_num(-1.0), right.nan_to_num(-1.0))  # λ of uniform noise is NaN


# ---- the family --------------------------------------------------------------------------------------------

POWERS = st.sampled_from([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
CAPS = st.sampled_from([None, 0.3, 1.0, 2.0])
NUMBERS = st.tuples(st.floats(0.1, 10), st.integers(1, 100), st.floats(0.1, 10))
SIZES = st.floats(0.05, 0.95)  # of the cap
MANY = settings(max_examples=60, deadline=None, derandomize=True)
ROUNDING = 1e-8  # the sort under the cap allows 1e-9 above it, and λ is in what the capped ones leave


def family(power, cap, size, **kwargs) -> WCIPosterior:
    own = {"power": power, "cap": cap, "frobenius": True}
    if power != 2:  # where it has no effect
        own["floor"] = 1e-6  # below all ratios of the products here: (7) itself
    return WCIPosterior(size * (cap or 1), **own, **kwargs)


def test_a_floor_without_effect_is_refused():
    """Uniform noise looks at no trace: an ablation of the floor would compare a run with itself."""
    with pytest.raises(ValueError, match=r"floor: got 0\.2 with power=2, where no trace counts"):
        WCIPosterior(power=2, floor=0.2)


def columns(layers) -> list[torch.Tensor]:
    return list(torch.tensor(layers, dtype=torch.float64).T)


def relative(found, a, d) -> torch.Tensor:
    return found.sigma * (d / a).sqrt()


@example([(1.0, 1, 1.0), (2.0, 50, 2.0), (3.0, 100, 3.0)], 1.0, 1.0, 0.9, "layers")  # two at the cap
@given(st.lists(NUMBERS, min_size=1, max_size=8), POWERS, CAPS, SIZES, st.sampled_from(["layers", "network"]))
@MANY
def test_the_family_has_the_relative_size_and_the_cap_it_was_given(layers, power, cap, size, size_of):
    """Noise of another strength than set; a layer beyond its cap; or the wrong layers at it."""
    a, d, t = columns(layers)
    rule = family(power, cap, size, size_of=size_of)
    found = rule.posterior(a, d, t, 1.0)
    r, weight = relative(found, a, d), a if size_of == "network" else torch.ones_like(a)
    mean = ((weight * r.square()).sum() / weight.sum()).sqrt()
    for value in (mean, found.relative_size):
        assert float(value) == pytest.approx(rule.relative_size, rel=ROUNDING)
    limit, shape = cap or torch.inf, (a * t / d.square()) ** (power / 2 - 1)
    assert (r <= limit * (1 + ROUNDING)).all()
    is_capped = r >= limit * (1 - ROUNDING)
    if is_capped.any() and not is_capped.all():
        assert shape[is_capped].min() >= shape[~is_capped].max()
    free = ~is_capped
    assert torch.allclose(r[free].square(), power * found.strength * shape[free], rtol=ROUNDING)  # (7)
    if power == 2:
        same = UniformNoise(rule.relative_size).posterior(a, d, t, 1.0).sigma
        assert torch.allclose(found.sigma, same, rtol=ROUNDING)
    if power == 1:
        assert torch.allclose(found.sigma[free].square(), (found.strength * (a / t).sqrt())[free])


@given(st.lists(NUMBERS, min_size=2, max_size=8), POWERS, CAPS, SIZES, st.floats(0.1, 10), st.data())
@MANY
def test_the_family_ignores_scale_and_layers_without_gradient(layers, power, cap, size, scale, data):
    """Rescaled layers of the same network would get other noise; dead ones would take the others' share."""
    (a, d, t), rule = columns(layers), family(power, cap, size)
    r = relative(rule.posterior(a, d, t, 1.0), a, d)
    other, at = torch.ones_like(a), data.draw(st.integers(0, len(a) - 1))
    other[at] = scale
    rescaled = relative(rule.posterior(a * other, d, t / other, 1.0), a * other, d)
    assert torch.allclose(r, rescaled, rtol=ROUNDING)
    is_active = torch.arange(len(a)) != at
    found = rule.posterior(a, d, t, 1.0, is_active)
    alone = rule.posterior(*(column[is_active] for column in (a, d, t)), 1.0)
    assert found.sigma[at] == found.frobenius[at] == 0
    assert torch.allclose(found.sigma[is_active], alone.sigma, rtol=ROUNDING)
    assert float(found.relative_size) == pytest.approx(rule.relative_size, rel=ROUNDING)


@given(st.lists(NUMBERS, min_size=1, max_size=8), POWERS, CAPS, SIZES, st.sampled_from(["layers", "network"]))
@MANY
def test_strength_and_relative_size_lead_to_each_other(layers, power, cap, size, size_of):
    """λ is logged by one run and set in another: both must be the same rule, and λ the weight of R_p."""
    a, d, t = columns(layers)
    rule = family(power, cap, size, size_of=size_of)
    found = rule.posterior(a, d, t, 1.0)
    by_strength = replace(rule, relative_size=None, strength=float(found.strength))
    back = by_strength.posterior(a, d, t, 1.0)
    assert float(back.relative_size) == pytest.approx(size * (cap or 1), rel=ROUNDING)
    assert torch.allclose(back.sigma, found.sigma, rtol=ROUNDING)
    w, t = a.sqrt().requires_grad_(), t.requires_grad_()
    (d ** (1 - power) * (w.square() * t) ** (power / 2)).sum().backward()  # R_p
    is_free = relative(found, a, d) < (cap or torch.inf) * (1 - ROUNDING)
    expected = (found.strength * t.grad)[is_free]  # the added loss ½ Σ σ_l² t_l has the gradient of λ R_p
    assert torch.allclose(0.5 * found.sigma[is_free].square(), expected, rtol=ROUNDING)
    assert torch.allclose(found.frobenius * w.detach(), found.strength * w.grad, rtol=ROUNDING)


@pytest.mark.parametrize("size_of", ["layers", "network"])
def test_a_size_at_the_cap_is_reached_in_float32_too(size_of):
    """On devices without float64 no layer seemed to fit under its cap: r fell to 61 % of its value."""
    rule = WCIPosterior(0.7, cap=0.7, size_of=size_of)
    for seed in range(50):
        g = torch.Generator().manual_seed(seed)
        a, t, d = (torch.rand(9, generator=g) * scale + 0.1 for scale in (10, 100, 5000))
        assert float(rule.posterior(a, d, t, 1.0).relative_size) == pytest.approx(0.7, rel=1e-3)
