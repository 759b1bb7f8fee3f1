"""The recipe: what is read, what is refused, and how the refusal reads."""

import warnings
from pathlib import Path

import pytest
from pydantic import ValidationError

from wcitrain.recipe import Recipe, RecipeError, fraction_text, load_recipe, recipe_from_dict


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a YAML file and returns its path."""

    def _write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def lines_of(data: dict | Path, overrides: tuple[str, ...] = ()) -> list[str]:
    """Return the lines of the error that ``data`` must cause."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(data, overrides) if isinstance(data, Path) else recipe_from_dict(data, overrides)
    return str(caught.value).splitlines()


def line_of(data: dict | Path, overrides: tuple[str, ...] = ()) -> str:
    """Return the only line of the error that ``data`` must cause."""
    (line,) = lines_of(data, overrides)
    return line


# Reading -------------------------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_default_recipe(write):
    """A new user's empty file would fail, or defaults would live in a second place."""
    recipe = load_recipe(write(""))
    assert recipe == Recipe() == recipe_from_dict({})
    assert (recipe.threat.eps, recipe.objective.name, recipe.perturbation.name) == (8 / 255, "pgd_at", "none")


def test_the_command_line_beats_the_file_beats_its_base_beats_the_defaults(write):
    """A sweep that sets a key on the command line would silently train with the key of the file."""
    write("base: ../root.yaml\ntrain: {epochs: 3, batch_size: 30, accumulate: 3}\n", "bases/middle.yaml")
    write("train: {epochs: 2, batch_size: 20, max_norm: 2}\nmodel: {mean: [1, 2], std: [1, 2]}\n", "root.yaml")
    path = write("base: bases/middle.yaml\ntrain: {epochs: 4}\nmodel: {mean: [0.5], std: [0.5]}\n")
    recipe = load_recipe(path, ["train.epochs=5", "train.epochs=6"])
    train = recipe.train
    assert (train.epochs, train.batch_size, train.accumulate, train.max_norm) == (6, 30, 3, 2.0)
    assert train.precision == "no"
    assert recipe.model.mean == [0.5], "lists are replaced, not joined"


def test_overrides_are_read_as_yaml():
    """Lists, numbers, null and equals signs on the command line would arrive as text."""
    recipe = recipe_from_dict(
        {"model": {"kwargs": {"kept": 1}, "checkpoint_path": "x"}},
        [
            "model.kwargs.layers=[1,1]",
            "threat.eps=4/255",
            "model.checkpoint_path=null",
            "optimizer.lr=1e-4",
            "model.kwargs.act=a=b",
            "perturbation={name: awp, gamma: 0.5}",
        ],
    )
    assert recipe.model.kwargs == {"kept": 1, "layers": [1, 1], "act": "a=b"}
    assert (recipe.threat.eps, recipe.model.checkpoint_path, recipe.optimizer.lr) == (4 / 255, None, 1e-4)
    assert recipe.perturbation.gamma == 0.5


def test_exponents_without_a_point_are_numbers_everywhere(write):
    """PyYAML reads 1e-8 as text; as an optimizer argument it would reach torch that way."""
    recipe = load_recipe(write("optimizer: {lr: 1e-2, kwargs: {eps: 1e-8, tag: '1e-8'}}\n"))
    assert (recipe.optimizer.lr, recipe.optimizer.kwargs) == (1e-2, {"eps": 1e-8, "tag": "1e-8"})
    assert recipe_from_dict({"optimizer": {"lr": "1e-2"}}).optimizer.lr == 1e-2


def test_the_caller_s_dict_is_left_alone():
    """A notebook that reuses its dict would get other settings the second time."""
    data = {"perturbation": {"name": "awp"}, "model": {"kwargs": {"layers": [1]}}}
    recipe_from_dict(data, ["perturbation.name=wci", "model.kwargs.layers=[2]"])
    assert data == {"perturbation": {"name": "awp"}, "model": {"kwargs": {"layers": [1]}}}


def test_a_recipe_cannot_be_changed():
    """A setting changed after the check and the print-out would be neither checked nor recorded."""
    with pytest.raises(ValidationError, match="frozen"):
        Recipe().train.epochs = 3


@pytest.mark.parametrize(
    ("section", "inherited", "child", "expected"),
    [
        ("perturbation", "name: awp, gamma: 0.1, every: 3", "name: wci", {"every": 1, "relative_size": 1.0}),
        ("perturbation", "name: awp, gamma: 0.1, every: 3", "name: awp, gamma: 0.2", {"every": 3, "gamma": 0.2}),
        ("perturbation", "name: awp, gamma: 0.1, every: 3", "gamma: 0.2", {"name": "awp", "every": 3}),
        ("penalty", "name: wci, radius: 0.1, strength: 3", "name: frobenius", {"strength": 0.0}),
        ("objective", "num_steps: 3", "name: standard", {"name": "standard"}),
        ("objective", "num_steps: 3", "name: pgd_at", {"num_steps": 3}),
        ("schedule", "milestones: [1]", "name: cosine, final_fraction: 0.5", {"final_fraction": 0.5}),
        ("optimizer", "lr: 3, momentum: 0.5", "name: adamw", {"lr": 0.1, "momentum": 0.9}),
        ("optimizer", "lr: 3, momentum: 0.5", "name: sgd", {"lr": 3.0, "momentum": 0.5}),
    ],
)
def test_another_kind_drops_the_inherited_section_and_the_same_kind_keeps_it(
    write, section, inherited, child, expected
):
    """Keys of the old kind would stop the run as unknown; or a kept kind would lose its settings."""
    base = write(f"{section}: {{{inherited}}}\n", "base.yaml")
    path = write(f"base: base.yaml\n{section}: {{{child}}}\n")
    overrides = [f"{section}.{setting.strip().replace(': ', '=')}" for setting in child.split(",")]
    for recipe in (load_recipe(path), load_recipe(base, overrides), load_recipe(base, overrides[::-1])):
        found = getattr(recipe, section).model_dump()
        assert {key: found[key] for key in expected} == expected


# Writing -------------------------------------------------------------------------------------------------------------

CASES = [
    {},
    {"threat": {"eps": 8 / 255}, "objective": {"step_size": 0.007}, "evaluation": {"step_size": "1.5/255"}}
    | {"model": {"kwargs": {"text": "1e-4", "on": "no", "deep": {"list": [1, 1e-9, None]}}, "name": "1e3"}},
    {"threat": {"norm": "l2", "eps": "128/255"}, "name": "1.5", "train": {"precision": False, "ema_decay": 0.999}},
    {"threat": {"norm": "l2", "eps": 2}, "perturbation": {"name": "wci", "strength": 3, "frobenius": True}},
    {"penalty": {"name": "frobenius_trace", "trace_weight": 1e-7}, "schedule": {"name": "one_cycle", "peak_epoch": 3}},
    {"data": {"source": "timm", "root": "naïve: folder", "name": "hfds/x", "in_memory": True}, "output": "null"},
]


@pytest.mark.parametrize("data", CASES)
def test_the_resolved_yaml_gives_an_equal_recipe(write, data):
    """The recipe stored with a run would not repeat the run."""
    recipe = recipe_from_dict(data)
    text = recipe.to_yaml()
    again = load_recipe(write(text))
    assert again == recipe
    assert again.to_yaml() == text


def test_the_resolved_yaml_writes_every_default_and_exact_fractions():
    """A later change of a default would change what an old run's recipe means; 0.031 would pass for 8/255."""
    text = recipe_from_dict({"objective": {"step_size": 0.0078}}).to_yaml()
    assert "  eps: 8/255\n" in text
    assert "  step_size: 0.0078\n" in text
    assert "  crop_padding: 0\n" in text
    assert "base" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(8 / 255, "8/255"), (0.031, 0.031), (0, 0), (1.0, 1.0), (2.0, 2.0), (0.2, "51/255"), (1e300, 1e300)],
)
def test_a_fraction_is_written_only_where_it_is_exact(value, text):
    """A rounded fraction would name another threat model than the one that was trained."""
    assert fraction_text(value) == text


# Wrong files ---------------------------------------------------------------------------------------------------------


def test_a_duplicate_key_names_both_lines(write):
    """YAML would silently keep the last of two values."""
    path = write("train:\n  epochs: 3\n  epochs: 4\nseed: 1\nseed: 2\nmodel: {kwargs: {a: [{b: 1, b: 2}]}}\n")
    lines = lines_of(path)
    assert lines[0] == (
        f"{path}:3: train.epochs: got the key a second time (first: {path}:2); "
        "expected each key once. Delete one of the two."
    )
    assert lines[1].startswith(f"{path}:5: seed: got the key a second time")
    assert lines[2].startswith(f"{path}:6: model.kwargs.a.[].b: got the key a second time")


def test_a_missing_base_names_the_file_that_asked(write):
    """In a chain of three files nobody would know which one to correct."""
    write("seed: 1\nbase: gone.yaml\n", "middle.yaml")
    path = write("base: middle.yaml\n")
    line = line_of(path)
    assert line.startswith(f"{path.parent / 'middle.yaml'}:2: base: got ")
    assert "gone.yaml" in line
    assert "expected a readable YAML file" in line


def test_a_circle_of_bases_is_refused(write):
    """Reading would never end."""
    write("base: recipe.yaml\n", "other.yaml")
    path = write("base: other.yaml\n")
    assert line_of(path).startswith(f"{path.parent / 'other.yaml'}:1: base: got 'recipe.yaml', which leads back to")
    assert "leads back to" in line_of(write("base: ./self.yaml\n", "self.yaml"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epochs: 3\nseed: 1\n", ":2: got text that is not YAML"),
        ("- 1\n", ": got a list; expected sections"),
        ("a: &x {b: *x}\n", "contains itself"),
        ("train: !!python/object:os.system {}\n", ":1: got text that is not YAML"),
        ("base: [a.yaml, b.yaml]\n", ":1: base: got ['a.yaml', 'b.yaml']; expected the path of one file"),
        ("seed: 1\n---\nseed: 2\n", ":2: got text that is not YAML"),
    ],
)
def test_a_file_that_is_no_recipe_says_where_and_why(write, text, expected):
    """The user would see a stack trace of the YAML reader."""
    path = write(text)
    assert line_of(path).startswith(str(path))
    assert expected in line_of(path)


def test_an_unreadable_file_is_a_recipe_error(tmp_path):
    """A typing error in the path would end in a stack trace."""
    assert "No such file" in line_of(tmp_path / "gone.yaml")
    assert "expected a readable YAML file" in line_of(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xfa")
    assert "not UTF-8 text" in line_of(tmp_path / "binary.yaml")


@pytest.mark.parametrize("override", ["train.epochs", "train..epochs=3", "=3", "train.epochs=["])
def test_an_override_that_cannot_be_read_is_shown(override):
    """It would be ignored, and the run would go on without it."""
    line = line_of({}, (override,))
    assert line.startswith("command line: ")
    assert override.split("=")[0] in line


def test_a_text_in_place_of_the_list_of_overrides_is_refused():
    """Each letter would be taken for an override."""
    with pytest.raises(TypeError, match=r"Write \['train.epochs=3'\]"):
        recipe_from_dict({}, "train.epochs=3")


# Unknown keys and kinds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "start", "end"),
    [
        (
            {"optimizer": {"wieght_decay": 1}},
            "optimizer.wieght_decay: got an unknown key",
            "Did you mean weight_decay?",
        ),
        ({"optimizer": {"epochs": 1}}, "optimizer.epochs: got", "It belongs under train."),
        ({"batch_size": 1}, "batch_size: got", "It belongs under train or evaluation."),
        ({"optimiser": {}}, "optimiser: got", "Did you mean optimizer?"),
        ({"epoch": 1}, "epoch: got", "Did you mean epochs under train?"),
        ({"train": {"zzzzzzz": 1}}, "train.zzzzzzz: got", "Remove it."),
        ({"base": "x.yaml"}, "base: got an unknown key", "."),
        (
            {"perturbation": {"name": "wci", "gamma": 1}},
            "perturbation.gamma: got an unknown key; expected one of name, start_epoch, ramp_epochs, every, layers, ",
            "It belongs to perturbation.name awp: set that name, or remove the key.",
        ),
        (
            {"perturbation": {"relative_size": 1}},
            "perturbation.relative_size: got an unknown key; expected one of name. ",
            "It belongs to perturbation.name wci_adversary or wci or noise: set that name, or remove the key.",
        ),
        (
            {"perturbation": {"name": "apw"}},
            "perturbation.name: got \"apw\"; expected one of 'none', 'sam', 'asam', 'awp', 'vasso', 'gsam', 'gradient_norm', "
            "'cr_sam', 'wci_adversary', 'wci', 'noise', 'noise_stability', 'rwp'. ",
            "Did you mean awp?",
        ),
        ({"schedule": {"name": None}}, "schedule.name: got null; expected one of 'constant'", "Choose one of them."),
        (
            {"penalty": "trace"},
            'penalty: got "trace"; expected a mapping',
            "Write penalty: {name: trace}, or leave penalty out.",
        ),
        (
            {"train": None},
            "train: got null; expected a mapping of keys",
            "Write train: {epochs: ...}, or leave train out.",
        ),
        ({"train": {3: 4}}, "train.3: got 3; expected a key that is text", "Put quotes around it."),
    ],
)
def test_an_unknown_key_or_kind_is_refused_with_the_way_out(data, start, end):
    """A misspelt key would silently train with the default."""
    line = line_of(data)
    assert line.startswith(f"recipe: {start}"), line
    assert line.endswith(end), line


# Wrong values --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"train": {"epochs": True}}, "train.epochs: got true; expected a valid integer."),
        ({"train": {"epochs": 3.0}}, "train.epochs: got 3.0; expected a valid integer."),
        ({"train": {"epochs": "3"}}, 'train.epochs: got "3"; expected a valid integer.'),
        ({"train": {"epochs": 0}}, "train.epochs: got 0; expected a number greater than or equal to 1."),
        ({"train": {"compile": 1}}, "train.compile: got 1; expected a valid boolean."),
        ({"optimizer": {"lr": True}}, "optimizer.lr: got true; expected a valid number."),
        ({"optimizer": {"lr": "fast"}}, 'optimizer.lr: got "fast"; expected a valid number.'),
        ({"optimizer": {"lr": float("nan")}}, "optimizer.lr: got NaN; expected a finite number."),
        ({"optimizer": {"lr": "inf"}}, "optimizer.lr: got Infinity; expected a finite number."),
        ({"optimizer": {"momentum": 1}}, "optimizer.momentum: got 1; expected a number less than 1."),
        ({"objective": {"label_smoothing": 1.5}}, "objective.label_smoothing: got 1.5; expected a number less than or"),
        (
            {"penalty": {"name": "wci", "radius": 2}},
            "penalty.radius: got 2; expected a number less than or equal to 1.",
        ),
        ({"schedule": {"milestones": [1, "x"]}}, 'schedule.milestones.1: got "x"; expected a valid number.'),
        ({"schedule": {"gamma": 1}}, "schedule.gamma: got 1; expected a number less than 1."),
        ({"model": {"std": [0.5, 0], "mean": [0, 0]}}, "model.std.1: got 0; expected a number greater than 0."),
        ({"model": {"kwargs": {"x": print}}}, "model.kwargs.x: got "),
        ({"data": {"in_memory": 1}}, "data.in_memory: got 1; expected true, false or 'auto'."),
        ({"data": {"in_memory": "atuo"}}, "data.in_memory: got \"atuo\"; expected true, false or 'auto'."),
        ({"data": {"source": "cifar"}}, "Did you mean cifar10?"),
        ({"name": "a/b"}, 'name: got "a/b"; expected letters, digits'),
        ({"name": ".."}, 'name: got ".."; expected letters, digits'),
        ({"name": "x\n"}, "expected letters, digits"),
        ({"output": ""}, 'output: got ""; expected at least 1 character.'),
        ({"name": 3}, "name: got 3; expected a valid string. Put quotes around it."),
        ({"train": {"precision": "fp16"}}, "'no' or 'bf16'. Differences of gradients overflow in fp16: use bf16."),
        ({"train": {"precision": True}}, "train.precision: got true; expected 'no' or 'bf16'. YAML reads unquoted"),
        ({"train": {"device": "gpu"}}, "train.device: got \"gpu\"; expected 'auto' or 'cpu'."),
    ],
)
def test_a_wrong_value_is_refused_with_its_rule(data, expected):
    """A value of the wrong type or size would be converted or reach the training loop."""
    line = line_of(data)
    assert expected in line


def test_a_wrong_value_comes_with_the_meaning_and_the_default():
    """The user would have to look up what the key means and what it was before."""
    assert line_of({"objective": {"step_size": -1}}) == (
        "recipe: objective.step_size: got -1; expected a number greater than 0. "
        "Length of an attack step in [0, 1] pixel units; null: 2.5 threat.eps / num_steps. Correct it, or leave it out for "
        "the default, null."
    )


@pytest.mark.parametrize("text", ["tracking: {wandb: off}", "tracking: {project: no}", "model: {name: yes}"])
def test_a_truth_value_in_place_of_a_text_is_told_to_be_quoted(write, text):
    """YAML 1.1 turns no, off and yes into truth values, and the message would speak of a false nobody wrote."""
    assert line_of(write(text)).endswith(
        "YAML reads unquoted on, off, yes and no as truth values: put quotes around the text."
    )


def test_the_unquoted_no_is_a_precision(write):
    """The natural way to write the default precision would be refused."""
    assert load_recipe(write("train: {precision: no}")).train.precision == "no"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("8/255", 8 / 255),
        (" 8 / 255", 8 / 255),
        ("1.5/255", 1.5 / 255),
        (0.03, 0.03),
        ("0.03", 0.03),
        ("3e-2", 0.03),
        (1, 1.0),
        ("1/2", 0.5),
    ],
)
def test_a_radius_is_a_fraction_or_a_number(value, expected):
    """The usual way to write a radius would be refused, or differ from 8/255 in the last bit."""
    assert recipe_from_dict({"threat": {"eps": value}}).threat.eps == expected


@pytest.mark.parametrize(
    "value",
    ["nan", "inf", "-inf", "8/0", "-1/255", "8/255/2", "eight", "", float("nan"), float("inf"), -0.1, True, None],
)
def test_a_radius_that_is_no_radius_is_refused(value):
    """Training would go on with an attack that does nothing, or with NaN."""
    line = line_of({"threat": {"eps": value}})
    assert line.startswith("recipe: threat.eps: got ")
    assert "number" in line


def test_a_radius_in_units_of_255_is_refused_with_the_fraction():
    """eps = 8 on [0, 1] images would train on noise."""
    assert line_of({"threat": {"eps": 8}}) == (
        "recipe: threat.eps: got 8; expected at most 1 under linf: pixels lie in [0, 1]. Did you mean 8/255?"
    )
    assert recipe_from_dict({"threat": {"eps": 8, "norm": "l2"}}).threat.eps == 8.0
    assert "expected at most 100 under l2" in line_of({"threat": {"eps": 128, "norm": "l2"}})
    assert line_of({"objective": {"step_size": 2}}).endswith("Did you mean 2/255?")


# Contradictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"data": {"source": "folder"}}, "data.root: got null with source folder; expected a folder."),
        ({"data": {"source": "timm", "root": "x"}}, "data.name: got null with source timm;"),
        ({"data": {"name": "x"}}, "data.name: got 'x' with source digits; expected null."),
        ({"data": {"max_train": 200}}, "data.val_size: got 200; expected fewer than data.max_train = 200."),
        ({"model": {"mean": [0.5]}}, "model.std: got null; expected a list like model.mean. Set both or none."),
        ({"model": {"std": [0.5]}}, "model.mean: got null; expected a list like model.std. Set both or none."),
        ({"model": {"mean": [0, 0], "std": [1]}}, "model.std: got 1 values; expected 2 as in model.mean."),
        ({"threat": {"eps": 0}}, "threat.eps: got 0 with objective.name pgd_at;"),
        (
            {"evaluation": {"step_size": 2}},
            "evaluation.step_size: got 2.0; expected at most twice threat.eps = 8/255",
        ),
        (
            {"threat": {"norm": "l2", "eps": 0.5}, "evaluation": {"step_size": "2/255"}},
            "evaluation.step_size: got 2/255; expected at least threat.eps",
        ),
        ({"data": {"root": "images"}}, "data.root: got a folder with source digits"),
        ({"model": {"kwargs": {"num_classes": 3}}}, "model.kwargs: got num_classes"),
        ({"optimizer": {"kwargs": {"lr": 3.0}}}, "optimizer.kwargs: got lr"),
        ({"optimizer": {"name": "adamw", "nesterov": True}}, "optimizer.nesterov: got true with adamw"),
        (
            {"perturbation": {"name": "awp", "layers": "weights"}, "penalty": {"name": "frobenius", "layers": "all"}},
            "penalty.layers: got 'all'",
        ),
        (
            {"objective": {"step_size": "17/255"}},
            "objective.step_size: got 17/255; expected at most twice threat.eps = 8/255",
        ),
        (
            {"objective": {"num_steps": 3, "step_size": "2/255"}},
            "objective.step_size: got 2/255; expected at least threat.eps = 8/255 over num_steps = 3",
        ),
        (
            {"perturbation": {"name": "wci", "strength": 1, "relative_size": 1}},
            "perturbation.strength: got 1.0 beside relative_size; expected one of them.",
        ),
        (
            {"perturbation": {"name": "wci", "relative_size": None}},
            "perturbation.strength: got null, and null for relative_size; expected exactly one of them.",
        ),
        ({"perturbation": {"name": "awp", "start_epoch": 20}}, "perturbation.start_epoch: got 20; expected less than"),
        ({"penalty": {"name": "trace", "start_epoch": 20}}, "penalty.start_epoch: got 20; expected less than"),
        ({"schedule": {"milestones": [3, 2]}}, "schedule.milestones: got [3.0, 2.0]; expected increasing epochs."),
        ({"schedule": {"milestones": [3, 3]}}, "schedule.milestones: got [3.0, 3.0]; expected increasing epochs."),
        ({"schedule": {"milestones": [3, 20]}}, "expected epochs before train.epochs = 20."),
        ({"schedule": {"name": "cosine", "warmup_epochs": 21}}, "schedule.warmup_epochs: got 21; expected at most"),
        ({"schedule": {"name": "one_cycle", "peak_epoch": 21}}, "schedule.peak_epoch: got 21; expected at most"),
        ({"train": {"accumulate": 3}}, "train.accumulate: got 3; expected a divisor of train.batch_size = 128."),
    ]
    + [
        (
            {"penalty": penalty, "perturbation": {"name": name}},
            f"penalty.name: got {penalty['name']} with perturbation.name {name}; expected at most one of the two: the "
            "penalty is evaluated where the gradient is taken, which must be one point",
        )
        for penalty in ({"name": "wci"}, {"name": "trace"}, {"name": "frobenius_trace", "trace_weight": 1})
        for name in ("gsam", "wci", "noise", "rwp")
    ],
)
def test_settings_that_contradict_each_other_are_refused(data, expected):
    """The run would start and one of the two settings would silently have no effect, or a wrong one."""
    assert expected in line_of(data)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (
            {"perturbation": {"name": "awp"}, "penalty": {"name": "wci", "estimator": "two_point"}},
            "penalty.estimator: got two_point with perturbation.name awp; expected gauss_newton",
        ),
        ({"objective": {"name": "trades"}, "threat": {"eps": 0}}, "threat.eps: got 0 with objective.name trades"),
        (
            {"objective": {"name": "union", "threats": [{"norm": "linf", "eps": 8}, {"norm": "l1", "eps": 12}]}},
            "objective.threats: got linf with eps 8; expected more than 0 and at most 1.",
        ),
        ({"objective": {"name": "free"}, "train": {"accumulate": 2}}, "train.accumulate: got 2 with objective free"),
        (
            {"objective": {"name": "trades", "random_start": False}},
            "objective.random_start: got false with attack_loss kl; expected true",
        ),
        (
            {"threat": {"warmup_epochs": 2}, "objective": {"name": "standard"}},
            "threat.warmup_epochs: got 2 with objective standard",
        ),
        (
            {"perturbation": {"name": "sam"}, "penalty": {"name": "frobenius"}},
            "perturbation.layers: got null with perturbation sam, published for all tensors",
        ),
        ({"threat": {"warmup_epochs": 21}}, "threat.warmup_epochs: got 21; expected at most train.epochs = 20"),
        ({"train": {"swa_start_epoch": 20}}, "train.swa_start_epoch: got 20; expected less than train.epochs = 20"),
        ({"train": {"swa_start_epoch": 5, "ema_decay": 0.9}}, "train.swa_start_epoch: got 5 with train.ema_decay 0.9"),
        ({"train": {"patience": 2}, "evaluation": {"every": 3}}, "train.patience: got 2; expected at least"),
        ({"augment": {"magnitude": 3}}, "augment.magnitude: got values with policy none"),
        ({"augment": {"policy": "cutout"}}, "augment.cutout_size: got null with policy cutout"),
        ({"augment": {"cutout_size": 8}}, "augment.cutout_size: got a setting with policy none"),
        ({"extra": {"fraction": 0.7}}, "extra.path: got null beside other keys"),
        ({"extra": {"path": "x.npz", "labels": "pseudo"}}, "extra.labeler: got None with labels pseudo"),
        ({"extra": {"path": "x.npz", "labeler": "run"}}, "extra.labeler: got 'run' with labels given"),
        ({"label_noise": {"resample": False}}, "label_noise.share: got 0 beside other keys"),
    ],
)
def test_methods_that_contradict_themselves_are_refused(data, expected):
    """A setting that would have no effect, or a run that would train on something else than it says."""
    assert expected in line_of(data)


@pytest.mark.parametrize(
    "data",
    [
        {"data": {"max_train": 200, "val_size": 199}},
        {"data": {"max_train": 100, "val_split": "val", "source": "folder", "root": "x"}},
        {"threat": {"eps": 0}, "objective": {"name": "standard"}},
        {"objective": {"step_size": "16/255"}},
        {"objective": {"step_size": "2/255", "num_steps": 4, "random_start": False}},
        # 11 * (3/255) falls short of 33/255 by its last bit.
        {"threat": {"eps": "33/255"}, "objective": {"step_size": "3/255", "num_steps": 11, "random_start": False}},
        {"perturbation": {"name": "wci", "strength": 1}},
        {"perturbation": {"name": "wci", "strength": None}},
        {"perturbation": {"name": "awp", "start_epoch": 19}},
        {"penalty": {"name": "frobenius_trace"}, "perturbation": {"name": "awp"}},
        {"penalty": {"name": "frobenius"}, "perturbation": {"name": "wci"}},
        {"schedule": {"milestones": [3, 19.5]}},
        {"schedule": {"name": "one_cycle", "peak_epoch": 20}},
    ],
)
def test_settings_on_the_right_side_of_each_rule_are_accepted(data):
    """A rule off by one would refuse a run that makes sense."""
    recipe_from_dict(data)


def test_a_strength_replaces_the_default_relative_size():
    """The user would have to know about, and switch off, a default they never asked for."""
    perturbation = recipe_from_dict({}, ["perturbation.name=wci", "perturbation.strength=2"]).perturbation
    assert (perturbation.strength, perturbation.relative_size) == (2.0, None)


def test_contradictions_are_refused_without_the_loader_too():
    """A recipe built from its classes in a notebook would skip the rules."""
    with pytest.raises(ValidationError, match="expected a divisor"):
        Recipe.model_validate({"train": {"accumulate": 3}})


def test_frobenius_penalty_with_weight_decay_warns():
    """The same tensors would be decayed twice without a word."""
    data = {"penalty": {"name": "frobenius", "strength": 1e-3}}
    with pytest.warns(UserWarning, match=r"optimizer\.weight_decay=0\.0005"):
        recipe_from_dict(data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        recipe_from_dict(data, ["optimizer.weight_decay=0"])
        recipe_from_dict(data, ["penalty.strength=0"])


# The error as a whole ------------------------------------------------------------------------------------------------


def test_one_error_lists_every_problem_with_its_place(write):
    """The user would correct one line, wait, and be told of the next."""
    base = write("train:\n  epochs: 0\n  accumulate: 3\nperturbation: {name: gsam, alpha: -1}\n", "base.yaml")
    path = write(
        "base: base.yaml\nseed: 1\nseed: 2\nthreat:\n  eps: 8\nobjective:\n  num_step: 3\nmodel: {mean: [1]}\n"
    )
    lines = lines_of(path, ("train.epoch=3", "foo", "penalty.name=trace"))
    starts = [
        f"{path}:3: seed: got the key a second time",
        "command line: got 'foo'; expected section.key=value",
        f"{path}:7: objective.num_step: got an unknown key",
        f"{base}:4: perturbation.alpha: got -1",
        f"{base}:2: train.epochs: got 0",
        "command line: train.epoch: got an unknown key",
        f"{path}:8: model.std: got null",
        f"{path}:5: threat.eps: got 8",
        "command line: penalty.name: got trace with perturbation.name gsam",
        f"{base}:3: train.accumulate: got 3",
    ]
    assert len(lines) == len(starts)
    for start, line in zip(starts, lines, strict=True):
        assert line.startswith(start)


@pytest.mark.parametrize(
    "data",
    [
        {"train": {"epochs": 0}, "perturbation": {"name": "awp", "start_epoch": 30}},
        {"threat": {"eps": -1}, "objective": {"step_size": 1}},
        {"perturbation": {"name": "apw"}, "penalty": {"name": "wci"}},
        {"train": 3, "schedule": {"milestones": [30]}},
    ],
)
def test_a_wrong_value_is_not_blamed_for_contradictions(data):
    """The list would tell of conflicts with a default the user never chose."""
    assert len(lines_of(data)) == 1


def test_an_unknown_kind_does_not_hide_contradictions_elsewhere():
    """The user would correct the name and only then be told of the rest."""
    lines = lines_of({"perturbation": {"name": "apw", "gamma": 1}, "train": {"accumulate": 3}})
    assert [line.split(": got")[0] for line in lines] == ["recipe: perturbation.name", "recipe: train.accumulate"]


def test_a_contradiction_with_a_default_names_the_place_of_the_other_key(write):
    """The error would point to the top of the file, where neither key is written."""
    path = write("data:\n  flip: true\n  max_train: 100\n")
    assert line_of(path).startswith(f"{path}:3: data.val_size: got 200; expected fewer than data.max_train = 100.")


def test_a_dropped_section_leaves_no_place_behind(write):
    """An error would point to a line of the base that no longer counts."""
    base = write("perturbation:\n  name: wci\n  every: 2\n", "base.yaml")
    path = write("base: base.yaml\nperturbation:\n  name: awp\n  start_epoch: 50\n")
    assert line_of(path).startswith(f"{path}:4: perturbation.start_epoch")
    assert line_of(base, ("perturbation.name=noise", "perturbation.every=0")).startswith("command line: ")


def test_every_key_has_a_description_and_a_default():
    """A key would be explained nowhere, or its default would live in the code that uses it."""
    sections = [Recipe, *(type(getattr(recipe, name)) for recipe in map(recipe_from_dict, CASES) for name in SECTIONS)]
    for section in sections:
        for name, field in section.model_fields.items():
            assert (field.description or "").endswith("."), (section, name)
            assert not field.is_required(), (section, name)


SECTIONS = [name for name in Recipe.model_fields if name not in ("name", "seed", "output")]
