"""The folder of an export, whole or not there, and checked: timm loads the same network from it."""

import functools
import importlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from wcitrain import architectures, files
from wcitrain.export.card import Facts, robustbench, write_card
from wcitrain.models import Classifier, load_exported
from wcitrain.preserve import kept_random_state
from wcitrain.recipe import Recipe

KEPT = ("classifier", "min_input_size")  # of timm's own configuration of a network
BUILDER = ("num_classes", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")  # not the network's


def export_model(
    run: Path,
    weights: Path,
    recipe: Recipe,
    at: str,
    shape: tuple[int, int, int],
    out: Path,
    *,
    onnx: bool = False,
    torch_export: bool = False,
    license: str | None = None,
    replace: bool = False,
) -> list[Path]:
    """Write the model that a run exported to ``weights`` for others, and return the files of ``out``.

    ``model.safetensors`` and ``config.json`` are what ``timm.create_model("local-dir:OUT", pretrained=True)``
    loads, ``modeling.py`` the architecture where timm has none such; ``README.md`` is the card and
    ``robustbench.json`` the entry; ``metadata.json`` is ours. ``model.onnx`` (opset as torch chooses) and
    ``model.pt2`` have the normalisation inside. All are compared with the model on random images.

    Args:
        run, recipe, at: Where the weights come from, for the card.
        shape: Channels, height and width of an image, before the model enlarges it.
        replace: Whether an export may be there already.

    Raises:
        ValueError: ``out`` may not be written, or what was written is not the same network: nothing is kept.
        ModuleNotFoundError: ``onnx`` without its packages.
    """
    refuse_taken(out, replace=replace)
    if onnx:
        _require_onnx()
    model, metadata = load_exported(weights), files.read_json(weights / "metadata.json")
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(x)
    partial = out.absolute().with_name(f".{out.absolute().name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        side = model.resize_inside
        config, origin = timm_config(model, metadata, (shape[0], side, side) if side else shape)
        for name in ("model.safetensors", "metadata.json"):
            shutil.copyfile(weights / name, partial / name)
        files.write_json(partial / "config.json", config)
        if config["architecture"] in architectures.default_cfgs:
            shutil.copyfile(architectures.__file__, partial / "modeling.py")
        compare(lambda: _load_by_timm(partial, side), x, logits, "timm")
        programs = ["model.pt2"] * torch_export + ["model.onnx"] * onnx
        for name in programs:
            write = _write_onnx if name == "model.onnx" else _write_program
            compare(functools.partial(write, model, x, partial / name), x, logits, name)
        facts = Facts(run, recipe, metadata, at)
        card = write_card(facts, config, origin, license, programs)
        (partial / "README.md").write_text(card, "utf-8")
        files.write_json(partial / "robustbench.json", robustbench(facts))
        _put(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sorted(out.iterdir())


def refuse_taken(out: Path, *, replace: bool) -> None:
    """Raise ValueError where ``out`` holds anything, but for an export that may be replaced."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    is_export = all((out / name).is_file() for name in ("config.json", "metadata.json", "README.md"))
    if not (replace and is_export):
        advice = "Give --force to replace it" if is_export else "Name another folder"
        what = "an export" if is_export else "another folder with files" if out.is_dir() else "a file"
        raise ValueError(f"{out}: got {what}; expected a new or empty folder. {advice}.")


def _put(partial: Path, out: Path) -> None:
    """Let the whole folder take its place; what is there leaves first and is removed last."""
    files.sync_folder(partial)
    former = partial.with_suffix(".replaced")
    if out.exists():
        shutil.rmtree(former, ignore_errors=True)
        os.rename(out, former)
    os.rename(partial, out)
    files.sync_folder(partial.parent)
    shutil.rmtree(former, ignore_errors=True)


def timm_config(
    model: Classifier, metadata: Mapping[str, str], shape: tuple[int, int, int]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of timm's ``config.json``, and timm's configuration of the weights before training.

    Mean, std and image size are those of training, and images are resized as there: to the whole square,
    bicubic. timm's own save would keep the origin's.
    """
    backbone: Any = model.backbone
    origin = dict(getattr(backbone, "pretrained_cfg", None) or {})
    given = {**getattr(backbone, "_model_args", {}), **json.loads(metadata["kwargs"])}
    arguments = {key: value for key, value in given.items() if key not in BUILDER}
    arguments["in_chans"] = shape[0]
    is_fixed = origin.get("fixed_input_size", False)
    if is_fixed:  # what timm built it for; another size may be allowed
        arguments.setdefault("img_size", list(origin["input_size"][-2:]))
    is_fixed &= not arguments.get("dynamic_img_size") and arguments.get("strict_img_size", True)
    name = origin.get("architecture") or metadata["architecture"].partition(".")[0]
    if metadata["stem"] == "cifar":
        name, arguments = "resnet_cifar_stem", {"backbone": name, **arguments}
    cfg = {key: origin[key] for key in KEPT if key in origin}
    cfg |= {
        "num_classes": backbone.num_classes,
        "input_size": shape,
        "fixed_input_size": is_fixed,
        "mean": model.mean.flatten().tolist(),
        "std": model.std.flatten().tolist(),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "pool_size": None,
        "first_conv": origin.get("first_conv") if shape[0] == 3 else None,  # timm would adapt it from RGB
    }
    config = {
        "architecture": name,
        "num_classes": backbone.num_classes,
        "num_features": getattr(backbone, "num_features", None),
        "label_names": json.loads(metadata["class_names"]),
        "model_args": arguments,
        "pretrained_cfg": cfg,
    }
    return config, origin


def compare(make: Callable[[], Callable[[Tensor], Tensor]], x: Tensor, logits: Tensor, where: str) -> None:
    """Raise ValueError unless what is made gives the logits [N, C] for images [N, *dims], and for one."""
    try:
        with torch.no_grad():
            made = make()
            pairs = [(made(x), logits), (made(x[:1]), logits[:1])]
    except Exception as error:  # of timm, torch or onnx, for networks that they do not take
        got = f"got {type(error).__name__} from {where} ({str(error).strip().partition(chr(10))[0]})"
        raise ValueError(f"export: {got}; expected the model. Leave that form out.") from error
    errors = [float((a - b).abs().max()) if a.shape == b.shape else math.inf for a, b in pairs]
    # Rounding of float32, in another order of operations.
    if not max(errors) <= 1e-5 * max(1.0, float(logits.abs().max())):
        got = f"got logits from {where} that differ by {max(errors):.2g}"
        raise ValueError(f"export: {got}; expected the model's. Nothing was written: please report it.")


def _load_by_timm(folder: Path, side: int | None) -> nn.Module:
    """Return the model as others load it, behind the size and the normalisation that the card says."""
    with kept_random_state(torch.device("cpu")):
        backbone = timm.create_model(f"local-dir:{folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(backbone)
    return Classifier(backbone, data["mean"], data["std"], resize_inside=side).eval()


def _write_program(model: nn.Module, x: Tensor, path: Path) -> nn.Module:
    """Write a program of torch.export for any number of images, and read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        torch.export.save(torch.export.export(model, (x,), dynamic_shapes=sizes), path)
        return torch.export.load(path).module()


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript"):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            rule = "the packages. pip install onnx onnxscript onnxruntime"
            raise ModuleNotFoundError(f"--onnx: got no {error.name}; expected {rule}") from error


def _write_onnx(model: nn.Module, x: Tensor, path: Path) -> Callable[[Tensor], Tensor]:
    """Write an ONNX file for any number of images, check it, and return what runs it.

    Without onnxruntime that is onnx's own reference implementation, which is slow.
    """
    onnx: Any = importlib.import_module("onnx")
    names: Any = {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch about itself
        sizes = ({0: torch.export.Dim("batch", min=1)},)
        torch.onnx.export(model, (x,), path, dynamo=True, dynamic_shapes=sizes, external_data=False,
                          verbose=False, **names)  # fmt: skip
    onnx.checker.check_model(str(path))
    try:
        session = importlib.import_module("onnxruntime").InferenceSession(str(path))
    except ModuleNotFoundError:
        session = importlib.import_module("onnx.reference").ReferenceEvaluator(str(path))
    return lambda images: torch.as_tensor(session.run(["logits"], {"images": images.numpy()})[0])
