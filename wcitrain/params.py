"""Which tensors are layers: part of the definition of the index, which sums over them.

By default the weights of convolutions, linear, attention and recurrent maps, told by the module that owns
them. Biases, normalisation scales and shifts, embeddings, class and position tokens are not layers (Xu &
Zhang speak of "weight matrices" only). Weight-standardised convolutions count by the tensor they store, the
maps of low-rank adapters as two layers, the factors that are trained (DESIGN.md).
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from wcitrain.text import name_some

MAPS = (_ConvNd, nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
NOT_MAPS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)
# Parts of fused projections, by the ends of their names, and timm's attributes of modules with other rows.
FUSED = {"qkv.": "qkv", "in_proj_": "qkv", "qk.": "qk", "kv.": "kv"}
OTHERWISE = ("head_first", "key_dim", "dim_out_qk")
Parts = Mapping[str, Sequence[str]]  # of the tensors that are cut, by their names
Center = Literal["origin", "initial"]  # what a norm is a distance from: 0, or the weights before training


class Layers(Mapping[str, Tensor]):
    """The tensors that count as layers, by name, and every sum over them.

    A tensor may be cut into equal ``parts`` along its first dimension, each a layer (``"qkv.weight[q]"``):
    ``layers[name]`` is then a view, ``layers.tensors`` the whole tensors.
    """

    def __init__(self, tensors: Mapping[str, Tensor], parts: Parts | None = None) -> None:
        if isinstance(tensors, Layers):
            parts = tensors._parts if parts is None else parts
            tensors = tensors._whole
        self._whole: dict[str, Tensor] = dict(tensors)
        self._parts: dict[str, Sequence[str]] = {name: (parts or {}).get(name, ("",)) for name in self._whole}
        self.tensors: list[Tensor] = list(self._whole.values())
        self.names = tuple(self._whole)  # of the whole tensors
        self.num_parts = [len(own) for own in self._parts.values()]
        self._sizes: Tensor | None = None
        self._places = {
            (f"{name}[{part}]" if part else name): (name, index)
            for name, own in self._parts.items()
            for index, part in enumerate(own)
        }

    def __getitem__(self, name: str) -> Tensor:
        whole, index = self._places[name]
        count = len(self._parts[whole])
        return self._whole[whole] if count == 1 else self._whole[whole].chunk(count)[index]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def only(self, ids: set[int]) -> "Layers":
        """Return the layers whose tensor has one of these ``id``."""
        return Layers({name: t for name, t in self._whole.items() if id(t) in ids}, self._parts)

    def sum_parts(self, index: int, x: Tensor) -> Tensor:
        """Return the sums [parts] of ``x``, shaped like tensor ``index``, in float64 where possible."""
        if self.num_parts[index] == 1:
            return x.sum(dtype=_wide_dtype(x)).reshape(1)
        return x.reshape(self.num_parts[index], -1).sum(1, dtype=_wide_dtype(x))

    def joined(self, sums: Sequence[Tensor | None], missing: float = 0.0) -> Tensor:
        """Return sums [parts] of the tensors as one tensor [L], ``missing`` where there is none."""
        like, counted = self.tensors[0], zip(sums, self.num_parts, strict=True)
        dtype = _wide_dtype(like)
        return torch.cat([like.new_full((c,), missing, dtype=dtype) if s is None else s for s, c in counted])

    def dots(self, left: Sequence[Tensor], right: Sequence[Tensor | None]) -> Tensor:
        """Return the inner products of two lists of tensors by layer [L]; a missing tensor counts as zero."""
        pairs = enumerate(zip(left, right, strict=True))
        return self.joined([None if b is None else self.sum_parts(i, a * b) for i, (a, b) in pairs])

    def squares(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return the squared Frobenius norms [L] of tensors like the layers; a missing one counts as zero."""
        constant = [t for t in tensors if t is not None and not t.requires_grad]
        if len(self) == len(self.tensors) == len(constant):  # one kernel for all
            norms = torch._foreach_norm([t.float() if t.dtype.itemsize < 4 else t for t in constant])
            return wide(torch.stack(norms)).square()
        return self.joined([t if t is None else self.sum_parts(i, t.square()) for i, t in enumerate(tensors)])

    def squared_norms(self) -> Tensor:
        """Return ``a_l = ||W_l||_F²`` [L], no graph attached."""
        return self.squares([t.detach() for t in self.tensors])

    def sizes(self) -> Tensor:
        """Return ``d_l``, the number of elements of each layer [L], on the layers' device."""
        like = self.tensors[0]
        if self._sizes is None or self._sizes.device != like.device:  # made once: the device must not wait
            counted = zip(self.tensors, self.num_parts, strict=True)
            numbers = [t.numel() // count for t, count in counted for _ in range(count)]
            self._sizes = like.new_tensor(numbers, dtype=_wide_dtype(like))
        return self._sizes

    def spread(self, values: Tensor) -> list[Tensor]:
        """Return ``values`` [L] as one factor a tensor: a scalar, or shaped to broadcast where it is cut."""
        factors = []
        for t, chunk in zip(self.tensors, values.split(self.num_parts), strict=True):
            factor = chunk.to(t.dtype)
            rows = factor.repeat_interleave(t.shape[0] // len(factor)) if len(factor) > 1 else factor
            factors.append(rows.reshape(-1, *[1] * (t.ndim - 1)) if len(factor) > 1 else factor[0])
        return factors

    def missing(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Return which layers have no tensor in ``tensors``, booleans [L]."""
        flags = [t is None for t, c in zip(tensors, self.num_parts, strict=True) for _ in range(c)]
        return torch.tensor(flags, device=self.tensors[0].device)


def is_compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile(module)`` made it, or ``module.compile()`` was called."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the user's own module inside DistributedDataParallel, DataParallel and ``torch.compile``."""
    wrappers = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    while isinstance(model, wrappers) or hasattr(model, "_orig_mod"):
        model = cast(nn.Module, model._orig_mod if hasattr(model, "_orig_mod") else model.module)
    return model


def select_layers(model: nn.Module, layers: str = "weights", *, split_qkv: bool = False) -> Layers:
    """Return the tensors that count as layers, by the user's own names, in the model's own order.

    It follows ``requires_grad`` at the moment of the call and costs one walk over the modules, no pass.

    Args:
        model: Any module. Frozen parameters are left out; a tied tensor appears once, under its first name.
        layers: ``"weights"``: the matrices of ``MAPS``, and of modules that are neither those nor
            ``NOT_MAPS`` what is named ``*weight``, a matrix or with two dimensions > 1. A weight tied to
            an embedding counts if a map owns it too. ``"weights+biases"``: those and the biases of their
            modules. ``"all"``: every trainable tensor. Or a glob over names such as ``"*layer4*weight"``.
        split_qkv: Count the query, key and value maps of a fused attention projection as layers each.

    Raises:
        ValueError: Nothing was selected; a weight is computed from other tensors (weight_norm,
            spectral_norm, pruning, any parametrization) and not chosen by ``"all"`` or a glob; a layer is
            complex; nothing can be split, or parts are interleaved by head or unequal.
    """
    model = unwrapped(model)
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if layers in ("weights", "weights+biases"):
        ids = _matrices(model, with_biases=layers == "weights+biases")
        selected = {name: p for name, p in trainable.items() if id(p) in ids}
    else:
        pattern = "*" if layers == "all" else layers
        selected = {name: p for name, p in trainable.items() if fnmatchcase(name, pattern)}
    if not selected:
        first = ", ".join(list(trainable)[:6]) or "none at all: is everything frozen?"
        rule = f"weights, weights+biases, all or a glob over names. Trainable ones begin with {first}."
        raise ValueError(f"layers: got {layers!r}, which selects no trainable tensor; expected {rule}")
    if odd := [name for name, p in selected.items() if p.is_complex()]:
        rule = "real ones. Freeze them, or choose others by a glob over names."
        raise ValueError(f"layers: got the complex tensors {name_some(odd)}; expected {rule}")
    return Layers(selected, _qkv_parts(model, selected) if split_qkv else None)


def _matrices(model: nn.Module, *, with_biases: bool) -> set[int]:
    """Return the ``id`` of the trainable matrices of maps, and of their biases; computed ones are refused."""
    owners: dict[int, nn.Module] = {}  # the first map that owns a matrix
    computed = []
    for path, owner in model.named_modules():
        for name, p in owner.named_parameters(recurse=False):
            if p.requires_grad and _is_matrix(owner, name, p):
                owners.setdefault(id(p), owner)
        for name, method, sources in _computed(owner):
            is_layer = any(_is_matrix(owner, name, p) for p in sources)
            is_bias = with_biases and isinstance(owner, MAPS) and _is_bias(name)
            if (is_layer or is_bias) and any(p.requires_grad for p in sources):
                computed.append(f"{path}.{name} ({method})".removeprefix("."))
    if computed:
        rule = "stored tensors, not ones computed at each call. Undo it (parametrize.remove_parametrizations,"
        rule += " remove_weight_norm, remove_spectral_norm, prune.remove), freeze them, or choose the stored"
        rule += " tensors by 'all' or a glob such as '*original1'."
        raise ValueError(f"layers: got {name_some(computed, 3)}; expected {rule}")
    biases = [p for m in owners.values() for name, p in m.named_parameters(recurse=False) if _is_bias(name)]
    return {*owners, *map(id, biases)} if with_biases else set(owners)


def _is_matrix(owner: nn.Module, name: str, tensor: Tensor) -> bool:
    """Whether the tensor ``name`` of ``owner`` is the matrix of a map."""
    if isinstance(owner, MAPS):
        is_recurrent = name.startswith(("weight_ih", "weight_hh", "weight_hr"))  # and "_l0_reverse" behind
        return name == "weight" or is_recurrent or (name.endswith("_weight") and tensor.ndim >= 2)
    is_scale = tensor.ndim != 2 and sum(size > 1 for size in tensor.shape) < 2  # such as [C, 1, 1]
    return name.endswith("weight") and not is_scale and not isinstance(owner, NOT_MAPS)


def _is_bias(name: str) -> bool:
    """Whether a tensor of a map is its bias; ``bias_k`` of an attention is a token."""
    return name.endswith("bias") or name.startswith(("bias_ih", "bias_hh"))


def _computed(owner: nn.Module) -> Iterator[tuple[str, str, list[nn.Parameter]]]:
    """Yield the name, the method and the stored tensors of what ``owner`` computes at each call."""
    if parametrize.is_parametrized(owner):
        for name, steps in cast(nn.ModuleDict, owner.parametrizations).items():
            methods = [type(step).__name__.strip("_") for step in cast(nn.ModuleList, steps)]
            yield name, ", ".join(methods), list(steps.parameters())
    for hook in owner._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm | SpectralNorm | BasePruningMethod):
            name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
            stored = [p for own, p in owner.named_parameters(recurse=False) if own.startswith(f"{name}_")]
            yield name, type(hook).__name__, stored


def _qkv_parts(model: nn.Module, selected: Mapping[str, Tensor]) -> dict[str, str]:
    """Return the parts of fused attention projections among ``selected``, by the ends of their names.

    Their rows are taken for equal parts where each has as many as the module, or its ``proj``, has inputs.
    """
    parts = dict[str, str]()
    for name in selected:
        stem = name.removesuffix("weight").removesuffix("bias")
        letters = next((own for end, own in FUSED.items() if stem.endswith(end)), "")
        if not letters:
            continue
        parts[name] = letters
        if stem.endswith("in_proj_"):  # torch's own
            continue
        path = stem.removesuffix(".")
        weight: Any = model.get_submodule(path).weight
        owner = model.get_submodule(path.rpartition(".")[0])
        following = getattr(getattr(owner, "proj", None), "weight", weight)
        has_equal = len(weight) in (len(letters) * weight.shape[1], len(letters) * following.shape[1])
        if not has_equal or any(getattr(owner, mark, False) for mark in OTHERWISE):
            got = f"got rows of {name} interleaved by head, or in unequal parts"
            rule = f"{', '.join(letters)} one after another. Set it to False for this model"
            raise ValueError(f"split_qkv: {got}; expected {rule}.")
    if not parts:
        rule = "a fused one (*qkv.weight, *kv.weight, in_proj_weight) among the layers. Set it to False."
        got = f"got True, but none of the {len(selected)} layers is one"
        raise ValueError(f"split_qkv: {got}; expected {rule}")
    return parts


def logits_of(outputs: Any) -> Tensor:
    """Return what a model returned; ValueError unless it is one tensor: which of several would be a guess."""
    if isinstance(outputs, Tensor):
        return outputs
    parts = f" ({', '.join(map(str, outputs))})" if isinstance(outputs, Mapping) else ""
    parts = f" of {len(outputs)}" if isinstance(outputs, tuple | list) else parts
    rule = "logits, one tensor [B, C]. Wrap it in a module whose forward returns those alone"
    raise ValueError(f"model: got a {type(outputs).__name__}{parts} as outputs; expected {rule}.")


def precise(x: Tensor) -> Tensor:
    """Return ``x`` in float32 at least; ValueError for outputs that are no tensor."""
    x = logits_of(x)
    return x if x.dtype == torch.float64 else x.float()


def wide(x: Tensor) -> Tensor:
    """Return ``x`` in float64 where the device has it (Apple's MPS has not): sums must not lose digits."""
    return x.to(_wide_dtype(x))


def _wide_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype sums over ``x`` are made in."""
    return torch.float32 if x.device.type == "mps" else torch.float64
