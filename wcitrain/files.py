"""Files that are whole or not there: written through to the disk, then renamed into place."""

import io
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def write(path: Path, content: bytes) -> None:
    """Write ``content`` through to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace(path: Path, content: bytes) -> None:
    """Replace the file at ``path`` in one instant: it holds the former content or this one, never half."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial, content)
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_json(path: Path, document: Any) -> Path:
    """Replace the file at ``path`` by JSON and return the path; NaN and infinity become null."""
    replace(path, json.dumps(without_nan(document), indent=2).encode() + b"\n")
    return path


def save_arrays(path: Path, arrays: Mapping[str, Any]) -> Path:
    """Replace the file at ``path`` by an .npz of arrays and return the path."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)
    replace(path, content.getvalue())
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; ValueError with its name where it holds none."""
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: got {error}; expected a JSON object. Delete or restore it.") from error
    if not isinstance(document, dict):
        raise ValueError(f"{path}: got {document!r}; expected a JSON object. Delete or restore it.")
    return document


def without_nan(value: Any) -> Any:
    """Return what JSON keeps of ``value``, with null for NaN and infinity."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable; syncing a file alone does not."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
