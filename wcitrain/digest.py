"""A short digest of tensors and plain values, which tells whether a result is known already."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def digest(parts: Iterable[object]) -> str:
    """Return 16 hex digits of every part: tensors by dtype, shape and bits, the rest by its ``repr``."""
    result = hashlib.blake2b(digest_size=8)
    for part in parts:
        if isinstance(part, Tensor):
            result.update(f"{part.dtype} {tuple(part.shape)}".encode())
            flat = part.detach().cpu().contiguous().reshape(-1)
            result.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
        else:
            result.update(repr(part).encode())
        result.update(b"\0")
    return result.hexdigest()
