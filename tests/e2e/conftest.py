"""What the end-to-end tests of a file share: one finished run of its ``TINY``."""

import shutil
from pathlib import Path

import pytest

from wcitrain.progress import run_folder
from wcitrain.recipe import recipe_from_dict
from wcitrain.train import fit


@pytest.fixture(scope="module")
def trained(request, tmp_path_factory) -> Path:
    """The folder of a finished run."""
    recipe = recipe_from_dict(request.module.TINY | {"output": str(tmp_path_factory.mktemp("runs"))})
    fit(recipe)
    return run_folder(recipe)


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of it, to write into."""
    return Path(shutil.copytree(trained, tmp_path / "tiny-s0"))
