"""Claims every rule of the optimizer wrapper shares, and its contract with torch and Accelerate."""

import copy
import pickle
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from cases import BASES, IDLE, RULES, TABLES, BatchNormNet, assert_same, everything, image_batch, make, run
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from wcitrain.attacks import ATTACK_LOSSES
from wcitrain.curvature import cross_entropy
from wcitrain.method import Choice, fields_of
from wcitrain.optim import (
    AWP,
    GSAM,
    RWP,
    FrobeniusPenalty,
    RegularizedOptimizer,
    StrengthSchedule,
    TracePenalty,
    UniformNoise,
    WCIPenalty,
    WCIPosterior,
)
from wcitrain.preserve import full_precision


def test_every_method_has_a_row():
    """The claims below hold for the table's rows: a method without one is tested by none of them."""
    rules = [rule.kwargs.get(kind) for rule in RULES.values() for kind in ("perturbation", "penalty")]
    rules += [rule.estimator for rule in rules if isinstance(rule, tuple(TABLES["penalty"].values()))]
    known = {cls for kind in ("perturbation", "penalty", "estimator") for cls in TABLES[kind].values()}
    assert known <= set(map(type, rules))


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in TABLES for name in TABLES[kind]])
def test_every_method_has_defaults_and_a_label_and_comes_back_from_recipes_and_pickles(kind, name):
    """Runs store methods as text, processes hand them on: what comes back must be what was given."""
    cls, choice = TABLES[kind][name], Choice(TABLES[kind])
    method, fields = cls(), fields_of(cls)
    written = choice.write(method)
    assert list(written) == ["name", *fields]
    assert written["name"] == name
    assert choice.read(written) == choice.read(name) == method
    assert pickle.loads(pickle.dumps(method)) == method
    assert cls.label or "__str__" in vars(cls)  # else it goes by the name of its class
    assert "{" not in str(method)


@pytest.mark.parametrize("method", [m for t in (*TABLES.values(), ATTACK_LOSSES) for m in t.values()])
def test_every_method_says_what_it_is_where_it_comes_from_and_what_it_costs(method):
    """``wcitrain list`` and METHODS.md are made of this: what a class does not say is said nowhere."""
    summary = method.__doc__.partition("\n")[0]
    assert summary.endswith(".")
    assert method.source
    assert method.cost
    if isinstance(method, type):
        assert all(field.description for field in fields_of(method).values())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("idle", IDLE)
def test_zero_strength_equals_the_base_optimizer_bitwise(idle, base):
    """Otherwise monitoring changes the run it monitors, and an ablation's zero is not its baseline."""
    model, optimizer = make(IDLE[idle], base)
    run(model, optimizer)
    after = torch.get_rng_state()

    torch.manual_seed(0)
    reference = BatchNormNet()
    plain = BASES[base](reference.parameters())
    for step in range(5):
        x, y = image_batch(seed=100 + step)
        torch.manual_seed(1000 + step)
        plain.zero_grad()
        F.cross_entropy(reference(x), y).backward()
        plain.step()
    assert_same(everything(model), everything(reference))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("estimator", ["gauss_newton", "hutchinson", "top_layer"])
def test_monitoring_logs_the_numbers_the_penalty_uses(estimator):
    """Strength 0 must measure with the probes of strength > 0, or it monitors something else."""
    measured = []
    for strength in (0.0, 1e-12):
        model, optimizer = make({"penalty": WCIPenalty(strength, estimator=estimator)})
        run(model, optimizer, steps=3)
        measured.append(optimizer.traces())
    # Hutchinson's differences take the mean of the traces at W ± hu, on a network with kinks.
    assert torch.allclose(*measured, rtol=0.2 if estimator == "hutchinson" else 1e-3), measured
    assert (measured[0] != 0).all()


@pytest.mark.parametrize("rule", RULES)
def test_passes_match_the_documented_cost_and_leave_weights_and_statistics(rule):
    """An extra forward silently costs every user time; one at moved weights must not be seen afterwards."""
    model, optimizer = make(RULES[rule].kwargs, "sgd", lr=0.0)
    before, calls = [p.detach().clone() for p in model.parameters()], Counter()
    model.register_forward_hook(lambda *_: calls.update(forward=1))
    model.conv.weight.register_hook(lambda g: calls.update(backward=1))
    run(model, optimizer, steps=2)
    calls.clear()
    run(model, optimizer, steps=1)  # curvature is known by now
    expected = RULES[rule]
    gradients = expected.backwards if expected.gradients is None else expected.gradients
    assert calls == Counter(forward=1 + expected.forwards, backward=1 + gradients)
    assert optimizer.extra_passes() == (expected.forwards, expected.backwards)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert int(model.bn.num_batches_tracked) == int(model.calls) == 3


class NoRead(TorchDispatchMode):
    """Raises where a number is read from the device, or a shape depends on one: the device would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "unique")
        assert not any(name in str(func) for name in waits), func
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("rule", [r for r in RULES if "hutchinson" not in r and "2 probes" not in r])
def test_a_step_never_waits_for_the_device(rule):
    """Every read of a number stops the host until the device is done: passes no longer overlap."""
    model, optimizer = make(RULES[rule].kwargs)
    run(model, optimizer, steps=3)
    x, y = image_batch()
    with NoRead():
        optimizer.step(lambda: cross_entropy(model(x), y))
    with pytest.raises(AssertionError, match="_local_scalar_dense"), NoRead():
        float(x.sum())


@pytest.mark.parametrize("rule", [r for r in RULES if "perturbation" not in RULES[r].kwargs or "awp" in r])
def test_running_statistics_are_those_of_the_unperturbed_weights(rule):
    """Statistics taken at perturbed weights belong to a model that is never evaluated."""
    model, optimizer = make(RULES[rule].kwargs)
    run(model, optimizer, steps=1)
    optimizer.zero_grad()
    reference = BatchNormNet()
    reference.load_state_dict(model.state_dict())
    x, y = image_batch()
    optimizer.backward(lambda: cross_entropy(model(x), y))
    reference(x)
    assert torch.equal(model.bn.running_mean, reference.bn.running_mean)
    assert torch.equal(model.bn.running_var, reference.bn.running_var)


@pytest.mark.parametrize("rule", [r for r in RULES if RULES[r].forwards])
def test_an_exception_in_any_pass_undoes_all_of_them(rule):
    """A failing pass (no memory, Ctrl-C) must leave weights, statistics, .grad, random state alone.

    Parameters of other optimizers over the model too: they would step on half of a difference.
    """
    for failing in range(1 + RULES[rule].forwards):
        model = BatchNormNet()
        own = [p for name, p in model.named_parameters() if name != "bn.weight"]
        optimizer = RegularizedOptimizer(BASES["sgd"](own), model, **RULES[rule].kwargs)
        run(model, optimizer, steps=1)
        x, y = image_batch()
        F.cross_entropy(model(x), y).backward()  # gradients of an earlier micro-batch, of the user's own, ...
        before, random_state = everything(model), torch.get_rng_state()
        gradients, calls = [p.grad.clone() for p in model.parameters()], []

        def loss_fn(model=model, x=x, y=y, failing=failing, calls=calls):
            loss = cross_entropy(model(x), y)
            calls.append(1)
            if len(calls) == failing + 1:
                raise MemoryError
            return loss

        with pytest.raises(MemoryError):
            optimizer.backward(loss_fn)
        assert_same(everything(model), before)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
        assert torch.equal(torch.get_rng_state(), random_state)
        optimizer.zero_grad()
        run(model, optimizer, steps=1)  # and it can go on


@pytest.mark.parametrize("rule", RULES)
def test_passes_of_a_step_see_the_same_random_numbers(rule):
    """With fresh dropout masks in every pass, differences of gradients are noise."""
    model, optimizer = make(RULES[rule].kwargs)
    run(model, optimizer, steps=1)  # from the second step on a penalty has its coefficients
    x, y = image_batch()
    kept = []  # 1 where dropout kept a unit, 0 where it dropped it, NaN where the unit was dead
    model.drop.register_forward_hook(
        lambda m, args, out: kept.append(torch.where(args[0] != 0, (out != 0).float(), float("nan")))
    )
    optimizer.backward(lambda: cross_entropy(model(x), y))
    assert len(kept) == 1 + RULES[rule].forwards
    for other in kept[1:]:
        both_alive = ~(kept[0].isnan() | other.isnan())
        assert both_alive.sum() > 20
        assert torch.equal(kept[0][both_alive], other[both_alive])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("base", BASES)
def test_state_round_trip_continues_bitwise(rule, base, tmp_path):
    """Peers lose the base optimizer's momentum or their running averages on resume."""
    model, optimizer = make(RULES[rule].kwargs, base)
    run(model, optimizer, steps=3)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    run(model, optimizer, steps=3, start=3)

    resumed, resumed_optimizer = make(RULES[rule].kwargs, base, seed=7)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    run(resumed, resumed_optimizer, steps=3, start=3)
    assert_same(everything(resumed), everything(model))


def test_wrapping_a_base_that_has_its_state_already_keeps_the_averages():
    """A loop that loads first and wraps second would begin its traces and its schedule anew."""
    model, optimizer = make({"perturbation": WCIPosterior(0.5)})
    run(model, optimizer, steps=3)
    again = RegularizedOptimizer(optimizer.base, model, perturbation=WCIPosterior(0.5))
    assert torch.equal(again.traces(), optimizer.traces())


def test_gsam_is_right_under_reentrant_checkpoints():
    """Their inner backward writes into .grad, past what ``autograd.grad`` returns."""
    x, y, gradients = torch.rand(6, 4, requires_grad=True), torch.arange(6) % 3, []
    for is_reentrant in (False, True):
        torch.manual_seed(0)
        body, head = nn.Sequential(nn.Linear(4, 8), nn.ReLU()), nn.Linear(8, 3)
        model = nn.ModuleList([body, head])
        optimizer = RegularizedOptimizer(BASES["sgd"](model.parameters()), model, perturbation=GSAM())

        def loss_fn(body=body, head=head, is_reentrant=is_reentrant):
            inner = checkpoint(body, x, use_reentrant=True) if is_reentrant else body(x)
            return cross_entropy(head(inner), y)

        optimizer.backward(loss_fn)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.equal(*gradients)


@pytest.mark.parametrize("rule", RULES)
def test_the_seed_matters_where_a_rule_is_random(rule):
    """Probes must depend on the seed."""
    results = []
    for seed in (0, 1):
        model, optimizer = make(RULES[rule].kwargs | {"seed": seed})
        run(model, optimizer)
        results.append(everything(model))
    assert RULES[rule].is_random != all(torch.equal(results[0][k], results[1][k]) for k in results[0])


@pytest.mark.parametrize("rule", RULES)
def test_gradients_keep_the_dtype_and_accumulate(rule):
    """``backward`` adds to what is in .grad, so micro-batches and the user's own terms survive."""
    found, (x, y) = [], image_batch()
    for start in (0.0, 1.0):
        model, optimizer = make(RULES[rule].kwargs)
        run(model, optimizer, steps=1)
        for p in model.parameters():
            p.grad = torch.full_like(p, start)
        torch.manual_seed(0)
        optimizer.backward(lambda model=model: cross_entropy(model(x), y))
        assert all(p.grad.dtype == p.dtype for p in model.parameters())
        found.append([p.grad - start for p in model.parameters()])
    for once, added in zip(*found, strict=True):
        assert torch.allclose(once, added, atol=1e-5)


@pytest.mark.parametrize("rule", [r for r in RULES if not RULES[r].is_random])
def test_equal_micro_batches_equal_one_of_them(rule):
    """Each micro-batch makes its own ascent: equal ones must give what one gives, or a share is wrong."""
    (x, y), grads = image_batch(6), []
    for parts in (1, 3):
        model, optimizer = make(RULES[rule].kwargs | {"num_micro_batches": parts})
        model.eval()
        for _ in range(parts):
            optimizer.backward(lambda model=model: cross_entropy(model(x), y))
        grads.append([p.grad.clone() for p in model.parameters()])
        optimizer.step()
        if "vasso" in rule:
            grads[-1] += optimizer._record["memory"]
    for one, many in zip(*grads, strict=True):
        assert torch.allclose(one, many, atol=1e-6)


def test_micro_batches_draw_their_own_directions_and_average_their_traces():
    """More probes for free: the step's trace is the mean over micro-batches of independent draws."""
    model, optimizer = make({"perturbation": WCIPosterior(0.1), "num_micro_batches": 2})
    x, y = image_batch()
    for _ in range(2):
        optimizer.backward(lambda: cross_entropy(model.eval()(x), y))
    first, second = optimizer._state.window.traces  # each counts a half
    optimizer.step()
    assert not torch.equal(first, second)
    assert torch.allclose(optimizer.traces(), first + second)


def test_groups_and_hooks_are_the_bases_own_through_schedulers_and_loading():
    """Stale aliases of param_groups decouple the schedule from the optimizer."""
    (model, optimizer), calls = make({}), Counter()
    optimizer.register_step_post_hook(lambda *_: calls.update(post=1))
    torch_scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 0.5**s)
    run(model, optimizer, steps=1)
    assert calls == Counter(post=1)
    torch_scheduler.step()
    assert optimizer.base.param_groups[0]["lr"] == 0.025
    optimizer.load_state_dict(optimizer.state_dict())
    timm_scheduler = CosineLRScheduler(optimizer, t_initial=10, warmup_t=2, warmup_lr_init=0.001)
    timm_scheduler.step(0)
    assert optimizer.base.param_groups[0]["lr"] == 0.001


def test_copies_and_pickles_are_complete_and_independent():
    """torch's default drops everything but groups and state."""
    model, optimizer = make({"perturbation": WCIPosterior(0.5)})
    run(model, optimizer, steps=2)
    for clone in (copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))):
        cloned_model, cloned = clone
        run(cloned_model, cloned, steps=2, start=2)
        assert cloned.layers["conv.weight"] is cloned_model.conv.weight
    run(model, optimizer, steps=2, start=2)
    assert_same(everything(model), everything(cloned_model))
    plain = BASES["sgd"](model.parameters())  # the bare optimizer's state loads too
    plain.load_state_dict(optimizer.base.state_dict())
    del plain.param_groups[0]["regularizer"]
    cloned.load_state_dict(plain.state_dict())
    assert cloned.traces() is None
    weights = cloned_model.fc.weight, model.fc.weight
    momenta = [o.state[w]["momentum_buffer"] for o, w in zip((cloned, plain), weights, strict=True)]
    assert torch.equal(*momenta)


def test_the_schedule_switches_on_ramps_and_skips():
    """Off before start, linear ramp, one step in ``every``; start and ramp count epochs if there are any."""
    schedule = StrengthSchedule(start=4, ramp=2, every=2)
    assert [round(schedule.factor(s), 3) for s in range(10)] == [0, 0, 0, 0, 0.333, 0, 1, 0, 1, 0]
    assert [StrengthSchedule().factor(s) for s in range(3)] == [1, 1, 1]
    epochs, steps = StrengthSchedule(start=0.5, ramp=1), StrengthSchedule(start=2, ramp=4)
    assert [epochs.factor(s, 4) for s in range(9)] == [steps.factor(s) for s in range(9)]
    model, optimizer = make({"perturbation": AWP(schedule=StrengthSchedule(start=1)), "steps_per_epoch": 3})
    sizes = [run(model, optimizer, steps=1) and optimizer.metrics().get("relative_size") for _ in range(4)]
    assert [size is not None for size in sizes] == [False, False, False, True]


def test_a_penalty_every_k_steps_keeps_its_mean_strength():
    """Amortising must not weaken the penalty by k."""
    model, optimizer = make({"penalty": FrobeniusPenalty(0.5, schedule=StrengthSchedule(every=3))})
    model.eval()
    gradients, (x, y) = [], image_batch()
    for step in (0, 1):
        optimizer._record["step"] = step
        optimizer.zero_grad()
        optimizer.backward(lambda: cross_entropy(model(x), y))
        gradients.append(model.conv.weight.grad.clone())
    added = gradients[0] - gradients[1]
    assert torch.allclose(added, 3 * 2 * 0.5 * model.conv.weight.detach(), atol=1e-5)


def test_layers_with_little_or_no_curvature_get_bounded_noise():
    """s = sqrt(a/t) explodes at a small or negative trace: one layer would take all the noise."""
    a, d = torch.ones(4).double(), torch.full((4,), 10.0).double()
    t = torch.tensor([1.0, 1.0, -5.0, float("nan")]).double()
    rule = WCIPosterior(1.0, floor=1e-2, cap=None)
    variance = rule.posterior(a, d, t, 1.0).sigma ** 2
    # Mean product of the measured layers is 2/3, the floor 1 % of it; the layer without one gets the mean.
    assert float(variance[2] / variance[0]) == pytest.approx((1e-2 * 2 / 3) ** -0.5)
    assert float(variance[3] / variance[0]) == pytest.approx((2 / 3) ** -0.5)
    assert float((d * variance).sum()) == pytest.approx(4.0)
    uniform = UniformNoise(1.0).posterior(a, d, None, 1.0).sigma
    for unknown in (None, -torch.ones(4).double()):
        assert torch.allclose(WCIPosterior(1.0).posterior(a, d, unknown, 1.0).sigma, uniform)
        by_strength = WCIPosterior(strength=5.0).posterior(a, d, unknown, 1.0)  # λ is in units of curvature
        assert float(by_strength.relative_size) == pytest.approx(0.1)


@pytest.mark.parametrize("rule", RULES)
def test_zero_initialised_and_unused_layers_do_no_harm(rule):
    """A zero head (linear probing), a layer off the graph: no NaN, no explosion, and the rest trains."""
    torch.manual_seed(0)
    x, y = torch.randn(16, 6), torch.arange(16) % 3
    model = nn.ModuleDict({"unused": nn.Linear(5, 5), "body": nn.Linear(6, 8), "head": nn.Linear(8, 3)})
    alone = nn.Linear(6, 3)
    networks = {model: lambda: model["head"](torch.tanh(model["body"](x))), alone: lambda: alone(x)}
    nn.init.zeros_(model["head"].weight)
    nn.init.zeros_(alone.weight)
    for net, forward in networks.items():
        optimizer = RegularizedOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net, **RULES[rule].kwargs)
        losses = [
            float(optimizer.step(lambda forward=forward: cross_entropy(forward(), y))) for _ in range(30)
        ]
        assert losses[-1] < losses[0]
        assert max(losses) < losses[0] + 0.5


@pytest.mark.parametrize("rule", [AWP(0.5), RWP(1.0)])
def test_a_non_finite_perturbed_pass_shows_in_the_returned_loss(rule):
    """The gradient comes from W + u: a finite loss at W must not hide that it is NaN there."""
    model = nn.Linear(4, 3)
    start, x = model.weight.detach().clone(), torch.randn(5, 4)

    def loss_fn():
        return model(x).square().mean() + (1e-3 - (model.weight - start).square().sum()).sqrt()

    optimizer = RegularizedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, perturbation=rule)
    assert torch.isnan(optimizer.backward(loss_fn))


def test_autocast_around_the_call_sees_the_moved_weights_and_float32_passes_refuse_it():
    """Autocast keeps bf16 copies of the weights: passes at W ± u would silently be passes at W."""
    x, y = image_batch()

    def inside(m):
        with torch.autocast("cpu", torch.bfloat16):
            return F.cross_entropy(m(x).float(), y)

    gradients = []
    for is_around in (False, True):
        model, optimizer = make({"perturbation": WCIPosterior(0.5)})
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_around):
            model.eval()(x)  # now the copies are there
            optimizer.backward(lambda m=model: inside(m))
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))
    model, optimizer = make({"penalty": TracePenalty(1e-3, estimator="hutchinson")})
    with pytest.raises(ValueError, match="needs float32"):
        optimizer.step(lambda: inside(model))
    half, penalty = nn.Linear(2, 2).bfloat16(), WCIPenalty(estimator="hutchinson")
    with pytest.raises(ValueError, match="float32 or float64"):
        RegularizedOptimizer(BASES["sgd"](half.parameters()), half, penalty=penalty)


def test_tf32_is_off_in_float32_passes_and_back_afterwards():
    """TF32 products have 10 bits: differences of gradients drown. Mixed switches make torch's reads raise."""
    places = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [place.allow_tf32 for place in places]
    try:
        for place in places:
            place.allow_tf32 = True
        for _ in range(2):
            with full_precision(nn.Linear(1, 1)), torch.backends.cudnn.flags(enabled=True):
                assert not places[0].allow_tf32
            assert all(place.allow_tf32 for place in places)
    finally:
        for place, value in zip(places, before, strict=True):
            place.allow_tf32 = value


def test_metrics_name_every_layer():
    """What is logged: norms, traces, index and its sum, relative size and λ."""
    model, optimizer = make({"perturbation": WCIPosterior(0.5)})
    run(model, optimizer, steps=2)
    metrics, norm = optimizer.metrics(), float(model.fc.weight.detach().square().sum())
    assert metrics["relative_size"] == pytest.approx(0.5)
    assert metrics["wci/total"] == pytest.approx(metrics["wci/conv.weight"] + metrics["wci/fc.weight"])
    assert metrics["frobenius/fc.weight"] == pytest.approx(norm, rel=1e-6)
    assert metrics["lambda"] > 0


def test_a_penalty_reports_the_relative_size_its_strength_amounts_to():
    """λ of the penalty and r of the posterior are one knob: the same λ must give the same r."""
    known = {"trace_sum": torch.tensor([2.0, 3.0]).double(), "trace_weight": torch.ones(2).double()}
    sizes = []
    for rule in ({"penalty": WCIPenalty(1e-3)}, {"perturbation": WCIPosterior(strength=1e-3)}):
        model, optimizer = make(rule, lr=0.0)
        optimizer._record.update(known, is_measured=True)
        run(model, optimizer, steps=1)
        sizes.append(optimizer.metrics()["relative_size"])
        assert optimizer.metrics()["lambda"] == pytest.approx(1e-3)
    assert sizes[0] == pytest.approx(sizes[1], rel=1e-6)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [({"penalty": WCIPenalty(1e-3, estimator="hutchinson")}, torch.float32), ({}, torch.bfloat16)],
)
def test_penalty_passes_run_in_float32_under_bf16(rule, expected):
    """Differences of bfloat16 gradients are noise; Accelerate's autocast sits inside the model's forward."""
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        accelerator = Accelerator(cpu=True, mixed_precision="bf16")
        model, optimizer = make(rule)
        prepared_model, _ = accelerator.prepare(model, optimizer)
        optimizer.attach(accelerator, prepared_model)
        (x, y), seen = image_batch(), []
        model.conv.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
        for _ in range(2):  # the first step only measures; its pass at W is the plain one
            seen.clear()
            optimizer.backward(lambda: cross_entropy(prepared_model(x), y))
            optimizer.step()
        assert set(seen) == {expected}
        prepared_model(x)
        assert seen[-1] == torch.bfloat16  # and autocast is back afterwards
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
