"""Where training starts: weights of another task, fitted to the model by timm's rules, and said.

A head for other classes is new, input channels are summed or shared out, position tables are resized, and the
normalisation is the one that the weights were trained behind.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv, load_checkpoint
from torch import Tensor, nn

from wcitrain.checkpoint import class_names_in, metadata_in
from wcitrain.files import read_json
from wcitrain.models import Classifier, by_channel
from wcitrain.text import name_some
from wcitrain.weights import OF_TIMM, in_order, load_into, read_weights, weights_of


def start_from(
    model: Classifier,
    path: str,
    *,
    match: str = "name",
    class_names: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> None:
    """Load weights into a model that was just built, and print what of them it does not take as they are.

    Args:
        path: See ``weights.read_weights``: a file, a run, an export, ``"package:NAME/FILE"``.
        match: ``"order"`` for the same network under other names, see ``weights.in_order``.
        class_names: Of the data. Where the weights have names, rows of the head go by name; the head is new
            for other classes, and where the names are unknown, for another number.
        mean, std: What the recipe asks for; None: what the weights are known to expect, else the model's.

    Raises:
        ValueError: Weights of another model, by name; a normalisation that contradicts theirs.
    """
    file, _ = weights_of(path)
    _normalise(model, file, path, {"mean": mean, "std": std})
    if file.suffix == ".npz":  # of JAX: timm alone knows the names
        load_checkpoint(model.backbone, str(file))
        return
    weights = read_weights(path)
    if match == "order":
        weights = in_order(model.backbone, weights, path)
    theirs = class_names_in(file)
    rows = None
    if theirs and class_names and sorted(theirs) == sorted(class_names):
        rows = [theirs.index(name) for name in class_names]
    is_new = bool(theirs and class_names) and rows is None

    def fit(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        return fitted(model.backbone, given, rows=rows, has_new_head=is_new)

    load_into(model.backbone, weights, path, {"mean": model.mean, "std": model.std}, fit)


def fitted(
    backbone: nn.Module, given: dict[str, Tensor], *, rows: list[int] | None, has_new_head: bool
) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights with the shapes of a timm model's own where timm's rules say how, and what was done.

    ``rows``: those of the head, in the order of the model's classes. Equal to what timm makes of them when it
    builds the model with these weights as its pretrained ones.
    """
    own, notes = backbone.state_dict(), []
    config: Any = getattr(backbone, "pretrained_cfg", None) or {}
    given, in_chans = dict(given), set[int]()
    for name in _names(config.get("first_conv")):
        key = f"{name}.weight"
        if key in own and key in given and given[key].ndim == own[key].ndim == 4:
            theirs, ours = given[key].shape[1], own[key].shape[1]
            if theirs != ours:
                in_chans.add(theirs)
                gray = given[key].sum(1, keepdim=True).expand(-1, ours, -1, -1) / ours
                given[key] = adapt_input_conv(ours, given[key]) if theirs == 3 else gray
                notes.append(f"{key} for {ours} channels in place of {theirs}")
    heads = [key for name in _head_names(backbone, config) for key in own if key.startswith(f"{name}.")]
    is_other = any(key not in given or given[key].shape != own[key].shape for key in heads)
    if has_new_head or is_other:
        given |= {key: own[key] for key in heads}
        notes.append(f"nothing of the head ({name_some(heads)}), which is new: the classes are others")
    elif rows is not None and rows != sorted(rows):
        given |= {key: given[key][rows] for key in heads}
        notes.append("the head's rows by the names of the classes")
    if any(key in own and t.shape != own[key].shape for key, t in given.items()):
        resize = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
        if resize is not None:
            before = {key: t.shape for key, t in given.items()}
            given = resize(given, backbone)
            resized = [key for key, t in given.items() if before.get(key, t.shape) != t.shape]
            notes += [f"resized {name_some(resized, 3)}"] if resized else []
    return given, notes


def _head_names(backbone: Any, config: Any) -> list[str]:
    """Return the names of the layers that give logits, of which distilled models have two."""
    head = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
    found = head if isinstance(head, tuple | list) else (head,)
    names = [name for name, module in backbone.named_modules() if any(module is one for one in found)]
    return names or _names(config.get("classifier"))


def _names(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


@torch.no_grad()
def _normalise(model: Classifier, file: Path, source: str, given: dict[str, Sequence[float] | None]) -> None:
    """Give the model the normalisation that its weights are known to expect; refuse a recipe's other one."""
    of_ours, config = metadata_in(file), file.parent / "config.json"
    has_config = file.name in OF_TIMM and config.is_file()
    of_timm = read_json(config).get("pretrained_cfg", {}) if has_config else {}
    for key, own in {"mean": model.mean, "std": model.std}.items():
        known = json.loads(of_ours[key]) if key in of_ours else of_timm.get(key)
        if known is None:
            continue
        value = torch.tensor(by_channel(key, None, known, own.shape[1])).to(own).view_as(own)
        if given[key] is not None and not torch.allclose(own, value, atol=1e-4):
            rule = f"{known}, behind which the weights of {source} were trained. Remove it"
            raise ValueError(f"model.{key}: got {list(given[key] or ())}; expected {rule}.")
        own.copy_(value)
