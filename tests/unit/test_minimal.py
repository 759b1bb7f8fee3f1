"""The smallest radius that breaks an image, against closed forms of a linear model."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.evaluation import Evaluation, MinimalEps, evaluate
from wcitrain.evaluation.intervals import median_interval, wilson_interval

DUAL = {"linf": 1, "l2": 2, "l1": math.inf}
LARGEST = {"linf": 0.04, "l2": 0.15, "l1": 0.4}


def linear_model() -> nn.Module:
    """Two classes of 4 x 4 images, told apart by the sign of w (x - 1/2)."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    w = torch.randn(16, generator=generator)
    with torch.no_grad():
        model[1].weight.copy_(torch.stack([0 * w, w]))
        model[1].bias.copy_(torch.tensor([0.0, -0.5 * float(w.sum())]))
    return model


def images(num: int = 30, spread: float = 0.03):
    """Images of which the first three have the wrong label and the last three are far from the border."""
    x = 0.5 + spread * torch.randn(num, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    w = linear_model()[1].weight[1].detach().reshape(4, 4)
    x[-3:] = 0.5 + 0.2 * w.sign()
    y = linear_model()(x).argmax(1)
    y[:3] = 1 - y[:3]
    return x, y


def smallest(x, y, *largest, attacks="margin-40", **settings) -> tuple[MinimalEps, ...]:
    """Return the smallest radii; the evaluation beside it is within a ball that nothing leaves."""
    settings = {"preflight": "off", "minimal": largest} | settings
    return evaluate(linear_model(), [(x, y)], ThreatModel("linf", 0.0), attacks=attacks, **settings).minimal


def margins(x, y):
    """Return w, the distance of each image from changing sides in units of w x, and whether it is right."""
    model = linear_model()
    w, gap = model[1].weight[1].detach().double(), model(x).detach().double()
    return w, (gap[:, 1] - gap[:, 0]).abs(), gap.argmax(1) == y


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_the_smallest_radius_of_a_linear_model_is_margin_over_dual_norm(norm):
    """margin / ||w||_dual where no pixel meets the border; wrong at once is 0, never broken is infinite."""
    x, y = images()
    w, margin, is_right = margins(x, y)
    expected = torch.where(is_right, margin / w.norm(DUAL[norm]), 0.0)
    (found,) = smallest(x, y, ThreatModel(norm, LARGEST[norm]))
    eps, never = found.eps, expected > LARGEST[norm]
    assert torch.equal(eps == 0, ~is_right)
    assert bool(eps[never].isinf().all())
    assert int(never.sum()) >= 3
    # From below a rounding of float32; from above a level (1/255 of the largest), and what the attack
    # misses of the best direction: nothing in linf, where steps reach the corner, 3 % in l2 and l1.
    rest = is_right & ~never
    missed = (0.0 if norm == "linf" else 0.03) * expected + LARGEST[norm] / 255
    is_close = (eps >= expected - 1e-5) & ((eps <= expected + missed) | (expected + missed > LARGEST[norm]))
    assert bool(is_close[rest].all())
    assert int(rest.sum()) > 15
    document = found.as_dict()
    assert (document["num_wrong_at_once"], document["num_never"]) == (3, int(eps.isinf().sum()))


@pytest.mark.parametrize("norm", ["linf", "l1"])
def test_the_border_of_the_box_costs_radius(norm):
    """What a pixel on the border cannot give, others must: a closed form without the box would be too small.

    linf: sum_i |w_i| min(eps, r_i) = margin; l1: the pixels of largest |w_i| are filled one after the other.
    """
    w, order = margins(*images(1))[0], margins(*images(1))[0].abs().argsort(descending=True)
    y = torch.arange(12) % 2
    towards = torch.where(y[:, None] == 1, -w.sign(), w.sign()).float()  # where the attack pushes
    flat = 0.5 - 0.2 * towards + 0.02 * torch.randn(12, 16, generator=torch.Generator().manual_seed(2))
    flat[:, order[0]] = (1 + towards[:, order[0]]) / 2 - 0.02 * towards[:, order[0]]  # the best has no room
    x = flat.reshape(12, 1, 4, 4)
    _, margin, is_right = margins(x, y)
    assert bool(is_right.all())
    room = torch.where(towards > 0, 1 - flat, flat).double()
    expected = []
    for need, r in zip(margin.tolist(), room, strict=True):
        if norm == "linf":
            low, high = 0.0, 1.0
            for _ in range(60):
                middle = (low + high) / 2
                low, high = (
                    (low, middle) if float((w.abs() * r.clamp_max(middle)).sum()) >= need else (middle, high)
                )
            expected.append(high)
        else:
            total = 0.0
            for i in order.tolist():
                part = min(float(r[i]), need / float(w[i].abs()))
                total, need = total + part, need - part * float(w[i].abs())
            expected.append(total)
    expected = torch.tensor(expected).double()
    largest = float(expected.max()) * 1.1
    (found,) = smallest(x, y, ThreatModel(norm, largest), attacks="margin-60")
    missed = (0.0 if norm == "linf" else 0.05) * expected + largest / 255
    assert bool((found.eps >= expected - 1e-5).all())
    assert bool((found.eps <= expected + missed).all())
    without_box = margin / w.norm(DUAL[norm])
    assert float((expected / without_box).median()) > 1.05  # the case was met


class Wavy(nn.Module):
    """Class 0 but where the mean is 0.03 to 0.05 off 1/2: a larger step of FGSM jumps over that."""

    def forward(self, x):
        away = ((x.mean((1, 2, 3)) - 0.5).abs() - 0.04).abs()
        return torch.stack([away, torch.full_like(away, 0.01)], 1)


def test_an_image_that_falls_at_a_radius_stays_fallen_at_larger_ones():
    """FGSM breaks at 0.04 and not at 0.06 or 0.08: a curve that rises again would be read as robustness."""
    x, y = (
        0.5 + 1e-4 * torch.rand(8, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
        torch.zeros(8).long(),
    )
    balls = [ThreatModel("linf", eps) for eps in (0.04, 0.06)]
    settings = {"attacks": "fgsm", "preflight": "off", "minimal": [ThreatModel("linf", 0.08)]}
    made = evaluate(Wavy(), [(x, y)], balls, **settings)
    assert [made.robust_accuracy(ball) for ball in balls] == [0, 1]
    (found,) = made.minimal
    assert bool((found.eps <= 0.04 + 1e-12).all())  # what the evaluation broke counts
    curve = found.curve()["accuracy"]
    assert curve == sorted(curve, reverse=True)
    assert (curve[0], curve[-1]) == (1, 0)
    assert found.accuracy(0.04)[0] == 0


def test_several_attacks_count_together_and_seeds_and_batches_do_not():
    """An image has one smallest radius: the weaker attack must not raise it."""
    x, y = images(16)
    ball = ThreatModel("l2", 0.15)
    one, other, both = (
        smallest(x, y, ball, attacks=a)[0] for a in ("pgd-1", "margin-20", ["pgd-1", "margin-20"])
    )
    assert both.attacks == "pgd-1+margin-20"
    torch.testing.assert_close(
        both.eps, torch.minimum(one.eps, other.eps), atol=ball.eps / 255 + 1e-9, rtol=0
    )
    assert not torch.equal(one.eps, other.eps)
    cut = smallest(x, y, ball, attacks="margin-20", batch_size=4)[0]
    torch.testing.assert_close(cut.eps, other.eps, atol=ball.eps / 255 + 1e-9, rtol=0)  # a tie of float32
    parts = smallest(x[8:11], y[8:11], ball, attacks="autoattack:apgd-ce")[0]
    torch.testing.assert_close(parts.eps, other.eps[8:11], atol=0.05 * ball.eps, rtol=0)


def test_a_killed_bisection_goes_on(tmp_path):
    """Hours of attacks, eight times over: what is known is kept, and the end is the same."""
    x, y = images(14)
    model, ball, calls = linear_model(), [ThreatModel("l2", 0.15), ThreatModel("linf", 0.04)], 0
    settings = {"attacks": "margin-2", "preflight": "off", "minimal": ball, "batch_size": 4}

    def count(*_):
        nonlocal calls
        calls += 1
        if calls == limit:
            raise KeyboardInterrupt

    limit = 0
    hook = model[1].register_forward_hook(count)
    whole = evaluate(model, [(x, y)], ThreatModel("l2", 0.1), folder=tmp_path / "whole", **settings)
    total, calls, limit = calls, 0, calls // 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, [(x, y)], ThreatModel("l2", 0.1), folder=tmp_path / "killed", **settings)
    calls, limit = 0, -1
    made = evaluate(model, [(x, y)], ThreatModel("l2", 0.1), folder=tmp_path / "killed", **settings)
    hook.remove()
    assert calls < 0.6 * total
    for a, b in zip(whole.minimal, made.minimal, strict=True):
        assert torch.equal(a.eps, b.eps)
    read = Evaluation.load(made.save(tmp_path / "x.npz"))
    assert read.as_dict() == made.as_dict()
    assert read.table() == made.table()
    assert torch.equal(read.minimal[1].eps, made.minimal[1].eps)


def test_medians_and_shares_have_intervals_and_never_is_named():
    """A median beyond the largest radius is no number; in JSON it is null, in the table what is known."""
    eps = torch.tensor([0.0] * 2 + [0.01] * 3 + [0.02] * 5 + [math.inf] * 10, dtype=torch.float64)
    found = MinimalEps(ThreatModel("linf", 0.03), "pgd-2", eps)
    assert found.accuracy(0.01) == (0.75, *wilson_interval(0.75, 20))
    assert found.accuracy(0.0)[0] == 0.9
    made = Evaluation(torch.zeros(20).long(), eps > 0, torch.zeros(20), minimal=(found,))
    document = made.as_dict()["minimal_eps"][0]
    assert document["median"] is None
    assert document["median_interval"] == [0.01, None]
    assert document["curve"]["accuracy"][0] == 0.9
    line = made.table().splitlines()[-1]
    assert "> 0.03" in line
    assert "0.01 to > 0.03" in line
    assert line.split()[-2:] == ["2", "10"]


def test_the_interval_of_a_median_covers_it_as_often_as_it_says():
    """Of 2000 samples of 41 exponential numbers; four standard errors of a share of 95 % are 2 %."""
    generator = np.random.default_rng(0)
    samples = torch.from_numpy(generator.exponential(size=(2000, 41)))
    ends = np.array([median_interval(sample) for sample in samples])
    assert np.allclose(ends[:, 0], np.median(samples, axis=1))
    covered = ((ends[:, 1] <= math.log(2)) & (math.log(2) <= ends[:, 2])).mean()
    assert 0.95 - 0.02 < covered < 0.98 + 0.02  # ranks are whole numbers: at most 2 % too often
    assert median_interval(torch.arange(5.0)) == (2.0, -math.inf, math.inf)


def test_what_cannot_be_bisected_is_refused():
    """Before the first batch."""
    with pytest.raises(ValueError, match="minimal: got no attacks"):
        smallest(*images(8), ThreatModel("linf", 0.1), attacks=())
