"""What goes on over the epochs: learning rates, averaged weights and their running statistics, by hand."""

import pickle
from copy import deepcopy

import pytest
import torch
from torch import nn

from wcitrain.averaging import AVERAGES, EMA, SWA, recalibrate
from wcitrain.learning_rate import SCHEDULES, Cosine, OneCycle, Piecewise
from wcitrain.method import Choice

SETTINGS = {"swa": {"start_epoch": 3}}  # of the methods that have no default for something


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5), nn.Linear(4, 2))


def move(model: nn.Module) -> list[torch.Tensor]:
    """Make a random step; return the weights there."""
    with torch.no_grad():
        return [p.add_(torch.randn_like(p)).clone() for p in model.parameters()]


def test_recalibration_takes_plain_means_over_the_batches_and_leaves_all_else():
    """A moving average would weigh the last batch most; dropout would shift what later layers normalise."""
    model = small().train()
    model[1].running_mean.fill_(7.0)
    model[3].eval()  # frozen by the user
    batches = [torch.randn(5, 3) + k for k in range(3)]

    def passes(module):
        for x in batches:
            assert not module[2].training
            module(x)
            yield

    recalibrate(model, passes)
    hidden = [model[0](x).detach() for x in batches]
    assert torch.allclose(model[1].running_mean, torch.stack([h.mean(0) for h in hidden]).mean(0), atol=1e-6)
    assert torch.allclose(model[1].running_var, torch.stack([h.var(0) for h in hidden]).mean(0), atol=1e-6)
    assert [m.training for m in model] == [True, True, True, False]
    assert model[1].momentum == 0.3
    with pytest.raises(ValueError, match="got no batch"):
        recalibrate(model, lambda module: iter(()))


def test_swa_is_the_equal_mean_of_the_epochs_after_its_start():
    """Weights before the start, and unequal weights after it, belong to another method."""
    model = small()
    swa, average, seen = SWA(start_epoch=2), deepcopy(model).eval(), []
    for epoch in range(1, 6):
        seen.append(move(model))
        swa.after_epoch(average, model, epoch, lambda module: iter([module(torch.randn(4, 3)).detach()]))
        start = 2 if epoch > 2 else epoch - 1  # before its start: the weights themselves
        for mean, parts in zip(average.parameters(), zip(*seen[start:], strict=True), strict=True):
            assert torch.allclose(mean, torch.stack(parts).mean(0), atol=1e-6)


def test_ema_follows_its_recursion():
    """decay · old + (1 − decay) · new after every step, from the weights after the second one."""
    model, expected = small(), []
    ema = deepcopy(model).eval()
    for step in range(5):
        now = move(model)
        EMA(0.9).after_step(ema, model, step)
        expected = now if step <= 1 else [0.9 * e + 0.1 * p for e, p in zip(expected, now, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ema.parameters(), expected, strict=True))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Piecewise(warmup_epochs=4), [0, 0.625, 1, 1, 1]),
        (Piecewise([5, 8], gamma=0.1), [1, 1, 0.1, 0.1, 0.01]),
        (Piecewise([5], gamma=0.5, warmup_epochs=10), [0, 0.25, 0.25, 0.375, 0.5]),
        (Cosine(), [1, 0.8536, 0.5, 0.1464, 0]),
        (Cosine(final_fraction=0.1, warmup_epochs=5), [0, 0.5, 1, 0.55, 0.1]),
        (OneCycle(), [0, 0.625, 0.8333, 0.4167, 0]),
        (OneCycle(peak_epoch=5), [0, 0.5, 1, 0.5, 0]),
    ],
)
def test_learning_rates_follow_their_schedule(schedule, expected):
    """At 0, 1/4, 1/2, 3/4 and all of ten epochs."""
    assert [schedule.factor(step, 4, 10) for step in (0, 10, 20, 30, 40)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("table", [SCHEDULES, AVERAGES], ids=["schedules", "averages"])
def test_methods_come_back_from_recipes_and_pickles_and_have_a_label(table):
    """A resolved recipe would train something else than the run, or a figure would show a class name."""
    choice = Choice(table)
    for name, kind in table.items():
        made = kind(**SETTINGS.get(name, {}))
        assert choice.write(made)["name"] == name
        assert choice.read(choice.write(made)) == made == pickle.loads(pickle.dumps(made))
        assert kind.label
        assert "{" not in str(made)
    assert Choice(SCHEDULES).read({"name": "piecewise", "milestones": [1, 2]}) == Piecewise((1.0, 2.0))
