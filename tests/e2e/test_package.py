"""What people install: the wheel alone, in an environment of its own, outside the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHORT = "train.epochs=1 schedule.milestones=[] data.max_train=200 data.max_test=100 evaluation.every=1"


def run(*command: object, cwd: Path) -> str:
    """Return what a command prints; it must succeed."""
    clean = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [*map(str, command)]
    done = subprocess.run(words, cwd=cwd, env=clean, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_the_wheel_is_complete_and_trains_a_recipe_by_name_in_a_fresh_environment(tmp_path):
    """What only the checkout has, and dependencies that are not declared, are missed by every user."""
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    folders = [ROOT / "recipes" / part for part in ("bases", "methods", "sweeps")]
    recipes = [file for folder in folders for file in folder.iterdir()]
    sources = [file for file in (ROOT / "wcitrain").rglob("*") if "__pycache__" not in file.parts]
    missing = {f"wcitrain/{file.relative_to(ROOT).as_posix()}" for file in recipes}
    missing |= {file.relative_to(ROOT).as_posix() for file in sources if file.is_file()}
    assert "wcitrain/py.typed" in held
    assert not missing - held
    python = tmp_path / "venv" / "bin" / "python"
    uv, pins = Path(sys.executable).with_name("uv"), ROOT / "tools" / "constraints.txt"
    run(uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv", cwd=tmp_path)
    run(uv, "pip", "install", "--quiet", "--python", python, "--constraints", pins, wheel, cwd=tmp_path)
    command = python.with_name("wcitrain")
    assert run(command, "--version", cwd=tmp_path).startswith("wcitrain ")
    assert "cifar10_small" in run(command, "list", "recipes", cwd=tmp_path)
    run(command, "train", "wci", "--base", "digits", *SHORT.split(), cwd=tmp_path)
    assert (tmp_path / "runs" / "digits-wci-s0" / "summary.json").is_file()
    where = run(python, "-c", "import wcitrain.train as t; print(t.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
