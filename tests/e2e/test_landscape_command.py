"""``wcitrain landscape`` on what training leaves behind."""

import numpy as np
import pytest
import torch
from tiny_run import TINY

from wcitrain.__main__ import main
from wcitrain.attacks import Attack, ThreatModel
from wcitrain.checkpoint import load_checkpoint
from wcitrain.data import load_splits
from wcitrain.measures.landscape import Landscape, landscape_1d
from wcitrain.measures.problem import Problem
from wcitrain.models import load_exported
from wcitrain.recipe import recipe_from_dict
from wcitrain.seeding import seed_from

QUICK = ["--examples", "8", "--points", "3"]


def test_a_run_is_drawn_with_its_own_attack(run, tmp_path, capsys):
    """The command's numbers must be the library's, on test images, under the recipe's evaluation attack."""
    assert main(["landscape", str(run), "--examples", "16", "--points", "5", "--num-directions", "2"]) == 0
    assert "over 2 random directions, PGD-2 linf 0.1, 16 examples" in capsys.readouterr().out
    found = Landscape.load(run / "landscapes" / "random-last-test-p5-d2-n16.npz")
    assert found.seed == 0
    assert (run / "landscapes" / "random-last-test-p5-d2-n16.png").stat().st_size > 10_000
    recipe = recipe_from_dict(TINY)
    splits = load_splits(recipe.data)
    batches = splits.test.batches(100, shuffle=True, seed=seed_from(0, "measure"))
    attack = Attack(ThreatModel(eps=0.1), 2, 0.06)
    problem = Problem(load_exported(run / "model" / "last"), batches, attack, num_examples=16)
    again = landscape_1d(problem, num_points=5, num_directions=2)
    assert np.array_equal(found.robust, again.robust)
    assert np.array_equal(found.clean, again.clean)
    assert (found.robust > found.clean).any()


def test_options_reach_the_landscape_and_name_the_files(run, tmp_path):
    """An option that is parsed and dropped draws something else under the right name."""
    common = ["landscape", str(run), *QUICK, "--out", str(tmp_path)]
    layer = ["--directions", "layer", "--num-directions", "1", "--seed", "3"]
    assert main([*common, "--at", "best", "--split", "val", "--clean", *layer]) == 0
    clean = Landscape.load(tmp_path / "layer-best-val-clean-p3-d1-n8-s3.npz")
    assert (clean.attack, clean.directions, clean.alphas.tolist()) == ("clean", "layer", [-0.5, 0.0, 0.5])
    assert (len(clean.clean), clean.num_examples, clean.seed) == (1, 8, 3)
    adversarial = ["--directions", "adversarial", "--radius", "0.1"]
    assert main([*common, "--two-d", *adversarial, "--norm", "l2", "--eps", "1/2"]) == 0
    plane = Landscape.load(tmp_path / "adversarial-last-test-plane-l2-0.5-PGD-2-r0.1-p3-n8.npz")
    assert (plane.is_plane, plane.robust.shape, plane.attack) == (True, (3, 3), "PGD-2 l2 0.5")
    weights = load_checkpoint(run / "checkpoints")[0]["model"]
    torch.save(weights, tmp_path / "w.pt")
    recipe = ["--recipe", str(run / "recipe.yaml"), "data.max_test=50"]
    assert main(["landscape", str(tmp_path / "w.pt"), *QUICK, *recipe]) == 0
    assert (tmp_path / "landscapes" / "random-w-test-p3-n8.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--points", "4"], "num_points=4"),
        (["{run}", "--two-d", "--num-directions", "4"], "--num-directions: got 4 with --two-d"),
        (["{run}", "--radius", "-1"], "radius=-1.0"),
        (["{run}", "--clean", "--eps", "8/255"], "--clean: got --eps as well"),
        (["{run}", "--examples", "0"], "num_examples: got 0"),
    ],
)
def test_wrong_input_is_explained(arguments, message, run, tmp_path, capsys):
    """A traceback does not say what to do, and nothing must be written."""
    before = sorted(run.rglob("*"))
    assert main(["landscape", *(text.format(tmp=tmp_path, run=run) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
