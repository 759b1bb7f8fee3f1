"""Checkpoints that survive: saved atomically, resumed exactly, checked when read, nothing pickled.

A checkpoint is a folder of two files. ``tensors.safetensors`` holds every tensor under its place in the state
("optimizer.state[0].exp_avg"); ``state.json`` holds the rest of the tree and the digests of both files.

    last/       the newest checkpoint
    previous/   the one before, for the day that last/ is found damaged
    best/       the best by validation

What JSON cannot say is written as an object with one key that starts with "$":
``{"$tuple": [..]}``, ``{"$dict": [[key, value], ..]}``, ``{"$float": "nan"}``, ``{"$dtype": "float32"}``,
``{"$tensor": "its place"}``.
"""

import contextlib
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

FORMAT = 1  # raised when a reader of the old format would misread the new one
TENSORS = "tensors.safetensors"
STATE = "state.json"

# Every checkpoint by name, and where the one it replaces stands meanwhile. Only `previous` is kept.
OLDER = {"last": "previous", "best": ".best.replaced"}

# The dtypes that safetensors writes and torch copies, whatever their versions.
DTYPES = frozenset({
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool,
})  # fmt: skip


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or none that is intact could be read."""


def save_checkpoint(folder: Path, state: dict[str, Any], name: str = "last") -> None:
    """Write ``state`` to ``folder/name``; a crash or a full disk costs at most this one checkpoint.

    The new checkpoint is written and synced beside the old one, then takes its place by renames. An intact
    ``last`` becomes ``previous``; a damaged one is dropped, so that it never pushes out an intact
    ``previous``. ``best`` replaces the former ``best``. One process writes; needs about twice the size of the
    tensors in host memory.

    Args:
        folder: Where a run keeps its checkpoints, e.g. ``runs/x/checkpoints``; made when missing.
        state: Any tree of dict (str or int keys), list, tuple, None, bool, int, float, str and dense tensors.
            Types, dtypes and bits come back exactly, except that tensors come back on the CPU, contiguous and
            without a gradient, tensors that shared memory come back as copies, and an ``OrderedDict`` comes
            back as a ``dict``.
        name: ``"last"`` or ``"best"``.

    Raises:
        TypeError: A value cannot be saved; the message names its place. Nothing has been written.
        CheckpointError: The disk refused, e.g. because it is full. The earlier checkpoints are untouched.
    """
    _check_name(name)
    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, "", tensors)
    tensor_bytes = safetensors.torch.save(tensors)
    document = {"format": FORMAT, "tensors_digest": _digest(tensor_bytes), "state": tree}
    document["digest"] = _digest(_canonical(document))
    files = {TENSORS: tensor_bytes, STATE: _canonical(document)}

    partial = folder / f".{name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".*.partial"):  # left by a process that was killed
            shutil.rmtree(stale)
        partial.mkdir()
        for filename, content in files.items():
            _write(partial / filename, content)
        _sync_folder(partial)
        _swap_in(partial, folder / name, folder / OLDER[name])
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise _disk_error(folder / name, error, sum(map(len, files.values()))) from error


def load_checkpoint(folder: Path, name: str = "last") -> tuple[dict[str, Any], Path]:
    """Read the newest intact checkpoint: ``folder/last``, or with a warning ``folder/previous``.

    Args:
        folder: The folder that was given to ``save_checkpoint``.
        name: ``"last"`` or ``"best"``.

    Returns:
        The state, with all tensors on the CPU, and the folder it was read from.

    Warns:
        UserWarning: The newest checkpoint is missing or damaged and an older one is used; says why and its
            epoch (the value of ``state["epoch"]``).

    Raises:
        CheckpointError: Neither is intact; gives both reasons.
    """
    _check_name(name)
    newest, older = folder / name, folder / OLDER[name]
    try:
        return _read(newest), newest
    except CheckpointError as error:
        reason = str(error)
    try:
        state = _read(older)
    except CheckpointError as error:
        raise CheckpointError(
            f"load_checkpoint({newest}): got {reason}, and {error}; expected one intact checkpoint. "
            "Restore the folder from a copy, or start the run anew in another folder."
        ) from error
    warnings.warn(
        f"load_checkpoint({newest}): got {reason}; expected an intact checkpoint. "
        f"Going on from {older} (epoch {state.get('epoch', 'unknown')}).",
        stacklevel=2,
    )
    return state, older


def save_exported_model(
    folder: Path, state_dict: Mapping[str, torch.Tensor], metadata: dict[str, str]
) -> Path:
    """Write weights that ``timm.create_model(..., checkpoint_path=...)`` loads, and what is known about them.

    ``model.safetensors`` carries the metadata in its header too, so each file is replaced atomically on its
    own and a crash between the two leaves nothing that misleads. Its path is returned.

    Args:
        folder: e.g. ``runs/x/model``; made when missing.
        state_dict: The weights, under the names the timm model gives them.
        metadata: Plain text by name, e.g. architecture and accuracies; also written to ``metadata.json``.

    Raises:
        TypeError: A value cannot be saved; the message names its place. Nothing has been written.
        CheckpointError: The disk refused, e.g. because it is full. An earlier export is untouched.
    """
    for key, value in metadata.items():
        if type(value) is not str:
            raise TypeError(
                f"metadata{_step(key)}: got a {_type_name(value)}; expected a str. Convert it with str()."
            )
    tensors = {key: _copy(value, f"state_dict{_step(key)}") for key, value in state_dict.items()}
    files = {
        "model.safetensors": safetensors.torch.save(tensors, {"format": "pt", **metadata}),
        "metadata.json": json.dumps(metadata, indent=2).encode(),
    }
    partial = {filename: folder / f".{filename}.partial" for filename in files}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for filename, content in files.items():
            _write(partial[filename], content)
        for filename in files:
            os.replace(partial[filename], folder / filename)
        _sync_folder(folder)
    except OSError as error:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink()
        raise _disk_error(folder / "model.safetensors", error, sum(map(len, files.values()))) from error
    return folder / "model.safetensors"


# The tree and its JSON form.


def _encode(value: Any, place: str, tensors: dict[str, torch.Tensor]) -> Any:
    """Return the JSON form of ``value``, collect its tensors. A subclass would come back changed: refused."""
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, torch.dtype):
        return {"$dtype": str(value).removeprefix("torch.")}
    if isinstance(value, torch.Tensor):
        tensors[place] = _copy(value, place)
        return {"$tensor": place}
    if kind in (list, tuple):
        items = [_encode(item, f"{place}[{index}]", tensors) for index, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if kind in (dict, OrderedDict):
        for key in value:
            if type(key) not in (str, int):
                raise TypeError(
                    f"{place or 'state'}: got the key {key!r}, a {_type_name(key)}; expected str or int "
                    "keys. Rename the key before saving."
                )
        pairs = [
            (key, _encode(item, (place + _step(key)).removeprefix("."), tensors))
            for key, item in value.items()
        ]
        is_plain = all(type(key) is str and not key.startswith("$") for key, _ in pairs)
        return dict(pairs) if is_plain else {"$dict": [list(pair) for pair in pairs]}
    raise TypeError(
        f"{place or 'state'}: got a {_type_name(value)}; expected None, bool, int, float, str, a tensor, or "
        "a dict, list or tuple of these. Convert it before saving, e.g. with float(), .tolist() or "
        "torch.from_numpy()."
    )


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
    if tag == "$dtype":
        return getattr(torch, content)
    if tag == "$tensor":
        return tensors[content]
    if tag == "$tuple":
        return tuple(_decode(item, tensors) for item in content)
    if tag == "$dict":
        return {key: _decode(item, tensors) for key, item in content}
    return {key: _decode(item, tensors) for key, item in value.items()}


def _step(key: str | int) -> str:
    """Return how ``key`` continues a place: ``.name`` or ``[...]``; two places never share a spelling."""
    # safetensors keeps the tensor name "__metadata__" for itself.
    return (
        f".{key}" if isinstance(key, str) and key.isidentifier() and key != "__metadata__" else f"[{key!r}]"
    )


def _copy(tensor: Any, place: str) -> torch.Tensor:
    """Return an independent, contiguous copy on the CPU; refuse what a safetensors file cannot hold."""
    # Subclasses (DTensor, fake tensors, ...) are more than their numbers; a Parameter is not.
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        raise TypeError(
            f"{place}: got a {_type_name(tensor)}; expected a plain tensor. Convert it before saving."
        )
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.dtype not in DTYPES:
        raise TypeError(
            f"{place}: got a {tensor.dtype} tensor ({tensor.layout}, on {tensor.device}); expected a dense "
            "tensor of a real dtype that safetensors can hold. Convert it before saving, e.g. with "
            "torch.view_as_real()."
        )
    return tensor.detach().resolve_neg().to("cpu", memory_format=torch.contiguous_format, copy=True)


def _type_name(value: object) -> str:
    """Return the type of ``value`` as a user would import it."""
    kind = type(value)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


# The files.


def _read(path: Path) -> dict[str, Any]:
    """Return the state in the checkpoint folder ``path``; ``CheckpointError`` says what is wrong with it."""
    if not path.is_dir():
        raise CheckpointError(f"{path.name}: missing")
    content = {}
    for filename in (STATE, TENSORS):
        try:
            content[filename] = (path / filename).read_bytes()
        except FileNotFoundError:
            raise CheckpointError(f"{path.name}/{filename}: missing") from None
        except OSError as error:
            raise CheckpointError(f"{path.name}/{filename}: unreadable ({error})") from error
    try:
        document = json.loads(content[STATE])
        is_intact = isinstance(document, dict) and document.pop("digest", None) == _digest(
            _canonical(document)
        )
    except ValueError:
        raise CheckpointError(f"{path.name}/{STATE}: damaged: not JSON") from None
    if not is_intact:
        raise CheckpointError(f"{path.name}/{STATE}: damaged: digest differs")
    if (version := document["format"]) != FORMAT:
        raise CheckpointError(
            f"{path.name}/{STATE}: written in format {version}, this version reads {FORMAT}"
        )
    if document["tensors_digest"] != _digest(content[TENSORS]):
        raise CheckpointError(f"{path.name}/{TENSORS}: damaged: digest differs")
    return _decode(document["state"], safetensors.torch.load(content[TENSORS]))


def _swap_in(partial: Path, newest: Path, older: Path) -> None:
    """Rename ``partial`` to ``newest``, the former to ``older``; one of the two is always intact."""
    folder = newest.parent
    if newest.exists():
        try:
            _read(newest)
        except CheckpointError:
            shutil.rmtree(newest)
        else:
            if older.exists():
                shutil.rmtree(older)
            os.rename(newest, older)
            _sync_folder(folder)
    os.rename(partial, newest)
    _sync_folder(folder)
    if older.name != "previous" and older.exists():
        shutil.rmtree(older)


def _write(path: Path, content: bytes) -> None:
    """Write ``content`` through to the disk and check that it arrived."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    if (size := path.stat().st_size) != len(content):
        raise OSError(f"{path.name} has {size} bytes after writing {len(content)}")


def _sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable; syncing a file alone does not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _disk_error(target: Path, error: OSError, num_bytes: int) -> CheckpointError:
    """Return the error that says where, how much was needed, how much is free, and what to do."""
    existing = next(parent for parent in target.absolute().parents if parent.exists())
    free = shutil.disk_usage(existing).free
    return CheckpointError(
        f"{target}: got {type(error).__name__} ({error}); expected to write {num_bytes / 1e6:.1f} MB, "
        f"{free / 1e6:.1f} MB are free. Free some space or check the permissions, then resume: "
        "what was saved before is untouched."
    )


def _check_name(name: str) -> None:
    """Refuse a name that is not in ``OLDER``."""
    if name not in OLDER:
        raise ValueError(
            f"name: got {name!r}; expected one of {', '.join(map(repr, OLDER))}. Choose one of these."
        )


def _digest(content: bytes) -> str:
    """Return the blake2b digest of ``content``, 256 bits in hex."""
    return hashlib.blake2b(content, digest_size=32).hexdigest()


def _canonical(document: dict[str, Any]) -> bytes:
    """Return the one JSON text of ``document``; reading it and writing it again gives the same bytes."""
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")
