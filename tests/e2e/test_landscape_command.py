"""``wcitrain landscape`` on what training leaves behind."""

import re

import numpy as np
import pytest
import torch
from tiny_run import TINY

from wcitrain.__main__ import main
from wcitrain.attacks import Attack, ThreatModel
from wcitrain.checkpoint import load_checkpoint
from wcitrain.data import load_splits
from wcitrain.measures.landscape import Landscape, take_landscape
from wcitrain.measures.problem import Problem
from wcitrain.models import load_exported
from wcitrain.recipe import recipe_from_dict

QUICK = ["--examples", "8", "--points", "3"]


def test_a_run_is_drawn_with_its_own_attack(run, tmp_path, capsys):
    """The command's numbers must be the library's, on test images, under the recipe's evaluation attack."""
    assert main(["landscape", str(run), "--examples", "16", "--points", "5", "--num-directions", "2"]) == 0
    assert "over 2 random directions, PGD-2 linf 0.1, 16 examples" in capsys.readouterr().out
    found = Landscape.load(run / "landscapes" / "random-last-test-p5-d2-n16.npz")
    assert (run / "landscapes" / "random-last-test-p5-d2-n16.png").stat().st_size > 10_000
    splits = load_splits(recipe_from_dict(TINY).data)
    batches = splits.test.subset(16, "measure", 0).batches(16)
    attack = Attack(ThreatModel(eps=0.1), 2, 0.06)
    problem = Problem(load_exported(run / "model" / "last"), batches, attack, num_examples=16)
    again = take_landscape(problem, num_points=5, num_directions=2)
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
    torch.save(load_checkpoint(run / "checkpoints")[0]["model"], tmp_path / "w.pt")
    for num in (50, 60):
        recipe = ["--recipe", str(run / "recipe.yaml"), f"data.max_test={num}"]
        assert main(["landscape", str(tmp_path / "w.pt"), *QUICK, *recipe]) == 0
    names = [file.stem for file in (tmp_path / "landscapes").glob("*.png")]
    assert len(names) == 2  # other images never take the file of an earlier landscape
    assert all(re.fullmatch(r"random-w-test-p3-n8-r[0-9a-f]{8}", name) for name in names)


@pytest.mark.parametrize("wrong", ["--points 4", "--two-d --num-directions 4", "--radius -1", "--examples 0"])
def test_wrong_input_is_explained(wrong, run, capsys):
    """A traceback does not say what to do, and nothing must be written."""
    before = sorted(run.rglob("*"))
    assert main(["landscape", str(run), *wrong.split()]) == 2
    assert "expected" in capsys.readouterr().err
    assert sorted(run.rglob("*")) == before
