"""``measure_wci`` against closed forms; its errors and stopping against statistics; what it leaves behind."""

import itertools
import json
import math

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from scipy.optimize import minimize, minimize_scalar
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.utils.data import DataLoader, TensorDataset

from wcitrain.attacks import ThreatModel
from wcitrain.curvature import ESTIMATORS, Estimator, TraceEstimate
from wcitrain.measures import Problem, WCIMeasurement, WeightCurvatureIndex, measure_wci, pac_bayes_bound
from wcitrain.method import method
from wcitrain.report.figures import layer_bars


def softmax_regression(classes: int = 4, seed: int = 0) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """One linear layer with confident predictions, and 300 images of 6 pixels well inside the box."""
    torch.manual_seed(seed)
    model = nn.Linear(6, classes, bias=False).double()
    with torch.no_grad():
        model.weight *= 4
    return model, 0.2 + 0.6 * torch.rand(300, 6).double(), torch.randint(0, classes, (300,))


def exact_index(model: nn.Linear, x: torch.Tensor) -> float:
    """sqrt(||W||² mean ||x||² (1 − ||p||²)): measures of softmax regression at images held fixed."""
    with torch.no_grad():
        t = (x.square().sum(1) * (1 - model(x).softmax(1).square().sum(1))).mean()
        return float((model.weight.square().sum() * t).sqrt())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clean_index_of_softmax_regression_is_the_closed_form(estimator):
    """A wrong factor (mean or sum, N, root) shows in no comparison. The mean loss feeds the bound."""
    model, x, y = softmax_regression()
    result = measure_wci(model, [(x, y)], estimator=estimator, num_probes=8)
    assert result.total_stderr < 0.05 * result.total  # else the next line says nothing
    assert abs(result.total - exact_index(model, x)) < 4 * result.total_stderr
    assert result.mean_loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)
    assert (result.num_examples, result.num_probes, result.trace.num_probes) == (300, 8, 17)  # 300 // 16 = 18
    assert result.estimator == (estimator if estimator != "auto" else "gauss_newton")


def test_robust_index_is_that_at_the_worst_case_images():
    """Measuring at clean images, or attacking towards the label, would pass every other test here.

    Two classes: the worst linf case is x + eps sign(w_other − w_y); 2.5 eps of steps reach it from any start.
    """
    model, x, _ = softmax_regression(classes=2)
    eps = 0.1
    with torch.no_grad():
        model.weight *= 2
        y = model(x).argmax(1)
        worst = x + eps * (model.weight[1 - y] - model.weight[y]).sign()
    result = measure_wci(model, [(x, y)], ThreatModel("linf", eps), num_probes=16)
    truth, clean = exact_index(model, worst), exact_index(model, x)
    assert abs(result.total - truth) < 4 * result.total_stderr < abs(clean - truth)
    assert result.mean_loss == pytest.approx(float(F.cross_entropy(model(worst), y).detach()), rel=1e-12)
    assert result.loss == "robust loss linf 0.1 PGD-10"


def test_intervals_cover_the_truth_as_often_as_they_say():
    """An error bar that is off by a factor misleads every comparison of two models.

    16 chunks: Student's t with 15 degrees. 100 repetitions: coverage 95 % ± 2.2 %, deviation of z 1.07 ± 7 %
    (one standard error each; four are allowed).
    """
    model, x, y = softmax_regression()
    truth = exact_index(model, x)
    z = []
    for seed in range(100):
        rows = torch.randint(0, 300, (32,), generator=torch.Generator().manual_seed(seed))  # a population
        result = measure_wci(model, [(x[rows], y[rows])], chunk_size=2, num_probes=1, seed=seed)
        z.append((result.total - truth) / result.total_stderr)
    z = torch.tensor(z)
    assert (z.abs() < 2.13).double().mean() > 0.95 - 4 * 0.022
    assert 0.77 < z.std() < 1.37
    assert abs(z.mean()) < 4 * 1.07 / 10


def test_the_bias_of_the_root_is_removed():
    """E sqrt(mean) < sqrt(E mean): models measured on fewer examples would look flatter.

    Gamma samples with variance twice the squared mean, K = 6: the plain root is low by 2/(8 K) = 4 %, the
    rest by order 1/K².
    """
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(1500, 6, 1, generator=generator, dtype=torch.float64).square()
    results = [WCIMeasurement.from_samples(("w",), torch.ones(1), s, torch.ones(6)) for s in samples]
    plain = torch.tensor([float(r.per_layer) for r in results])
    corrected = torch.tensor([r.total for r in results])
    error = plain.std() / 1500**0.5
    assert plain.mean() - 1 < -4 * error
    assert abs(corrected.mean() - 1) < 3 * error


@method
class Synthetic(Estimator):
    """An estimator of one layer, mean trace 1: chunks and probes within them differ by skewed factors.

    Skewed as real traces are, so mean and error are correlated and careless stopping is biased.
    """

    def draw(self, passes, num_probes, generator):
        chunk = torch.randn(1, 1, generator=generator, dtype=torch.float64).square()
        probes = torch.randn(num_probes, 1, generator=generator, dtype=torch.float64).square()
        return (chunk + 2 * probes) / 3, torch.zeros(())


@pytest.fixture
def synthetic(monkeypatch):
    """``measure_wci`` by `Synthetic`, one example a chunk, of an index of one."""
    monkeypatch.setitem(ESTIMATORS, "synthetic", Synthetic)
    model = nn.Linear(1, 2, bias=False)
    nn.init.constant_(model.weight, 0.5**0.5)

    def measure(num: int, **settings) -> WCIMeasurement:
        data = [(torch.zeros(num, 1), torch.zeros(num, dtype=torch.long))]
        return measure_wci(model, data, estimator="synthetic", chunk_size=1, **settings)

    return measure


def test_stopping_at_a_target_keeps_the_error_honest(synthetic):
    """Stopping when the error looks small prefers draws small by chance, and the error is too small then.

    Looking after every chunk from the fourth on gives z a deviation of 1.6; from the 16th on it is 1.07, its
    mean −0.1, by 1500 repetitions. 100 here: z to 0.1 and its deviation to 7 %, four of each are allowed.
    """
    results = [synthetic(400, target_relative_error=0.07, seed=seed) for seed in range(100)]
    z = torch.tensor([(r.total - 1) / r.total_stderr for r in results])
    assert all(r.reached and r.relative_error <= 0.07 for r in results)
    assert 16 <= min(r.num_examples for r in results) < max(r.num_examples for r in results) < 100
    assert abs(z.mean() + 0.1) < 0.4
    assert 0.78 < z.std() < 1.36
    assert (z.abs() < 1.96).double().mean() > 0.93 - 4 * 0.026
    assert 0.7 < torch.tensor([r.total for r in results]).std() / 0.07 < 1.35


def test_a_target_takes_the_first_chunks_of_a_fixed_budget(synthetic):
    """The same chunks with the same numbers: no example is read or attacked twice."""
    found = synthetic(400, target_relative_error=0.07, num_probes=3)
    fixed = synthetic(400, num_examples=found.num_examples, num_probes=3)
    assert (found.total, found.total_stderr, found.num_probes) == (fixed.total, fixed.total_stderr, 3)
    assert fixed.reached is None
    fewer = synthetic(400, num_examples=found.num_examples - 1, num_probes=3)
    assert fewer.num_examples < 16 or fewer.relative_error > 0.07


def test_running_out_of_examples_is_said(synthetic):
    """A missed target must not look reached; all the data must have been used, and 15 chunks cannot tell."""
    result = synthetic(40, target_relative_error=0.01)
    assert (result.reached, result.num_examples) == (False, 40)
    assert "instead of 0.01: limited by examples" in result.headline()
    few = synthetic(15, target_relative_error=0.9)
    assert (few.reached, few.relative_error < 0.9) == (False, True)
    with pytest.warns(UserWarning, match="single chunk"):
        assert synthetic(1, target_relative_error=0.2).reached is False


def test_everything_is_left_as_it_was_also_on_exceptions():
    """Measuring in the middle of training must not change the training."""
    torch.manual_seed(0)
    model = BatchNormNet()
    model.train()
    model.drop.eval()
    model.fc.bias.requires_grad_(False)
    model.conv.weight.grad = torch.ones_like(model.conv.weight)
    loader = DataLoader(TensorDataset(*image_batch(40)), batch_size=8, shuffle=True)
    modes, calls = set(), itertools.count()

    def watch(module, args):
        modes.update(module.training for module in model.modules())
        if next(calls) == 70:
            raise RuntimeError("in the middle")

    def measure():
        measure_wci(model, loader, ThreatModel(eps=0.1), num_steps=2, target_relative_error=0.9)

    before, state = everything(model), torch.get_rng_state()
    with model.register_forward_pre_hook(watch):
        measure()
        with pytest.raises(RuntimeError, match="in the middle"):
            measure()
    assert_same(before, everything(model))
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert not model.drop.training
    assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False]
    assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
    assert all(p.grad is None for name, p in model.named_parameters() if name != "conv.weight")
    assert modes == {False}  # batch statistics and dropout belong to training


def test_the_result_depends_on_examples_and_seed_not_on_batches():
    """Two loaders over the same images must give the same number, bit for bit.

    And a stream of a million images must not be downloaded to measure a hundred.
    """
    model, x, y = softmax_regression()
    stream = zip(x.split(10), y.split(10), strict=True)
    settings = {"threat": ThreatModel(eps=0.1), "num_steps": 2, "num_examples": 100}
    totals = [measure_wci(model, batches, **settings).total for batches in ([(x, y, "more")], stream)]
    assert len(list(stream)) == 20
    assert totals[0] == totals[1] != measure_wci(model, [(x, y)], seed=1, **settings).total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": []}, "got no images"),
        ({"batches": [{"x": 1}]}, "got a dict as a batch"),
        ({"x": torch.full((4, 6), 2.0)}, "images from 2 to 2; expected"),
        ({"x": torch.ones(4, 6, dtype=torch.uint8)}, "images of dtype torch.uint8; expected floats"),
        ({"y": torch.tensor([0, 1, 2, 4])}, "got labels from 4 to 4; expected 0 to 3"),
        ({"model": nn.Linear(6, 4).bfloat16()}, "got a model with weights in torch.bfloat16"),
        ({"estimator": "top_layer", "layers": "all"}, "layers: got 'all'; expected none"),
        ({"model": nn.Sequential(nn.Linear(6, 4), nn.Softmax(1)), "estimator": "top_layer"}, "unscaled"),
    ],
)
def test_wrong_input_is_refused_with_what_to_do(change, message):
    """A wrong number is worse than a stop."""
    arguments = {"model": nn.Linear(6, 4), "x": torch.rand(4, 6), "y": torch.randint(0, 4, (4,))} | change
    x, y = arguments.pop("x"), arguments.pop("y")
    arguments = {"batches": [(x, y)]} | arguments
    with pytest.raises(ValueError, match=message):
        measure_wci(threat=ThreatModel(eps=0.1), **arguments)


def example() -> WCIMeasurement:
    """Three layers: an ordinary one, one whose trace is negative, one that is flat."""
    t = TraceEstimate(torch.tensor([4.0, -1.0, 0.0]).double(), torch.tensor([0.4, 2.0, 0.0]).double(), 8)
    a = torch.tensor([9.0, 2.0, 1.0]).double()
    return WCIMeasurement(("a.weight", "a.bias", "b.weight"), a, t, 6.1, 0.3, sizes=torch.tensor([4, 2, 1]))


def test_negative_traces_count_as_zero_and_layer_errors_follow_the_delta_method():
    """A silent clamp hides that the estimator is too noisy, or the loss not at a minimum.

    ½ sqrt(9/4) 0.4 = 0.3; at a negative trace the index of one standard error; zero where t is exact.
    """
    result = example()
    assert result.num_negative == 1
    assert result.per_layer.tolist() == [6.0, 0.0, 0.0]
    assert "1 of 3 traces negative, counted as 0" in result.headline()
    torch.testing.assert_close(result.columns()["wci_stderr"], torch.tensor([0.3, 2.0, 0.0]).double())


def indefinite() -> WCIMeasurement:
    """An ordinary layer, one that is negative by five standard errors, one that is within its error."""
    rows = torch.tensor([4.0, -5.0, -0.1]).double() + torch.tensor([1.0, 1.0, 1.0, -3.0]).double()[:, None]
    samples = torch.cat([rows] * 4)  # standard errors of sqrt(3/15)
    layers, sizes = ("a.weight", "b.weight", "c.weight"), torch.tensor([4, 2, 1])
    details = {"sizes": sizes, "target_relative_error": 0.9}
    return WCIMeasurement.from_samples(layers, torch.ones(3), samples, torch.ones(16), **details)


def test_a_trace_negative_beyond_its_error_leaves_no_index():
    """A sum over the other layers, or a zero, would make a model at a saddle look flatter than it is."""
    result = indefinite()
    assert (result.negative_layers, result.num_negative) == (["b.weight"], 1)
    assert math.isnan(result.total)
    assert (result.reached, result.relative_error) == (False, math.inf)
    known = "1 of 3 traces negative beyond their error"
    assert result.headline().startswith(f"WCI – no index: {known}, b.weight (")
    assert "limited by examples" not in result.headline()  # more of them make no index
    document = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert [document[key] for key in ("wci", "wci_stderr", "negative_layers")] == [None, None, ["b.weight"]]
    assert [document["layers"][name]["wci"] for name in result.layers] == [2.0, None, 0.0]
    assert "nan" not in result.table()
    assert "-5.00 ± 0.45" in result.table()
    assert {"wci/total", "wci/total_stderr", "wci/b.weight"}.isdisjoint(result.metrics())
    assert result.metrics()["curvature/trace/b.weight"] == -5.0
    texts = [text.get_text() for text in layer_bars(result, "title").axes[0].texts]
    assert texts == ["", "negative trace", ""]


def test_the_surrogate_refuses_an_index_that_is_none():
    """The least of NaNs is the first β, printed like an answer."""
    for wci in (math.nan, -1.0):
        with pytest.raises(ValueError, match="expected at least 0"):
            pac_bayes_bound(0.7, wci, 1000)


class Gated(nn.Module):
    """A GELU gate between two layers: indefinite without training, as in gMixer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 32), nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        value, gate = self.up(x.flatten(1)).chunk(2, 1)
        return self.down(value * F.gelu(gate))


def test_two_chunks_of_a_gated_network_give_no_negative_index():
    """It was −0.63 ± 0.09 with seed 3, and −1254 ± 4 of a gMixer: the jackknife at the kink of the root."""
    num_none = 0
    for seed in range(12):
        torch.manual_seed(seed)
        model, x, y = Gated().double(), torch.rand(8, 3, 2, 2).double(), torch.randint(0, 4, (8,))
        result = measure_wci(model, [(x, y)], estimator="hutchinson", chunk_size=4)
        num_none += bool(result.negative_layers)
        assert math.isnan(result.total) == bool(result.negative_layers)
        assert result.negative_layers or 0 <= float(result.per_layer.sum()) <= result.total + 1e-12
    assert 0 < num_none < 6  # else the lines above say little
    measured = WeightCurvatureIndex(estimator={"name": "hutchinson"}, chunk_size=4)
    torch.manual_seed(7)
    model, x, y = Gated().double(), torch.rand(8, 3, 2, 2).double(), torch.randint(0, 4, (8,))
    assert "no index: 2 of 2 traces negative" in str(measured.measure(Problem(model, [(x, y)])))


@pytest.mark.parametrize("is_positive", [True, False])
def test_the_index_is_never_negative_nor_far_from_the_plain_value(is_positive):
    """With a small last chunk the jackknife went below zero even for positive samples.

    Of positive samples the correction is at most half the plain value: (K−1)(1 − sqrt(1 − 1/K)) of one sample
    that is not zero.
    """
    generator = torch.Generator().manual_seed(0)
    for i in range(2000):
        num = (2, 3, 4, 8, 17)[i % 5]
        samples = torch.randn(num, 3, generator=generator, dtype=torch.float64) ** (2 + 2 * (i % 3 == 0))
        if not is_positive:
            samples = 0.3 + torch.randn(num, 3, generator=generator, dtype=torch.float64)
        weights = torch.full((num,), 25.0)
        weights[-1] = 1 + i % 25
        result = WCIMeasurement.from_samples(("a", "b", "c"), torch.ones(3), samples, weights)
        if result.negative_layers:
            continue
        plain = float(result.per_layer.sum())
        assert 0 <= result.total <= 1.5 * plain + 1e-12
        assert result.total_stderr > 0


def test_positive_samples_of_16_chunks_keep_the_jackknife_to_the_last_bit():
    """Published numbers must not move, nor those of a trace well above its error with samples below zero."""
    generator = torch.Generator().manual_seed(0)
    draw = torch.randn(16, 2, generator=generator, dtype=torch.float64)
    for samples in (draw**4, draw + 2):
        weights = torch.tensor([25.0] * 15 + [7.0]).double()
        shares = weights[:, None] * samples
        others = (shares.sum(0) - shares) / (weights.sum() - weights)[:, None]
        plain = ((weights / weights.sum())[:, None] * samples).sum(0).sqrt().sum()
        without = others.sqrt().sum(1)
        result = WCIMeasurement.from_samples(("a", "b"), torch.ones(2), samples, weights)
        assert result.total == 16 * float(plain) - 15 * float(without.mean())
        assert result.total_stderr == float((15 / 16 * (without - without.mean()).square().sum()).sqrt())


def test_an_index_of_zero_never_reaches_its_target():
    """Traces that cancel exactly, or a saturated loss: 0 ± 0 would stop at the 16th chunk as if known."""
    own = ("a",), torch.ones(1), torch.zeros(16, 1), torch.ones(16)
    result = WCIMeasurement.from_samples(*own, target_relative_error=0.9)
    assert (result.total, result.total_stderr, result.reached) == (0.0, 0.0, False)


def test_json_and_table_hold_every_layer():
    """JSON has no infinity, and a table that loses its columns cannot be read."""
    result = example()
    document = json.loads(json.dumps(result.as_dict(), allow_nan=False))
    assert document["layers"]["a.weight"]["wci"] == 6.0
    assert document["layers"]["a.bias"]["sigma"] is None
    assert document["mean_loss"] is None
    lines = result.table().splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1
    assert lines[1].split() == ["a.weight", "9", "4.00", "±", "0.40", "6.00", "±", "0.30", "100.0", "1.22"]


def test_names_are_kept():
    """Reports of finished runs read the metrics; in a chart a name of weight and bias must stay two names."""
    prefixes = "wci", "curvature/trace", "curvature/trace_stderr", "frobenius"
    names = {f"{prefix}/{name}" for prefix in prefixes for name in ("a.weight", "a.bias", "b.weight")}
    assert set(example().metrics()) == {"wci/total", "wci/total_stderr"} | names
    labels = layer_bars(example(), "title").axes[0].get_yticklabels()
    assert [text.get_text() for text in labels] == ["a", "a.bias", "b"]


def posterior_sigma(a: torch.Tensor, t: torch.Tensor, beta: float) -> torch.Tensor:
    trace = TraceEstimate(t, torch.zeros_like(t), 2)
    return WCIMeasurement([f"{i}" for i in range(len(a))], a, trace, 1.0, 0.1).columns(beta)["sigma"]


def test_with_curvature_the_value_is_the_minimum_over_the_posterior_variances():
    """WCI/√β must be what the best Gaussian posterior reaches: a wrong factor makes the bound too good."""
    a, t = torch.tensor([2.0, 50.0, 9.0]).double(), torch.tensor([0.3, 4.0, 100.0]).double()
    n, wci = 1000, float((a * t).sqrt().sum())
    bound = pac_bayes_bound(0.7, wci, n)
    beta, num_betas = bound.beta, 16  # 1 to 2^15, the last below 64 000

    def free_energy(log_s) -> float:
        s = torch.tensor(log_s).double().exp()
        # KL of the two Gaussians from its definition, d_l = 1: variances agree, means differ by ||W_l||
        kl = kl_divergence(Normal(a.sqrt(), s.sqrt()), Normal(torch.zeros_like(a), s.sqrt())).sum()
        return float(0.5 * (s * t).sum() + kl / beta)

    options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
    best = minimize(free_energy, [0.0, 0.0, 0.0], method="Nelder-Mead", options=options)
    union = math.log(20 * num_betas) / beta  # each β of the grid has a share of δ
    assert bound.value == pytest.approx(0.7 + best.fun + union + beta / (8 * n), rel=1e-9)
    sigma = torch.tensor(best.x).exp().sqrt()  # the minimiser is less sharp than the minimum: √fatol
    torch.testing.assert_close(posterior_sigma(a, t, beta), sigma, rtol=1e-5, atol=0)


def test_the_terms_are_the_value_and_the_error_is_that_of_the_curvature():
    """A report that prints the terms must add up; the error of the index divides by √β like the index."""
    bound = pac_bayes_bound(1.1, 150.0, 50_000, wci_stderr=6.0)
    assert list(bound.terms) == ["risk", "curvature", "confidence", "complexity"]
    assert math.isclose(sum(bound.terms.values()), bound.value, rel_tol=1e-15)
    higher, lower = (pac_bayes_bound(1.1, wci, 50_000).value for wci in (150.001, 149.999))  # of the same β
    assert bound.stderr == pytest.approx(6 * (higher - lower) / 0.002, rel=1e-8)
    assert pac_bayes_bound(1.1, 150.0, 50_000).stderr is None
    assert "surrogate" in str(bound)


@pytest.mark.parametrize("n", [1000, 50_000, 1_281_167])
def test_the_grid_is_fine_and_wide_enough(n):
    """It depends on N alone, and loses at most 6.1 % against the best β for any index up to 128 √N."""
    cost = math.log(20) + math.log(int(math.log2(64 * n)) + 1)
    for wci in [0.0, *(10.0**k for k in range(-3, 8) if 10**k <= 90 * n**0.5), 64 * n**0.5]:

        def total(b: float, wci: float = wci) -> float:
            return wci * math.exp(-b / 2) + cost * math.exp(-b) + math.exp(b) / (8 * n)

        best = minimize_scalar(total, bounds=(0, 40))
        bound = pac_bayes_bound(0.0, wci, n)
        assert bound.value <= best.fun * (2**0.5 + 0.5**0.5) / 2 * (1 + 1e-9)


def test_a_flat_layer_may_move_without_limit_and_an_empty_one_not_at_all():
    """Trace estimates can be negative; a NaN would spread through the table."""
    sigma = posterior_sigma(torch.tensor([4.0, 4.0, 0.0, 16.0]), torch.tensor([0.0, -1.0, 2.0, 1.0]), 1.0)
    assert sigma.tolist() == [math.inf, math.inf, 0.0, 2.0]
