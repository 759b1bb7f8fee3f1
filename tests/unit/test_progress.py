"""Which settings a run may go on with, and what is said of the others."""

import pytest

from wcitrain.progress import changed_settings, refuse_another_run
from wcitrain.recipe import recipe_from_dict

FOLDER = {"name": "x", "data": {"source": "folder", "root": "a"}}
FREE = {  # where, how fast and how often
    "data.root": "/b",
    "data.num_workers": "0",
    "data.in_memory": "false",
    "data.download": "true",
    "evaluation.batch_size": "7",
    "train.num_threads": "3",
    "train.device": "cpu",
    "checkpoint.every": "2",
    "tracking.wandb": "disabled",
}
FIXED = {  # what
    "data.max_train": "10",
    "data.split_seed": "1",
    "data.test_split": "other",
    "train.batch_size": "64",
    "evaluation.num_steps": "3",
    "optimizer.lr": "0.5",
    "seed": "1",
}


@pytest.mark.parametrize("key", FREE)
def test_where_and_how_fast_may_change(key, tmp_path):
    """Data on another disk, or a machine with other cores, would end a week of training."""
    saved, asked = recipe_from_dict(FOLDER), recipe_from_dict(FOLDER, [f"{key}={FREE[key]}"])
    refuse_another_run(saved, asked, tmp_path)
    (told,) = changed_settings(saved, asked)
    assert told.startswith(f"{key}=")
    assert "(was " in told


@pytest.mark.parametrize("key", FIXED)
def test_what_is_computed_may_not(key, tmp_path):
    """The run would no longer be the one its recipe describes."""
    saved, asked = recipe_from_dict(FOLDER), recipe_from_dict(FOLDER, [f"{key}={FIXED[key]}"])
    with pytest.raises(ValueError, match=f"got {key}=.*; expected .*, as this run has"):
        refuse_another_run(saved, asked, tmp_path)


def test_all_that_differs_is_named(tmp_path):
    """One key at a time takes as many attempts as there are keys."""
    settings = ["seed=1", "train.epochs=3", "data.root=/b", "evaluation.every=2"]
    with pytest.raises(
        ValueError, match=r"got seed=1; expected 0, .*, and other train.epochs, evaluation.every"
    ):
        refuse_another_run(recipe_from_dict(FOLDER), recipe_from_dict(FOLDER, settings), tmp_path)


def test_extra_images_may_move_but_not_come_or_go(tmp_path):
    """Where they lie says nothing; whether there are any is the method."""
    here, there, none = (
        recipe_from_dict(FOLDER | ({"extra": {"path": path}} if path else {}))
        for path in ("a.npz", "b.npz", "")
    )
    refuse_another_run(here, there, tmp_path)
    for saved, asked in ((here, none), (none, here)):
        with pytest.raises(ValueError, match=r"got extra\.path="):
            refuse_another_run(saved, asked, tmp_path)
