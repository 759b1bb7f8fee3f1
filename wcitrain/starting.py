"""Where training starts: weights of another task, fitted to the model by timm's rules, and said.

A head for other classes is new, input channels are summed or shared out, position tables are resized, and the
normalisation is the one that the weights were trained behind.
"""

import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from timm.models import load_checkpoint
from torch import Tensor, nn

from wcitrain.checkpoint import class_names_in, metadata_in
from wcitrain.files import read_json
from wcitrain.models import Classifier, by_channel
from wcitrain.text import name_some
from wcitrain.weights import OF_TIMM, by_prefix, in_order, load_into, read_weights, weights_of


def start_from(
    model: Classifier,
    path: str,
    *,
    match: str = "name",
    class_names: Sequence[str] = (),
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    is_exact: bool = False,
) -> None:
    """Load weights into a model that was just built, and print what of them it does not take as they are.

    Args:
        path: See ``weights.read_weights``: a file, a run, an export, ``"package:NAME/FILE"``.
        match: ``"order"`` for the same network under other names, see ``weights.in_order``.
        class_names: Of the data. Where the weights have names, rows of the head go by name; the head is new
            for other classes, and where the names are unknown, for another number.
        mean, std: What the recipe asks for; None: what the weights are known to expect, else the model's.
        is_exact: Refuse weights that have to be fitted: what is measured is the model that they are.

    Raises:
        ValueError: Weights of another model, by name; a normalisation that contradicts theirs.
    """
    file, _ = weights_of(path)
    normalise(model, known_normalisation(file), path, {"mean": mean, "std": std})
    if file.suffix == ".npz" and match == "name":  # of JAX: timm alone knows the names
        load_checkpoint(model.backbone, str(file))
        return
    weights = read_weights(path)
    if match == "order":
        weights = in_order(model.backbone, weights, path)
    elif not is_exact and not by_prefix(weights, model.backbone.state_dict()):
        weights = by_timms_names(model.backbone, weights)
    theirs = class_names_in(file)
    rows = None
    if theirs and class_names and sorted(theirs) == sorted(class_names):
        rows = [theirs.index(name) for name in class_names]
    is_new = bool(theirs and class_names) and rows is None

    def fit(given: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        return fitted(model.backbone, given, model.mean.numel(), rows=rows, has_new_head=is_new)

    constants = {"mean": model.mean, "std": model.std}
    load_into(model.backbone, weights, path, constants, None if is_exact else fit)


def fitted(
    backbone: nn.Module,
    given: dict[str, Tensor],
    in_chans: int,
    *,
    rows: list[int] | None,
    has_new_head: bool,
) -> tuple[dict[str, Tensor], list[str]]:
    """Return weights with the shapes of a timm model's own where timm's rules say how, and what was done.

    ``rows``: those of the head, in the order of the model's classes. Equal to what timm makes of them when it
    builds the model with these weights as its pretrained ones.
    """
    own, notes = backbone.state_dict(), []
    config: Any = getattr(backbone, "pretrained_cfg", None) or {}
    if any(key not in own or t.shape != own[key].shape for key, t in given.items()):
        before, given = given, filtered(backbone, given)
        resized = [key for key, t in given.items() if key in before and before[key].shape != t.shape]
        renamed = [key for key in given if key not in before]
        notes += [f"resized {name_some(resized, 3)}"] if resized else []
        notes += [f"by timm's names {name_some(renamed, 3)}"] if renamed else []
    for name in _names(config.get("first_conv")):
        key = f"{name}.weight"
        if key in own and key in given and given[key].ndim == own[key].ndim == 4:
            theirs = given[key].shape[1] * in_chans / own[key].shape[1]  # of an image: some stems fold pixels
            if theirs != in_chans and theirs.is_integer():
                given[key] = _for_channels(given[key], int(theirs), in_chans)
                notes.append(f"{key} for {in_chans} channels in place of {int(theirs)}")
    heads = [key for name in _head_names(backbone, config) for key in own if key.startswith(f"{name}.")]
    is_other = any(key not in given or given[key].shape != own[key].shape for key in heads)
    if has_new_head or is_other:
        given |= {key: own[key] for key in heads}
        notes.append(f"nothing of the head ({name_some(heads)}), which is new: the classes are others")
    elif rows is not None and rows != sorted(rows):
        given |= {key: given[key][rows] for key in heads}
        notes.append("the head's rows by the names of the classes")
    return given, notes


def filtered(backbone: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what timm's filter for this architecture makes of weights: its names, its sizes of tables."""
    change = getattr(sys.modules[type(backbone).__module__], "checkpoint_filter_fn", None)
    try:
        return dict(given) if change is None else dict(change(dict(given), backbone))
    except (RuntimeError, TypeError, LookupError, ValueError, AssertionError):
        return dict(given)  # what does not fit is named where it is compared


def by_timms_names(backbone: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return weights under timm's names where its filter knows those of the file, such as a paper's own."""
    own = backbone.state_dict().keys()
    parts = {name.rpartition("/")[0]: {} for name in weights}  # type: dict[str, dict[str, Tensor]]
    for name, tensor in weights.items():
        home, _, key = name.rpartition("/")
        parts[home][key.removeprefix("module.")] = tensor
    for home, given in parts.items():
        renamed = filtered(backbone, given)
        if len(own & renamed.keys()) > len(own) / 2 > len(own & given.keys()):
            print(f"{home or 'weights'}: under other names, which timm knows", flush=True)
            return renamed
    return weights


def _for_channels(weight: Tensor, theirs: int, ours: int) -> Tensor:
    """Return a first convolution [O, k·theirs, h, w] for other channels: one is their sum, more repeat them.

    Repeated ones are scaled by theirs/ours; as timm's ``adapt_input_conv``. ``k``: pixels that a stem folds
    into channels.
    """
    apart = weight.float().unflatten(1, (-1, theirs))  # [O, k, theirs, h, w]
    if ours == 1:
        return apart.sum(2).to(weight)
    repeated = apart.repeat(1, 1, math.ceil(ours / theirs), 1, 1)[:, :, :ours] * (theirs / ours)
    return repeated.flatten(1, 2).to(weight)


def _head_names(backbone: Any, config: Any) -> list[str]:
    """Return the names of the layers that give logits, of which distilled models have two."""
    modules = dict(backbone.named_modules())
    if names := [name for name in _names(config.get("classifier")) if name in modules]:
        return names
    head = backbone.get_classifier() if hasattr(backbone, "get_classifier") else None
    return [name for name, module in modules.items() if module is head]


def _names(value: str | Sequence[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def known_normalisation(file: Path) -> dict[str, list[float]]:
    """Return the ``mean`` and ``std`` that weights are known to expect: from our export, or timm's folder."""
    of_ours, config = metadata_in(file), file.parent / "config.json"
    has_config = file.name in OF_TIMM and config.is_file()
    known = read_json(config).get("pretrained_cfg", {}) if has_config else {}
    known |= {key: json.loads(of_ours[key]) for key in ("mean", "std") if key in of_ours}
    return {key: known[key] for key in ("mean", "std") if key in known}


@torch.no_grad()
def normalise(
    model: Classifier,
    known: Mapping[str, Sequence[float]],
    source: str,
    given: Mapping[str, Sequence[float] | None],
) -> None:
    """Give the model the normalisation that its weights are known to expect; refuse a recipe's other one."""
    for key, value in known.items():
        own = getattr(model, key)
        theirs = torch.tensor(by_channel(key, None, value, own.shape[1])).to(own).view_as(own)
        if given[key] is not None and not torch.allclose(own, theirs, atol=1e-4):
            rule = f"{list(value)}, behind which the weights of {source} were trained. Remove it"
            raise ValueError(f"model.{key}: got {list(given[key] or ())}; expected {rule}.")
        own.copy_(theirs)
