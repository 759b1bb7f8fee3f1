"""``measure_wci`` against closed forms; its errors and stopping against statistics; what it leaves behind."""

import contextlib
import itertools
import json
import math
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from cases import BatchNormNet, assert_same, everything, image_batch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from wcitrain.attacks import ThreatModel
from wcitrain.curvature import ESTIMATORS, Estimator, TraceEstimate, binary_cross_entropy
from wcitrain.measures import WCIMeasurement, measure_wci
from wcitrain.method import method
from wcitrain.report.drawing import short_names
from wcitrain.report.figures import layer_bars


def softmax_regression(classes: int = 4, seed: int = 0) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """One linear layer with confident predictions, and 300 images of 6 pixels well inside the box."""
    torch.manual_seed(seed)
    model = nn.Linear(6, classes, bias=False).double()
    with torch.no_grad():
        model.weight *= 4
    return model, 0.2 + 0.6 * torch.rand(300, 6).double(), torch.randint(0, classes, (300,))


def tensor_loss(net: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy that does not say what the outputs were."""
    return F.cross_entropy(net(x), y)


def exact_index(model: nn.Linear, x: torch.Tensor) -> float:
    """sqrt(||W||² mean ||x||² (1 − ||p||²)): measures of softmax regression at images held fixed."""
    with torch.no_grad():
        t = (x.square().sum(1) * (1 - model(x).softmax(1).square().sum(1))).mean()
        return float((model.weight.square().sum() * t).sqrt())


def supply(x: torch.Tensor, y: torch.Tensor, seed: int, batch: int = 32):
    """Endless batches drawn with replacement: the images are the whole population, whose index is known."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        rows = torch.randint(0, len(x), (batch,), generator=generator)
        yield x[rows], y[rows]


# Value and error ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_clean_index_of_softmax_regression_is_the_closed_form(estimator):
    """A wrong factor (mean or sum, N, root) shows in no comparison. The mean loss feeds the bound."""
    model, x, y = softmax_regression()
    result = measure_wci(model, [(x, y)], estimator=estimator, num_probes=8)
    assert result.total_stderr < 0.05 * result.total  # else the next line says nothing
    assert abs(result.total - exact_index(model, x)) < 4 * result.total_stderr
    assert result.mean_loss == pytest.approx(float(F.cross_entropy(model(x), y).detach()), rel=1e-12)
    counts = result.num_examples, result.num_probes, result.trace.num_probes
    assert counts == (300, 8, 17)  # chunks of 300 // 16 = 18
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
        result = measure_wci(
            model, supply(x, y, seed), num_examples=32, chunk_size=2, num_probes=1, seed=seed
        )
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
    samples = torch.randn(
        1500, 6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).square()
    results = [WCIMeasurement.from_samples(("w",), torch.ones(1), s, torch.ones(6)) for s in samples]
    plain = torch.tensor([float(r.per_layer) for r in results])
    corrected = torch.tensor([r.total for r in results])
    error = plain.std() / 1500**0.5
    assert plain.mean() - 1 < -4 * error
    assert abs(corrected.mean() - 1) < 3 * error


# Stopping -------------------------------------------------------------------------------------------------


@method
class Synthetic(Estimator):
    """An estimator of one layer, mean trace 1: chunks and probes within them differ by skewed factors.

    Skewed as real traces are, so mean and error of a stage are correlated and careless stopping is biased.
    """

    probe_cost: ClassVar[int] = 2

    def draw(self, passes, num_probes, generator):
        chunk = torch.randn(1, 1, generator=generator, dtype=torch.float64).square()
        probes = torch.randn(num_probes, 1, generator=generator, dtype=torch.float64).square()
        return (chunk + 2 * probes) / 3, torch.zeros(())

    def refuses(self, passes, needs_gradient):
        return None


@pytest.fixture
def synthetic(monkeypatch):
    """``measure_wci`` to a target by `Synthetic`."""
    monkeypatch.setitem(ESTIMATORS, "synthetic", Synthetic)
    model = nn.Linear(1, 2, bias=False)
    nn.init.constant_(model.weight, 0.5**0.5)  # a = 1: the index is 1
    x, y = torch.zeros(64, 1), torch.zeros(64, dtype=torch.long)

    def measure(seed: int, target: float, num: int | None = None) -> WCIMeasurement:
        batches = itertools.repeat((x, y)) if num is None else [(x[:1].expand(num, 1), y[:1].expand(num))]
        return measure_wci(
            model, batches, estimator="synthetic", target_relative_error=target, chunk_size=1, seed=seed
        )

    return measure


def test_stopping_at_a_target_does_not_bias_the_index(synthetic):
    """Stopping when the error looks small prefers draws small by chance, and the error is too small then.

    Looking after every chunk, from the fourth on, gives z a deviation of 1.6 here.
    150 repetitions: the mean of z has standard error 1/sqrt(150).
    """
    results = [synthetic(seed, 0.1) for seed in range(150)]
    z = torch.tensor([(r.total - 1) / r.total_stderr for r in results])
    error = torch.tensor([r.total - 1 for r in results])
    assert all(r.reached for r in results)
    assert abs(z.mean()) < 4 / 150**0.5
    assert abs(error.mean()) < 4 * error.std() / 150**0.5
    assert 0.8 < z.std() < 1.25  # 1 ± 4 · 6 %, in round numbers
    assert max(r.relative_error for r in results) <= 0.1


def test_running_out_of_examples_is_said(synthetic):
    """A missed target must not look reached; all the data and many probes must have been used."""
    result = synthetic(0, 0.01, num=40)
    assert (result.reached, result.limited_by, result.num_examples) == (False, "examples", 40)
    assert result.num_probes > 2
    assert "instead of 0.01: limited by examples" in result.headline()
    assert synthetic(0, 0.2, num=500).limited_by is None
    with pytest.warns(UserWarning, match="single chunk"):
        single = synthetic(0, 0.2, num=1)
    assert (single.reached, single.limited_by) == (False, "examples")
    more = synthetic(3, 0.055, num=60)  # more probes replace missing examples: chunks alone leave 3 %
    assert more.reached
    assert more.num_probes > 4


# What it reads, and what it leaves ------------------------------------------------------------------------


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

    def failing(net, x, y):
        modes.update(module.training for module in net.modules())
        if next(calls) == 7:
            raise RuntimeError("in the middle")
        return F.cross_entropy(net(x), y)

    before, state = everything(model), torch.get_rng_state()
    for settings in ({"target_relative_error": 0.3}, {"loss": failing, "estimator": "hutchinson"}):
        fails = pytest.raises(RuntimeError, match="in the middle")
        with fails if "loss" in settings else contextlib.nullcontext():
            measure_wci(model, loader, ThreatModel(eps=0.1), num_steps=2, chunk_size=4, **settings)
        assert_same(before, everything(model))
        assert torch.equal(torch.get_rng_state(), state)
        assert model.training
        assert not model.drop.training
        assert [p.requires_grad for p in model.parameters()] == [True, True, True, True, False]
        assert torch.equal(model.conv.weight.grad, torch.ones_like(model.conv.weight))
        assert all(p.grad is None for name, p in model.named_parameters() if name != "conv.weight")
    assert modes == {False}  # batch statistics and dropout belong to training


def test_the_result_depends_on_examples_and_seed_not_on_batches():
    """Two loaders over the same images must give the same number, bit for bit."""
    model, x, y = softmax_regression()
    whole, pieces = [(x, y, "more")], list(zip(x.split(7), y.split(7), strict=True))
    threat = ThreatModel(eps=0.1)
    results = [measure_wci(model, b, threat, num_steps=2, num_examples=100) for b in (whole, pieces)]
    assert results[0].total == results[1].total
    assert measure_wci(model, whole, threat, num_steps=2, num_examples=100, seed=1).total != results[0].total


def test_an_endless_iterator_is_read_no_further_than_needed():
    """A stream of a million images must not be downloaded to measure a hundred."""
    model, x, y = softmax_regression()
    stream = iter([(x[:10], y[:10])] * 12)
    assert measure_wci(model, stream, num_examples=100).num_examples == 100
    assert len(list(stream)) == 2


def test_a_custom_loss_is_attacked_and_measured():
    """Two classes, logits (0, z): binary cross-entropy is cross-entropy, another function, the same index."""
    torch.manual_seed(0)
    single, double = nn.Linear(6, 1, bias=False).double(), nn.Linear(6, 2, bias=False).double()
    with torch.no_grad():
        double.weight.copy_(torch.cat([torch.zeros_like(single.weight), single.weight]))
    _, x, y = softmax_regression(classes=2)
    threat = ThreatModel(eps=0.1)
    binary = measure_wci(
        single, [(x, y)], threat, loss=lambda net, x, y: binary_cross_entropy(net(x), y[:, None].double())
    )
    plain = measure_wci(double, [(x, y)], threat)
    assert binary.mean_loss == pytest.approx(plain.mean_loss, rel=1e-12)  # attacked alike
    # Each row of W alone has the trace of the binary loss, so t is twice as large; a is the same.
    error = math.hypot(2**0.5 * binary.total_stderr, plain.total_stderr)
    assert abs(2**0.5 * binary.total - plain.total) < 4 * error < 0.3 * plain.total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"target_relative_error": 0.1, "num_probes": 2},
            "num_probes: got 2 beside target_relative_error=0.1",
        ),
        ({"batches": []}, "got no images"),
        ({"batches": [{"x": 1}]}, "got a dict as a batch"),
        ({"x": torch.full((4, 6), 2.0)}, "images from 2 to 2; expected"),
        ({"x": torch.ones(4, 6, dtype=torch.uint8)}, "images of dtype torch.uint8; expected floats"),
        ({"y": torch.tensor([0, 1, 2, 4])}, "got labels from 4 to 4; expected 0 to 3"),
        ({"y": torch.rand(4)}, "got labels of shape"),
        (
            {"model": nn.Sequential(nn.Linear(6, 4), nn.Unflatten(1, (2, 2)))},
            r"got outputs \(1, 2, 2\) for 1 images",
        ),
        ({"model": nn.Linear(6, 4).bfloat16()}, "got a model with weights in torch.bfloat16"),
        ({"loss": tensor_loss, "estimator": "gauss_newton"}, "does not say which outputs"),
        ({"estimator": "top_layer", "layers": "all"}, "layers: got 'all' and estimator top_layer"),
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


# The measurement itself -----------------------------------------------------------------------------------


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
    torch.testing.assert_close(result.per_layer_stderr, torch.tensor([0.3, 2.0, 0.0]).double())


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


def test_the_bar_chart_names_every_layer():
    """Sixty layers must keep their names; a name shared by weight and bias must stay two names."""
    figure = layer_bars(example(), "title")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["a", "a.bias", "b"]
    assert short_names(["m.a.weight", "m.b.qkv.weight[q]"]) == ["a", "b.qkv[q]"]


def test_what_evaluation_logs_keeps_its_names():
    """Reports of finished runs read them."""
    assert set(example().metrics()) == {"wci/total", "wci/total_stderr"} | {
        f"{prefix}/{name}"
        for prefix in ("wci", "curvature/trace", "curvature/trace_stderr", "frobenius")
        for name in ("a.weight", "a.bias", "b.weight")
    }
