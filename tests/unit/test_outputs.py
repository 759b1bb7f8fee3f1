"""Models that return dicts, tuples or objects: the same sentence wherever a model comes in."""

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from wcitrain import RegularizedOptimizer
from wcitrain.attacks import ATTACK_LOSSES, Attack, ThreatModel, fgsm, msd, pgd
from wcitrain.curvature import cross_entropy
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.curvature.loss import Output, binary_cross_entropy, mean_squared_error
from wcitrain.evaluation import evaluate
from wcitrain.evaluation.accuracy import measure_accuracy
from wcitrain.measures import MEASURES, Problem
from wcitrain.objectives import INPUT_REGULARIZERS, OBJECTIVES, CatastrophicOverfittingGuard
from wcitrain.optim import SAM

KINDS = {
    "dict": (lambda z: {"logits": z, "aux": z}, r"a dict \(logits, aux\)"),
    "ordered": (lambda z: OrderedDict(logits=z), r"a OrderedDict \(logits\)"),
    "tuple": (lambda z: (z, z), "a tuple of 2"),
    "object": (lambda z: SimpleNamespace(logits=z), "a SimpleNamespace"),
}
SENTENCE = "as outputs; expected logits, one tensor [B, C]. Wrap it in a module whose forward returns those"
THREAT = ThreatModel("linf", 0.1)


class Model(nn.Module):
    """A linear model that returns more than its logits."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.pack = nn.Linear(16, 4), KINDS[kind][0]

    def forward(self, x, head="classes"):
        return self.pack(self.layer(x.flatten(1)))


def batch():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(8, 1, 4, 4, generator=generator), torch.arange(8) % 4


def attacks(model, x, y):
    yield lambda: pgd(model, x, y, threat=THREAT, num_steps=2)
    yield lambda: fgsm(model, x, y, threat=THREAT)
    yield lambda: msd(model, x, y, [Attack(THREAT, 2)])
    for loss in ATTACK_LOSSES:
        yield lambda loss=loss: Attack(THREAT, 2, start="gaussian", loss=loss)(model, x, y)


def objectives(model, x, y):
    for kind in OBJECTIVES.values():
        yield lambda kind=kind: kind().loss(model, x, torch.cat([x] * 2) if kind().passes[0] == 0 else x, y)
        if kind().attack_passes() != (0, 0):
            yield lambda kind=kind: kind().perturb(model, x, y)
    for kind in INPUT_REGULARIZERS.values():
        yield lambda kind=kind: kind().penalty(model, x, y)
    yield lambda: CatastrophicOverfittingGuard().check(model, x, y, THREAT)


def losses(model, x, y):
    z = model(x)
    yield lambda: cross_entropy(z, y)
    yield lambda: binary_cross_entropy(z, torch.zeros(8, 4))
    yield lambda: mean_squared_error(z, torch.zeros(8, 4))
    yield lambda: gauss_newton_samples(z, {"w": model.layer.weight})
    yield lambda: gauss_newton_samples(Output(z), {"w": model.layer.weight})
    wrapper = RegularizedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, perturbation=SAM())
    yield lambda: wrapper.step(lambda: cross_entropy(model(x), y))


WITHOUT = {"frobenius_norms", "spectral_norms", "path_norm", "distance_from_initialisation"}  # no outputs


def measures(model, x, y):
    for name in MEASURES.keys() - WITHOUT:
        for attack in (THREAT, None):
            problem = Problem(model, [(x, y)], attack, test_batches=[(x, y)])
            yield lambda name=name, problem=problem: MEASURES[name]().measure(problem)


def evaluations(model, x, y):
    yield lambda: evaluate(model, [(x, y)], THREAT)
    yield lambda: evaluate(model, [(x, y)], THREAT, attacks=(), preflight="off")
    yield lambda: measure_accuracy(model, [(x, y, y)], Attack(THREAT, 2))


@pytest.mark.parametrize("entries", [attacks, objectives, losses, measures, evaluations])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_that_are_no_tensor_are_one_sentence_everywhere(kind, entries):
    """Else torch says that 'dict' object has no attribute 'dtype', three calls deep, or a part is guessed."""
    model, (x, y) = Model(kind), batch()
    before, count = torch.get_rng_state(), 0
    for entry in entries(model, x, y):
        with pytest.raises(ValueError, match=f"got {KINDS[kind][1]} {SENTENCE}".replace("[B", r"\[B")):
            entry()
        count += 1
    assert count >= 3
    assert torch.equal(before, torch.get_rng_state())
    assert not any(p.grad is not None for p in model.parameters())


def test_a_loss_that_is_no_tensor_is_said_by_attack_and_wrapper():
    """A Hugging Face model returns its loss inside an object."""
    model, x = Model("dict"), batch()[0]
    with pytest.raises(ValueError, match=r"pgd: got a dict; expected one loss per example, \(8,\)"):
        pgd(lambda images: model(images), x, threat=THREAT)
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, perturbation=SAM())
    with pytest.raises(TypeError, match=r"loss_fn returned \{'loss': .*expected a scalar loss"):
        optimizer.backward(lambda: {"loss": model(x)["logits"].sum()})
