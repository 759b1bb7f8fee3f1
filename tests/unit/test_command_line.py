"""The command line before a command runs: quick help, lazy names, lists and recipe names."""

import subprocess
import sys

import pytest
from pydantic import Field
from tiny_run import TINY

import wcitrain
from wcitrain.__main__ import main
from wcitrain.commands.common import file_name
from wcitrain.commands.options import COMMANDS, LISTS, parser
from wcitrain.listing import describe, describe_recipes, recipe_file
from wcitrain.method import Count, Method, method
from wcitrain.optim import RegularizedOptimizer
from wcitrain.recipe.reading import to_yaml_text

HEAVY = ("torch", "numpy", "pydantic", "timm", "sklearn", "matplotlib", "yaml")


@method
class Walk(Method):
    """Go on
    foot.

    More.
    """

    steps: Count = Field(default=3, description="Steps of 1 m.")
    pause: float | None = None
    cost = "one a step"


def test_help_and_import_load_nothing_heavy():
    """Help that takes seconds is not asked for; one import at the top of a file would bring torch back."""
    code = (
        "import sys, wcitrain\nfrom wcitrain.__main__ import main\n"
        f"for command in {[*COMMANDS]}:\n    try: main([command, '--help'])\n    except SystemExit: pass\n"
        f"loaded = [name for name in {HEAVY} if name in sys.modules]\nimport wcitrain.recipe\n"
        "print('loaded', loaded + [name for name in ('scipy', 'sklearn') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.splitlines()[-1] == "loaded []", result.stderr


def test_every_public_name_is_there_and_no_other():
    """A name is looked up when it is first used: a wrong one would fail in the user's code."""
    names = [name for name in dir(wcitrain) if name[0] != "_"]
    assert {"fit", "load_recipe", "RegularizedOptimizer", "MEASURES"} <= set(names)
    assert all(getattr(wcitrain, name) is not None for name in names)
    with pytest.raises(AttributeError, match="has no attribute 'Fit'"):
        wcitrain.Fit  # noqa: B018


def test_a_description_is_what_the_class_says():
    """Lists and documents are made of it: a setting that is missing there is never found."""
    (entry,) = describe({"walk": Walk})
    lines = [" ".join(line.split()) for line in str(entry).splitlines()]
    assert lines == ["walk: Go on foot.", "steps 3 Steps of 1 m.", "pause null", "cost: one a step"]


@pytest.mark.parametrize("kind", LISTS)
def test_every_list_is_printed(kind, capsys):
    """A room whose table moved, or whose classes say nothing of themselves."""
    assert main(["list", kind]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 3


def test_recipes_that_come_along_have_names(tmp_path, monkeypatch):
    """`train wci --base cifar10` must work from anywhere, and a file of one's own always wins."""
    monkeypatch.chdir(tmp_path)
    assert recipe_file("cifar10", ["bases"]).endswith("recipes/bases/cifar10.yaml")
    assert recipe_file("wci", ["bases", "methods"]).endswith("recipes/methods/wci.yaml")
    with pytest.raises(ValueError, match="cifar: got no file; expected a path, or one of cifar10"):
        recipe_file("cifar", ["bases"])
    (tmp_path / "wci").write_text("")
    assert recipe_file("wci", ["methods"]) == "wci"
    entries = {entry.name: entry.summary for entry in describe_recipes()}
    assert entries["methods/at"].startswith("PGD adversarial training (Madry et al. 2018): what the")
    assert all(summary.endswith((".", ":")) for summary in entries.values())


def test_settings_may_follow_an_option(tmp_path, monkeypatch, capsys):
    """argparse refuses words on both sides of an option; a misspelt option must not pass for a setting."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "at", "--base", "digits", "train.epochs=0"]) == 2
    assert "train.epochs: got 0" in capsys.readouterr().err
    for wrong in (["train", "at", "--bse", "digits"], ["report", "run", "--no-images", "x=1"]):
        with pytest.raises(SystemExit, match="2"):
            main(wrong)
    assert "unrecognized arguments" in capsys.readouterr().err


def test_a_dry_run_makes_a_step_and_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    """The cost before the hours; a folder that it left would keep the run itself from starting."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(to_yaml_text(TINY))
    step, steps = RegularizedOptimizer.step, []
    counted = lambda self, *given: steps.append(1) or step(self, *given)  # noqa: E731
    monkeypatch.setattr(RegularizedOptimizer, "step", counted)
    assert main(["train", "tiny.yaml", "awp", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "perturbation:" in printed
    # PGD-2 and two passes of training: 2 + 2 + 2 x 3 passes; PGD-10 AT is 10 + 10 + 3
    assert "a step: 4 forward and 4 backward passes, 0.43 x PGD-10 adversarial training" in printed
    assert (len(steps), [path.name for path in tmp_path.iterdir()]) == (1, ["tiny.yaml"])


def test_repeated_options_add_up():
    """Of two `--set` the first was dropped without a word: the measure ran at its default."""
    line = "measure RUN --set wci.layers=head --set wci.num_probes=3 --measures wci --measures lambda_max"
    options = parser().parse_args(line.split())
    assert options.set == ["wci.layers=head", "wci.num_probes=3"]
    assert options.measures == ["wci", "lambda_max"]


def test_long_file_names_are_shortened_and_stay_different():
    """A name of more than 255 bytes fails when everything is done."""
    names = {file_name("last", "-".join(["linf 8/255"] * 30), end) for end in ("a", "b")}
    assert [len(name) for name in names] == [120, 120]
