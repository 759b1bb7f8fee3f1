"""Which tensors are layers.

The index sums over layers, so what counts as one is part of its definition. The default, ``"weights"``, takes the weight
tensors of convolutions and linear maps (two or more dimensions); biases, normalisation scales and shifts, embeddings,
class and position tokens are not layers (Xu & Zhang speak of "weight matrices" only).
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import cast

import torch
from torch import Tensor, nn

LAYER_CHOICES = ("weights", "weights+biases", "all")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module inside DistributedDataParallel, DataParallel and ``torch.compile`` wrappers."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = cast(nn.Module, model._orig_mod if hasattr(model, "_orig_mod") else model.module)
    return model


def select_layers(model: nn.Module, layers: str = "weights") -> dict[str, nn.Parameter]:
    """Return the tensors that count as layers, by the user's own names, in the model's own order.

    Args:
        model: Any module. Frozen parameters are left out; a tied tensor appears once, under its first name.
        layers: ``"weights"`` (default: named ``weight`` or ``*_weight``, two or more dimensions, no embedding);
            ``"weights+biases"`` (those and every bias of a module that has such a weight, each its own layer);
            ``"all"`` (every trainable tensor is its own layer); or a glob over parameter names such as ``"*layer4*weight"``.

    Raises:
        ValueError: Nothing was selected; the message lists some names that exist.
    """
    model = unwrapped(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if layers == "all":
        chosen = set(trainable)
    elif layers in ("weights", "weights+biases"):
        embeddings = {
            id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)
        }
        chosen = {
            name
            for name, p in trainable.items()
            if p.ndim >= 2 and name.rpartition(".")[2].endswith("weight") and id(p) not in embeddings
        }
        if layers == "weights+biases":
            owners = {name.rpartition(".")[0] for name in chosen}
            chosen |= {
                name
                for name in trainable
                if name.rpartition(".")[0] in owners and name.rpartition(".")[2].endswith("bias")
            }
    else:
        chosen = {name for name in trainable if fnmatchcase(name, layers)}
    selected = {name: p for name, p in trainable.items() if name in chosen}
    if not selected:
        some = ", ".join(list(trainable)[:6]) or "none at all: is everything frozen?"
        raise ValueError(
            f"layers: got {layers!r}, which selects no trainable tensor; expected one of {', '.join(LAYER_CHOICES)} "
            f"or a glob over parameter names. Trainable names begin with: {some}."
        )
    return selected


def squared_norms(layers: Mapping[str, Tensor]) -> Tensor:
    """Return ``a_l = ||W_l||_F^2`` as a float64 tensor [L] (float32 on devices without float64), no graph attached."""
    tensors = [p.detach() for p in layers.values()]
    return wide(torch.stack(torch._foreach_norm([t.float() if t.dtype.itemsize < 4 else t for t in tensors]))).square()


def sizes(layers: Mapping[str, Tensor]) -> Tensor:
    """Return ``d_l``, the number of elements of each layer, as a tensor [L] on the layers' device."""
    first = next(iter(layers.values()))
    return wide(torch.tensor([p.numel() for p in layers.values()], device=first.device, dtype=torch.float32))


def dots(left: Sequence[Tensor], right: Sequence[Tensor | None]) -> Tensor:
    """Return the inner products ``<left_l, right_l>`` [L], summed in float64; a missing tensor counts as zero."""
    zero = torch.zeros((), device=left[0].device)
    return torch.stack(
        [wide(zero) if b is None else (a * b).sum(dtype=wide(zero).dtype) for a, b in zip(left, right, strict=True)]
    )


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float64 where the device has it (Apple's MPS does not), for sums that must not lose digits."""
    return x if x.device.type == "mps" else x.double()
