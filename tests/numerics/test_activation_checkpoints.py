"""Activation checkpoints: the other kind gives the very numbers, the reentrant kind is refused or right."""

import copy
import warnings
from contextlib import nullcontext
from functools import partial
from itertools import product

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from wcitrain import CURE, PGDAT, TRADES, GradAlign, cross_entropy
from wcitrain.attacks import ThreatModel, pgd
from wcitrain.evaluation import evaluate
from wcitrain.measures import MEASURES, Problem
from wcitrain.models import checkpoint_activations, create_model
from wcitrain.objectives import WithInputRegularizer
from wcitrain.optim import AWP, SAM, RegularizedOptimizer, WCIPenalty, WCIPosterior

NAMED = "use_reentrant=False"
pytestmark = pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")


class Net(nn.Module):
    """Two tanh layers, recomputed in the backward pass, between a stem (or nothing) and a head."""

    def __init__(self, reentrant: bool | None, has_stem: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(12, 12) if has_stem else nn.Identity()
        self.body = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.head, self.reentrant = nn.Linear(8, 3), reentrant
        self.double()

    def forward(self, x):
        x = self.stem(x.flatten(1))
        if self.reentrant is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(8, 3, 2, 2, generator=generator, dtype=torch.float64), torch.arange(8) % 3


IN_WEIGHTS = ("wci", "hessian_trace", "gradient_norm", "lambda_max", "sam_sharpness", "worst_sharpness")


@pytest.mark.parametrize("has_stem", [False, True])
@pytest.mark.parametrize("name", IN_WEIGHTS)
def test_measures_are_exact_or_refused(name, has_stem):
    """The layers of a reentrant checkpoint on the images got no gradient and counted as flat."""
    measure, data = MEASURES[name](), [batch()]
    values = [measure.measure(Problem(Net(kind, has_stem), data)).value for kind in (None, False)]
    assert values[0] == values[1] > 0
    with pytest.raises(ValueError, match=NAMED):
        measure.measure(Problem(Net(True, has_stem), data))


TIMM = {
    "resnet18": {"layers": [1] * 4, "channels": [4, 4, 8, 8], "drop_path_rate": 0.3},
    "vit_tiny_patch16_224": {"img_size": 8, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_heads": 2,
                             "drop_path_rate": 0.3, "proj_drop_rate": 0.1},
    "mobilenetv3_small_050": {},  # its blocks end in BatchNorm, amid which a recomputation ends
}  # fmt: skip
OF_TIMM = {
    "no rule": (PGDAT(ThreatModel(eps=0.1), 1), {}),
    "trades, cure": (WithInputRegularizer(TRADES(ThreatModel(eps=0.1), 2), CURE()), {}),
    "grad_align": (GradAlign(ThreatModel(eps=0.1)), {"perturbation": SAM(0.05)}),
    "wci": (PGDAT(ThreatModel(eps=0.1), 2, attack_bn="train"), {"perturbation": WCIPosterior(0.5)}),
    "hutchinson": (PGDAT(ThreatModel(eps=0.1), 1), {"penalty": WCIPenalty(1e-3, estimator="hutchinson")}),
    "gauss_newton": (PGDAT(ThreatModel(eps=0.1), 1), {"penalty": WCIPenalty(1e-3, estimator="gauss_newton")}),
}


@pytest.mark.parametrize(
    ("name", "method"), [*product(list(TIMM)[:2], OF_TIMM), ("mobilenetv3_small_050", "no rule")]
)
def test_checkpoints_of_timm_give_the_bits_of_training_without(name, method):
    """BatchNorm counted twice, other dropout in the recomputation, fused attention in one of two passes."""
    (objective, rules), states = OF_TIMM[method], []
    for is_on in (False, True):
        torch.manual_seed(0)
        model = create_model(name, num_classes=3, **TIMM[name])
        for module in model.modules() if not is_on else ():  # as the checkpoints have it
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        if is_on:
            checkpoint_activations(model, name)
            model = copy.deepcopy(model)  # as averages are made
        recomputed = []
        blocks = model.backbone.layer1 if name == "resnet18" else model.backbone.blocks
        inner = next(m for m in blocks.modules() if isinstance(m, nn.BatchNorm2d | nn.LayerNorm))
        inner.register_forward_hook(lambda *_, seen=recomputed: seen.append(1), always_call=True)
        optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model.train(), **rules)
        generator = torch.Generator().manual_seed(1)
        for step in range(2):
            x, y = torch.rand(6, 3, 8, 8, generator=generator), torch.arange(6) % 3
            torch.manual_seed(step)
            x_adv = objective.perturb(model, x, y, generator)
            optimizer.zero_grad()
            optimizer.backward(partial(objective.loss, model, x, x_adv, y))
            optimizer.step()
        states.append((model.state_dict(), len(recomputed)))
    (plain, calls), (same, more) = states
    assert more >= 2 * calls
    assert all(torch.equal(value, same[key]) for key, value in plain.items())


@pytest.mark.parametrize("is_on", [False, True])
@pytest.mark.parametrize("method", ["wci", "hutchinson"])
def test_every_pass_of_a_step_drops_the_same_paths(method, is_on):
    """At W + u and W - u of a difference other networks would be compared; an attack shifts no draw."""
    (objective, rules), name, masks, chosen, total = OF_TIMM[method], list(TIMM)[1], [], [], 0
    torch.manual_seed(0)
    model = create_model(name, num_classes=3, **TIMM[name]).train()
    if is_on:
        checkpoint_activations(model, name)
    drop = model.backbone.blocks[1].drop_path1
    drop.register_forward_hook(lambda _, args, out: masks.append((out != 0).flatten(1).any(1).tolist()))
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, **rules)
    x, y = torch.rand(12, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 3
    for step in range(2):
        torch.manual_seed(step)
        x_adv = objective.perturb(model, x, y, torch.Generator().manual_seed(step))
        masks.clear()
        optimizer.backward(partial(objective.loss, model, x, x_adv, y))
        total += len(masks)
        assert all(mask == masks[0] for mask in masks)
        torch.manual_seed(step)
        objective.loss(model, x, x, y)  # without an attack before it
        assert masks[-1] == masks[0]
        chosen.append(masks[0])
    assert chosen[0] != chosen[1]
    assert total >= 4  # the first step of a penalty may only measure


def test_a_gradient_hidden_by_detach_is_not_that_of_an_unused_layer():
    """The loss depends on the layer; a spare head, on which it does not, changes nothing."""

    class Detached(Net):
        def forward(self, x):
            return self.head(self.body(x.flatten(1)).detach())

    measure, data = MEASURES["gradient_norm"](), [batch()]
    with pytest.raises(ValueError, match=r"depends on some of 4 layers \(of 6\) without a gradient.*detach"):
        measure.measure(Problem(Detached(None), data))
    spare = Net(None)
    spare.other = nn.Linear(5, 5).double()
    before = spare.other.weight.clone()
    value = measure.measure(Problem(Net(None), data)).value
    assert measure.measure(Problem(spare, data)).value == pytest.approx(value, rel=1e-12)  # float64 sums
    assert torch.equal(before, spare.other.weight)


RULES = {
    "sam": {"perturbation": SAM(0.05)},
    "awp": {"perturbation": AWP(0.02)},
    "wci": {"perturbation": WCIPosterior(0.5)},
    "penalty": {"penalty": WCIPenalty(1e-3, estimator="gauss_newton")},
}


def trained(model: nn.Module, rule: str, is_closure: bool) -> torch.Tensor:
    """Make two steps; return all weights."""
    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), 0.1), model, **RULES[rule])
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y).total
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.zero_grad()
        if is_closure:
            optimizer.step(closure)
        else:
            optimizer.backward(lambda: cross_entropy(model(x), y))
            optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("is_closure", [False, True])
@pytest.mark.parametrize("rule", RULES)
def test_training_is_exact_or_refused(rule, is_closure):
    """Torch only warns, once: SAM would train the head alone and leave the body where it was."""
    if is_closure and rule == "penalty":
        is_closure = False  # it needs the graph of the loss
    plain = trained(Net(None), rule, is_closure)
    assert torch.equal(plain, trained(Net(False), rule, is_closure))
    refused = Net(True)
    before = [p.clone() for p in refused.parameters()]
    with pytest.raises(ValueError, match=NAMED):
        trained(refused, rule, is_closure)
    assert all(torch.equal(a, b) for a, b in zip(before, refused.parameters(), strict=True))
    with_stem = trained(Net(None, True), rule, is_closure)
    assert torch.equal(with_stem, trained(Net(False, True), rule, is_closure))
    if rule == "penalty":  # it differentiates gradients, which such a checkpoint cannot
        with pytest.raises(ValueError, match=NAMED):
            trained(Net(True, True), rule, is_closure)
    else:
        assert torch.equal(with_stem, trained(Net(True, True), rule, is_closure))


def test_a_loop_of_ones_own_is_refused_too_and_other_warnings_come_through():
    """Inside ``perturbed`` forward and backward are the user's: the layers' noise would be for nothing."""
    (x, y), weights = batch(), []
    for kind in (None, False, True):
        model = Net(kind)
        base = torch.optim.SGD(model.parameters(), 0.1)
        optimizer = RegularizedOptimizer(base, model, perturbation=WCIPosterior(0.5, passes=1))
        before = [p.clone() for p in model.parameters()]
        said, told = pytest.warns(UserWarning, match="mine"), nullcontext()
        with said, pytest.raises(ValueError, match=NAMED) if kind else told, optimizer.perturbed():
            warnings.warn("mine", UserWarning, stacklevel=1)
            cross_entropy(model(x), y).total.backward()
        if not kind:
            optimizer.step()
        assert not kind or all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights[:2])


def test_attacks_and_evaluations_name_the_checkpoints():
    """They differentiate in the images, which reentrant checkpoints refuse in torch's words, as a crash."""
    (x, y), exact = batch(), []
    for kind in (None, False):
        exact.append(pgd(Net(kind), x, y, threat=ThreatModel("linf", 0.1), num_steps=3, start="none"))
    assert torch.equal(*exact)
    with pytest.raises(ValueError, match=NAMED):
        pgd(Net(True), x, y, threat=ThreatModel("linf", 0.1), num_steps=3)
    with pytest.raises(ValueError, match=NAMED):
        evaluate(Net(True).float(), [(x, y)], ThreatModel("linf", 0.1))
