"""Averaged weights and their running statistics, against sums by hand."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from wcitrain.averaging import EMA, SWA, recalibrate


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=0.3), nn.Dropout(0.5), nn.Linear(4, 2))


def test_recalibration_takes_plain_means_over_the_batches_and_leaves_all_else():
    """A moving average would weigh the last batch most; dropout would shift what later layers normalise."""
    model = small()
    model[1].running_mean.fill_(7.0)
    model.train()
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
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        seen.append([p.detach().clone() for p in model.parameters()])
        swa.after_epoch(
            average, model, epoch, lambda module: (module(torch.randn(4, 3)).detach().sum() for _ in range(2))
        )
        start = 2 if epoch > 2 else epoch - 1  # before its start: the weights themselves
        for mean, parts in zip(average.parameters(), zip(*seen[start:], strict=True), strict=True):
            assert torch.allclose(mean, torch.stack(parts).mean(0), atol=1e-6)


def test_ema_follows_its_recursion():
    """decay · old + (1 − decay) · new after every step, from the weights after the second one."""
    model = small()
    ema = deepcopy(model).eval()
    expected: list[torch.Tensor] = []
    for step in range(5):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
        EMA(0.9).after_step(ema, model, step)
        now = [p.detach().clone() for p in model.parameters()]
        expected = now if step <= 1 else [0.9 * e + 0.1 * p for e, p in zip(expected, now, strict=True)]
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ema.parameters(), expected, strict=True))
