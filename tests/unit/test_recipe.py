"""The recipe: what is read, what is refused, and how the refusal reads."""

import logging
import math
import warnings
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from wcitrain.attacks import ThreatModel
from wcitrain.method import Choice, fields_of, fraction_text, method
from wcitrain.objectives import PGDAT
from wcitrain.optim import AWP, PERTURBATIONS
from wcitrain.recipe import Recipe, RecipeError, load_recipe, recipe_from_dict
from wcitrain.recipe.reading import read_yaml, to_yaml_text


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a YAML file and returns its path."""

    def _write(text: str, name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return _write


def lines_of(data: dict | Path | list[Path], overrides: tuple[str, ...] = ()) -> list[str]:
    """Return the lines of the error that ``data`` must cause."""
    with pytest.raises(RecipeError) as caught:
        recipe_from_dict(data, overrides) if isinstance(data, dict) else load_recipe(data, overrides)
    return str(caught.value).splitlines()


def line_of(data: dict | Path | list[Path], overrides: tuple[str, ...] = ()) -> str:
    """Return the only line of the error that ``data`` must cause."""
    (line,) = lines_of(data, overrides)
    return line


# Reading --------------------------------------------------------------------------------------------------


def test_an_empty_file_is_the_default_recipe(write):
    """A new user's empty file would fail, or defaults would live in a second place."""
    recipe = load_recipe(write(""))
    assert recipe == Recipe() == recipe_from_dict({})
    assert (recipe.threat.eps, recipe.objective, recipe.perturbation) == (8 / 255, PGDAT(), None)


def test_the_command_line_beats_the_file_beats_its_base_beats_the_defaults(write):
    """A sweep that sets a key on the command line would silently train with the key of the file."""
    write("base: ../root.yaml\ntrain: {epochs: 3, batch_size: 30, accumulate: 3}\n", "bases/middle.yaml")
    write(
        "train: {epochs: 2, batch_size: 20, max_norm: 2}\nmodel: {mean: [1, 2], std: [1, 2]}\n", "root.yaml"
    )
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
    """YAML 1.1 reads 1e-8 as text; as an optimizer argument it would reach torch that way."""
    recipe = load_recipe(write("optimizer: {lr: 1e-2, kwargs: {eps: 1e-8, tag: '1e-8'}}\n"))
    assert (recipe.optimizer.lr, recipe.optimizer.kwargs) == (1e-2, {"eps": 1e-8, "tag": "1e-8"})
    assert line_of({"optimizer": {"lr": "1e-2"}}).startswith(
        'recipe: optimizer.lr: got "1e-2"; expected a valid number.'
    )


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
    ("section", "below", "above", "expected"),
    [
        (
            "perturbation",
            "name: awp, gamma: 0.1, schedule: {every: 3}",
            "name: wci",
            "name: wci, schedule: {every: 3}",
        ),
        (
            "perturbation",
            "name: awp, gamma: 0.1",
            "name: awp, schedule: {every: 3}",
            "name: awp, gamma: 0.1, schedule: {every: 3}",
        ),
        ("perturbation", "name: awp, gamma: 0.1", "gamma: 0.2", "name: awp, gamma: 0.2"),
        ("perturbation", "name: awp, gamma: 0.1", "name: none", "name: none"),
        ("perturbation", "name: sam, rho: 0.1", "name: asam", "name: asam, rho: 0.1"),
        (
            "penalty",
            "name: wci, strength: 3",
            "estimator: {name: two_point}",
            "name: wci, strength: 3, estimator: two_point",
        ),
        (
            "penalty",
            "name: wci, estimator: {name: two_point, radius: 0.1}",
            "name: trace",
            "name: trace, estimator: {name: two_point, radius: 0.1}",
        ),
        (
            "penalty",
            "name: wci, estimator: {name: two_point, radius: 0.1, num_probes: 2}",
            "estimator: gauss_newton",
            "name: wci, estimator: {name: gauss_newton, num_probes: 2}",
        ),
        (
            "penalty",
            "name: wci, estimator: two_point",
            "estimator: {radius: 0.1}",
            "name: wci, estimator: {name: two_point, radius: 0.1}",
        ),
        (
            "penalty",
            "name: wci, strength: 3, estimator: two_point",
            "name: frobenius",
            "name: frobenius, strength: 3",
        ),
        ("objective", "num_steps: 3, attack_bn: train", "name: standard", "name: standard"),
        (
            "objective",
            "num_steps: 3, attack_bn: train",
            "name: trades",
            "name: trades, num_steps: 3, attack_bn: train",
        ),
        ("objective", "num_steps: 3", "name: pgd_at", "num_steps: 3"),
        (
            "schedule",
            "milestones: [1], warmup_epochs: 2",
            "name: cosine, final_fraction: 0.5",
            "name: cosine, final_fraction: 0.5, warmup_epochs: 2",
        ),
        ("optimizer", "lr: 1e-4, momentum: 0.5", "name: adamw", "name: adamw, lr: 1e-4"),
        ("optimizer", "lr: 1e-4, momentum: 0.5", "name: lamb", "name: lamb, lr: 1e-4, momentum: 0.5"),
        ("optimizer", "lr: 3, momentum: 0.5", "name: sgd", "lr: 3, momentum: 0.5"),
    ],
)
@pytest.mark.filterwarnings("ignore:penalty.name. got frobenius")
def test_another_kind_keeps_the_settings_it_shares_and_drops_the_rest(write, section, below, above, expected):
    """A rate of 1e-4 would turn into a default of 0.1, or keys of the old kind stop the run as unknown."""
    base = write(f"{section}: {{{below}}}\n", "base.yaml")
    path = write(f"{section}: {{{above}}}\n", "above.yaml")
    changes = read_yaml(f"{{{above}}}")
    overrides = [f"{section}.{key}={to_yaml_text({'x': value})[3:]}" for key, value in changes.items()]
    based = write(f"base: base.yaml\n{section}: {{{above}}}\n")
    wanted = recipe_from_dict(read_yaml(f"{section}: {{{expected}}}"))
    assert load_recipe([base, path]) == load_recipe(based) == wanted
    assert load_recipe(base, overrides) == load_recipe(base, overrides[::-1]) == wanted


def test_what_a_changed_name_on_the_command_line_keeps_and_drops_is_said(caplog, write):
    """``optimizer.name=adamw`` on a file's SGD: nobody would know which of its settings still hold.

    A file says so itself.
    """
    base = write(
        "optimizer: {lr: 1e-4, momentum: 0.5}\n"
        "penalty: {name: wci, estimator: {name: two_point, radius: 0.1}}\n"
    )
    with caplog.at_level(logging.INFO, "wcitrain.recipe"):
        load_recipe([base, write("optimizer: {name: adamw}\npenalty: {estimator: auto}\n", "above.yaml")])
        load_recipe(base, ["optimizer.momentum=0.1", "optimizer.name=sgd", "schedule.name=cosine"])
        assert caplog.messages == []
        load_recipe(base, ["optimizer.name=adamw", "optimizer.weight_decay=0", "penalty.estimator=auto"])
        load_recipe(base, ["optimizer.name=lamb", "optimizer.lr=0.1"])
    assert caplog.messages == [
        "penalty.estimator.name: two_point became auto; dropped, as auto has no such key: radius=0.1; "
        "at the default: num_probes",
        "optimizer.name: sgd became adamw; kept: lr=0.0001; dropped, as adamw has no such key: momentum=0.5; "
        "at the default: decay_norm_and_bias, kwargs",
        "optimizer.name: sgd became lamb; kept: momentum=0.5; at the default: "
        "weight_decay, decay_norm_and_bias, kwargs",
    ]


@pytest.mark.parametrize("order", [1, -1])
def test_a_name_alone_and_its_settings_go_together_on_the_command_line(write, order):
    """``perturbation=noise perturbation.relative_size=0.5`` would train the file's rule, at noise's size."""
    base = write("perturbation: {name: wci, relative_size: 0.2}\n")
    overrides = ["perturbation=noise", "perturbation.relative_size=0.5"][::order]
    assert load_recipe(base, overrides) == recipe_from_dict(
        {"perturbation": {"name": "noise", "relative_size": 0.5}}
    )


def test_a_method_is_given_by_name_as_a_mapping_or_as_an_object():
    """A notebook has the object at hand, a file its name."""
    by_name, as_mapping, as_object = (
        recipe_from_dict({"perturbation": one}) for one in ("awp", {"name": "awp"}, AWP())
    )
    assert by_name == as_mapping == as_object
    assert by_name.perturbation == Recipe(perturbation=AWP()).perturbation == AWP(0.01)
    assert recipe_from_dict({"perturbation": None}) == recipe_from_dict({"perturbation": "none"}) == Recipe()


# Files on one another -------------------------------------------------------------------------------------


def test_files_are_laid_on_one_another_and_name_the_run_together(write):
    """A method on a base would be trained into the base's folder, or the base's settings would win."""
    write("name: root\ntrain: {epochs: 2, batch_size: 20}\n", "root.yaml")
    base = write("base: root.yaml\nname: small\ntrain: {epochs: 3}\n", "base.yaml")
    method = write("name: wci\nperturbation: wci\ntrain: {epochs: 4}\n", "method.yaml")
    nameless = write("penalty: frobenius\n", "nameless.yaml")
    recipe = load_recipe([base, method, str(nameless)])
    assert (recipe.name, recipe.train.epochs, recipe.train.batch_size) == ("small-wci", 4, 20)
    assert recipe.method == "WCI r=1"
    assert recipe.penalty is not None
    assert load_recipe([method, base]).train.epochs == 3
    assert load_recipe([base, method], ["name=mine"]).name == "mine"
    names = [load_recipe(one).name for one in (base, [base], [base, nameless], [nameless])]
    assert names == ["small", "small", "small", "run"]
    assert load_recipe([]) == Recipe()


def test_a_method_file_says_what_holds_for_one_base_alone(write):
    """A size for small images would be trained on full ones, or a base get the settings of its own base."""
    write("name: small\n", "small.yaml")
    tiny = write("base: small.yaml\nname: tiny\n", "tiny.yaml")
    write("name: first\nby_base: {tiny: {train: {epochs: 5, batch_size: 7}}}\n", "first.yaml")
    method = write(
        "base: first.yaml\nname: method\ntrain: {epochs: 3}\nby_base:\n"
        "  tiny: {seed: 1}\n  small: {seed: 2, train: {accumulate: 7}}\n  first: {output: x}\n"
        "  other: {seed: 3}\n",
        "method.yaml",
    )
    recipe = load_recipe([tiny, method])
    assert (recipe.name, recipe.seed, recipe.output) == ("tiny-method", 1, "x")
    assert (recipe.train.epochs, recipe.train.batch_size, recipe.train.accumulate) == (3, 7, 7)
    assert load_recipe([tiny, method], ["seed=9"]).seed == 9
    assert load_recipe([write("name: other\n", "other.yaml"), method]).seed == 3
    assert load_recipe(method).seed == 0


def test_an_error_in_what_holds_for_one_base_names_its_line(write):
    """The user would look for the value in the method's own section."""
    base = write("name: small\n", "small.yaml")
    method = write(
        "train: {epochs: 3}\nby_base:\n  small:\n    train:\n      epochs: 0\n  big: {seed: -1}\n",
        "method.yaml",
    )
    assert line_of([base, method]).startswith(f"{method}:5: train.epochs: got 0")


@pytest.mark.parametrize(
    ("setting", "advice"),
    [
        ("threat.warmup_epochs=1", "Did you mean eps_warmup_epochs under train?"),
        ("train.ema_decay=0.9", "Did you mean decay under averaging?"),
        ("train.swa_start_epoch=1", "Did you mean start_epoch under averaging?"),
        ("train.patience=3", "It belongs under early_stopping."),
        ("penalty={name: wci, num_probes: 2}", "It belongs under penalty.estimator."),
        ("penalty={name: wci, radius: 0.1}", "It belongs under penalty.estimator."),
        ("penalty={name: wci, gradient: autograd}", "It belongs under penalty.estimator."),
        ("penalty={name: wci, split_qkv: true}", "It belongs under wrapper."),
        ("perturbation={name: wci, layers: all}", "It belongs under wrapper."),
        ("perturbation={name: wci, trace_decay: 0.5}", "It belongs under wrapper."),
        ("perturbation={name: awp, every: 2}", "It belongs under perturbation.schedule."),
        ("perturbation={name: awp, ramp_epochs: 2}", "Did you mean ramp under perturbation.schedule?"),
        ("perturbation={name: awp, start_epoch: 2}", "Did you mean start under perturbation.schedule?"),
        ("optimizer={name: adamw, momentum: 0.9}", "It belongs to optimizer.name sgd"),
    ],
)
def test_a_key_of_the_first_build_leads_to_its_new_place(setting, advice):
    """CHANGELOG lists them; nobody who ran the first build should have to read it."""
    assert advice in line_of({}, (setting,))


def test_what_by_base_cannot_do_is_said(write, caplog):
    """A misspelt base, a number for a name or a run's name there would have no effect, without a word."""
    base = write("name: digits\n", "base.yaml")
    misspelt = write("name: m\nby_base: {digit: {seed: 3}, cifar10: {seed: 4}}\n", "method.yaml")
    assert load_recipe([base, misspelt]).seed == 0
    assert "nothing is said for digits, which lies below; is digit meant?" in caplog.text
    write("name: m\nby_base: {1: {seed: 3}}\n", "method.yaml")
    assert "expected sections for each base" in line_of([base, misspelt])
    write("name: m\nby_base: {digits: {name: special}}\n", "method.yaml")
    assert "got a name; expected other keys" in line_of([base, misspelt])
    write("name: 3\n", "base.yaml")
    assert line_of([base, write("name: m\n", "method.yaml")]).startswith("the files' names: name: got 3")


def test_null_and_empty_mappings_take_away_what_was_there():
    """Else a model's arguments could not be cleared, and a null before another setting would be lost."""
    below = {"perturbation": {"name": "awp"}, "model": {"kwargs": {"layers": [1]}}}
    recipe = recipe_from_dict(below, ["model.kwargs={}", "perturbation=null"])
    assert recipe.model.kwargs == {}
    assert recipe.perturbation is None
    assert "got an unknown key" in line_of(below, ("perturbation=null", "perturbation.gamma=0.3"))
    own = {"optimizer": {"name": "lion", "lr": 0.1, "kwargs": {"betas": [0.9, 0.99]}}}
    assert recipe_from_dict(own, ["optimizer.name=adamw"]).optimizer.kwargs == {}


def test_an_objective_with_another_threat_is_refused():
    """The recipe's threat would take its place without a word."""
    with pytest.raises(RecipeError, match=r"objective.threat: got l2 0.5.*Set threat"):
        recipe_from_dict({"objective": PGDAT(ThreatModel("l2", 0.5))})
    threat = {"norm": "l2", "eps": 0.5}
    recipe = recipe_from_dict({"objective": PGDAT(ThreatModel("l2", 0.5)), "threat": threat})
    assert recipe.objective.threat == recipe.threat


def test_a_class_that_no_name_stands_for_is_refused():
    """It would be written without a name, and could not be read again."""

    @method
    class Mine(AWP):
        pass

    assert "expected a mapping with a name" in line_of({"perturbation": Mine(0.02)})


@pytest.mark.parametrize("value", ["!!bool foo", '!!float ""', "!!timestamp foo"])
def test_a_tag_that_does_not_fit_is_no_traceback(value, write):
    """PyYAML raises errors of its own there, without a line."""
    assert "expected a YAML value" in line_of({}, (f"train.epochs={value}",))
    assert "not YAML" in line_of(write(f"train: {{epochs: {value}}}\n"))


def test_an_item_of_a_list_is_found_on_its_own_line(write):
    """The list may begin far above."""
    text = "objective:\n  name: union\n  threats:\n    - {norm: linf, eps: 0.1}\n    - {norm: l2, eps: -1}\n"
    assert line_of(write(text)).split(": ")[0].endswith(":5")


@pytest.mark.parametrize("by_base", ["3", "null", "[small]", "{small: null}", "{small: {seed: 1}, big: 3}"])
def test_sections_for_bases_of_another_shape_are_refused_beside_other_problems(write, by_base):
    """A base's settings would be left out without a word."""
    base = write("name: small\n", "small.yaml")
    method = write(f"seed: -1\nby_base: {by_base}\n", "method.yaml")
    lines = lines_of([base, method])
    assert lines[0].startswith(f"{method}:2: by_base: got ")
    assert lines[0].endswith("expected sections for each base. Write by_base: {NAME: {...}}.")
    assert [line.split(": got")[0] for line in lines[1:]] == [f"{method}:1: seed"]


# Scalars: YAML 1.2 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[(text, text) for text in ("1:30", "1_000", "no", "off", "yes", "On", "y")],
        *[(text, text) for text in ("2024-01-01", "0b1", "1e", "=", "0o9")],
        *[("010", 10), ("0o10", 8), ("0x1F", 31), ("-0", 0), ("+3", 3), ("007", 7)],
        *[("1e-4", 1e-4), ("1E3", 1e3)],
        *[("-1.5e+3", -1500.0), (".5", 0.5), ("5.", 5.0), (".inf", math.inf), ("-.INF", -math.inf)],
        *[("~", None), ("", None), ("NULL", None), ("true", True), ("False", False)],
        *[("'no'", "no"), ("'010'", "010")],
        *[("8/255", "8/255"), ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}), ("!!str 3", "3")],
    ],
)  # fmt: skip
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    """1:30 would be ninety, 010 eight, no false, 1_000 a thousand, 1e-4 a text."""
    read = read_yaml(text)
    assert (read, type(read)) == (value, type(value))


def test_words_of_yaml_1_1_are_texts_in_a_recipe(write):
    """``precision: no`` would be refused for a false that nobody wrote."""
    recipe = load_recipe(
        write("train: {precision: no}\ntracking: {project: off}\nmodel: {name: yes}\nseed: 010\n")
    )
    assert (recipe.train.precision, recipe.tracking.project, recipe.model.name) == ("no", "off", "yes")
    assert recipe.seed == 10
    assert recipe_from_dict({}, ["train.precision=no", "output=1:30"]).output == "1:30"
    assert line_of({}, ("train.epochs=1_000",)).startswith(
        'command line: train.epochs: got "1_000"; expected a valid integer.'
    )


WORDS = ["no", "1:30", "010", "0o7", "1_000", "1e5", "2024-01-01", "~", "<<", "=", "1.", ".inf", "0x", " "]
NUMBERS = [st.integers(), st.floats(allow_nan=False)]
SCALARS = [st.none(), st.booleans(), *NUMBERS, st.text(), st.sampled_from([*WORDS, "a: b"])]


def _nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)


@given(st.dictionaries(st.text(), st.recursive(st.one_of(SCALARS), _nested, max_leaves=8), max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_written_reads_as_what_it_was(data):
    """A stored recipe would repeat another run: a text "010" read back as ten, 1e5 as a text."""
    text = to_yaml_text(data)
    assert _typed(read_yaml(text)) == _typed(data)


def _typed(value):
    """Return ``value`` with its types, as True == 1 == 1.0."""
    if isinstance(value, dict):
        return {key: _typed(one) for key, one in value.items()}
    return [_typed(one) for one in value] if isinstance(value, list) else (type(value), value)


# Writing --------------------------------------------------------------------------------------------------

CASES = [
    {},
    {"threat": {"eps": 8 / 255}, "objective": {"step_size": 0.007}, "evaluation": {"step_size": "1.5/255"}}
    | {"model": {"kwargs": {"text": "1e-4", "on": "no", "deep": {"list": [1, 1e-9, None]}}, "name": "1e3"}},
    {
        "threat": {"norm": "l2", "eps": "128/255"},
        "name": "1.5",
        "train": {"precision": "no"},
        "averaging": {"name": "ema", "decay": 0.99},
        "optimizer": {"name": "lamb", "lr": 1e-9, "kwargs": {"betas": [0.9, 1e-1]}},
    },
    {
        "threat": {"norm": "l2", "eps": 2},
        "perturbation": {
            "name": "wci",
            "strength": 3,
            "frobenius": True,
            "schedule": {"start": 1, "every": 3},
        },
        "averaging": {"name": "swa", "start_epoch": 3},
        "wrapper": {"trace_decay": 0.5, "layers": "*.weight"},
    },
    {
        "penalty": {
            "name": "frobenius_trace",
            "trace_weight": 1e-7,
            "estimator": {"name": "two_point", "radius": 0.1},
        },
        "schedule": {"name": "one_cycle", "peak_epoch": 3},
        "objective": {
            "name": "union",
            "threats": [{"norm": "l1", "eps": 12}, {"norm": "linf", "eps": "3/255"}],
        },
        "input_regularizer": {"name": "cure", "h": 2},
    },
    {
        "data": {"source": "timm", "root": "naïve: folder", "name": "hfds/x", "in_memory": True},
        "output": "null",
    },
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


# Wrong files ----------------------------------------------------------------------------------------------


def test_a_duplicate_key_names_both_lines(write):
    """YAML would silently keep the last of two values."""
    path = write("train:\n  epochs: 3\n  epochs: 4\nseed: 1\nseed: 2\nmodel: {kwargs: {a: [{b: 1, b: 2}]}}\n")
    lines = lines_of(path)
    assert lines[0] == (
        f"{path}:3: train.epochs: got the key a second time (first: {path}:2); "
        "expected each key once. Delete one of the two."
    )
    assert lines[1].startswith(f"{path}:5: seed: got the key a second time")
    assert lines[2].startswith(f"{path}:6: model.kwargs.a.0.b: got the key a second time")


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
    assert line_of(path).startswith(
        f"{path.parent / 'other.yaml'}:1: base: got 'recipe.yaml', which leads back to"
    )
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


# Unknown keys and kinds -----------------------------------------------------------------------------------


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
        ({"eps": 1}, "eps: got", "It belongs under threat."),
        ({"optimiser": {}}, "optimiser: got", "Did you mean optimizer?"),
        ({"epoch": 1}, "epoch: got", "Did you mean epochs under train?"),
        ({"train": {"zzzzzzz": 1}}, "train.zzzzzzz: got", "Remove it."),
        ({"base": "x.yaml"}, "base: got an unknown key", "."),
        (
            {"perturbation": {"name": "wci", "gamma": 1}},
            "perturbation.gamma: got an unknown key; expected one of name, relative_size, strength, ",
            "It belongs to perturbation.name awp: set that name, or remove the key.",
        ),
        (
            {"perturbation": {"relative_size": 1}},
            "perturbation.relative_size: got an unknown key; expected one of name. ",
            "belongs to perturbation.name wci_adversary or wci or noise: set that name, or remove the key.",
        ),
        (
            {"perturbation": {"name": "apw"}},
            f'perturbation.name: got "apw"; expected one of none, {", ".join(PERTURBATIONS)}. ',
            "Did you mean awp?",
        ),
        (
            {"perturbation": "apw"},
            'perturbation.name: got "apw"; expected one of none, s',
            "Did you mean awp?",
        ),
        ({"objective": "none"}, 'objective.name: got "none"; expected one of standard, pgd_at,', "?"),
        (
            {"optimizer": {"name": 3}},
            "optimizer.name: got 3; expected one of sgd, adamw, a name for Timm",
            "them.",
        ),
        (
            {"optimizer": "adamww"},
            "optimizer.name: got 'adamww'; expected sgd",
            "Did you mean adamw or radamw or nadamw?",
        ),
        ({"optimizer": {"name": "lamb", "nesterov": True}}, "optimizer.nesterov: got", "or remove the key."),
        (
            {"train": {"seed": 1}},
            "train.seed: got an unknown key",
            "It belongs at the top of the recipe, in no section.",
        ),
        (
            {"objective": {"threat": {"eps": 1}}},
            "objective.threat: got",
            "It belongs at the top of the recipe, in no section.",
        ),
        # Keys inside a method's own parts.
        (
            {"penalty": {"name": "wci", "estimator": {"name": "gauss_newton", "radius": 0.1}}},
            "penalty.estimator.radius: got an unknown key; expected one of name, num_probes. ",
            "It belongs to penalty.estimator.name hutchinson or two_point: set that name, or remove the key.",
        ),
        (
            {"penalty": {"name": "wci", "estimator": {"radius": 0.1}}},
            "penalty.estimator.radius: got an unknown key; expected one of name, num_probes. ",
            "It belongs to penalty.estimator.name hutchinson or two_point: set that name, or remove the key.",
        ),
        (
            {"penalty": {"name": "wci", "estimator": {"name": "two_point", "radiu": 0.1}}},
            "penalty.estimator.radiu: got an unknown key; expected one of name, num_probes, radius. ",
            "Did you mean radius?",
        ),
        (
            {"penalty": {"name": "wci", "estimator": "two_pint"}},
            'penalty.estimator.name: got "two_pint"; expected one of auto, gauss_newton, ',
            "Did you mean two_point?",
        ),
        (
            {"perturbation": {"name": "awp", "schedule": {"strat": 1}}},
            "perturbation.schedule.strat: got an unknown key; expected one of start, ramp, every. ",
            "Did you mean start?",
        ),
        (
            {"perturbation": {"name": "awp", "schedule": {"start_epoch": 1}}},
            "perturbation.schedule.start_epoch: got an unknown key",
            "Did you mean start?",
        ),
        (
            {
                "objective": {
                    "name": "union",
                    "threats": [{"norm": "l2", "eps": 1}, {"norm": "l1", "eps": 1, "step_sise": 1}],
                }
            },
            "objective.threats.1.step_sise: got an unknown key; expected one of norm, eps, step_size. ",
            "Did you mean step_size?",
        ),
        # Keys that stood elsewhere, or that users look for elsewhere.
        *[
            ({section: {"name": name, key: 1}}, f"{section}.{key}: got an unknown key", end)
            for section, name, key, end in [
                ("perturbation", "awp", "every", "It belongs under perturbation.schedule."),
                ("perturbation", "awp", "start_epoch", "Did you mean start under perturbation.schedule?"),
                ("penalty", "wci", "ramp_epochs", "Did you mean ramp under penalty.schedule?"),
                ("perturbation", "awp", "layers", "It belongs under wrapper."),
                ("penalty", "wci", "split_qkv", "It belongs under wrapper."),
                ("penalty", "wci", "trace_decay", "It belongs under wrapper."),
                ("penalty", "wci", "radius", "It belongs under penalty.estimator."),
                ("penalty", "trace", "num_probes", "It belongs under penalty.estimator."),
                ("penalty", "trace", "gradient", "It belongs under penalty.estimator."),
            ]
        ],
        (
            {"schedule": {"name": None}},
            "schedule.name: got null; expected one of constant",
            "Choose one of them.",
        ),
        (
            {"penalty": 3},
            "penalty: got 3; expected a mapping with a name. ",
            "Write penalty: {name: ...}, or leave penalty out.",
        ),
        (
            {"penalty": {"name": "wci", "estimator": None}},
            "penalty.estimator: got null; expected a mapping with a name. ",
            "Write estimator: {name: ...}, or leave estimator out.",
        ),
        (
            {"perturbation": {"name": "awp", "schedule": "late"}},
            'perturbation.schedule: got "late"; expected a mapping of keys. ',
            "Write schedule: {start: ...}, or leave schedule out.",
        ),
        (
            {"augment": "cutout"},
            'augment: got "cutout"; expected a mapping of keys. ',
            "Write augment: {policy: ...}, or leave augment out.",
        ),
        (
            {"objective": None},
            "objective: got null; expected a mapping with a name. ",
            "Write objective: {name: ...}, or leave objective out.",
        ),
        (
            {"train": None},
            "train: got null; expected a mapping of keys",
            "Write train: {epochs: ...}, or leave train out.",
        ),
        ({"train": {3: 4}}, "train.3: got 3; expected a key that is text", "Put quotes around it."),
        (
            {"perturbation": {"name": "awp", 3: 4}},
            "perturbation.3: got 3; expected a key that is text",
            "it.",
        ),
    ],
)
def test_an_unknown_key_or_kind_is_refused_with_the_way_out(data, start, end):
    """A misspelt key would silently train with the default."""
    line = line_of(data)
    assert line.startswith(f"recipe: {start}"), line
    assert line.endswith(end), line


# Wrong values ---------------------------------------------------------------------------------------------


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
        ({"optimizer": {"lr": math.nan}}, "optimizer.lr: got NaN; expected a finite number."),
        ({"optimizer": {"lr": math.inf}}, "optimizer.lr: got Infinity; expected a finite number."),
        ({"optimizer": {"momentum": 1}}, "optimizer.momentum: got 1; expected a number less than 1."),
        (
            {"objective": {"label_smoothing": 1.5}},
            "objective.label_smoothing: got 1.5; expected a number less than or",
        ),
        (
            {"penalty": {"name": "wci", "estimator": {"name": "two_point", "radius": 2}}},
            "estimator.radius: got 2; expected a number less than or equal to 1. Norm of the direction "
            "over that of the weights, in (0, 1]. Correct it, or leave it out for the default, 0.01.",
        ),
        (
            {"perturbation": {"name": "awp", "schedule": {"start": -1}}},
            "perturbation.schedule.start: got -1; expected a number greater than or equal to 0. Epochs",
        ),
        (
            {"averaging": "swa"},
            "averaging.start_epoch: got nothing; expected a value. Epochs before the first sample; then one "
            "sample an epoch. Set it.",
        ),
        ({"optimizer": ""}, 'optimizer.name: got ""; expected at least 1 character. Name for timm'),
        (
            {"objective": {"name": "union", "threats": [{"norm": "l2"}, {"norm": "l1", "eps": 2}]}},
            "objective.threats.0.eps: got nothing; expected a value. Radius of the ball",
        ),
        (
            {
                "objective": {
                    "name": "union",
                    "threats": [{"norm": "l2", "eps": 1}, {"norm": "l1", "eps": -2}],
                }
            },
            "objective.threats.1.eps: got -2; expected a number greater than or equal to 0. Radius of the "
            "ball in [0, 1] pixel units. Correct it.",
        ),
        (
            {"schedule": {"milestones": 3}},
            "schedule.milestones: got 3; expected a list. Epochs after which the rate drops.",
        ),
        ({"schedule": {"milestones": [1, "x"]}}, 'schedule.milestones.1: got "x"; expected a valid number.'),
        ({"schedule": {"gamma": 1}}, "schedule.gamma: got 1; expected a number less than 1."),
        (
            {"model": {"std": [0.5, 0], "mean": [0, 0]}},
            "model.std.1: got 0; expected a number greater than 0.",
        ),
        ({"model": {"kwargs": {"x": print}}}, "model.kwargs.x: got "),
        ({"data": {"in_memory": 1}}, "data.in_memory: got 1; expected true, false or 'auto'."),
        ({"data": {"in_memory": "atuo"}}, "data.in_memory: got \"atuo\"; expected true, false or 'auto'."),
        ({"data": {"source": "cifar"}}, "Did you mean cifar10?"),
        ({"name": "a/b"}, 'name: got "a/b"; expected letters, digits'),
        ({"name": ".."}, 'name: got ".."; expected letters, digits'),
        ({"name": "x\n"}, "expected letters, digits"),
        ({"output": ""}, 'output: got ""; expected at least 1 character.'),
        ({"name": 3}, "name: got 3; expected a valid string. Put quotes around it."),
        (
            {"train": {"precision": "fp16"}},
            "train.precision: got \"fp16\"; expected 'no' or 'bf16'. Did you mean bf16?",
        ),
        (
            {"train": {"precision": True}},
            "train.precision: got true; expected 'no' or 'bf16'. Choose one of them.",
        ),
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
        "Length of an attack step in [0, 1] pixel units; null: 2.5 threat.eps / num_steps. Correct it, or "
        "leave it out for the default, null."
    )


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
    ["nan", "inf", "-inf", "8/0", "-1/255", "8/255/2", "eight", "", math.nan, math.inf, -0.1, True, None],
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


# Contradictions -------------------------------------------------------------------------------------------

MIXES = "mixes gradients of several points, of which the penalty would see one"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"data": {"source": "folder"}}, "data.root: got null with source folder; expected a folder."),
        ({"data": {"source": "timm", "root": "x"}}, "data.name: got null with source timm;"),
        ({"data": {"name": "x"}}, 'data.name: got "x" with source digits; expected null.'),
        ({"data": {"max_train": 200}}, "data.val_size: got 200; expected fewer than max_train = 200."),
        (
            {"model": {"mean": [0.5]}},
            "model.std: got null; expected a list like model.mean. Set both or none.",
        ),
        (
            {"model": {"std": [0.5]}},
            "model.mean: got null; expected a list like model.std. Set both or none.",
        ),
        ({"model": {"mean": [0, 0], "std": [1]}}, "model.std: got 1 values; expected 2 as in model.mean."),
        ({"threat": {"eps": 0}}, "threat.eps: got 0 with objective AT; expected a positive radius."),
        (
            {"evaluation": {"step_size": 2}},
            "evaluation.step_size: got 2.0; expected at most twice threat.eps = 8/255",
        ),
        (
            {"threat": {"norm": "l2", "eps": 0.5}, "evaluation": {"step_size": "2/255"}},
            "evaluation.step_size: got 2/255; expected at least threat.eps",
        ),
        (
            {"data": {"root": "images"}},
            'data.root: got "images" with source digits, which are embedded; expected the default.',
        ),
        ({"model": {"kwargs": {"num_classes": 3}}}, "model.kwargs: got num_classes"),
        ({"optimizer": {"kwargs": {"lr": 3.0}}}, "optimizer.kwargs: got lr"),
        ({"optimizer": {"momentum": 0, "nesterov": True}}, "optimizer.nesterov: got true with momentum 0"),
        ({"data": {"download": True}}, "data.download: got true with source digits"),
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
            "perturbation.strength: got 1 beside relative_size=1; expected one of them.",
        ),
        (
            {"perturbation": {"name": "awp", "schedule": {"start": 20}}},
            "perturbation.schedule.start: got 20; expected less than train.epochs = 20, or it never acts.",
        ),
        (
            {"penalty": {"name": "trace", "schedule": {"start": 20}}},
            "penalty.schedule.start: got 20; expected less than",
        ),
        (
            {"schedule": {"milestones": [3, 2]}},
            "schedule.milestones: got [3.0, 2.0]; expected increasing epochs.",
        ),
        (
            {"schedule": {"milestones": [3, 3]}},
            "schedule.milestones: got [3.0, 3.0]; expected increasing epochs.",
        ),
        ({"schedule": {"milestones": [3, 20]}}, "expected epochs before train.epochs = 20."),
        (
            {"schedule": {"name": "cosine", "warmup_epochs": 21}},
            "schedule.warmup_epochs: got 21; expected at most",
        ),
        (
            {"schedule": {"name": "one_cycle", "peak_epoch": 21}},
            "schedule.peak_epoch: got 21; expected at most",
        ),
        (
            {"train": {"accumulate": 3}},
            "train.accumulate: got 3; expected a divisor of train.batch_size = 128.",
        ),
    ]
    + [
        (
            {"penalty": penalty, "perturbation": {"name": name}},
            f"penalty.name: got {text} beside {rule}; expected a rule that takes the gradient at W + u alone "
            f"(SAM, ASAM, AWP, VaSSO, RWP with mixing 1): it {why}. Leave one of the two out.",
        )
        for penalty, text in [
            ({"name": "wci"}, "wci penalty 0"),
            ({"name": "trace"}, "trace penalty 0"),
            ({"name": "frobenius_trace", "trace_weight": 1}, "F+T penalty 0, 1"),
        ]
        for name, rule, why in [
            ("gsam", "GSAM ρ=0.05 α=0.2", MIXES),
            ("rwp", "RWP σ=0.01 α=0.5", MIXES),
            ("wci", "WCI r=1", "measures the traces by itself"),
            ("noise", "noise r=1", "measures the traces by itself"),
        ]
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
            "penalty.estimator.name: got two_point, which moves the weights itself, beside AWP γ=0.01;",
        ),
        (
            {"objective": {"name": "trades"}, "threat": {"eps": 0}},
            "threat.eps: got 0 with objective TRADES β=6; expected a positive radius.",
        ),
        (
            {
                "objective": {
                    "name": "union",
                    "threats": [{"norm": "linf", "eps": 8}, {"norm": "l1", "eps": 12}],
                }
            },
            "objective.threats.0.eps: got 8; expected at most 1 under linf: pixels lie in [0, 1]. "
            "Did you mean 8/255?",
        ),
        (
            {"objective": {"name": "free"}, "train": {"accumulate": 2}},
            "train.accumulate: got 2 with free AT m=8",
        ),
        (
            {"objective": {"name": "free"}, "penalty": {"name": "wci"}},
            "objective.name: got free AT m=8 with wci penalty 0, whose passes would move its image",
        ),
        (
            {"objective": {"name": "free"}, "perturbation": {"name": "rwp"}},
            "objective.name: got free AT m=8 with RWP σ=0.01 α=0.5, whose passes would move its image",
        ),
        (
            {"objective": {"name": "trades", "random_start": False}},
            "objective.random_start: got False with attack_loss 'kl'; expected True",
        ),
        (
            {"train": {"eps_warmup_epochs": 2}, "objective": {"name": "standard"}},
            "train.eps_warmup_epochs: got 2 with objective standard, which attacks nothing; expected 0.",
        ),
        (
            {"perturbation": {"name": "sam"}, "penalty": {"name": "frobenius"}},
            "wrapper.layers: got null with SAM ρ=0.05, which is published for all tensors,",
        ),
        (
            {"wrapper": {"layers": "all"}},
            'wrapper.layers: got "all" without a rule that uses it; expected the default, null.',
        ),
        (
            {"wrapper": {"trace_decay": 0.5}, "perturbation": {"name": "awp"}},
            "wrapper.trace_decay: got 0.5 without a rule that uses it; expected the default, 0.9.",
        ),
        (
            {"train": {"overfitting_guard": "stop"}},
            "train.overfitting_guard: got stop with objective AT, which has no single",
        ),
        (
            {"train": {"compile": True}, "objective": {"name": "grad_align"}},
            "train.compile: got true with GradAlign",
        ),
        (
            {"train": {"compile": True}, "input_regularizer": {"name": "cure"}},
            "train.compile: got true with CURE 4",
        ),
        (
            {"train": {"eps_warmup_epochs": 21}},
            "train.eps_warmup_epochs: got 21; expected at most train.epochs = 20",
        ),
        (
            {"averaging": {"name": "swa", "start_epoch": 20}},
            "averaging.start_epoch: got 20; expected less than train.epochs = 20",
        ),
        (
            {"early_stopping": {"patience": 2}, "evaluation": {"every": 3}},
            "early_stopping.patience: got 2; expected at least evaluation.every = 3.",
        ),
        (
            {"perturbation": {"name": "rwp", "statistics": "clean"}},
            "perturbation.statistics: got clean with mixing below 1",
        ),
        ({"mixing": {"probability": 0.5}}, "mixing.probability: got settings that mix nothing"),
        ({"augment": {"magnitude": 3}}, "augment.magnitude: got 3 with policy none"),
        ({"augment": {"probability": 0.5}}, "augment.probability: got 0.5 with policy none"),
        ({"augment": {"policy": "cutout"}}, "augment.cutout_size: got null with policy cutout"),
        ({"augment": {"cutout_size": 8}}, "augment.cutout_size: got 8 with policy none"),
        ({"extra": {"fraction": 0.7}}, "extra.path: got null beside other keys"),
        ({"extra": {"path": "x.npz", "labels": "pseudo"}}, "extra.labeler: got null with labels pseudo"),
        ({"extra": {"path": "x.npz", "labeler": "run"}}, 'extra.labeler: got "run" with labels given'),
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
        {
            "threat": {"eps": "33/255"},
            "objective": {"step_size": "3/255", "num_steps": 11, "random_start": False},
        },
        {"perturbation": {"name": "wci", "strength": 1}},
        {"perturbation": {"name": "wci", "strength": None}},
        {"perturbation": {"name": "awp", "schedule": {"start": 19}}},
        {"penalty": {"name": "wci"}, "perturbation": {"name": "awp"}},
        {
            "penalty": {"name": "wci"},
            "perturbation": {"name": "rwp", "mixing": 1},
            "wrapper": {"layers": "weights"},
        },
        {"penalty": {"name": "wci", "estimator": "top_layer"}, "wrapper": {"layers": "weights"}},
        {"wrapper": {"trace_decay": 0.5}, "penalty": {"name": "wci"}},
        {"early_stopping": {"patience": 3}, "evaluation": {"every": 3}},
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
    without = recipe_from_dict({"perturbation": {"name": "wci", "relative_size": None}})
    assert str(without.perturbation) == "WCI r=1"


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


# The error as a whole -------------------------------------------------------------------------------------


def test_one_error_lists_every_problem_with_its_place(write):
    """The user would correct one line, wait, and be told of the next."""
    base = write("train:\n  epochs: 0\n  accumulate: 3\nperturbation: {name: gsam, alpha: -1}\n", "base.yaml")
    path = write(
        "base: base.yaml\nseed: 1\nseed: 2\nthreat:\n  eps: 8\nobjective:\n  num_step: 3\n"
        "model: {mean: [1]}\naveraging: swa\npenalty:\n  name: wci\n  schedule:\n    strat: 3\n"
        "  estimator:\n    name: two_point\n    radius: 2\n"
    )
    method = write(
        "seed: 1\nschedule: {name: cosine, milestones: [3],\n           final_fraction: 2}\n", "method.yaml"
    )
    lines = lines_of([path, method], ("train.epoch=3", "foo", "penalty.strength=-1"))
    starts = [
        f"{path}:3: seed: got the key a second time",
        "command line: got 'foo'; expected section.key=value",
        f"{path}:8: model.std: got null",
        f"{path}:5: threat.eps: got 8",
        f"{path}:7: objective.num_step: got an unknown key",
        f"{base}:4: perturbation.alpha: got -1",
        "command line: penalty.strength: got -1",
        f"{path}:16: penalty.estimator.radius: got 2",
        f"{path}:13: penalty.schedule.strat: got an unknown key",
        f"{method}:3: schedule.final_fraction: got 2",
        f"{method}:2: schedule.milestones: got an unknown key",
        f"{path}:9: averaging.start_epoch: got nothing",
        f"{base}:2: train.epochs: got 0",
        "command line: train.epoch: got an unknown key",
        f"{path}:11: penalty.name: got wci penalty 0 beside GSAM",
        f"{base}:3: train.accumulate: got 3",
    ]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


@pytest.mark.parametrize(
    "data",
    [
        {"train": {"epochs": 0}, "perturbation": {"name": "awp", "schedule": {"start": 30}}},
        {"averaging": {"name": "swa"}, "train": {"epochs": 3}},
        {"threat": {"eps": -1}, "objective": {"step_size": 1}},
        {"perturbation": {"name": "apw"}, "penalty": {"name": "wci"}},
        {"train": 3, "schedule": {"milestones": [30]}},
    ],
)
def test_a_wrong_value_is_not_blamed_for_contradictions(data):
    """The list would tell of conflicts with a default the user never chose."""
    assert len(lines_of(data)) == 1


@pytest.mark.parametrize(
    ("data", "wrong"),
    [
        ({"perturbation": {"name": "apw", "gamma": 1}}, "perturbation.name"),
        ({"perturbation": {"name": "wci", "relative_size": 1, "strength": 1}}, "perturbation.strength"),
        ({"perturbation": {"name": "awp", "schedule": {"every": 0}}}, "perturbation.schedule.every"),
        ({"penalty": {"name": "wci", "estimator": 3}}, "penalty.estimator"),
        (
            {"penalty": {"name": "wci", "estimator": {"name": "two_point", "radius": 2}}},
            "penalty.estimator.radius",
        ),
        ({"averaging": "swa"}, "averaging.start_epoch"),  # the default is wrong too
        ({"data": {"max_train": 100}}, "data.val_size"),
        ({"objective": {"name": "union", "threats": [{"norm": "l2", "eps": 1}]}}, "objective.threats"),
    ],
)
def test_a_wrong_method_does_not_hide_contradictions_elsewhere(data, wrong):
    """The user would correct the one and only then be told of the rest."""
    lines = lines_of(data | {"train": {"accumulate": 3}})
    assert [line.split(": got")[0] for line in lines] == [f"recipe: {wrong}", "recipe: train.accumulate"]


def test_every_unknown_key_of_no_method_is_named():
    """The user would take the keys out one by one."""
    lines = lines_of({"perturbation": {"gamma": 1, "rho": 2}})
    assert [line.split(": got")[0] for line in lines] == [
        "recipe: perturbation.gamma",
        "recipe: perturbation.rho",
    ]


def test_a_contradiction_with_a_default_names_the_place_of_the_other_key(write):
    """The error would point to the top of the file, where neither key is written."""
    path = write("data:\n  flip: true\n  max_train: 100\n")
    assert line_of(path).startswith(f"{path}:3: data.val_size: got 200; expected fewer than max_train = 100.")


def test_a_dropped_section_leaves_no_place_behind(write):
    """An error would point to a line of the base that no longer counts."""
    base = write("perturbation:\n  name: wci\n  relative_size: 2\n  floor: 0.1\n", "base.yaml")
    path = write("base: base.yaml\nperturbation:\n  name: awp\n  schedule: {start: 50}\n")
    assert line_of(path).startswith(f"{path}:4: perturbation.schedule.start")
    assert line_of(base, ("perturbation.name=noise", "perturbation.floor=0.2")).startswith("command line: ")
    path = write("base: base.yaml\nperturbation:\n  name: noise\n  statistics: x\n")
    assert line_of(path).startswith(f"{path}:4: perturbation.statistics")


WITHOUT_DEFAULT = {"SWA.start_epoch", "TimmOptimizer.name", "UnionThreat.norm", "UnionThreat.eps"}


def test_every_key_has_a_description_and_a_default():
    """A key would be explained nowhere, or its default would live in the code that uses it."""
    seen, todo = set(), [Recipe]
    while todo:
        section = todo.pop()
        if section in seen:
            continue
        seen.add(section)
        for name, field in fields_of(section).items():
            assert (field.description or "").endswith("."), (section, name)
            assert field.is_required() == (f"{section.__name__}.{name}" in WITHOUT_DEFAULT), (section, name)
            choices = [part for part in field.metadata if isinstance(part, Choice)]
            parts = [kind for choice in choices for kind in (*choice.table.values(), choice.fallback) if kind]
            todo += parts or [
                one for one in _classes(field.annotation) if hasattr(one, "__pydantic_fields__")
            ]
    assert {"Data", "AWP", "TwoPoint", "StrengthSchedule", "UnionThreat", "TimmOptimizer"} <= {
        one.__name__ for one in seen
    }
    assert all((section.__doc__ or "").strip() for section in seen)


def _classes(annotation) -> list:
    """Return the classes in an annotation."""
    return [annotation, *(inner for one in get_args(annotation) for inner in _classes(one))]
