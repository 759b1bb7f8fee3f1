"""What people install: the wheel alone, in an environment of its own, outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = [
    "train.epochs=1",
    "schedule.milestones=[]",
    "data.max_train=200",
    "data.max_test=100",
    "evaluation.every=1",
]


def run(*command: object, cwd: Path) -> str:
    """Return what a command prints; it must succeed."""
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")
    }
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The built wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


@pytest.mark.slow
def test_the_wheel_holds_recipes_types_and_templates(wheel):
    """A file that only the checkout has is missed by every user, and by no test that runs in the checkout."""
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = [
        file.relative_to(ROOT)
        for part in ("bases", "methods", "sweeps")
        for file in (ROOT / "recipes" / part).iterdir()
    ]
    sources = [
        file.relative_to(ROOT)
        for file in (ROOT / "wcitrain").rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    ]
    missing = {f"wcitrain/{file.as_posix()}" for file in wanted} | {file.as_posix() for file in sources}
    assert "wcitrain/py.typed" in held
    assert not missing - held


@pytest.mark.slow
def test_the_wheel_trains_a_recipe_by_name_in_a_fresh_environment(wheel, tmp_path):
    """Dependencies that are not declared, and paths into the checkout, show nowhere else."""
    python = tmp_path / "venv" / "bin" / "python"
    uv, pins = Path(sys.executable).with_name("uv"), ROOT / "tools" / "constraints.txt"
    run(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv", cwd=tmp_path)
    run(uv, "pip", "install", "--quiet", "--python", python, "--constraints", pins, wheel, cwd=tmp_path)
    command = [python.with_name("wcitrain")]
    assert run(*command, "--version", cwd=tmp_path).startswith("wcitrain ")
    assert "cifar10_small" in run(*command, "list", "recipes", cwd=tmp_path)
    run(*command, "train", "wci", "--base", "digits", *SHORT, cwd=tmp_path)
    assert (tmp_path / "runs" / "digits-wci-s0" / "summary.json").is_file()
    where = run(python, "-c", "import wcitrain.train as t; print(t.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
