"""The frame of all measures: reused attacks are the attacks, and nothing is left behind."""

import sys

import pytest
import torch
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import attacked, held, measuring, reused_attacks
from wcitrain.measures.by_name import MEASURES, Shared, measure
from wcitrain.measures.losses import robust_gap, robust_loss
from wcitrain.measures.pac_bayes_sharpness import pac_bayes_sharpness

THREAT = ThreatModel("linf", 0.1)


def setting() -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(30, 1, 4, 4, generator=generator)
    return model, [(x, torch.arange(30) % 3)]


def test_reused_adversarial_examples_are_those_a_new_attack_finds(monkeypatch):
    """A key without the weights, images or a setting would hand one measure another one's examples."""
    model, data = setting()
    calls = []
    room = sys.modules[attacked.__module__]  # its name is also that of a measure
    real = room.pgd
    monkeypatch.setattr(room, "pgd", lambda *args, **settings: calls.append(1) or real(*args, **settings))

    def attack(**changes):
        chunks = held(model, data, 30, changes.pop("chunk_size", 10))
        settings = {"threat": THREAT, "num_steps": 3, "seed": 0} | changes
        return torch.cat([x for x, _ in attacked(model, chunks, settings.pop("threat"), **settings)])

    variants = [{}, {"num_steps": 4}, {"seed": 1}, {"threat": ThreatModel("l2", 0.1)}, {"step_size": 0.01}]
    variants += [{"num_restarts": 2}, {"chunk_size": 15}]
    with measuring(model):
        fresh = [attack(**v) for v in variants]
        with reused_attacks(model):
            first = [attack(**v) for v in variants]
            calls.clear()
            again = [attack(**v) for v in variants]
            assert not calls
            with torch.no_grad():
                model[1].weight.mul_(1.5)  # other weights are attacked anew
            moved = attack()
            assert calls
            calls.clear()
            assert torch.equal(attack(), moved)  # and what is found there is not kept
            assert calls
            data[0] = (data[0][0].flip(0), data[0][1])
            with torch.no_grad():
                model[1].weight.div_(1.5)
            assert not torch.equal(attack(), first[0])
    for a, b, c in zip(fresh, first, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


def test_the_robust_loss_is_the_mean_over_examples_whatever_the_chunks_and_the_gap_is_test_minus_train():
    """A mean of chunk means weighs a ragged last chunk too much."""
    model, data = setting()
    clean = robust_loss(model, data, None)
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model.eval()(data[0][0]), data[0][1], reduction="none")
    assert clean.value == pytest.approx(losses.double().mean().item(), abs=1e-6)  # float32 logits
    assert clean.stderr == pytest.approx(losses.double().std().item() / 30**0.5, rel=1e-5)
    assert robust_loss(model, data, None, chunk_size=7).value == pytest.approx(clean.value, abs=1e-6)
    halves = [[(data[0][0][:15], data[0][1][:15])], [(data[0][0][15:], data[0][1][15:])]]
    gap = robust_gap(model, *halves, THREAT, num_steps=3)
    train, test = (robust_loss(model, half, THREAT, num_steps=3) for half in halves)
    assert gap.value == test.value - train.value
    assert gap.parts["accuracy_gap"] == train.parts["accuracy"] - test.parts["accuracy"]
    assert gap.stderr == pytest.approx((train.stderr**2 + test.stderr**2) ** 0.5)


def test_the_model_is_put_back_also_after_an_error_and_a_frozen_one_can_be_measured():
    """A measure in the middle of training must not freeze, unfreeze or update anything."""
    model, data = setting()
    model.train()
    for p in model.parameters():
        p.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()

    def fail() -> None:
        with measuring(model):
            assert not model.training
            assert all(p.requires_grad for p in model.parameters())
            model(data[0][0])
            torch.rand(3)
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail()
    assert model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_no_examples_are_refused():
    """A mean over nothing is NaN."""
    model, _ = setting()
    with pytest.raises(ValueError, match="no images"):
        held(model, [], None)
    with pytest.raises(ValueError, match="at least 1"):
        robust_loss(model, [], None, num_examples=0)


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_diverged_model_has_no_measure(name):
    """Accuracy that cannot fall and a maximum that NaN never exceeds would read as perfectly flat."""
    model, data = setting()
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite in 1\.weight"):
        measure(name, model, data, THREAT, Shared(num_steps=1, image_shape=(1, 4, 4)))


def test_a_model_that_cannot_lose_the_accuracy_has_no_pac_bayes_sharpness():
    """At an accuracy of at most ``max_drop`` every noise is borne: σ would be its limit, the flattest."""
    model, data = setting()
    wrong = [(x, (model.eval()(x).argmax(1) + 1) % 3) for x, _ in data]
    found = pac_bayes_sharpness(model, wrong, None, num_draws=1, num_bisections=2)
    assert found.value != found.value
    assert "at most max_drop" in found.settings
