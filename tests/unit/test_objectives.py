"""Every objective keeps the contract of ``objectives.objective``; the table is ``objective_cases``."""

import copy
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import assert_same, everything, image_batch
from objective_cases import BALLS, FEW, LINF, OBJECTIVE_CASES, SmallNet, TwoHeads, balls_of, is_in_ball
from torch import nn

from wcitrain import CURE, FGSMRS, PGDAT, TRADES, CatastrophicOverfittingGuard, FreeAT, GradAlign
from wcitrain.attacks import Attack, ThreatModel, fgsm, project, steepest_step
from wcitrain.models import create_model
from wcitrain.objectives import OBJECTIVES, InputGradient, RotationAT, Standard, UnionAT, WithInputRegularizer
from wcitrain.objectives.pairing import rotation_logits

SEED = 7
every_objective = pytest.mark.parametrize("name", OBJECTIVE_CASES)


def two_heads(training: bool = True) -> TwoHeads:
    torch.manual_seed(0)
    return TwoHeads().train(training)


def generator(seed: int = SEED) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def loss_and_gradients(objective, model, x, x_adv, y) -> list[torch.Tensor]:
    """The total and its gradients; parameters the loss does not reach get zeros."""
    torch.manual_seed(SEED)
    total, weights = objective.loss(model, x, x_adv, y).total, list(model.parameters())
    return [total.detach(), *torch.autograd.grad(total, weights, allow_unused=True, materialize_grads=True)]


@every_objective
@pytest.mark.parametrize("fails", [False, True])
def test_perturb_leaves_no_trace(name, fails):
    """An attack that moves statistics, modes, gradients or random numbers changes the training it serves."""
    case = OBJECTIVE_CASES[name]
    if fails and not case.attack[0]:
        pytest.skip("nothing is called, so nothing can fail")
    model, (x, y) = two_heads(), image_batch()
    model.bn.eval()  # frozen by the user
    for p in model.parameters():
        p.grad = torch.full_like(p, 0.5)
    model.fc.bias.requires_grad_(False)
    calls, allowed = [], min(1, case.attack[0] - 1)  # fail in the second call where there is one
    if fails:
        model.fc.register_forward_hook(
            lambda *_: calls.append(1) if len(calls) < allowed else pytest.fail("on purpose")
        )
    torch.manual_seed(3)
    before, modes, state = everything(model), [m.training for m in model.modules()], torch.get_rng_state()
    with pytest.raises(pytest.fail.Exception, match="on purpose") if fails else nullcontext():
        case.make().perturb(model, x, y)
    assert_same(everything(model), before)
    assert [m.training for m in model.modules()] == modes
    assert all((p.grad == 0.5).all() for p in model.parameters())
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert torch.equal(torch.get_rng_state(), state)


@every_objective
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_perturb_and_loss_are_the_same_without_gradients(name, mode):
    """A validation loop runs under either; input gradients are taken there too."""
    model, (x, y), objective = two_heads(), image_batch(), OBJECTIVE_CASES[name].make()
    before = everything(model)
    torch.manual_seed(SEED)
    x_adv = objective.perturb(model, x, y, generator())
    loss = objective.loss(model, x, x_adv, y).total.detach()
    model.load_state_dict(before)
    with mode():
        x, y = x.clone(), y.clone()
        torch.manual_seed(SEED)
        found = objective.perturb(model, x, y, generator())
        assert torch.equal(found, x_adv)
        assert found.requires_grad == x_adv.requires_grad
        assert torch.equal(objective.loss(model, x, found, y).total, loss)


@every_objective
def test_adversarial_images_are_in_ball_and_box_and_repeat(name):
    """Outside, training is against another threat; unrepeatable, a resumed run differs."""
    model, (x, y) = two_heads(), image_batch()
    first, second = (OBJECTIVE_CASES[name].make() for _ in range(2))
    x_adv = first.perturb(model, x, y, generator())
    assert torch.equal(x_adv, second.perturb(model, x, y, generator()))
    assert x_adv.requires_grad == isinstance(first, FreeAT)
    assert x_adv.is_leaf
    delta = x_adv.detach() - x.repeat(len(x_adv) // len(x), 1, 1, 1)
    assert torch.stack([is_in_ball(delta, threat) for threat in balls_of(first)]).any(0).all()
    assert x_adv.clamp(0, 1).equal(x_adv)
    assert bool((delta != 0).any()) == (OBJECTIVE_CASES[name].attack != (0, 0))


@every_objective
def test_costs_are_as_documented(name):
    """A run's cost table multiplies these numbers; compiled models cannot differentiate an input gradient."""
    case, model, (x, y) = OBJECTIVE_CASES[name], two_heads(), image_batch()
    objective, counts, seen = case.make(), {"forward": 0, "backward": 0}, []

    def count(module, args, kwargs, logits):
        share = len(args[0]) / len(x)
        counts["forward"] += share
        seen.append(args[0])
        if logits.requires_grad:
            logits.register_hook(lambda _: counts.update(backward=counts["backward"] + share))

    model.register_forward_hook(count, with_kwargs=True)
    x_adv = objective.perturb(model, x, y, generator())
    assert tuple(counts.values()) == objective.attack_passes() == case.attack
    counts.update(forward=0, backward=0)
    seen.clear()
    objective.loss(model, x, x_adv, y).total.backward()
    assert tuple(counts.values()) == objective.loss_passes() == case.loss
    is_twice = any(z.requires_grad and z.is_leaf and z is not x_adv for z in seen)
    assert is_twice == objective.needs_double_backward
    assert objective.attacks_in_backward == hasattr(objective, "after_backward")


@every_objective
def test_soft_targets_count_and_one_hot_ones_are_labels(name):
    """Mixup hands over soft targets: misread, or read as the largest class, it would be noise or a no-op."""
    objective, model, (x, y) = OBJECTIVE_CASES[name].make(), two_heads(), image_batch()
    one_hot = F.one_hot(y, 3).float()
    x_adv = objective.perturb(model, x, y, generator())
    assert torch.equal(x_adv, objective.perturb(model, x, one_hot, generator()))
    hard, same = (loss_and_gradients(objective, model, x, x_adv, targets) for targets in (y, one_hot))
    for a, b in zip(hard, same, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)  # another summation order in float32
    soft = 0.6 * one_hot + 0.4 * one_hot.roll(1, 1)
    assert objective.perturb(model, x, soft, generator()).shape == x_adv.shape
    assert abs(float(loss_and_gradients(objective, model, x, x_adv, soft)[0] - hard[0])) > 1e-3


@every_objective
def test_scaled_by_zero_is_no_attack_and_by_one_is_the_same(name):
    """eps warm-up starts at zero: an attack that still moves, or fails there, is not a warm-up."""
    objective, model, (x, y) = OBJECTIVE_CASES[name].make(), two_heads(), image_batch()
    assert objective.scaled(1.0) is objective
    x_adv = objective.scaled(0.0).perturb(model, x, y, generator())
    assert torch.equal(x_adv, x.repeat(len(x_adv) // len(x), 1, 1, 1))
    half = objective.scaled(0.5)
    assert [t.eps for t in balls_of(half)] == [t.eps / 2 for t in balls_of(objective)]
    assert half.loss(model, x, x_adv, y).total.requires_grad


@every_objective
def test_the_loss_at_the_images_is_the_limit_of_small_radii(name):
    """Epochs without an attack, at x_adv = x, would train another loss than the first of those with one."""
    objective, model, (x, y) = OBJECTIVE_CASES[name].make(), two_heads(), image_batch()
    model.drop.p = 0.0  # a union of T balls passes the images T times, each with draws of its own
    model.bn.eval()
    results = []
    for point in (0.0, 1e-12):  # the second is lost in rounding at the images
        scaled = objective.scaled(point)
        x_adv = scaled.perturb(model, x, y, generator()).detach() if point else x
        assert torch.equal(x_adv, x.repeat(len(x_adv) // len(x), 1, 1, 1))
        results.append(loss_and_gradients(scaled, model, x, x_adv, y))
    for a, b in zip(*results, strict=True):  # float32 sums of another order; equal terms cancel to rounding
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@every_objective
def test_micro_batches_average_to_the_batch(name):
    """A sum instead of a mean, or 1/B of the wrong batch, makes gradient accumulation another method."""
    objective, model, (x, y) = OBJECTIVE_CASES[name].make(), two_heads(training=False), image_batch(8)
    x_adv = objective.perturb(model, x, y, generator())
    copies = x_adv.unflatten(0, (-1, 8))  # [T, 8, ...], T > 1 for the average over a union
    losses = []
    for size in (8, 4):
        torch.manual_seed(SEED)
        pairs = zip(x.split(size), copies.split(size, 1), y.split(size), strict=True)
        parts = [objective.loss(model, a, b.flatten(0, 1), c).total.item() for a, b, c in pairs]
        losses.append(sum(parts) / len(parts))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # float32 sums of a few dozen terms


@every_objective
def test_low_precision_logits_are_upcast(name):
    """Softmax, logarithms and their differences in bfloat16 have two digits."""
    objective, model, (x, y) = OBJECTIVE_CASES[name].make(), two_heads(), image_batch()
    model.register_forward_hook(lambda module, args, logits: logits.bfloat16())
    loss = objective.loss(model, x, objective.perturb(model, x, y, generator()), y)
    numbers = [loss.total, *loss.parts.values(), *(output.logits for output in loss.outputs)]
    assert all(number.dtype == torch.float32 for number in numbers)


def test_every_name_leads_to_a_class_of_its_own_that_has_a_row():
    """Two names of one class would train the same; a class without a row is tested by none of the claims."""
    assert len(set(OBJECTIVES.values())) == len(OBJECTIVES)
    assert set(OBJECTIVES.values()) <= {type(case.make()) for case in OBJECTIVE_CASES.values()}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PGDAT({"eps": 8}), r"PGDAT.threat.eps: got 8; .* Did you mean 8/255"),
        (lambda: UnionAT(BALLS, "msd", attack_loss="kl"), r"UnionAT.attack_loss: got 'kl'"),
        (lambda: GradAlign(attack_loss="kl"), r"GradAlign.attack_loss: got 'kl'"),
        (lambda: UnionAT(BALLS[:1]), r"UnionAT.threats: got 1; expected at least 2"),
        (lambda: UnionAT([*BALLS, {"norm": "l3", "eps": 1}]), r"UnionAT.threats.3.norm: got 'l3'"),
    ],
)
def test_settings_outside_their_range_are_refused(make, message):
    """Before the first batch, with the name of the setting."""
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("attack_bn", ["eval", "train"])
def test_the_attack_runs_in_the_mode_it_names(attack_bn):
    """Statistics of the batch in place of the running ones, or the other way round, is another attack."""
    model, (x, y) = two_heads(), image_batch()
    modes = []
    model.drop.register_forward_hook(lambda module, *_: modes.append(module.training))
    PGDAT(**FEW, attack_bn=attack_bn).perturb(model, x, y)
    assert modes == [attack_bn == "train"] * 3


def test_the_kl_attack_starts_beside_the_image():
    """At the image itself the KL is flat: from there TRADES' attack would never move."""
    model, (x, y) = two_heads(training=False), image_batch()
    x_adv = TRADES(**FEW).perturb(model, x, y, generator())
    assert torch.equal(x_adv, Attack(LINF, 3, 0.05, start="gaussian", loss="kl")(model, x, y, generator()))


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_fgsm_steps_are_in_units_of_eps(factor):
    """FGSM-RS steps 1.25 eps also while eps is warmed up; GradAlign's FGSM steps eps from the image."""
    model, (x, y), threat = two_heads(training=False), image_batch(), LINF.scaled(factor)

    def loss(z):
        return F.cross_entropy(model(z), y, reduction="none")

    settings = {"threat": threat, "step_size": 1.25 * threat.eps, "start": "uniform"}
    started = fgsm(loss, x, generator=generator(), **settings)
    assert torch.equal(FGSMRS(LINF).scaled(factor).perturb(model, x, y, generator()), started)
    assert torch.equal(GradAlign(LINF).scaled(factor).perturb(model, x, y), fgsm(loss, x, threat=threat))


@pytest.mark.parametrize("regularizer", [None, CURE(), InputGradient()])
def test_extra_passes_leave_running_statistics_alone(regularizer):
    """The statistics the network is evaluated with would be those of images it is not trained on."""
    objective = WithInputRegularizer(FGSMRS(LINF), regularizer) if regularizer else GradAlign(LINF)
    model, (x, y) = two_heads(), image_batch()
    reference = copy.deepcopy(model)
    x_adv = objective.perturb(model, x, y, generator())
    objective.loss(model, x, x_adv, y).total.backward()  # autograd refuses if statistics were written back
    reference(x_adv)
    assert_same(everything(model), everything(reference))


def test_both_input_gradients_see_the_same_dropout():
    """With different masks the difference of gradients is noise: with h = 0 it must be exactly zero."""
    model, (x, y) = two_heads(), image_batch()
    assert CURE(h=0.0).penalty(model, x, y).item() == 0
    aligned = GradAlign(ThreatModel("linf", 0.0)).loss(model, x, x, y).parts["alignment"]
    assert abs(float(aligned)) < 1e-6  # one minus a cosine of one, float32


def test_input_gradients_are_computed_in_float32_under_autocast():
    """Differences of bfloat16 gradients are rounding noise."""
    model, (x, y) = two_heads(training=False), image_batch()
    exact = CURE(h=0.1).penalty(model, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(CURE(h=0.1).penalty(model, x, y), exact)


def test_input_gradients_go_through_fused_attention():
    """Its kernels have no second derivative; the penalty must not fail on transformers."""

    class Attention(nn.Linear):
        def forward(self, x):
            h = super().forward(x.flatten(1, 2))
            return F.scaled_dot_product_attention(h, h, h).mean(1)

    model, (x, y) = Attention(4, 3), image_batch()
    InputGradient().penalty(model, x, y).backward()
    assert bool((model.weight.grad != 0).any())


def test_examples_without_gradient_do_not_make_nan():
    """0/0 in the cosine, or the root's infinite slope at zero, would end the run."""
    model, (x, y) = SmallNet(torch.relu), image_batch()
    with torch.no_grad():
        model.first.bias.fill_(-100.0)  # every unit is dead
    for objective in (GradAlign(LINF), WithInputRegularizer(Standard(), CURE())):
        values = loss_and_gradients(objective, model, x, x, y)
        assert all(bool(torch.isfinite(v).all()) for v in values)
    assert float(GradAlign(LINF).loss(model, x, x, y).parts["alignment"]) == 0


def free_batches(num: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(x.double(), y) for x, y in (image_batch(6, seed=20 + i) for i in range(num))]


def free_step(objective, model, x, y) -> float:
    """One round of the documented loop without the optimizer; return the largest of δ."""
    x_adv = objective.perturb(model, x, y)
    objective.loss(model, x, x_adv, y).total.backward()
    objective.after_backward(x, x_adv)
    assert x_adv.grad is None
    return objective.state_dict()["delta"].abs().max().item()


def train_free(objective: FreeAT, model: nn.Module, batches) -> None:
    """The documented loop with SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for x, y in batches:
        for _ in range(objective.num_replays):
            optimizer.zero_grad()
            free_step(objective, model, x, y)
            optimizer.step()


@pytest.mark.parametrize(("norm", "eps", "step"), [("linf", 0.1, 0.03), ("l2", 0.4, 0.2), ("l1", 2.0, 0.5)])
def test_free_training_is_the_published_loop(norm, eps, step):
    """Against algorithm 1 written out: the perturbation moves with the gradient of the weights' own pass."""
    torch.manual_seed(0)
    model, threat = SmallNet().double(), ThreatModel(norm, eps)
    reference = copy.deepcopy(model)
    train_free(FreeAT(threat, num_replays=3, step_size=step), model, free_batches())
    optimizer = torch.optim.SGD(reference.parameters(), lr=0.3, momentum=0.9)
    delta = torch.zeros(6, 1, 4, 4, dtype=torch.float64)
    for x, y in free_batches():
        for _ in range(3):
            delta.requires_grad_()
            clipped = (x + delta).clamp(0, 1)
            optimizer.zero_grad()
            F.cross_entropy(reference(clipped), y).backward()
            move = steepest_step(delta.grad, threat, x=x, x_adv=(x + delta).detach())
            delta = project(delta.detach() + step * move, threat)
            optimizer.step()
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-10)  # float64 rounding through 9 steps


def test_free_training_resumes_from_its_state():
    """Without the perturbation in the checkpoint a resumed run starts its attack from zero."""
    torch.manual_seed(0)
    model, (first, second, third) = SmallNet().double(), free_batches()
    whole, stopped = (FreeAT(LINF, num_replays=2, step_size=0.03) for _ in range(2))
    train_free(whole, model, [first, second])
    state = whole.state_dict()
    stopped.load_state_dict(state)
    for objective in (whole, stopped):
        train_free(objective, copy.deepcopy(model), [third])
    assert torch.equal(whole.state_dict()["delta"], stopped.state_dict()["delta"])
    assert not torch.equal(whole.state_dict()["delta"], state["delta"])
    assert whole == FreeAT(LINF, num_replays=2, step_size=0.03)
    assert replace(whole).state_dict() == {}  # an equal objective is not the same run


def test_scaled_free_training_shares_the_perturbation():
    """In eps warm-up a new object is made every step; the perturbation must outlive it and fit the radius."""
    model, (x, y), objective = SmallNet(), image_batch(), FreeAT(LINF)
    with pytest.raises(RuntimeError, match=r"after_backward: got x_adv without .grad"):
        objective.after_backward(x, objective.perturb(model, x, y))
    assert free_step(objective.scaled(0.5), model, x, y) == pytest.approx(0.05)
    assert free_step(objective, model, x, y) > 0.09
    x_adv = objective.scaled(0.2).perturb(model, x, y)
    assert float((x_adv - x).detach().abs().max()) <= 0.02 + 1e-6
    smaller = objective.perturb(model, x[:5], y[:5])  # a batch of another shape starts from zero
    assert torch.equal(smaller.detach(), x[:5])


def test_a_regularizer_passes_free_training_through():
    """Wrapped, the perturbation must still move and be saved."""
    model, (x, y) = SmallNet(), image_batch()
    objective = WithInputRegularizer(FreeAT(LINF), InputGradient(weight=0.1))
    assert (objective.num_replays, objective.is_single_step) == (8, True)
    assert free_step(objective, model, x, y) == pytest.approx(0.1)
    assert copy.deepcopy(objective).num_replays == 8
    with pytest.raises(AttributeError):
        _ = WithInputRegularizer(Standard(), CURE()).after_backward


def test_image_n_is_turned_n_mod_4_times():
    """Labels that do not belong to the turns make the task noise."""
    x, seen = torch.rand(7, 2, 3, 3), []
    turns = rotation_logits(lambda z, head: seen.append(z) or torch.zeros(7, 4), x)[1]
    assert turns.tolist() == [0, 1, 2, 3, 0, 1, 2]
    for image, original, r in zip(seen[0], x, turns, strict=True):
        assert torch.equal(image, torch.rot90(original, int(r), (1, 2)))


def test_rotations_need_the_head_and_square_images():
    """Labels of turns that the class head learns, or images turned to another shape, pass in silence."""
    x, y = image_batch()
    no_head = create_model("preact_resnet18", num_classes=3, in_chans=1, width=4)
    with pytest.raises(ValueError, match="rotation_head=True"):
        RotationAT(**FEW).perturb(no_head, x, y)
    with pytest.raises(ValueError, match=r"got rotation logits of shape \(12, 3\)"):
        RotationAT(**FEW).loss(lambda z, head="": torch.zeros(len(z), 3), x, x, y)
    for images in (x[:, :, :3], x[:3]):
        with pytest.raises(ValueError, match=r"expected .* H = W and B >= 4"):
            RotationAT(**FEW).perturb(two_heads(), images, y[: len(images)])


def test_the_union_takes_the_worst_adversary_of_each_example():
    """By the cross-entropy, example by example; the batch's worst gives most examples a weak attack."""
    model, (x, y) = two_heads(training=False), image_batch(40)
    found = UnionAT(BALLS, "average", 3).perturb(model, x, y, generator()).unflatten(0, (3, 40))
    worst = UnionAT(BALLS, "max", 3).perturb(model, x, y, generator())
    losses = torch.stack([F.cross_entropy(model(z), y, reduction="none") for z in found])
    chosen = losses.argmax(0)
    assert len(chosen.unique()) > 1  # otherwise the choice is not tested
    for i in range(40):
        assert torch.equal(worst[i], found[chosen[i], i])


def test_a_step_size_of_none_crosses_each_ball():
    """2.5 eps / num_steps in the norm of each ball; one for all would be useless in the others."""
    assert PGDAT(LINF, 5).attack.step_size == 2.5 * 0.1 / 5
    assert TRADES(LINF, 5).scaled(0.5).attack.step_size == 2.5 * 0.1 / 5 / 2
    for factor, steps in ((1, [0.05, 0.25, 2.0]), (0.5, [0.025, 0.125, 1.0])):  # l1: eps
        attacks = UnionAT(BALLS, num_steps=5).scaled(factor).attacks
        assert [round(a.step_size, 6) for a in attacks] == steps


class Wavy(nn.Module):
    """Class 0 where the mean of cos(2π (x − ½) / eps) exceeds ½: at the image and a whole step away only."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps, self.bias = eps, nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        margin = torch.cos(2 * torch.pi * (x - 0.5) / self.eps).flatten(1).mean(1) - 0.5 + self.bias
        return torch.stack([margin, torch.zeros_like(margin)], 1)


def test_the_guard_sees_what_fgsm_does_not():
    """A model that resists every whole step and no half step is catastrophic overfitting in one line."""
    x, y = 0.5 + 0.001 * torch.randn(64, 1, 8, 8), torch.zeros(64, dtype=torch.long)
    model, guard = Wavy(0.1), CatastrophicOverfittingGuard()
    x_fgsm = fgsm(lambda z: F.cross_entropy(model(z), y, reduction="none"), x, threat=LINF)
    assert (model(x_fgsm).argmax(1) == y).all()
    model.bias.data.fill_(5.0)
    assert not guard.check(model, x, y, LINF, generator())
    assert (guard.best, guard.last) == (1.0, 1.0)
    model.bias.data.fill_(0.0)
    before, state = everything(model), torch.get_rng_state()
    assert guard.check(model, x, F.one_hot(y, 2).float(), LINF)
    assert guard.last < 0.1
    assert_same(everything(model), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training


def test_the_guard_compares_with_the_best_so_far():
    """A fall in two halves is a fall; a bad start, slow progress and noise are not."""
    guard = CatastrophicOverfittingGuard(drop=0.2)
    assert [guard.update(a) for a in (0.1, 0.3, 0.25, 0.4, 0.21, 0.19)] == [False] * 5 + [True]
    assert (guard.best, guard.last) == (0.4, 0.19)
    for wrong in ({"drop": 20}, {"num_steps": 1}):  # neither could ever fire
        with pytest.raises(ValueError, match="expected 0 < drop < 1, 2 steps or more"):
            CatastrophicOverfittingGuard(**wrong)
