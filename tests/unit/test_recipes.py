"""Every recipe that ships: methods build and take steps on the bases, sweeps list what exists."""

import re
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from wcitrain.build import fresh_objective, initial_model, wrap
from wcitrain.commands.sweep import read_studies
from wcitrain.models import create_model
from wcitrain.recipe import Recipe, load_recipe, recipe_from_dict
from wcitrain.recipe.loading import CHOICES
from wcitrain.recipe.reading import read_yaml
from wcitrain.sweep import read_sweep, read_sweep_file
from wcitrain.train import threat_factor

FOLDER = Path(__file__).parents[2] / "recipes"
BASES, METHODS = (sorted(p.stem for p in (FOLDER / part).glob("*.yaml")) for part in ("bases", "methods"))
SWEEPS = sorted((FOLDER / "sweeps").glob("*.yaml"))
STACKS = ["trades wci", "mart wci", "awp wci_penalty"]
SHAPES = {"digits": (1, 8), "cifar10": (3, 16)}
# Sized for colour images, and refused on digits.
FOR_COLOUR = {"eps_2": "step_size", "eps_4": "step_size", "l2": "step_size"}
FOR_COLOUR |= {"cutout": "cutout_size"}
STEPS = [("cifar10", one) for one in [*METHODS, *STACKS]]
STEPS += [("digits", one) for one in [*METHODS, *STACKS] if one not in FOR_COLOUR]


def load(base: str, methods: str = "", *settings: str) -> Recipe:
    """Return the recipe of a base with methods laid on it."""
    names = [f"bases/{base}.yaml", *(f"methods/{name}.yaml" for name in methods.split())]
    return load_recipe([FOLDER / name for name in names], settings)


@pytest.mark.parametrize(("base", "methods"), STEPS)
def test_a_method_builds_and_takes_two_steps_on_a_base(base, methods):
    """A recipe nobody runs in the tests rots first. (Full-size networks are narrowed, long attacks cut.)"""
    narrow = ["model.kwargs={width: 4}", "model.checkpoint_path=null"] if base == "cifar10" else []
    recipe = load(base, methods, *narrow)
    channels, size = SHAPES[base]
    recipe.augment.check((channels, 2 * size if base == "cifar10" else size, size))
    model = initial_model(recipe, SimpleNamespace(num_classes=10, in_chans=channels))
    optimizer = wrap(recipe, recipe.optimizer.build(model), model, steps_per_epoch=10)
    objective = fresh_objective(recipe)
    if getattr(objective, "num_steps", 0) > 3:
        objective = replace(objective, num_steps=2)
    x, y = torch.rand(4, channels, size, size), torch.tensor([0, 1, 2, 3])
    if recipe.augment.is_active:
        images = [recipe.augment.apply((255 * image).byte(), number) for number, image in enumerate(x)]
        x = torch.stack(images) / 255
    if recipe.mixing.is_active:
        x, y = recipe.mixing.apply(x, y, 10, seed=0)
    before = model.backbone.fc.weight.detach().clone()
    for step in range(2):
        now = objective.scaled(threat_factor(recipe, (step + 1) / 10))
        x_adv = now.perturb(model, x, y)
        if recipe.threat.norm == "linf" and not methods.startswith("union"):
            assert (x_adv - x).abs().max() <= recipe.threat.eps + 1e-6
        assert torch.isfinite(optimizer.step(partial(now.loss, model, x, x_adv, y)))
        if x_adv.requires_grad:
            now.after_backward(x, x_adv)
    assert not torch.equal(before, model.backbone.fc.weight)


@pytest.mark.parametrize(("method", "key"), FOR_COLOUR.items())
def test_a_method_sized_for_colour_images_is_refused_on_digits(method, key):
    """Its attack would not reach its radius there, or its square would cover the image."""
    with pytest.raises(ValueError, match=key):
        load("digits", method).augment.check((1, 8, 8))


@pytest.mark.parametrize("base", BASES)
def test_every_method_differs_from_its_base_and_is_named_after_both(base):
    """A method that can only be tried on one base, or a file that forgot its method, is of no use."""
    plain = load(base).model_dump()
    names = set()
    for method in METHODS:
        if base == "digits" and FOR_COLOUR.get(method) == "step_size":
            continue
        recipe = load(base, method)
        names.add(recipe.name)
        assert recipe.name == f"{plain['name']}-{method.replace('_', '-')}"
        is_plain = recipe.model_dump() | {"name": plain["name"]} == plain
        assert is_plain == (method == "at" or (base, method) == ("cifar10", "crop_flip")), method
    assert load(base).name == base.replace("_", "-") not in names


@pytest.mark.parametrize("base", ["digits", "cifar10"])
def test_stacked_methods_act_together(base):
    """The second would replace the first, and the table show a combination that was not trained."""
    for methods, label in zip(STACKS, ["TRADES β=6 + WCI r=", "MART λ=5 + WCI r=", "AWP γ="], strict=True):
        both, (first, second) = load(base, methods), (load(base, name) for name in methods.split())
        assert both.name == f"{base}-{methods.replace('_', '-').replace(' ', '-')}"
        assert both.method.startswith(label)
        assert both.objective == first.objective
        assert both.perturbation == (second.perturbation or first.perturbation)
        assert both.penalty == second.penalty
    assert "wci penalty 0.0006" in both.method


def test_what_holds_for_one_base_names_a_base_that_exists():
    """A misspelt name in ``by_base`` would leave the method at the sizes of other images, without a word."""
    names = {load(base).name for base in BASES}
    said = [read_yaml((FOLDER / "methods" / f"{one}.yaml").read_text()).get("by_base", {}) for one in METHODS]
    assert all(set(by_base) <= names for by_base in said)
    assert sum(map(bool, said)) > 10
    bases = ("cifar10_tiny", "cifar10_small", "cifar10")
    recipes = [load(base, "wci_adversary early_stopping") for base in bases]
    assert [recipe.early_stopping.patience for recipe in recipes] == [4, 15, 60]
    assert [recipe.perturbation.relative_size for recipe in recipes] == [0.005, 0.01, 0.01]


TABLES = {key[0]: choice.table for key, (choice, _) in CHOICES.items() if len(key) == 1}
WITHOUT_A_FILE = {"penalty": {"frobenius", "trace", "frobenius_trace"}}
WITHOUT_A_FILE |= {"optimizer": {"adamw"}, "schedule": {"cosine", "timm"}}


@pytest.mark.parametrize("section", TABLES)
def test_every_method_of_a_table_has_a_file_or_is_reached_by_name(section):
    """A method that no recipe names would be there for its own tests alone."""
    written = {load("cifar10", method).model_dump(mode="json")[section]["name"] for method in METHODS}
    assert written - {"none"} == set(TABLES[section]) - WITHOUT_A_FILE.get(section, set())
    for name, kind in TABLES[section].items():
        settings = {"start_epoch": 1} if name == "swa" else {}
        recipe = recipe_from_dict({section: {"name": name, **settings}})
        assert type(getattr(recipe, section)) is kind
        assert recipe.model_dump()[section]["name"] == name
        if not settings:
            assert recipe_from_dict({}, [f"{section}={name}"]) == recipe


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_a_sweep_reads_its_recipes(path):
    """All recipes are checked before the first one trains, and so is what is measured after the last."""
    recipes = read_sweep(path)
    assert len({(recipe.method, recipe.name) for recipe in recipes}) >= 3
    read_studies(read_sweep_file(path).measure, recipes, path.name)
    if path.stem in ("rice", "stutz", "weight_perturbations", "xu_zhang", "yamada"):  # of papers
        full = read_sweep(path, bases=["cifar10"])
        assert [one.name.replace("cifar10-tiny", "cifar10") for one in recipes] == [one.name for one in full]
        assert {one.train.epochs for one in recipes} <= {2, 8}
        assert max(one.train.epochs for one in full) == 200


@pytest.fixture
def sweep(tmp_path):
    """Return a function that writes a sweep beside two bases and two methods, and reads its recipes."""
    files = {
        "bases/one": "name: one\ntrain: {epochs: 3}\n",
        "bases/two": "name: two\ntrain: {epochs: 4}\n",
        "methods/awp": "name: awp\nperturbation: awp\nby_base: {two: {perturbation: {gamma: 0.5}}}\n",
        "methods/swa": "name: swa\naveraging: {name: swa, start_epoch: 1}\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.yaml").write_text(text)
    path = tmp_path / "sweeps" / "s.yaml"
    path.parent.mkdir()

    def read(text: str, *settings: str, **kwargs) -> list[Recipe]:
        path.write_text(text)
        return read_sweep(path, settings, **kwargs)

    return read


def test_a_sweep_is_bases_times_methods_times_settings_times_seeds(sweep):
    """A run would be missing, or be trained with another's settings under its own name."""
    text = "bases: [one, two]\nmethods: [awp, awp swa perturbation.gamma=0.2 name=both]\nseeds: [0, 1]\n"
    with pytest.raises(ValueError, match=r"s\.yaml: got two runs in runs.both-s0; expected one folder each"):
        sweep(text)
    recipes = sweep(text.replace(" name=both", "") + "settings: [train.batch_size=1]", "output=here")
    runs = [("one-awp", 3, 0.01), ("one-awp-swa", 3, 0.2), ("two-awp", 4, 0.5), ("two-awp-swa", 4, 0.2)]
    got = [(recipe.name, recipe.train.epochs, recipe.perturbation.gamma) for recipe in recipes]
    assert (got, [recipe.seed for recipe in recipes]) == (runs * 2, [0] * 4 + [1] * 4)
    assert {(recipe.output, recipe.train.batch_size) for recipe in recipes} == {("here", 1)}
    assert [recipe.averaging is None for recipe in recipes] == [True, False] * 4
    text = "bases: [one]\nmethods: [awp]\ngrid: {threat.eps: [4/255, 8/255], optimizer.lr: [5e-2]}\n"
    assert [(recipe.name, recipe.threat.eps, recipe.optimizer.lr) for recipe in sweep(text)] == [
        ("one-awp-eps_4_255-lr_0.05", 4 / 255, 0.05),
        ("one-awp-eps_8_255-lr_0.05", 8 / 255, 0.05),
    ]
    names = [recipe.name for recipe in sweep(text, bases=["two", "../bases/one.yaml"])]
    assert names[::2] == ["two-awp-eps_4_255-lr_0.05", "one-awp-eps_4_255-lr_0.05"]
    (recipe,) = sweep("""{bases: [one], methods: ["awp 'model.kwargs={layers: [1, 2]}'"]}""")
    assert recipe.model.kwargs["layers"] == [1, 2]  # values with blanks stand in quotes


WRONG_SWEEPS = """
methods: [awp] => Sweep.bases: got nothing; expected a value.
bases: [one], methods: [awp], seed: [1] => Sweep.seed: got [1]; expected a setting it has. It has bases,
awp => A sweep file is described in
bases: [one => got text that is not YAML
bases: [one], methods: [awp], seeds: [a] => Sweep.seeds.0: got 'a'; expected a valid integer.
bases: [one], methods: [awp seed=1] => got seed as a setting; expected seeds,
bases: [one], methods: [awp], grid: {optimizer.lr: 1} => Sweep.grid.optimizer.lr: got 1; expected a valid
bases: [one], methods: [awp], grid: {seed: [1]}, settings: [seed=1] => got seed as a
bases: [one], methods: [awp], methods: [swa] => methods: got the key a second time
bases: [one], methods: [apw] => methods/apw.yaml: got [Errno 2] No such file
bases: [one], methods: [awp train.epoch=3] => command line: train.epoch: got an unknown key
"""


@pytest.mark.parametrize("row", WRONG_SWEEPS.strip().splitlines())
def test_a_wrong_sweep_says_what_is_wrong(sweep, row):
    """Hours later a run would be found missing, or trained with what it was not asked for."""
    text, _, expected = row.partition(" => ")
    with pytest.raises(ValueError, match=re.escape(expected)):
        sweep(f"{{{text}}}")


LABELS = """
=> AT
threat: {norm: l2, eps: 0.5} => AT l2
objective: standard => standard
perturbation: {name: wci, strength: 0.1} => WCI λ=0.1
perturbation: {name: wci, frobenius: true} => WCI r=0.5 +F
penalty: wci => AT
penalty: {name: wci, strength: 0.1} => wci penalty 0.1
objective: trades, perturbation: {name: awp, gamma: 0.005} => TRADES β=6 + AWP γ=0.005
objective: union => AT max of linf, l2
objective: standard, input_regularizer: cure => standard + CURE 4
augment: {policy: cutout, cutout_size: 4}, mixing: {mixup_alpha: 1} => cutout + mixup
objective: {label_smoothing: 0.1}, averaging: ema => label smoothing 0.1 + EMA 0.999
train: {eps_warmup_epochs: 2}, early_stopping: {patience: 3} => eps warm-up + early stopping
"""


def test_labels_say_what_is_trained():
    """Tables and figures are read by their labels."""
    for text, _, label in (row.partition("=> ") for row in LABELS.strip().splitlines()):
        assert recipe_from_dict(read_yaml(f"{{{text}}}")).method == label


def small_model() -> torch.nn.Module:
    """Return a ResNet of four blocks, four channels wide."""
    return create_model("resnet18", num_classes=3, layers=[1, 1, 1, 1], channels=[4, 4, 4, 4])


def test_optimizers_by_name_and_without_decay_on_norms():
    """sgd is torch's SGD (timm's is Nesterov); decay_norm_and_bias=false takes vectors out of the decay."""
    model = small_model()
    sgd = recipe_from_dict({"optimizer": {"decay_norm_and_bias": False}}).optimizer.build(model)
    assert type(sgd) is torch.optim.SGD
    assert not sgd.defaults["nesterov"]
    assert [g["weight_decay"] for g in sgd.param_groups] == [0.0, 5e-4]
    assert all(p.ndim <= 1 for p in sgd.param_groups[0]["params"])
    assert sum(len(g["params"]) for g in sgd.param_groups) == len(list(model.parameters()))
    for name, kind, rate in (("adamw", "AdamW", 1e-3), ("lamb", "Lamb", 0.1)):
        built = recipe_from_dict({"optimizer": name}).optimizer.build(model)
        assert (type(built).__name__, built.defaults["lr"]) == (kind, rate)
    with pytest.raises(ValueError, match=r"second derivatives"):
        recipe_from_dict({"optimizer": "adahessian"}).optimizer.build(model)


def test_what_a_composed_recipe_says_reaches_the_wrapper():
    """Beside a perturbation the penalty's own settings were once dropped without a word."""
    estimator = {"name": "gauss_newton", "num_probes": 2}
    penalty = {"name": "frobenius_trace", "frobenius_weight": 1e-3, "schedule": {"every": 3}}
    both = {"perturbation": {"name": "awp", "gamma": 0.5}, "penalty": penalty | {"estimator": estimator}}
    recipe = recipe_from_dict(both | {"wrapper": {"trace_decay": 0.1, "layers": "weights"}})
    model = small_model()
    optimizer = wrap(recipe, recipe.optimizer.build(model), model, steps_per_epoch=10)
    assert (optimizer.penalty, optimizer.perturbation) == (recipe.penalty, recipe.perturbation)
    assert (optimizer.penalty.frobenius_weight, optimizer.penalty.schedule.every) == (1e-3, 3)
    assert optimizer.penalty.estimator.num_probes == 2
    assert (optimizer.trace_decay, optimizer.steps_per_epoch) == (0.1, 10)
