"""The architecture: imports go one way, optional packages stay so, declared dependencies are complete."""

import ast
import graphlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

from docs import documents

PACKAGE = Path(__file__).parents[2] / "wcitrain"

# From the top down; a room may import rooms of later rows, and its own package.
ROWS = [
    {"__main__"},
    {"commands"},
    {"sweep"},
    {"train"},
    {"monitoring", "export"},
    {"run", "targets"},
    {"build", "foreign"},
    {"report", "starting"},
    {"evaluation", "checkpoint", "tracking", "progress"},
    {"recipe"},
    {"measures"},
    {"objectives"},
    {"attacks"},
    {"optim"},
    {"curvature"},
    {"freezing"},
    {"data", "models", "averaging", "learning_rate", "finding"},
    {"weights", "architectures"},
    {"params", "listing"},
    {"seeding", "preserve", "digest", "method", "text", "files"},
]


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(dotted: str) -> str:
    """The second part of a module's name: a file, or a folder inside which imports are free."""
    return dotted.split(".")[1]


def test_imports_go_downward_only():
    """A cycle or an upward import makes a part unusable without the whole; those for types count too."""
    level = {name: row for row, names in enumerate(ROWS) for name in names}
    problems = []
    for path in modules():
        own = room(".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts))
        if own == "__init__":
            continue
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module == "wcitrain":
                names = [f"wcitrain.{a.name}" for a in node.names]
            for name in names:
                if name.startswith("wcitrain.") and room(name) != own and level[room(name)] <= level[own]:
                    problems.append(f"{own} imports {room(name)}")
    assert not problems


def test_no_module_imports_itself_on_a_round_trip():
    """Files of one folder may import each other, but never in a circle: then neither can be read alone."""
    names = {path: ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in modules()}
    known = set(names.values())
    graph: dict[str, set[str]] = {}
    for path, name in names.items():
        if name.endswith("__init__"):
            continue  # what a folder offers
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("wcitrain"):
                parts = {f"{node.module}.{alias.name}" for alias in node.names} & known
                graph[name] |= parts or ({node.module or ""} & known)
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_every_module_imports_without_optional_packages():
    """A user without W&B, TensorBoard, or the development tools must still get the package."""
    hidden = ["wandb", "tensorboard", "pyautoattack", "hypothesis", "pytest", "curvlinops", "pyhessian"]
    paths = [".".join(p.relative_to(PACKAGE.parent).with_suffix("").parts) for p in modules()]
    names = [path.removesuffix(".__init__") for path in paths]
    code = (
        f"import sys\nfor name in {hidden!r}: sys.modules[name] = None\n"
        f"import importlib\nfor name in {names!r}: importlib.import_module(name)\nprint('imported')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.stdout.strip().endswith("imported"), result.stderr


def test_declared_dependencies_are_complete_and_open_upward():
    """Peers fail at import in a clean environment, or rot behind upper bounds."""
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["completion"]]
    declared = {d.split(">=")[0].strip().lower().replace("-", "_") for d in wanted}
    assert all("<" not in d and "==" not in d for d in project["dependencies"])
    distribution = {"yaml": "pyyaml", "sklearn": "scikit_learn", "PIL": "pillow", "pydantic_core": "pydantic"}
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


def test_every_requirement_is_pinned_for_the_tests():
    """A release of something left out would change what `make test` runs on without a change here."""
    root = PACKAGE.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    project = settings["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    wanted += settings["build-system"]["requires"]
    pins = (root / "tools" / "constraints.txt").read_text().lower().splitlines()[1:]
    assert all(re.fullmatch(r"[a-z0-9-]+==[^\s*+]+", pin) for pin in pins)
    names = {re.split(r"[<>=\[]", name)[0].lower() for name in wanted}
    assert names <= {pin.split("==")[0] for pin in pins}


def test_the_generated_documents_are_up_to_date():
    """A table that nobody generated again tells what the code no longer does; `make docs` mends it."""
    texts = documents()
    assert [path.name for path, text in texts.items() if path.read_text("utf-8") != text] == []
