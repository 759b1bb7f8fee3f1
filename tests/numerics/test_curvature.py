"""The curvature mathematics in float64 against closed forms, brute-force autograd, statistics."""

import pytest
import torch
from cases import SmoothNet, wrapped
from oracles import exact_gauss_newton_trace, exact_trace, gradients
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.curvature import Hutchinson, TraceEstimate, cross_entropy, top_layer_trace
from wcitrain.curvature.loss import signs
from wcitrain.evaluation import measure_accuracy
from wcitrain.measures import WCIMeasurement
from wcitrain.optim import RegularizedOptimizer, WCIPenalty, WCIPosterior
from wcitrain.params import select_layers
from wcitrain.seeding import generator_from


@pytest.fixture
def smooth():
    """A tanh network, data, and its loss, in float64."""
    torch.manual_seed(3)
    model = SmoothNet().double()
    with torch.no_grad():
        model.second.weight *= 3  # confident predictions, so that ...
    x = torch.randn(10, 4).double()
    # With these labels the Hessian is close to Gauss-Newton and its layer traces are positive
    y = model(x).argmax(1)
    return model, lambda: cross_entropy(model(x), y)


def with_known_traces(model: nn.Module, traces: torch.Tensor, seed: int, **rule) -> RegularizedOptimizer:
    """A wrapper whose running averages are the exact traces."""
    optimizer = wrapped(model, seed=seed, **rule)
    optimizer._record.update(is_measured=True, trace_sum=traces.clone(), trace_weight=torch.ones_like(traces))
    return optimizer


# All are the index's gradient: by differences, and as the mean over a (here small) posterior; gauss_newton's
# for the Gauss–Newton traces. Truncation is O(radius²). Per rule: arguments, strength, draws.
RULES = {
    "posterior": (lambda s: {"perturbation": WCIPosterior(strength=s, frobenius=True)}, 1e-4, 1200),
    "gauss_newton": (lambda s: {"penalty": WCIPenalty(s, estimator="gauss_newton")}, 1.0, 900),
    "hutchinson": (lambda s: {"penalty": WCIPenalty(s, Hutchinson(3, radius=1e-3))}, 1.0, 400),
}


@pytest.mark.parametrize("name", RULES)
def test_the_gradient_converges_to_the_exact_gradient_of_the_index(name, smooth):
    """Two published codes pass no gradient; a wrong factor or a missing term shows here too.

    The mean over n independent directions must lie within the error its own variance predicts, and that error
    must be small against the gradient: both the norm and every factor are tested.
    """
    model, loss_fn = smooth
    of = exact_gauss_newton_trace if name == "gauss_newton" else exact_trace
    layers, parameters, samples = select_layers(model), list(model.parameters()), []
    traces = of(loss_fn(), layers, create_graph=True)
    assert (traces > 0).all(), "choose another seed: the index needs positive traces"
    a = torch.stack([p.square().sum() for p in layers.values()])
    exact = gradients((a * traces).sqrt().sum(), parameters)  # by autograd through the exact traces
    plain = torch.autograd.grad(loss_fn().total, parameters)
    rule, strength, num_draws = RULES[name]
    optimizer = with_known_traces(model, traces.detach(), seed=1, **rule(strength))
    for draw in range(num_draws):
        optimizer._record["step"] = draw
        optimizer.zero_grad()
        optimizer.backward(loss_fn)
        added = [(p.grad - g).flatten() / strength for p, g in zip(parameters, plain, strict=True)]
        samples.append(torch.cat(added))
    samples = torch.stack(samples)
    truth = torch.cat([g.flatten() for g in exact])
    error = samples.mean(0) - truth
    predicted = (samples.var(0).sum() / len(samples)).sqrt()  # E||error||² = Σ var / n
    assert predicted < 0.13 * truth.norm()
    assert error.norm() < 1.5 * predicted + 1e-3 * truth.norm()
    assert torch.cosine_similarity(samples.mean(0), truth, dim=0) > 0.99


@pytest.mark.parametrize("relative_size", [1e-3, 1.0])
def test_on_a_quadratic_the_estimate_and_the_gradient_hold_at_every_radius(relative_size):
    """½ wᵀAw: differences of gradients are exact, and for a diagonal A the trace in every draw."""
    model, diagonal = nn.Linear(6, 1, bias=False).double(), torch.arange(1.0, 7.0).double()
    optimizer = wrapped(model, 0.1, perturbation=WCIPosterior(relative_size))
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(lambda: 0.5 * (diagonal * model.weight[0].square()).sum())
        assert torch.allclose(model.weight.grad[0], diagonal * model.weight.detach()[0])
        optimizer.step()
        assert torch.allclose(optimizer.traces(), diagonal.sum(), rtol=1e-9)


def test_standard_errors_are_those_of_repeated_experiments():
    """An error bar nobody checked is decoration: compare with the spread over 2,000 repetitions."""
    generator = torch.Generator().manual_seed(0)
    a, t = torch.tensor([[2.0, 5.0], [3.0, 1.0]]).double()
    rows = []
    for _ in range(2000):
        samples = t * torch.empty(12, 2).double().exponential_(generator=generator)
        m = WCIMeasurement.from_samples(("u", "v"), a, samples, torch.ones(12))
        totals = torch.tensor([m.total, m.total_stderr]).double()
        rows.append(torch.cat([totals, m.trace.mean, m.trace.stderr]))
    total, error, *traces = torch.stack(rows).unbind(1)
    truth = float((a * t).sqrt().sum())
    # The plain value is biased by −(1/8)(1/12) = −1 %; corrected, what is left is of order 1/K².
    assert abs(float(total.mean()) - truth) < 4 * float(total.std()) / 2000**0.5 + 0.002 * truth
    for values, errors in ((total, error), (traces[0], traces[2]), (traces[1], traces[3])):
        assert float(errors.square().mean().sqrt()) == pytest.approx(float(values.std()), rel=0.1)


def test_signs_are_fair_independent_and_reproducible():
    """A published Rademacher sampler always returned −1."""
    layers = [torch.zeros(100, 99), torch.zeros(13)]
    v = torch.cat([s.flatten() for s in signs(layers, generator_from("cpu", 1, 2))])
    n = v.numel()
    assert set(v.tolist()) == {-1.0, 1.0}
    assert abs(float(v.mean())) < 4 / n**0.5
    assert abs(float((v[1:] * v[:-1]).mean())) < 4 / n**0.5
    assert abs(float((v[8:] * v[:-8]).mean())) < 4 / n**0.5  # eight signs come from one random byte


def test_evaluation_reports_the_index_with_its_error():
    """One draw has no error bar: batches are cut so that the spread of the traces is known."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    x, y = torch.rand(400, 1, 4, 4).double(), torch.randint(0, 3, (400,))
    attack, layers = Attack(ThreatModel("linf", 1e-9), 1, 1e-9), select_layers(model)
    batches = [(x, y, torch.arange(400))]
    results = [measure_accuracy(model, batches, attack, seed=seed, layers=layers).wci for seed in range(60)]
    spread, error = (torch.tensor([getattr(r, n) for r in results]) for n in ("total", "total_stderr"))
    assert results[0].trace.num_probes == 8
    # The examples are the same in every repetition, so the spread over seeds is at most the reported error.
    assert 0.3 * float(error.mean()) < float(spread.std()) < 1.3 * float(error.mean())
    exact = top_layer_trace(model(x), torch.relu(model[1](x.flatten(1)))).detach()
    last = TraceEstimate.from_samples(torch.stack([r.trace.mean[1:] for r in results]))
    assert abs(float(last.mean[0]) - float(exact)) < 4 * float(last.stderr[0])
