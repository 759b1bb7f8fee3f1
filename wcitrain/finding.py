"""What a typed target is: a run, a checkpoint, an export, weights, a recipe, a program, a name."""

import zipfile
from pathlib import Path

import timm

from wcitrain.method import nearest
from wcitrain.weights import SUFFIXES, is_weights, split_part

HUBS = ("hf-hub:", "hf_hub:", "local-dir:")
RECIPES = (".yaml", ".yml")
KINDS = "a run folder, a checkpoint of one (RUN/checkpoints/last), an exported model folder, a file of "
KINDS += f"weights ({', '.join(SUFFIXES)}), a TorchScript or torch.export file, a recipe "
KINDS += f"({', '.join(RECIPES)}) whose model is pretrained, a name of timm's ({', '.join(HUBS)} too), or "
KINDS += "module:function that returns an nn.Module"


def is_timm_name(target: str) -> bool:
    """Whether timm builds a model of this name, or would look for it on a hub or in a folder."""
    return target.startswith(HUBS) or timm.is_model(target.partition(".")[0])


def is_function(target: str) -> bool:
    """Whether this reads as ``module:function`` or ``file.py:function``."""
    place, _, name = target.rpartition(":")
    is_module = all(part.isidentifier() for part in place.split("."))
    return name.isidentifier() and bool(place) and (is_module or place.endswith(".py"))


def program_kind(path: Path) -> str:
    """Return "TorchScript" or "torch.export" for a file that holds such a program, else nothing."""
    if not zipfile.is_zipfile(path):
        return ""
    with zipfile.ZipFile(path) as archive:
        inner = [name.partition("/")[2] for name in archive.namelist()]
    if any(name.startswith("code/") for name in inner):
        return "TorchScript"
    return "torch.export" if any(name.startswith("models/") for name in inner) else ""


def kept_epochs(run: Path) -> list[int]:
    """Return the epochs whose weights a run kept (``checkpoint.keep_every``), in order."""
    folders = (run / "model").glob("epoch-*/metadata.json")
    return sorted(int(file.parent.name.removeprefix("epoch-")) for file in folders)


def find(text: str, at: str | None) -> tuple[Path, Path | None, str, Path | None, str]:
    """Return path, run, epoch, export and kind of a target, as ``Target`` has them."""
    path = Path(text)
    run, (file, part) = path.parent.parent, split_part(text)
    is_run = path.is_dir() and (path / "recipe.yaml").is_file()
    found: tuple[Path, Path | None, str, Path | None, str]
    is_checkpoint = path in (run / "checkpoints" / "last", run / "checkpoints" / "best")
    if is_run and at not in (None, "last", "best"):
        kept = path / "model" / f"epoch-{at}"
        if not (kept / "metadata.json").is_file():
            there = ", ".join(map(str, kept_epochs(path))) or "none: set checkpoint.keep_every in its recipe"
            rule = f"last, best, or an epoch that {path} kept ({there})"
            raise ValueError(f"--at: got {at!r}; expected {rule}.")
        return kept, path, kept.name, kept, ""
    if is_run or (is_checkpoint and (run / "recipe.yaml").is_file()):
        run, name = (path, at or "last") if is_run else (run, path.name)
        export = run / "model" / name
        found = run, run, name, export if (export / "metadata.json").is_file() else None, ""
    elif path.is_dir() and (path / "metadata.json").is_file():
        above = path.resolve().parent.parent
        found = path, above if (above / "recipe.yaml").is_file() else None, path.resolve().name, path, ""
    elif path.is_file() and (kind := program_kind(path)):
        found = path, None, path.stem, None, kind
    elif file.is_file() and (file.suffix in RECIPES or is_weights(file)):
        found = path, None, "-".join(filter(None, (file.stem, part))), None, ""
    elif not path.exists() and (is_timm_name(text) or is_function(text)):
        found = path, None, text, None, "timm" if is_timm_name(text) else "function"
    else:
        got = "another folder" if path.is_dir() else f"a {path.suffix or 'plain'} file"
        near = nearest(text, timm.list_models(), 0.8)
        advice = f"Did you mean {near}?" if near else "Check the path."
        got, advice = (got, "Check the path.") if path.exists() else ("nothing", advice)
        raise ValueError(f"{path}: got {got}; expected {KINDS}. {advice}")
    if at is not None and not is_run:
        text = f"got {at!r} with {path}, one epoch already; expected a run folder. Leave it out."
        raise ValueError(f"--at: {text}")
    return found
