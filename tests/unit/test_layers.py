"""The architecture: imports go one way only, optional packages stay optional, declared dependencies are complete."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "wcitrain"

# From the top down; a room may import rooms of later rows, and its own package.
ROWS = [
    {"__main__"},
    {"commands"},
    {"sweep", "studying"},
    {"train"},
    {"summary", "measuring_runs", "evaluating_runs", "landscape_of_runs", "correlating_runs"},
    {"measuring_many"},
    {"targets"},
    {"build", "averaging", "images"},
    {"evaluation", "report", "checkpoint", "tracking", "stopping", "labels", "progress"},
    {"measures"},
    {"objectives"},
    {"attacks"},
    {"optim"},
    {"curvature"},
    {"params"},
    {"recipe", "data", "models"},
    {"seeding", "preserve"},
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(dotted: str) -> str:
    """The second part of a module's name: a file, or a folder inside which imports are free."""
    return dotted.split(".")[1]


def test_imports_go_downward_only():
    """A cycle or an upward import makes a part unusable without the whole."""
    level = {name: row for row, names in enumerate(ROWS) for name in names}
    problems = []
    for path in modules():
        own = room(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        if own == "__init__":
            continue
        tree = ast.parse(path.read_text())
        types_only = {
            id(inner)
            for node in ast.walk(tree)
            if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
            for inner in node.body
        }
        for node in ast.walk(tree):
            if id(node) in types_only:
                continue
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "wcitrain":
                names = [f"wcitrain.{a.name}" for a in node.names]
            for name in names:
                if name.startswith("wcitrain.") and room(name) != own and level[room(name)] <= level[own]:
                    problems.append(f"{own} imports {room(name)}")
    assert not problems


def test_every_module_imports_without_optional_packages():
    """A user without W&B, TensorBoard, or the development tools must still get the package."""
    hidden = ["wandb", "tensorboard", "pyautoattack", "hypothesis", "pytest", "curvlinops", "pyhessian"]
    names = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__") for p in modules()]
    code = (
        f"import sys\nfor name in {hidden!r}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {[n for n in names if not n.endswith('__main__')]!r}: importlib.import_module(name)\n"
        "import wcitrain.__main__\nprint('imported')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip().endswith("imported"), result.stderr


def test_declared_dependencies_are_complete_and_open_upward():
    """Peers fail at import in a clean environment, or rot behind upper bounds."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    declared = {d.split(">=")[0].strip().lower().replace("-", "_") for d in project["dependencies"]}
    assert all("<" not in d and "==" not in d for d in project["dependencies"])
    distribution = {"yaml": "pyyaml", "sklearn": "scikit_learn", "PIL": "pillow"}
    imported = set()
    for path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {a.name.split(".")[0] for a in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.split(".")[0])
    third_party = imported - set(sys.stdlib_module_names) - {"wcitrain"}
    missing = {distribution.get(name, name) for name in third_party} - declared
    assert not missing


@pytest.mark.parametrize("name", ["preact_resnet18", "resnet18"])
def test_public_names_exist(name):
    """``from wcitrain import *`` must not promise what is not there."""
    import wcitrain

    assert all(hasattr(wcitrain, public) for public in wcitrain.__all__)
    assert wcitrain.create_model(name, num_classes=3, in_chans=1) is not None
