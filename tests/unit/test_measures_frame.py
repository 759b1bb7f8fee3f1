"""The frame of all measures: adversarial examples used again are an attack's, and nothing is left behind."""

import pytest
import torch
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.measures import MEASURES, Problem, WeightCurvatureIndex, measure_wci
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
    """A key without the weights or the chunks would hand one measure another one's examples.

    And a notebook that changes an attribute would read the former number under the new name.
    """
    model, data = setting()
    calls, real = [], Attack.__call__
    monkeypatch.setattr(Attack, "__call__", lambda *arguments: calls.append(1) or real(*arguments))
    problem = Problem(model, data, THREAT)

    def images(size: int, problem: Problem = problem) -> torch.Tensor:
        return torch.cat([x for x, _ in problem.adversarial(size)])

    def is_anew(before: torch.Tensor) -> bool:
        fresh = Problem(model, problem.batches, problem.attack, problem.seed)
        return torch.equal(images(10), images(10, fresh)) and not torch.equal(images(10), before)

    with measuring(model):
        first = {size: images(size) for size in (10, 15)}
        assert len(calls) == 5
        assert not torch.equal(first[10], first[15])  # other starts
        with torch.no_grad():
            model[1].weight.mul_(2)
        assert is_anew(first[10])
        with torch.no_grad():
            model[1].weight.div_(2)
        calls.clear()
        assert all(torch.equal(images(size), known) for size, known in first.items())
        assert not calls
        assert torch.equal(torch.cat([x for x, _ in problem.attacked_anew(problem.clean(10))]), first[10])
        assert calls
        other = [(1 - x, y) for x, y in data]
        for name, value in (("attack", Attack(THREAT, 2, 0.3)), ("seed", 1), ("batches", other)):
            before = images(10)
            setattr(problem, name, value)
            assert is_anew(before)


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


def test_what_cannot_be_measured_is_refused():
    """A mean over nothing is NaN; "linf" has no radius."""
    model, _ = setting()
    with pytest.raises(ValueError, match="no images"):
        Problem(model, []).adversarial()
    with pytest.raises(ValueError, match="at least 1"):
        Problem(model, [], num_examples=0)
    for refused in (lambda: Problem(model, [], "linf"), lambda: measure_wci(model, [], "linf")):
        with pytest.raises(TypeError, match="attack: got 'linf'; expected an Attack, a ThreatModel or None"):
            refused()


def test_an_iterator_is_read_once():
    """The second measure of a loader's iterator would silently be of other images, or of none."""
    model, ((x, y),) = setting(40)
    whole = Problem(model, [(x, y)], num_examples=20)
    for first, second in ((CleanLoss(), WeightCurvatureIndex()), (WeightCurvatureIndex(), CleanLoss())):
        problem = Problem(model, zip(x.split(5), y.split(5), strict=True), num_examples=20)
        assert first.measure(problem).value == first.measure(whole).value
        with pytest.raises(ValueError, match="batches: got an iterator, which another measure has used up"):
            second.measure(problem)
    problem = Problem(model, iter([(x, y)]), test_batches=iter([(x, y)]))
    assert [RobustGap().measure(problem).value for _ in range(2)] == [0, 0]  # known chunks need no reading
    with pytest.raises(ValueError, match="got an iterator"):
        problem.clean(7)


@pytest.mark.parametrize("name", list(MEASURES))
def test_a_diverged_model_has_no_measure(name):
    """Accuracy that cannot fall and a maximum that NaN never exceeds would read as perfectly flat."""
    model, data = setting()
    problem = Problem(model, data, Attack(THREAT, 1, 0.1), initial=model.state_dict(), test_batches=data)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite in 1\.weight"):
        MEASURES[name]().measure(problem)


def test_a_recipe_holds_its_measures_and_says_what_is_wrong_with_one(tmp_path):
    """A setting that is dropped, or a metric that two measures write, would show after hours or never."""
    recipe = recipe_from_dict({"measures": {"take": ["wci", {"name": "average_flatness", "xi": 0.25}]}})
    assert recipe.measures.take[1] == AverageFlatness(xi=0.25)
    assert recipe_from_dict(read_yaml(recipe.to_yaml())) == recipe
    file = tmp_path / "wrong.yaml"
    for line, message in (
        ("{name: average_flatness, xii: 0.25}", "4: measures.take.1.xii: got an unknown key"),
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
