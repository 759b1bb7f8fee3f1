"""The recipe: what is read, what is refused, and how the refusal reads."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from wcitrain.attacks import ThreatModel
from wcitrain.method import fraction_text
from wcitrain.objectives import PGDAT
from wcitrain.optim import AWP
from wcitrain.recipe import Recipe, RecipeError, load_recipe, recipe_from_dict
from wcitrain.recipe.loading import KEYS
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


def recipe_of(text: str, *overrides: str) -> Recipe:
    """Return the recipe with the keys in ``text``, YAML without its outer braces."""
    return recipe_from_dict(read_yaml(f"{{{text}}}"), overrides)


def lines_of(data: str | Path | list[Path], *overrides: str) -> list[str]:
    """Return the lines of the error that ``data`` must cause."""
    with pytest.raises(RecipeError) as caught:
        recipe_of(data, *overrides) if isinstance(data, str) else load_recipe(data, overrides)
    return str(caught.value).splitlines()


def one_line(data: str | Path | list[Path], *overrides: str) -> str:
    """Return the only line of it."""
    (line,) = lines_of(data, *overrides)
    return line


def rows(table: str, separator: str = " => ") -> list:
    """Return the rows of a table written as text, for ``parametrize``."""
    return [tuple(map(str.strip, row.split(separator))) for row in table.strip().splitlines()]


def test_an_empty_file_is_the_default_recipe(write):
    """A new user's empty file would fail, or defaults would live in a second place."""
    recipe = load_recipe(write(""))
    assert recipe == Recipe() == recipe_from_dict({}) == load_recipe([])
    assert (recipe.threat.eps, recipe.objective, recipe.perturbation) == (8 / 255, PGDAT(), None)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.train.epochs = 3


def test_the_command_line_beats_the_file_beats_its_base_beats_the_defaults(write):
    """A sweep that sets a key on the command line would silently train with the key of the file."""
    write("base: ../root.yaml\ntrain: {epochs: 3, batch_size: 30, accumulate: 3}\n", "bases/middle.yaml")
    root = "train: {epochs: 2, batch_size: 20, max_norm: 2}\nmodel: {mean: [1, 2], std: [1, 2]}\n"
    write(root, "root.yaml")
    path = write("base: bases/middle.yaml\ntrain: {epochs: 4}\nmodel: {mean: [0.5], std: [0.5]}\n")
    recipe = load_recipe(path, ["train.epochs=5", "train.epochs=6"])
    train = recipe.train
    assert (train.epochs, train.batch_size, train.accumulate, train.max_norm) == (6, 30, 3, 2.0)
    assert train.precision == "no"
    assert recipe.model.mean == [0.5], "lists are replaced, not joined"


def test_overrides_are_read_as_yaml_and_leave_the_caller_s_dict_alone():
    """Lists, numbers and null would arrive as text; a notebook would get other settings the second time."""
    data = {"perturbation": {"name": "wci"}, "model": {"kwargs": {"kept": 1}, "checkpoint_path": "x"}}
    given = ["model.kwargs.layers=[1,1]", "threat.eps=4/255", "model.checkpoint_path=null"]
    given += ["optimizer.lr=1e-4", "model.kwargs.act=a=b", "perturbation={name: awp, gamma: 0.5}"]
    recipe = recipe_from_dict(data, given)
    assert recipe.model.kwargs == {"kept": 1, "layers": [1, 1], "act": "a=b"}
    assert (recipe.threat.eps, recipe.model.checkpoint_path, recipe.optimizer.lr) == (4 / 255, None, 1e-4)
    assert recipe.perturbation == AWP(0.5)
    assert data == {"perturbation": {"name": "wci"}, "model": {"kwargs": {"kept": 1}, "checkpoint_path": "x"}}


CHANGES = """
perturbation | name: awp, gamma: 0.1, schedule: {every: 3} | name: wci | name: wci, schedule: {every: 3}
perturbation | name: awp, gamma: 0.1 | name: awp, schedule: {every: 3} | gamma: 0.1, name: awp, schedule: {every: 3}
perturbation | name: sam, rho: 0.1 | name: asam | name: asam, rho: 0.1
penalty | name: wci, strength: 3 | estimator: {name: hutchinson} | name: wci, strength: 3, estimator: hutchinson
penalty | name: wci, estimator: {name: hutchinson, radius: 0.1} | estimator: auto | name: wci
penalty | name: wci, estimator: hutchinson | estimator: {radius: 1} | name: wci, estimator: {name: hutchinson, radius: 1}
objective | num_steps: 3, attack_bn: train | name: trades | name: trades, num_steps: 3, attack_bn: train
optimizer | lr: 1e-4, momentum: 0.5 | name: adamw | name: adamw, lr: 1e-4
optimizer | lr: 1e-4, momentum: 0.5, kwargs: {dampening: 0} | name: lamb | name: lamb, lr: 1e-4, momentum: 0.5
"""  # noqa: E501


@pytest.mark.parametrize(("section", "below", "above", "expected"), rows(CHANGES, "|"))
def test_another_kind_keeps_the_settings_it_shares_and_drops_the_rest(write, section, below, above, expected):
    """A rate of 1e-4 would turn into a default of 0.1, or keys of the old kind stop the run as unknown."""
    base = write(f"data: {{source: digits}}\n{section}: {{{below}}}\n", "base.yaml")
    path = write(f"{section}: {{{above}}}\n", "above.yaml")
    based = write(f"base: base.yaml\n{section}: {{{above}}}\n")
    changes = read_yaml(f"{{{above}}}").items()
    overrides = [f"{section}.{key}={to_yaml_text({'x': value})[3:]}" for key, value in changes]
    wanted = recipe_of(f"{section}: {{{expected}}}")
    assert load_recipe([base, path]) == load_recipe(based) == wanted
    assert load_recipe(base, overrides) == load_recipe(base, overrides[::-1]) == wanted


def test_two_methods_that_are_one_choice_and_a_base_above_a_method_are_refused(write):
    """``wci awp`` would train AWP under both names, ``wci digits`` without what holds for digits."""
    base = write("name: base\ndata: {source: digits}\nperturbation: sam\n", "base.yaml")
    text = "name: {0}\nperturbation: {{name: {0}}}\n"
    wci, awp = (write(text.format(name), f"{name}.yaml") for name in ("wci", "awp"))
    rule = r"awp\.yaml: perturbation: got awp, and wci by .*wci\.yaml; expected one"
    with pytest.raises(RecipeError, match=rule):
        load_recipe([base, wci, awp])
    with pytest.raises(RecipeError, match=r"base\.yaml: got a base after a method; expected bases before"):
        load_recipe([wci, base])
    assert load_recipe([base, wci, wci]).perturbation == load_recipe([base, wci]).perturbation


def test_a_name_alone_and_its_settings_go_together_on_the_command_line(write):
    """``perturbation=noise perturbation.relative_size=0.5`` would train the file's rule, at noise's size."""
    base = write("perturbation: {name: wci, relative_size: 0.2}\n")
    overrides = ["perturbation=noise", "perturbation.relative_size=0.5"]
    for one in (overrides, overrides[::-1]):
        assert load_recipe(base, one) == recipe_of("perturbation: {name: noise, relative_size: 0.5}")


def test_a_method_is_given_by_name_as_a_mapping_or_as_an_object():
    """A notebook has the object at hand, a file its name."""
    for one in ("awp", {"name": "awp"}, AWP()):
        assert recipe_from_dict({"perturbation": one}) == Recipe(perturbation=AWP(0.01))
    assert recipe_of("perturbation: null") == recipe_of("perturbation: none") == Recipe()
    with pytest.raises(RecipeError, match="expected a mapping with a name"):
        recipe_from_dict({"perturbation": object()})


def test_null_and_empty_mappings_take_away_what_was_there():
    """Else a model's arguments could not be cleared, and a null before another setting would be lost."""
    below = "perturbation: awp, model: {kwargs: {layers: [1]}}"
    recipe = recipe_of(below, "model.kwargs={}", "perturbation=null")
    assert (recipe.model.kwargs, recipe.perturbation) == ({}, None)
    assert "got an unknown key" in one_line(below, "perturbation=null", "perturbation.gamma=0.3")


def test_an_objective_with_another_threat_is_refused():
    """The recipe's threat would take its place without a word."""
    objective, threat = PGDAT(ThreatModel("l2", 0.5)), {"norm": "l2", "eps": 0.5}
    with pytest.raises(RecipeError, match=r"objective.threat: got l2 0.5.*Set threat"):
        recipe_from_dict({"objective": objective})
    recipe = recipe_from_dict({"objective": objective, "threat": threat})
    assert recipe.objective.threat == recipe.threat


def test_files_are_laid_on_one_another_and_name_the_run_together(write):
    """A method on a base would be trained into the base's folder, or the base's settings would win."""
    write("name: root\ntrain: {epochs: 2, batch_size: 20}\n", "root.yaml")
    base = write("base: root.yaml\nname: small\ntrain: {epochs: 3}\n", "base.yaml")
    method = write("name: wci\nperturbation: wci\ntrain: {epochs: 4}\n", "method.yaml")
    nameless = write("penalty: frobenius\n", "nameless.yaml")
    recipe = load_recipe([base, method, str(nameless)])
    assert (recipe.name, recipe.train.epochs, recipe.train.batch_size) == ("small-wci", 4, 20)
    assert recipe.method == "WCI r=0.5"
    assert recipe.penalty is not None
    assert load_recipe([method, base]).train.epochs == 3
    assert load_recipe([base, method], ["name=mine"]).name == "mine"
    names = [load_recipe(one).name for one in (base, [base], [base, nameless], [nameless])]
    assert names == ["small", "small", "small", "run"]


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


@pytest.mark.parametrize("by_base", ["3", "null", "[small]", "{small: null}"])
def test_sections_for_bases_of_another_shape_are_refused_beside_other_problems(write, by_base):
    """A base's settings would be left out without a word."""
    base = write("name: small\n", "small.yaml")
    method = write(f"seed: -1\nby_base: {by_base}\n", "method.yaml")
    by_base_line, seed_line = lines_of([base, method])
    assert by_base_line.startswith(f"{method}:2: by_base: got ")
    assert seed_line.startswith(f"{method}:1: seed: got -1")
    method = write("by_base:\n  small:\n    train:\n      epochs: 0\n", "method.yaml")
    assert one_line([base, method]).startswith(f"{method}:4: train.epochs: got 0")


SCALARS_OF_1_2 = [
    *[(text, text) for text in ("1:30", "1_000", "no", "off", "yes", "On", "y", "2024-01-01", "0b1", "1e")],
    *[("=", "="), ("0o9", "0o9"), ("8/255", "8/255"), ("'no'", "no"), ("'010'", "010"), ("!!str 3", "3")],
    *[("010", 10), ("0o10", 8), ("0x1F", 31), ("-0", 0), ("+3", 3), ("1e-4", 1e-4), ("1E3", 1e3)],
    *[("-1.5e+3", -1500.0), (".5", 0.5), ("5.", 5.0), (".inf", math.inf), ("-.INF", -math.inf)],
    *[("~", None), ("", None), ("NULL", None), ("true", True), ("False", False)],
    ("{<<: {a: 1}, b: 2}", {"a": 1, "b": 2}),
]


@pytest.mark.parametrize(("text", "value"), SCALARS_OF_1_2)
def test_plain_scalars_are_those_of_yaml_1_2(text, value):
    """1:30 would be ninety, 010 eight, no false, 1_000 a thousand, 1e-4 a text."""
    assert repr(read_yaml(text)) == repr(value)  # the type too


WORDS = ["no", "1:30", "010", "0o7", "1_000", "1e5", "2024-01-01", "~", "<<", "=", "1.", ".inf", "0x", " "]
NUMBERS = [st.integers(), st.floats(allow_nan=False)]
SCALARS = [st.none(), st.booleans(), *NUMBERS, st.text(), st.sampled_from([*WORDS, "a: b"])]


def _nested(inner: st.SearchStrategy) -> st.SearchStrategy:
    return st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3)


@given(st.dictionaries(st.text(), st.recursive(st.one_of(SCALARS), _nested, max_leaves=8), max_size=4))
@settings(max_examples=200, deadline=None)
def test_what_is_written_reads_as_what_it_was(data):
    """A stored recipe would repeat another run: a text "010" read back as ten, 1e5 as a text."""
    assert repr(read_yaml(to_yaml_text(data))) == repr(data)  # types too


CASES = [
    "",
    "threat: {eps: 8/255}, objective: {step_size: 0.007}, evaluation: {step_size: 1.5/255}, "
    "model: {kwargs: {text: '1e-4', on: no, deep: {list: [1, 1e-9, null]}}, name: '1e3'}",
    "threat: {norm: l2, eps: 128/255}, name: '1.5', train: {precision: no}, "
    "averaging: {name: ema, decay: 0.99}, optimizer: {name: lamb, lr: 1e-9, kwargs: {betas: [0.9, 1e-1]}}",
    "threat: {norm: l2, eps: 2}, perturbation: {name: wci, strength: 3, schedule: {start: 1}}, "
    "averaging: {name: swa, start_epoch: 3}, wrapper: {trace_decay: 0.5, layers: '*.weight'}",
    "penalty: {name: frobenius_trace, trace_weight: 1e-7, estimator: {name: hutchinson, radius: 0.1}}, "
    "objective: {name: union, threats: [{norm: l1, eps: 12}, {norm: linf, eps: 3/255}]}, "
    "schedule: {name: one_cycle, peak_epoch: 3}, input_regularizer: {name: cure, h: 2}",
    "data: {source: timm, root: 'naïve: folder', name: hfds/x, in_memory: true}, output: 'null'",
]  # fmt: skip


@pytest.mark.parametrize("text", CASES)
def test_the_resolved_yaml_gives_an_equal_recipe(write, text):
    """The recipe stored with a run would not repeat the run."""
    recipe = recipe_of(text)
    written = recipe.to_yaml()
    again = load_recipe(write(written))
    assert again == recipe
    assert again.to_yaml() == written


def test_the_resolved_yaml_writes_every_default_and_exact_fractions():
    """A later change of a default would change what an old run's recipe means; 0.031 would pass for 8/255."""
    text = recipe_of("objective: {step_size: 0.0078}").to_yaml()
    assert all(f"  {line}\n" in text for line in ("eps: 8/255", "step_size: 0.0078", "crop_padding: 0"))
    numbers = {8 / 255: "8/255", 0.031: 0.031, 0: 0, 1.0: 1.0, 2.0: 2.0, 0.2: 0.2, 1e300: 1e300}
    assert {value: fraction_text(value) for value in numbers} == numbers


def test_a_duplicate_key_names_both_lines(write):
    """YAML would silently keep the last of two values."""
    path = write("train:\n  epochs: 3\n  epochs: 4\nmodel: {kwargs: {a: [{b: 1, b: 2}]}}\n")
    first, second = lines_of(path)
    got = "train.epochs: got the key a second time"
    assert first.startswith(f"{path}:3: {got} (first: {path}:2); expected each key once.")
    assert second.startswith(f"{path}:4: model.kwargs.a.0.b: got the key a second time")


def test_a_missing_base_or_a_circle_names_a_file(write):
    """Nobody would know which one to correct, or reading would never end."""
    write("seed: 1\nbase: gone.yaml\n", "middle.yaml")
    assert "gone.yaml: got [Errno 2] No such file or directory" in one_line(write("base: middle.yaml\n"))
    circle = write("base: recipe.yaml\n", "other.yaml")
    line = one_line(write("base: other.yaml\n"))
    assert line.startswith(f"{circle}:1: base: got 'recipe.yaml'; expected the path of one file")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {epochs: 3\nseed: 1\n", ":2: got text that is not YAML"),
        ("- 1\n", ": got a list; expected sections"),
        ("a: &x {b: *x}\n", "recursion"),
        ("train: !!python/object:os.system {}\n", ":1: got text that is not YAML"),
        ("base: [a.yaml, b.yaml]\n", ":1: base: got ['a.yaml', 'b.yaml']; expected the path"),
        ("seed: 1\n---\nseed: 2\n", ":2: got text that is not YAML"),
        ("train: {epochs: !!timestamp foo}\n", "got text that is not YAML"),  # PyYAML's own errors there
        (b"\xff\xfe\xfa", "can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_no_recipe_says_where_and_why(tmp_path, text, expected):
    """The user would see a stack trace of the YAML reader."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert str(path) in one_line(path)
    assert expected in one_line(path)


def test_an_override_that_cannot_be_read_is_shown():
    """It would be ignored, and the run would go on without it."""
    for override in ("train.epochs", "train..epochs=3", "=3", "train.epochs=[", "seed=!!bool foo"):
        assert re.match(f"command line: .*{override.split('=')[0]}", one_line("", override))


# What a recipe says => its line after "recipe: ", parts of it that follow each other with " ... " between.
UNKNOWN = """
optimizer: {wieght_decay: 1} => optimizer.wieght_decay: got an unknown key; expected one of name, lr, ... Did you mean weight_decay?
batch_size: 1 => batch_size: got ... It belongs under train or evaluation.
perturbation: {name: wci, gamma: 1} => perturbation.gamma: got an unknown key; expected one of name, relative_size, ... It belongs to another perturbation.name.
perturbation: {relative_size: 1} => perturbation.relative_size: got an unknown key; expected one of name.
optimizer: {name: 3} => optimizer.name: got 3; expected one of sgd, adamw, a name for Timm
optimizer: adamww => optimizer.name: got 'adamww'; expected sgd ... Did you mean adamw?
objective: {threat: {eps: 1}} => objective.threat: got ... It belongs under no section.
penalty: {name: wci, num_probes: 2} => penalty.num_probes: got ... It belongs under penalty.estimator.
penalty: {name: wci, estimator: {name: gauss_newton, radius: 0.1}} => penalty.estimator.radius: ... expected one of name, num_probes.
objective: {name: union, threats: [{norm: l2, eps: 1}, {norm: l1, eps: 1, epss: 1}]} => objective.threats.1.epss: got an unknown key; expected one of norm, eps. Did you mean eps?
schedule: {name: null} => schedule.name: got null; expected one of piecewise
penalty: 3 => penalty: got 3; expected a mapping with a name. What is added to the loss. Correct it.
perturbation: {name: awp, schedule: late} => perturbation.schedule: got "late"; expected a mapping of keys.
train: null => train: got null; expected a mapping of keys.
train: {3: 4} => train.3: got 3; expected a key that is text.
"""  # noqa: E501
WRONG = """
train: {epochs: true} => train.epochs: got true; expected a valid integer.
train: {epochs: 0} => train.epochs: got 0; expected a number greater than or equal to 1. Passes over the training images.
optimizer: {lr: "1e-2"} => optimizer.lr: got "1e-2"; expected a valid number.
optimizer: {lr: .nan} => optimizer.lr: got NaN; expected a finite number.
optimizer: "" => optimizer.name: got ""; expected at least 1 character.
penalty: {name: wci, estimator: {name: hutchinson, radius: 2}} => penalty.estimator.radius: got 2; expected a number less than or equal to 1. Norm of the step over that of the weights, in (0, 1]. Correct it.
averaging: swa => averaging.start_epoch: got nothing; expected a value. Epochs before the first sample; then one sample an epoch. Set it.
schedule: {milestones: [1, x]} => schedule.milestones.1: got "x"; expected a valid number.
model: {kwargs: {a: [2, .nan]}} => model.kwargs.a.list.1.float: got NaN; expected a finite number.
name: .. => name: got ".."; expected letters, digits
train: {precision: fp16} => train.precision: got "fp16"; expected 'no' or 'bf16'.
threat: {eps: 8} => threat.eps: got 8; expected at most 1 under linf: pixels lie in [0, 1]. Did you mean 8/255?
"""  # noqa: E501
# One setting contradicts another, of its own section or of another one.
CONTRADICTIONS = """
data: {source: folder} => data.root: got null with source folder; expected a folder.
data: {name: x} => data.name: got "x" with source digits; expected a data set name with timm alone.
model: {mean: [0.5]} => model.std: got null; expected a list like model.mean. Set both or none.
extra: {fraction: 0.7} => extra.path: got null beside other keys
extra: {path: x.npz, labels: pseudo} => extra.labeler: got null with labels pseudo
extra: {path: x.npz, labeler: run} => extra.labeler: got "run" with labels given
label_noise: {resample: false} => label_noise.share: got 0 beside other keys
mixing: {probability: 0.5} => mixing.probability: got settings that mix nothing
mixing: {mixup_alpha: 1, switch_probability: 0.9} => mixing.switch_probability: got 0.9 without two kinds
augment: {policy: trivialaugment, num_ops: 1} => augment.num_ops: got 1 with policy trivialaugment
data: {root: images} => data.root: got "images" with source digits; expected the default
schedule: {milestones: [3, 20]} => schedule.milestones: got 20; expected less than train.epochs = 20.
schedule: {name: cosine, warmup_epochs: 21} => schedule.warmup_epochs: got 21; expected at most
threat: {eps: 0} => threat.eps: got 0 with objective AT; expected a positive radius.
objective: {step_size: 17/255} => objective.step_size: got 0.06667; expected at most twice the radius of linf 8/255
threat: {norm: l2, eps: 0.5}, evaluation: {step_size: 2/255} => evaluation.step_size: got 0.007843; expected to reach the radius of l2 0.5
threat: {norm: l1, eps: 2}, evaluation: {step_size: 0.5} => evaluation.step_size: got 0.5; expected to reach 5 times the radius of l1 2 within num_steps = 10
objective: free, train: {accumulate: 2} => train.accumulate: got 2 with free AT m=8
objective: free, penalty: wci => objective.name: got free AT m=8 with a rule whose passes would move its image
train: {accumulate: 3} => train.accumulate: got 3; expected a divisor of train.batch_size = 128.
averaging: {name: swa, start_epoch: 20} => averaging.start_epoch: got 20; expected less than train.epochs = 20
perturbation: {name: wci, strength: 1, relative_size: 1} => perturbation.strength: got 1 beside relative_size=1; expected one of them.
perturbation: {name: awp, schedule: {start: 20}} => perturbation.schedule.start: got 20; expected less than train.epochs = 20
perturbation: awp, penalty: {name: wci, estimator: hutchinson} => penalty.estimator: got hutchinson beside AWP γ=0.01; expected gauss_newton
perturbation: gsam, penalty: wci => penalty: got wci penalty 0 beside GSAM ρ=0.05 α=0.2; expected a rule that takes the gradient at W + u alone ... Leave one of the two out.
perturbation: noise, penalty: {name: frobenius_trace, trace_weight: 1} => penalty: got F+T penalty 0, 1 beside noise r=0.5; ... Leave one of the two out.
perturbation: sam, penalty: frobenius => wrapper.layers: got null with SAM ρ=0.05, which is published for all tensors,
train: {eps_warmup_epochs: 2}, objective: standard => train.eps_warmup_epochs: got 2.0, which nothing uses; expected an attack
train: {eps_zero_epochs: 2}, objective: standard => train.eps_zero_epochs: got 2.0, which nothing uses; expected an attack
train: {eps_zero_epochs: 20} => train.eps_zero_epochs: got 20; expected less than train.epochs = 20
train: {eps_zero_epochs: 15, eps_warmup_epochs: 10} => train.eps_warmup_epochs, with eps_zero_epochs: got 25; expected at most train.epochs = 20
train: {compile: true}, objective: grad_align => train.compile: got true with GradAlign
data: {crop_padding: 2}, augment: {crop_scale: [0.5, 1]} => data.crop_padding: got it beside augment.crop_scale
augment: {crop_scale: [0.5, 0.2]} => augment.crop_scale: got [0.5, 0.2]; expected the smaller share first
augment: {policy: timm} => augment.config: got None with policy timm; expected it with timm
augment: {config: rand-m9} => augment.config: got rand-m9 with policy none
augment: {policy: timm, config: rand-m9-mst0.5} => augment.config: got "rand-m9-mst0.5"
augment: {policy: timm, config: rand-magnitude} => augment.config: got "rand-magnitude"
train: {compile: true, gradient_checkpointing: true} => train.gradient_checkpointing: got true with compile
train: {compile: true}, input_regularizer: cure => train.compile: got true with CURE 4
train: {overfitting_guard: stop} => train.overfitting_guard: got "stop", which nothing uses; expected an objective of a single
wrapper: {layers: all} => wrapper.layers: got "all", which nothing uses; expected a perturbation or penalty
wrapper: {trace_decay: 0.5}, perturbation: awp => wrapper.trace_decay: got 0.5, which nothing uses; expected a rule that takes
early_stopping: {patience: 2}, evaluation: {every: 3} => early_stopping.patience: got 2, over before the next measurement; expected at least 3.
measures: {take: [wci, margins, wci]} => measures.take: got wci twice; expected each measure once.
"""  # noqa: E501


@pytest.mark.parametrize(("text", "expected"), [*rows(UNKNOWN), *rows(WRONG), *rows(CONTRADICTIONS)])
def test_what_would_train_something_else_is_refused_with_its_rule_and_the_way_out(text, expected):
    """A misspelt key would train with the default; of two settings at odds one would have no effect."""
    parts = [re.escape(part) for part in expected.split(" ... ")]
    line = one_line(text)
    assert re.match(rf"recipe: .*{'.*'.join(parts)}", line), line


ACCEPTED = """
threat: {eps: 0}, objective: standard
objective: {step_size: 16/255}
objective: {step_size: 2/255, num_steps: 4}
threat: {eps: 33/255}, objective: {step_size: 3/255, num_steps: 11}
perturbation: {name: awp, schedule: {start: 19}}
penalty: wci, perturbation: {name: rwp, mixing: 1}, wrapper: {layers: weights}
schedule: {milestones: [3, 19.5]}
schedule: {name: one_cycle, peak_epoch: 20}
"""  # 11 * (3/255) falls short of 33/255 by its last bit


def test_settings_on_the_right_side_of_each_rule_are_accepted():
    """A rule off by one would refuse a run that makes sense."""
    for text in ACCEPTED.strip().splitlines():
        recipe_of(text)


def test_a_radius_is_a_fraction_or_a_number():
    """The usual way to write a radius would differ from 8/255 in the last bit, or nan attack nothing."""
    radii = {"8/255": 8 / 255, " 8 / 255": 8 / 255, "1.5/255": 1.5 / 255, 0.03: 0.03, "3e-2": 0.03, 1: 1.0}
    for value, expected in radii.items():
        assert recipe_from_dict({"threat": {"eps": value}}).threat.eps == expected
    for value in ("nan", "inf", "8/0", "-1/255", "8/255/2", "eight", "''", ".nan", -0.1, "true", "~"):
        assert re.match(r"recipe: threat.eps: got .* number", one_line(f"threat: {{eps: {value}}}"))


def test_one_error_lists_every_problem_with_its_place(write):
    """The user would correct one line, wait, and be told of the next."""
    base = write("train:\n  epochs: 0\nperturbation: {name: gsam, alpha: -1}\n", "base.yaml")
    path = write(
        "base: base.yaml\nseed: 1\nseed: 2\nthreat:\n  eps: 8\naveraging: swa\n"
        "penalty:\n  name: wci\n  schedule:\n    strat: 3\n  estimator: {name: hutchinson,\n    radius: 2}\n"
    )
    text = "seed: 1\nschedule: {name: cosine, milestones: [3],\n  final_fraction: 2}\n"
    method = write(text, "method.yaml")
    starts = [
        f"{path}:3: seed: got the key a second time",
        "command line: got 'foo'; expected section.key=value",
        f"{path}:5: threat.eps: got 8",
        f"{base}:3: perturbation.alpha: got -1",
        "command line: penalty.strength: got -1",
        f"{path}:12: penalty.estimator.radius: got 2",
        f"{path}:10: penalty.schedule.strat: got an unknown key",
        f"{method}:3: schedule.final_fraction: got 2",
        f"{method}:2: schedule.milestones: got an unknown key",
        f"{path}:6: averaging.start_epoch: got nothing",
        f"{base}:2: train.epochs: got 0",
        "command line: train.epoch: got an unknown key",
    ]
    lines = lines_of([path, method], "train.epoch=3", "foo", "penalty.strength=-1")
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


def test_a_dropped_section_leaves_no_place_behind(write):
    """An error would point to a line of the base that no longer counts."""
    base = write("perturbation:\n  name: wci\n  relative_size: 2\n  floor: 0.1\n", "base.yaml")
    path = write("base: base.yaml\nperturbation:\n  name: awp\n  schedule: {start: 50}\n")
    assert one_line(path).startswith(f"{path}:4: perturbation.schedule.start")
    assert one_line(base, "perturbation.name=noise", "perturbation.floor=0.2").startswith("command line: ")
    union = "objective:\n  name: union\n  threats:\n    - {norm: linf, eps: 0.1}\n    - {norm: l2, eps: -1}\n"
    assert one_line(write(union)).startswith(f"{path}:5: objective.threats.1.eps")  # the list began above


WITHOUT_DEFAULT = {("averaging", "start_epoch")}


def test_every_key_has_a_description_and_a_default():
    """A key would be explained nowhere, or its default would live in the code that uses it."""
    for key, field in KEYS:
        assert (field.description or "").endswith("."), key
        assert field.is_required() == (key in WITHOUT_DEFAULT), key
    names = {key[-1] for key, _ in KEYS}
    assert {"crop_padding", "gamma", "ramp", "radius", "num_replays", "patience"} <= names
