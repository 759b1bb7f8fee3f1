"""The frame of all measures: adversarial examples used again are an attack's, and nothing is left behind."""

import pytest
import torch
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.measures import MEASURES, Problem
from wcitrain.measures.flatness import AverageFlatness
from wcitrain.measures.losses import CleanLoss, RobustGap, RobustLoss
from wcitrain.measures.problem import measuring
from wcitrain.recipe import RecipeError, load_recipe, recipe_from_dict
from wcitrain.recipe.reading import read_yaml

THREAT = ThreatModel("linf", 0.1)


def setting(num: int = 30) -> tuple[nn.Module, list]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(num, 1, 4, 4, generator=generator)
    return model, [(x, torch.arange(num) % 3)]


def test_adversarial_examples_used_again_are_those_a_new_attack_finds(monkeypatch):
    """A key without the weights or the chunks would hand one measure another one's examples."""
    model, data = setting()
    calls, real = [], Attack.__call__
    monkeypatch.setattr(Attack, "__call__", lambda *arguments: calls.append(1) or real(*arguments))
    problem = Problem(model, data, THREAT)

    def images(problem: Problem, size: int) -> torch.Tensor:
        return torch.cat([x for x, _ in problem.adversarial(size)])

    with measuring(model):
        first = {size: images(problem, size) for size in (10, 15)}
        assert len(calls) == 5
        assert not torch.equal(first[10], first[15])  # other starts
        with torch.no_grad():
            model[1].weight.mul_(2)
        moved = images(problem, 10)
        assert torch.equal(moved, images(Problem(model, data, THREAT), 10))
        assert not torch.equal(moved, first[10])
        with torch.no_grad():
            model[1].weight.div_(2)
        calls.clear()
        assert all(torch.equal(images(problem, size), known) for size, known in first.items())
        assert not calls
        assert torch.equal(torch.cat([x for x, _ in problem.attacked_anew(problem.clean(10))]), first[10])
        assert calls


def test_the_robust_loss_is_the_mean_over_examples_and_the_gap_is_test_minus_train():
    """A mean of chunk means weighs a ragged last chunk too much."""
    model, data = setting(130)  # chunks of 100 and 30
    (x, y), clean = data[0], CleanLoss().measure(Problem(model, data, THREAT))
    with torch.no_grad():
        losses = nn.functional.cross_entropy(model.eval()(x), y, reduction="none").double()
    assert clean.value == pytest.approx(losses.mean().item(), abs=1e-6)  # float32 logits
    assert clean.stderr == pytest.approx(losses.std().item() / 130**0.5, rel=1e-5)
    assert RobustLoss().measure(Problem(model, data)).value == clean.value
    halves = [(x[:65], y[:65])], [(x[65:], y[65:])]
    gap = RobustGap().measure(Problem(model, halves[0], THREAT, test_batches=halves[1]))
    train, test = (RobustLoss().measure(Problem(model, half, THREAT)) for half in halves)
    assert train.value > clean.value
    assert gap.value == test.value - train.value
    assert gap.parts["accuracy_gap"] == train.parts["accuracy"] - test.parts["accuracy"]
    assert gap.stderr == pytest.approx((train.stderr**2 + test.stderr**2) ** 0.5)
    with pytest.raises(ValueError, match="test_batches: got none"):
        RobustGap().measure(Problem(model, data))


def test_no_examples_are_refused():
    """A mean over nothing is NaN."""
    model, _ = setting()
    with pytest.raises(ValueError, match="no images"):
        Problem(model, []).adversarial()
    with pytest.raises(ValueError, match="at least 1"):
        Problem(model, [], num_examples=0)


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_diverged_model_has_no_measure(name):
    """Accuracy that cannot fall and a maximum that NaN never exceeds would read as perfectly flat."""
    model, data = setting()
    problem = Problem(model, data, Attack(THREAT, 1, 0.1), initial=model.state_dict(), test_batches=data)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite in 1\.weight"):
        MEASURES[name]().measure(problem)


def test_a_model_that_cannot_lose_the_accuracy_has_no_pac_bayes_sharpness():
    """At an accuracy of at most ``max_drop`` every noise is borne: σ would be its limit, the flattest."""
    model, data = setting()
    wrong = [(x, (model.eval()(x).argmax(1) + 1) % 3) for x, _ in data]
    measure = MEASURES["pac_bayes_sharpness"](num_draws=1, num_bisections=2)
    measurement = measure.measure(Problem(model, wrong))
    assert measurement.value != measurement.value
    assert "at most max_drop" in measurement.settings


def test_a_recipe_holds_its_measures_and_says_what_is_wrong_with_one(tmp_path):
    """A setting that is dropped, or a metric that two measures write, would show after hours or never."""
    recipe = recipe_from_dict({"measures": {"take": ["wci", {"name": "average_flatness", "xi": 0.25}]}})
    assert recipe.measures.take[1] == AverageFlatness(xi=0.25)
    assert recipe_from_dict(read_yaml(recipe.to_yaml())) == recipe
    file = tmp_path / "wrong.yaml"
    for line, message in (
        (
            "{name: average_flatness, xii: 0.25}",
            "4: measures.take.1.xii: got an unknown key; expected one of",
        ),
        ("{name: average_flatness, xi: -1}", "4: measures.take.1.xi: got -1"),
        ("{name: wci, estimator: hutch}", '4: measures.take.1.estimator.name: got "hutch"'),
        ("sam_sharpnes", '4: measures.take.1.name: got "sam_sharpnes"'),
        ("robust_gap", '4: measures.take.1.name: got "robust_gap"'),  # no test images in training
        ("margins", "2: measures.take: got margins twice; expected each measure once."),
    ):
        file.write_text(f"measures:\n  take:\n    - margins\n    - {line}\n")
        with pytest.raises(RecipeError) as error:
            load_recipe([file])
        assert str(error.value).startswith(f"{file}:{message}")


def test_another_attack_seed_or_set_of_images_is_not_answered_from_memory():
    """A notebook that changes one attribute would read the former number under the new name."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3))
    batches = [[(torch.rand(8, 1, 2, 2), torch.arange(8) % 3)] for _ in range(2)]
    problem = Problem(model, batches[0], Attack(ThreatModel(eps=0.1), 2, 0.1))
    first = RobustLoss().measure(problem).value
    problem.attack = Attack(ThreatModel(eps=0.3), 2, 0.3)
    second = RobustLoss().measure(problem).value
    assert second == RobustLoss().measure(Problem(model, batches[0], problem.attack)).value != first
    problem.batches = batches[1]
    fresh = Problem(model, batches[1], problem.attack)
    assert RobustLoss().measure(problem).value == RobustLoss().measure(fresh).value
