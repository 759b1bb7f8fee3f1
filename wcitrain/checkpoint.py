"""Checkpoints that survive: saved atomically, resumed exactly, checked when read, nothing pickled.

A checkpoint is a folder of two files. ``tensors.safetensors`` holds every tensor under its place in the state
("optimizer.state[0].exp_avg"); ``state.json`` holds the rest of the tree and the digests of both files.

    last/       the newest checkpoint
    previous/   the one before, for the day that last/ is found damaged
    best/       the best by validation

What JSON cannot say is written as an object with one key that starts with "$":
``{"$tuple": [..]}``, ``{"$dict": [[key, value], ..]}``, ``{"$float": "nan"}``, ``{"$tensor": "its place"}``.
"""

import hashlib
import json
import math
import os
import shutil
import warnings
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from wcitrain import files

FORMAT = 1  # raised when a reader of the old format would misread the new one
TENSORS, STATE = "tensors.safetensors", "state.json"

# Every checkpoint by name, and where the one it replaces stands meanwhile. Only `previous` is kept.
OLDER = {"last": "previous", "best": ".best.replaced"}


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that is intact could be read."""

    exit_status = 1

    @classmethod
    def of_disk(cls, target: Path, error: OSError) -> "CheckpointError":
        """Return the error for a target that the disk refused."""
        advice = "Free some space or check the permissions, then resume: what was saved before is untouched."
        return cls(f"{target}: got {error}; expected a disk that takes it. {advice}")


def save_checkpoint(folder: Path, state: dict[str, Any], name: str = "last") -> None:
    """Write ``state`` to ``folder/name``; a crash or a full disk costs at most this one checkpoint.

    The new checkpoint is written and synced beside the old one, then takes its place by renames. An intact
    ``last`` becomes ``previous``; a damaged one is dropped, so that it never pushes out an intact
    ``previous``. One process writes; needs about twice the size of the tensors in host memory.

    ``state`` is any tree of dict (str or int keys), list, tuple, None, bool, int, float, str and dense
    tensors. Types, dtypes and bits come back exactly, except that tensors come back on the CPU, contiguous,
    apart from each other and without a gradient, and an ``OrderedDict`` as a ``dict``.

    Raises:
        TypeError: A value cannot be saved; the message names its place. Nothing has been written.
        CheckpointError: The disk refused, e.g. because it is full. The earlier checkpoints are untouched.
    """
    newest, older, partial = folder / name, folder / OLDER[name], folder / f".{name}.partial"
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    tensor_bytes = safetensors.torch.save(tensors)
    document = {"format": FORMAT, "tensors_digest": _digest(tensor_bytes), "state": tree}
    document["digest"] = _digest(_canonical(document))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.partial"):  # left by a process that was killed
            shutil.rmtree(stale)
        partial.mkdir()
        files.write(partial / TENSORS, tensor_bytes)
        files.write(partial / STATE, _canonical(document))
        files.sync_folder(partial)
        if newest.exists():  # from here on one of newest and older is intact
            try:
                _read(newest)
            except CheckpointError:
                shutil.rmtree(newest)
            else:
                if older.exists():
                    shutil.rmtree(older)
                os.rename(newest, older)
                files.sync_folder(folder)
        os.rename(partial, newest)
        files.sync_folder(folder)
        if older.name != "previous" and older.exists():
            shutil.rmtree(older)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError.of_disk(newest, error) from error


def load_checkpoint(folder: Path, name: str = "last") -> tuple[dict[str, Any], Path]:
    """Read the newest intact checkpoint: ``folder/last``, or with a warning ``folder/previous``.

    Returns the state, with all tensors on the CPU, and the folder it was read from; raises
    ``CheckpointError`` with both reasons where neither is intact.
    """
    reasons: list[str] = []
    for source in (folder / name, folder / OLDER[name]):
        try:
            state = _read(source)
        except CheckpointError as error:
            reasons.append(str(error))
            continue
        if reasons:
            advice = f"Going on from {source} (epoch {state.get('epoch', 'unknown')})."
            text = f"got {reasons[0]}; expected an intact checkpoint. {advice}"
            warnings.warn(f"load_checkpoint({folder / name}): {text}", stacklevel=2)
        return state, source
    text = f"got {', and '.join(reasons)}; expected one intact checkpoint. Restore the folder from a copy,"
    raise CheckpointError(f"load_checkpoint({folder / name}): {text} or start anew in another folder.")


def save_exported_model(
    folder: Path, state_dict: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> Path:
    """Write weights that ``timm.create_model(..., checkpoint_path=...)`` loads, and what is known about them.

    ``model.safetensors``, whose path is returned, carries the content of ``metadata.json`` in its header too,
    so a crash between the two files leaves nothing that misleads.

    Raises:
        TypeError: A tensor cannot be saved; the message names it. Nothing has been written.
        CheckpointError: The disk refused, e.g. because it is full.
    """
    tensors = {key: _copy(value, f"state_dict{_step(key)}") for key, value in state_dict.items()}
    path = folder / "model.safetensors"
    try:
        files.replace(path, safetensors.torch.save(tensors, {"format": "pt", **metadata}))
        files.replace(folder / "metadata.json", json.dumps(metadata, indent=2).encode())
    except OSError as error:
        raise CheckpointError.of_disk(path, error) from error
    return path


def metadata_in(path: Path) -> dict[str, str]:
    """Return what an export's folder or a ``.safetensors`` file says of its weights; nothing for others."""
    try:
        if path.is_dir():
            return dict(json.loads((path / "metadata.json").read_text("utf-8")))
        with safetensors.safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, ValueError, TypeError, safetensors.SafetensorError):
        return {}  # damage is named where the weights are read


def class_names_in(path: Path) -> tuple[str, ...] | None:
    """Return the class names that an export's folder or a ``.safetensors`` file carries; None for none."""
    try:
        return tuple(json.loads(metadata_in(path)["class_names"]))
    except (KeyError, ValueError, TypeError):
        return None


# ---- the tree and its JSON form ----------------------------------------------------------------------------


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the JSON form of ``value``, collect its tensors. A subclass would come back changed: refused."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.Tensor):
        tensors[place] = _copy(value, place)
        return {"$tensor": place}
    if kind in (list, tuple):
        items = [_encode(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind not in (dict, OrderedDict):
        raise _unsavable(place, kind)
    pairs = []
    for key, item in value.items():
        if type(key) not in (str, int):
            raise _unsavable(place, f"the key {key!r}")
        pairs.append([key, _encode(item, (place + _step(key)).removeprefix("."), tensors)])
    is_plain = all(type(key) is str and not key.startswith("$") for key, _ in pairs)
    return dict(pairs) if is_plain else {"$dict": pairs}


def _decode(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """Return what ``_encode`` was given."""
    if isinstance(value, list):
        return [_decode(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    tag = next(iter(value)) if len(value) == 1 else ""
    content: Any = value.get(tag)
    if tag == "$float":
        return float(content)
    if tag == "$tensor":
        return tensors[content]
    if tag == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    pairs = content if tag == "$dict" else value.items()
    return {key: _decode(item, tensors) for key, item in pairs}


def _step(key: str | int) -> str:
    """Return how ``key`` continues a place: ``.name`` or ``[...]``; two places never share a spelling."""
    # safetensors keeps the tensor name "__metadata__" for itself.
    is_plain = isinstance(key, str) and key.isidentifier() and key != "__metadata__"
    return f".{key}" if is_plain else f"[{key!r}]"


def _copy(tensor: Any, place: str) -> torch.Tensor:
    """Return an independent, contiguous copy on the CPU; refuse what a safetensors file cannot hold."""
    # Subclasses (DTensor, fake tensors, ...) are more than their numbers; a Parameter is not.
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise _unsavable(place, type(tensor))
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_complex() or tensor.is_quantized:
        raise _unsavable(place, f"a {tensor.dtype} tensor ({tensor.layout}, on {tensor.device})")
    return tensor.detach().resolve_neg().to("cpu", memory_format=torch.contiguous_format, copy=True)


def _unsavable(place: str, got: object) -> TypeError:
    """Return the error for a value that would not come back as it was."""
    rule = "None, bool, int, float, str, a dense real tensor, or a list, tuple or dict (keys: str, int)"
    return TypeError(f"{place}: got {got}; expected {rule} of these. Convert it before saving.")


# ---- the files ---------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any]:
    """Return the state in the checkpoint folder ``path``; ``CheckpointError`` says what is wrong with it."""
    try:
        written, tensor_bytes = (path / STATE).read_bytes(), (path / TENSORS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path.name}: {error}") from error
    try:
        document = json.loads(written)
        is_intact = document.pop("digest") == _digest(_canonical(document))
    except (ValueError, TypeError, KeyError, AttributeError):  # not JSON, or not an object with a digest
        is_intact = False
    if not is_intact:
        raise CheckpointError(f"{path.name}/{STATE}: damaged: digest differs")
    if document["format"] != FORMAT:
        text = f"written in format {document['format']}, this version reads {FORMAT}"
        raise CheckpointError(f"{path.name}/{STATE}: {text}")
    if document["tensors_digest"] != _digest(tensor_bytes):
        raise CheckpointError(f"{path.name}/{TENSORS}: damaged: digest differs")
    return _decode(document["state"], safetensors.torch.load(tensor_bytes))


def _digest(content: bytes) -> str:
    """Return the blake2b digest of ``content``, 256 bits in hex."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def _canonical(document: dict[str, Any]) -> bytes:
    """Return the one JSON text of ``document``; reading it and writing it again gives the same bytes."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
