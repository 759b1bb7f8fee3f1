"""Weights of other tools: a state dict from a file, put into a model that it must fit to the last tensor."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor

from wcitrain.models import Classifier

UNREADABLE = (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError, ValueError)


def read_weights(path: Path) -> Mapping[str, Tensor]:
    """Return the state dict in a file: bare, or under ``model`` or ``state_dict``, without ``module.``.

    Nothing in the file is executed (``weights_only=True``).
    """
    try:
        if path.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        text = f"got a file that torch cannot read as weights alone ({str(error).splitlines()[0]})"
        advice = "Save one with torch.save(model.state_dict(), path)."
        raise ValueError(f"{path}: {text}; expected a state dict. {advice}") from error
    for key in ("model", "state_dict"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    is_mapping = isinstance(content, Mapping)
    if not (is_mapping and content and all(isinstance(value, Tensor) for value in content.values())):
        got = f"keys {', '.join(map(str, [*content][:5]))}" if is_mapping else f"a {type(content).__name__}"
        rule = "a state dict, bare or under 'model' or 'state_dict'. Save model.state_dict()."
        raise ValueError(f"{path}: got {got}; expected {rule}")
    return {name.removeprefix("module."): value for name, value in content.items()}


def load_weights(model: Classifier, weights: Mapping[str, Tensor], source: str) -> None:
    """Load weights of the classifier or its backbone, and refuse any that do not fit, normalisation too."""
    is_whole = any(name.startswith("backbone.") for name in weights)
    module = model if is_whole else model.backbone
    normalisation = ("mean", "std") if is_whole else ()
    given = {name: value for name, value in weights.items() if name not in normalisation}
    expected = module.state_dict()
    problems = {
        "missing": [name for name in expected if name not in given],
        "unexpected": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(value.shape)}"
            for name, value in expected.items()
            if name in given and given[name].shape != value.shape
        ],
    }
    if any(problems.values()):
        shown = "; ".join(
            f"{len(names)} {what} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for what, names in problems.items()
            if names
        )
        text = f"got weights that do not fit the recipe's model: {shown}; expected all of them to."
        advice = "Correct the recipe's model section (name, stem, kwargs) or its data (number of classes)."
        raise ValueError(f"{source}: {text} {advice}")
    for name in normalisation:
        own = cast(Tensor, getattr(model, name)).flatten()
        other = weights.get(name, own).flatten().to(own)
        if len(other) not in (1, len(own)) or not torch.allclose(other, own, rtol=1e-4, atol=0):
            text = f"got weights for images normalised with {name} {other.tolist()}"
            rule = f"{own.tolist()}, as the recipe's model has. Set model.{name} in the recipe."
            raise ValueError(f"{source}: {text}; expected {rule}")
    module.load_state_dict(given)
