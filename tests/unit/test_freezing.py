"""Fine-tuning by parts: rates by layer, what is frozen and when it thaws, timm's schedules."""

import math
from copy import deepcopy

import pytest
import timm
import torch
from tiny_run import TINY
from torch.nn.modules.batchnorm import _NormBase

from wcitrain.checkpoint import load_checkpoint
from wcitrain.freezing import Freezing, freeze
from wcitrain.learning_rate import Cosine, Piecewise, TimmSchedule
from wcitrain.models import create_model
from wcitrain.monitoring import epoch_accuracies
from wcitrain.optim.base import SGD, AdamW, TimmOptimizer
from wcitrain.params import select_layers
from wcitrain.progress import StopRequest, run_folder
from wcitrain.recipe import recipe_from_dict
from wcitrain.run import start_run
from wcitrain.train import Interrupted, finish_epoch, open_run, train, train_epoch

MODELS = {
    "vit": ("vit_tiny_patch16_224", {"img_size": 32, "embed_dim": 12, "depth": 3, "num_heads": 3}),
    "convnext": ("convnext_atto", {"depths": [1, 1, 2, 1], "dims": [4, 4, 8, 8]}),
    "resnet": ("resnet18", {"layers": [1, 2, 1, 1], "channels": [4, 4, 4, 4]}),
    "efficientnet": ("mobilenetv2_035", {}),
}


def model_of(kind: str):
    name, kwargs = MODELS[kind]
    return create_model(name, num_classes=3, **kwargs)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("decays_all", [True, False])
@pytest.mark.parametrize("optimizer", [SGD, AdamW, TimmOptimizer])
def test_rates_and_decays_are_those_of_timm_s_own_groups_name_by_name(kind, decays_all, optimizer):
    """The classifier around the backbone once hid group_matcher and no_weight_decay, which go by names."""
    model, name = model_of(kind), {"name": "lamb"} if optimizer is TimmOptimizer else {}
    ours = optimizer(**name, lr=0.2, weight_decay=0.1, layer_decay=0.7, decay_norm_and_bias=decays_all).build(
        model
    )
    settings = {"lr": 0.2, "weight_decay": 0.1, "layer_decay": 0.7, "filter_bias_and_bn": not decays_all}
    theirs = timm.optim.create_optimizer_v2(model.backbone, "sgd", **settings)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in ours.param_groups for p in g["params"]}
    assert all("lr_scale" not in g for g in ours.param_groups)  # else timm's schedulers would apply it twice
    assert len(found) == len(list(model.parameters()))
    kept = set() if not decays_all else getattr(model.backbone, "no_weight_decay", set)()
    for group in theirs.param_groups:
        for p in group["params"]:
            name = next(n for n, q in model.backbone.named_parameters() if q is p)
            decay = 0.1 if name in kept else group["weight_decay"]
            assert found[id(p)] == (pytest.approx(0.2 * group["lr_scale"], rel=1e-12), decay), name
    assert len({rate for rate, _ in found.values()}) > 3


def test_the_head_has_its_own_rate_and_ratios_outlast_the_schedule():
    model = model_of("vit")
    optimizer = AdamW(lr=0.1, head_lr=0.03, layer_decay=0.5, decay_norm_and_bias=False).build(model)
    rates = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert {rates[id(p)]["lr"] for p in model.backbone.head.parameters()} == {0.03}
    assert rates[id(model.backbone.pos_embed)]["weight_decay"] == 0
    before = [g["lr"] for g in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: Cosine(warmup_epochs=1).factor(s, 4, 5)
    )
    assert {g["lr"] for g in optimizer.param_groups} == {0}  # the warm-up begins at zero
    for number in range(1, 12):
        optimizer.step()
        scheduler.step()
        factor = Cosine(warmup_epochs=1).factor(number, 4, 5)
        assert [g["lr"] for g in optimizer.param_groups] == [rate * factor for rate in before]
    turned = create_model("resnet18", num_classes=3, rotation_head=True, **MODELS["resnet"][1])
    heads = [g for g in SGD(head_lr=0.3).build(turned).param_groups if g["lr"] == 0.3]
    assert sum(len(g["params"]) for g in heads) == 4


def trains(model, freezing, epochs):
    """The trainable parameters in each epoch."""
    plan, found = freezing.plan(model, epochs), []
    for epoch in range(epochs):
        freeze(model, plan, epoch)
        found.append({n.removeprefix("backbone.") for n, p in model.named_parameters() if p.requires_grad})
    return found


def test_stages_thaw_from_the_top_after_the_head():
    model = model_of("vit")
    everything = {name for name, _ in model.backbone.named_parameters()}
    head = {"head.weight", "head.bias"}
    block = {i: {n for n in everything if n.startswith(f"blocks.{i}.")} for i in range(3)}
    top = head | block[2] | {"norm.weight", "norm.bias"}
    found = trains(model, Freezing(head_epochs=1, unfreeze_every=2), 8)
    assert found == [head, top, top, *[top | block[1]] * 2, *[everything - everything.difference(
        top | block[0] | block[1])] * 2, everything]  # fmt: skip
    assert trains(model_of("vit"), Freezing(head_epochs=2), 3) == [head, head, everything]
    frozen = Freezing(names=["patch_embed", "*_embed", "cls_token", "blocks.0-1"], unfreeze_every=1)
    assert trains(model_of("vit"), frozen, 1) == [top]
    fixed = model_of("vit")
    fixed.backbone.pos_embed.requires_grad_(False)  # by the model itself, as fixed position codes are
    assert "pos_embed" not in trains(fixed, Freezing(head_epochs=1), 2)[1]


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("vit", {"names": ["block.0"]}, "freezing.names: got 'block.0', which matches nothing; .* blocks.0"),
        ("vit", {"names": ["blocks.1-3"]}, r"got 'blocks.3', which matches nothing"),
        ("vit", {"names": ["blocks.3-1"]}, r"got the range 3-1; expected 1-3"),
        ("vit", {"names": ["*"]}, "nothing trains at first"),
        ("resnet", {"names": ["fc"], "head_epochs": 1}, "nothing trains at first"),
        ("resnet", {"names": ["conv1", "bn1", "layer1-4"], "head_epochs": 1}, "expected a classifier"),
        (
            "resnet",
            {"unfreeze_every": 1},
            "one of 5 stages begins in epoch 4; expected less than train.epochs = 3",
        ),
    ],
)
def test_freezing_that_does_not_do_what_it_says_is_refused(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        Freezing(**settings).plan(model_of(kind), 3)


def test_rates_without_a_layer_or_a_head_to_have_them_are_refused():
    model = create_model("preact_resnet18", num_classes=3, width=2)
    with pytest.raises(ValueError, match=r"optimizer.layer_decay: got 0.5 with PreActResNet"):
        SGD(layer_decay=0.5).build(model)
    with pytest.raises(ValueError, match=r"freezing.unfreeze_every: got PreActResNet"):
        Freezing(unfreeze_every=1).plan(model, 9)
    freeze(model, Freezing(names=["fc"]).plan(model, 1), 0)
    with pytest.raises(ValueError, match=r"optimizer.head_lr: got 0.5 .* does not train"):
        SGD(head_lr=0.5).build(model)
    with pytest.raises(ValueError, match=r"optimizer.kwargs: got layer_decay_min_scale"):
        TimmOptimizer("lamb", kwargs={"layer_decay_min_scale": 0.1}).build(model)


SETTINGS = {
    "plain": ["optimizer={name: adamw, weight_decay: 0.1, layer_decay: 0.8, head_lr: 0.01}",
              "train.max_norm=0.5"],
    "vasso, ema": ["perturbation.name=vasso", "averaging={name: ema, decay: 0.5}", "schedule.name=cosine"],
    "wci, swa": ["perturbation.name=wci", "averaging={name: swa, start_epoch: 1}", "optimizer.name=lamb",
                 "schedule={name: timm, kind: tanh, each_step: true, warmup_epochs: 1,warmup_fraction: 0.1}"],
    "penalty": ["penalty={name: wci, strength: 1e-4}", "objective.name=trades", "train.accumulate=2"],
}  # fmt: skip
STAGED = {"names": ["conv1", "bn1", "layer2.0.bn1"], "head_epochs": 1, "unfreeze_every": 1}
SMALL = TINY | {
    "data": {"source": "digits", "val_size": 50, "max_train": 150, "max_test": 50},
    "train": {"epochs": 5, "batch_size": 50, "device": "cpu"},
    "freezing": STAGED,
    "checkpoint": {"every": 1},
    "evaluation": {"train_size": 50, "num_steps": 1, "wci": False},
}


def small(tmp_path, name, *settings):
    return recipe_from_dict(SMALL | {"output": str(tmp_path), "name": name}, list(settings))


@pytest.mark.parametrize("kind", SETTINGS)
def test_what_is_frozen_keeps_every_bit_and_a_resume_amid_thawing_is_exact(kind, tmp_path):
    """Weight decay, momentum and running statistics would move it; a resume has other layers."""
    whole, parted = (small(tmp_path, name, *SETTINGS[kind]) for name in ("whole", "parted"))
    run = open_run(whole)
    plan = {name: start for name, start in run.plan.items()}
    for epoch in range(5):
        frozen = [name for name, start in plan.items() if start > epoch]
        owners = {name.rpartition(".")[0] for name in frozen}
        still = [n for n in run.bare.state_dict() if n in frozen or n.rpartition(".")[0] in owners]
        before = {n: run.bare.state_dict()[n].clone() for n in still}
        states = deepcopy(run.bare.state_dict())
        train_epoch(run)
        after = run.bare.state_dict()
        assert all(torch.equal(after[n], value) for n, value in before.items())
        assert all(
            run.regularizer.state.get(p, {}) == {} for n, p in run.bare.named_parameters() if n in frozen
        )
        assert [n for n, start in plan.items() if start <= epoch and torch.equal(after[n], states[n])] == []
        norms = [m for m in run.bare.modules() if isinstance(m, _NormBase)]
        assert [m.training for m in norms] == [any(p.requires_grad for p in m.parameters()) for m in norms]
        finish_epoch(run)
        if run.average is not None:
            average = run.average.state_dict()
            assert all(torch.equal(average[n], value) for n, value in before.items())
    first = open_run(parted)

    class Pressed(StopRequest):
        at = 0
        is_set = property(lambda self: first.progress.step == self.at, lambda self, value: None)

    for stop in (3, 6):  # within the second epoch, at the end of the third
        first.stop = Pressed()
        first.stop.at = stop
        with pytest.raises(Interrupted):
            train(first)
        first = open_run(parted, resume=True)
    first.stop = StopRequest()
    train(first)
    ends = [load_checkpoint(run_folder(recipe) / "checkpoints")[0] for recipe in (whole, parted)]
    for key in ("model", "average"):
        assert str(ends[0][key]) == str(ends[1][key])
    for a, b in zip(run.bare.state_dict().values(), first.bare.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    records = [r.regularizer.param_groups[0]["regularizer"] for r in (run, first)]
    assert str(records[0]) == str(records[1])


def test_measures_are_of_all_layers_in_every_epoch(tmp_path):
    """An index of what trains would jump where a stage thaws, and differ from that of the exported model."""
    settings = ["evaluation.wci=true", "measures={take: [frobenius_norms], every: 1}", "train.epochs=2"]
    recipe = small(tmp_path, "index", *settings, "freezing.unfreeze_every=null")
    run = open_run(recipe)
    train_epoch(run)
    names = set(select_layers(create_like(run)))
    assert {key.removeprefix("wci/") for key in epoch_accuracies(run) if key.startswith("wci/")} >= names
    assert not run.bare.backbone.layer4[0].conv1.weight.requires_grad  # put back


def create_like(run):
    model = deepcopy(run.bare)
    for p in model.parameters():
        p.requires_grad_(True)
    return model


@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "nadamw", "adan", "muon", "adafactor"])
def test_no_optimizer_moves_what_has_no_gradient(name):
    model = model_of("resnet")
    optimizer = recipe_from_dict(
        {"optimizer": {"name": name, "lr": 0.1, "weight_decay": 0.5}}
    ).optimizer.build(model)
    freeze(model, Freezing(head_epochs=1).plan(model, 2), 0)
    before = deepcopy(model.state_dict())
    for _ in range(7):
        model(torch.rand(2, 3, 32, 32)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"backbone.fc.weight", "backbone.fc.bias"}


@pytest.mark.parametrize(
    "text",
    [
        {"kind": "cosine", "warmup_epochs": 2, "warmup_fraction": 0.1, "final_fraction": 0.05},
        {"kind": "step", "kwargs": {"decay_epochs": 2, "decay_rate": 0.5}},
        {"kind": "multistep", "kwargs": {"decay_milestones": [2, 5]}},
        {"kind": "poly", "kwargs": {"decay_rate": 0.9}},
        {"kind": "tanh", "warmup_epochs": 1},
        {"kind": "wsd", "warmup_epochs": 1},
    ],
)
@pytest.mark.parametrize("each_step", [False, True])
def test_timm_s_schedules_give_the_rates_of_its_training_script(text, each_step):
    """The loop of timm's train.py: step at the end of an epoch, step_update after an update."""
    ours = TimmSchedule(**text, each_step=each_step)
    settings = dict(text)
    kwargs = settings.pop("kwargs", {})
    optimizer = torch.optim.SGD([{"params": [torch.zeros(1)], "lr_scale": s} for s in (1.0, 0.25)], lr=0.4)
    scheduler, _ = timm.scheduler.create_scheduler_v2(
        optimizer,
        settings["kind"],
        num_epochs=8,
        warmup_epochs=settings.get("warmup_epochs", 0),
        warmup_lr=0.4 * settings.get("warmup_fraction", 0),
        min_lr=0.4 * settings.get("final_fraction", 0),
        step_on_epochs=not each_step,
        updates_per_epoch=3,
        **kwargs,
    )
    number = 0
    for epoch in range(8):
        for _ in range(3):
            rates = [0.4 * scale * ours.factor(number, 3, 8) for scale in (1.0, 0.25)]
            if epoch or number:  # before the first step timm's rate is the peak's where there is no warm-up
                assert [g["lr"] for g in optimizer.param_groups] == pytest.approx(rates, rel=1e-12, abs=1e-15)
            number += 1
            scheduler.step_update(number)
        scheduler.step(epoch + 1)


def test_our_cosine_and_piecewise_are_not_timm_s():
    """Were they, there would be two names for one thing."""
    assert TimmSchedule("cosine", True, 2.0).factor(2, 1, 10) == pytest.approx(
        (1 + math.cos(0.2 * math.pi)) / 2
    )
    assert Cosine(warmup_epochs=2.0).factor(2, 1, 10) == 1
    assert TimmSchedule("multistep", kwargs={"decay_milestones": [3]}).factor(2, 1, 10) == pytest.approx(0.1)
    assert Piecewise((3.0,)).factor(2, 1, 10) == 1


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ({"kind": "step"}, "schedule.kind: "),
        ({"kind": "plateau"}, "schedule.kind: "),
        ({"kind": "cosine", "warmup_fraction": 0.1}, "schedule.warmup_fraction: "),
        ({"kind": "cosine", "kwargs": {"decay_rate": 0.5}}, "schedule.kwargs.decay_rate: "),
        ({"kind": "cosine", "kwargs": {"min_lr": 1e-5}}, "schedule.kwargs: "),
        ({"kind": "cosine", "kwargs": {"cycle_limit": 2}}, "schedule.kwargs: got a schedule of 40 epochs"),
        ({"kind": "cosine", "warmup_epochs": 21}, "schedule.warmup_epochs: "),
    ],
)
def test_a_schedule_that_does_not_do_what_it_says_is_refused(text, key):
    with pytest.raises(ValueError, match=key):
        recipe_from_dict({"schedule": {"name": "timm", **text}})


def test_clipping_is_by_the_norm_of_what_trains(tmp_path):
    """A frozen tensor's old gradient would count; there is none."""
    run = start_run(
        small(tmp_path, "clip", "train.max_norm=0.01", "optimizer={name: sgd, momentum: 0, weight_decay: 0}")
    )
    before = deepcopy(run.bare.state_dict())
    train_epoch(run)
    delta = [(p.detach() - before[n]).norm() for n, p in run.bare.named_parameters()]
    assert 0 < float(torch.stack(delta).norm()) <= 0.1 * 0.01 * run.updates * (1 + 1e-5)
