"""Norms of the weights: sizes that capacity bounds are made of. Images only lend their shape.

Legend: L layers with weights W_l, ‖·‖_F Frobenius and ‖·‖_σ spectral norm, A_l the linear map of layer l.

    frobenius   Σ_l ‖W_l‖_F²,    log product  Σ_l ln ‖W_l‖_F²                                              (1)
    spectral    Σ_l ln ‖A_l‖_σ²                                                                            (2)
    path        ln Σ_c f_{w²}(1, ..., 1)_c                                                                 (3)
    distance    sqrt( Σ_l ‖W_l − W_l⁰‖_F² )                                                                (4)

(2) takes the map that a convolution really is, with its stride, padding and the size of its input, measured
by a hook; not its kernel as a matrix (a lower number), nor the circular map of Sedghi, Gupta & Long (2018;
exact by FFT, but for stride one and periodic images only). Lanczos on A_lᵀ A_l finds it to about 1e-4.

Normalisation is not folded into convolutions, as the code of Dziugaite et al. (2020) does: which layer it
follows is not visible from outside. So (1) and (4) change when a convolution before a BatchNorm is rescaled,
which changes no output. (2) does not: BatchNorm in eval mode is a diagonal map and counts as one more layer,
with norm max |γ| / sqrt(v + ε). (3) uses its affine map. For a chain of layers and 1-Lipschitz activations
exp((2) / 2) bounds the network's Lipschitz constant; skip connections would add up. The input normalisation
of ``models.Classifier`` is part of no norm.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from wcitrain.measures.adversarial import measuring
from wcitrain.measures.measurement import Measurement
from wcitrain.models import Classifier
from wcitrain.params import Layers, select_layers, unwrapped

RELATIVE_ERROR = 1e-4  # of the eigenvalue ‖A‖², where Lanczos stops
DENSE = 64  # inputs or outputs up to which a map is written out as a matrix


def frobenius_norms(model: nn.Module, *, layers: str = "weights") -> Measurement:
    """Return Σ_l ‖W_l‖_F² of (1); parts: ``log_product``, and every layer's ‖W_l‖_F² under its name.

    Args:
        model: Any module.
        layers: What counts, see ``params.select_layers``.

    >>> frobenius_norms(nn.Linear(2, 3)).parts.keys()
    dict_keys(['log_product', 'weight'])
    """
    with measuring(unwrapped(model)):
        chosen = select_layers(model, layers)
    squares = chosen.squared_norms().tolist()
    parts = {"log_product": _log_sum(squares), **dict(zip(chosen, squares, strict=True))}
    return Measurement("frobenius_norms", sum(squares), settings=f"{len(squares)} layers", parts=parts)


def spectral_norms(model: nn.Module, *, image_shape: Sequence[int] | None = None) -> Measurement:
    """Return Σ_l ln ‖A_l‖_σ² of (2); parts: every layer's norm ‖A_l‖_σ, BatchNorm layers included.

    Cost: some 20 to 100 forward and backward passes through each convolution alone, one image.

    Args:
        model: Any module; convolutions count as maps, other weights of dimension >= 2 as [d_0, rest].
        image_shape: [C, H, W] of an image; needed for convolutions only.

    Raises:
        ValueError: A convolution and no ``image_shape``; or one that is never called with such an image.

    >>> print(spectral_norms(nn.Linear(3, 3, bias=False).requires_grad_(False)).parts.keys())
    dict_keys(['weight'])
    """
    model = unwrapped(model)
    with measuring(model):
        norms = dict(_spectral(model, image_shape))
    total = 2 * _log_sum(norms.values())
    return Measurement("spectral_norms", total, settings=f"{len(norms)} layers, sum of ln σ²", parts=norms)


def path_norm(model: nn.Module, *, image_shape: Sequence[int] | None = None) -> Measurement:
    """Return ln of the squared path norm (3): the sum over all input-output paths of their squared weights.

    Every weight and bias is squared, BatchNorm is its affine map with both numbers squared, and ones go in:
    where the activations leave positive numbers alone (ReLU) and pooling averages, that is the sum over paths
    (Neyshabur et al. 2015). Of a ``Classifier`` it is the backbone's, ones in place of the normalised image.
    In float64, on a copy.

    Args:
        model: A network whose only normalisation is BatchNorm.
        image_shape: [C, H, W] of an image; needed.

    Raises:
        ValueError: No ``image_shape``; another normalisation than BatchNorm, for which paths have no weights.
    """
    model = unwrapped(model)
    model = model.backbone if isinstance(model, Classifier) else model
    if image_shape is None:
        raise ValueError("path_norm: got no image_shape; expected [C, H, W]. Pass what your images have.")
    strange = sorted({type(m).__name__ for m in model.modules() if _is_other_norm(m)})
    if strange:
        raise ValueError(
            f"path_norm: got a model with {', '.join(strange)}; expected BatchNorm or none: others are not "
            "affine in eval mode. Leave this measure out."
        )
    with measuring(model), torch.no_grad():
        squared = copy.deepcopy(model).double()
        own = {id(p) for m in squared.modules() if isinstance(m, _BatchNorm) for p in m.parameters()}
        for p in squared.parameters():
            if id(p) not in own:
                p.square_()
        for module in squared.modules():
            if isinstance(module, _BatchNorm):
                _square_batchnorm(module)
        device = next(squared.parameters()).device
        total = float(squared(torch.ones(1, *image_shape, dtype=torch.float64, device=device)).sum())
    return Measurement(
        "path_norm", _log(total), settings="ln of the sum of squared paths", parts={"sum": total}
    )


def distance_from_initialisation(
    model: nn.Module, *, initial: Mapping[str, Tensor] | None, layers: str = "weights"
) -> Measurement:
    """Return sqrt(Σ_l ‖W_l − W_l⁰‖_F²) of (4); parts: ``relative`` to ‖W⁰‖, each layer's squared distance.

    Args:
        model: The trained network.
        initial: Its state dict before training, under the same names (or the backbone's alone).
        layers: What counts, see ``params.select_layers``.

    Raises:
        ValueError: No initial weights, or a layer is missing from them or has another shape there.
    """
    with measuring(unwrapped(model)):
        chosen = select_layers(model, layers)
    before = initial_weights(chosen, initial, "distance_from_initialisation")
    differences = [t.detach() - w0 for t, w0 in zip(chosen.tensors, before, strict=True)]
    squares = chosen.squares(differences)
    value = math.sqrt(float(squares.sum()))
    start = math.sqrt(float(chosen.squares(before).sum()))
    parts = {
        "relative": value / start if start else math.inf,
        **dict(zip(chosen, squares.tolist(), strict=True)),
    }
    return Measurement("distance_from_initialisation", value, settings=f"{len(chosen)} layers", parts=parts)


def initial_weights(layers: Layers, initial: Mapping[str, Tensor] | None, where: str) -> list[Tensor]:
    """Return the initial weights of the layers' tensors, on their device and in their dtype.

    Raises:
        ValueError: See ``distance_from_initialisation``.
    """
    known = {name.removeprefix("module."): t for name, t in (initial or {}).items()}
    found = [known.get(name, known.get(name.removeprefix("backbone."))) for name in layers.names]
    pairs = zip(layers.names, layers.tensors, found, strict=True)
    wrong = [name for name, now, then in pairs if then is None or then.shape != now.shape]
    if initial is None or wrong:
        got = (
            "no initial weights" if initial is None else f"none of the right shape for {', '.join(wrong[:3])}"
        )
        raise ValueError(f"{where}: got {got}; expected the state dict of this model before training.")
    return [then.to(now) for now, then in zip(layers.tensors, found, strict=True) if then is not None]


def _spectral(model: nn.Module, image_shape: Sequence[int] | None) -> Iterator[tuple[str, float]]:
    """Yield the name and the spectral norm of every layer."""
    modules = dict(model.named_modules())
    maps = {f"{name}.weight".lstrip("."): m for name, m in modules.items() if isinstance(m, _ConvNd)}
    shapes = _input_shapes(model, maps, image_shape) if maps else {}
    for name, weight in select_layers(model, "weights").items():
        if name in maps:
            yield name, max(_map_norm(maps[name], shape, weight) for shape in shapes[name])
        else:
            yield name, float(torch.linalg.matrix_norm(weight.detach().flatten(1).double(), 2))
    for name, module in modules.items():
        if isinstance(module, _BatchNorm) and module.running_var is not None:
            yield name, float(_affine(module)[0].abs().max())


def _input_shapes(
    model: nn.Module, maps: Mapping[str, nn.Module], image_shape: Sequence[int] | None
) -> dict[str, set[torch.Size]]:
    """Return the shapes of the inputs that every convolution gets when one image goes through the model."""
    if image_shape is None:
        raise ValueError(
            f"spectral_norms: got no image_shape for a model with {len(maps)} convolutions; expected [C, H, "
            "W]: their norm depends on it. Pass image_shape=(3, 32, 32) or what your images have."
        )
    shapes: dict[str, set[torch.Size]] = {name: set() for name in maps}
    first = next(model.parameters())
    with (
        _hooks([m.register_forward_pre_hook(_recorder(shapes[name])) for name, m in maps.items()]),
        torch.no_grad(),
    ):
        model(torch.zeros(1, *image_shape, device=first.device, dtype=first.dtype))
    unused = [name for name, found in shapes.items() if not found]
    if unused:
        raise ValueError(
            f"spectral_norms: got {', '.join(unused[:3])}, which no image reaches; expected every "
            "convolution to be used. Remove them, or measure the part of the model that is."
        )
    return shapes


def _recorder(shapes: set[torch.Size]) -> Callable[[nn.Module, Any], None]:
    return lambda module, args: shapes.add(args[0].shape)


@contextmanager
def _hooks(handles: Sequence[torch.utils.hooks.RemovableHandle]) -> Iterator[None]:
    """Remove the hooks on exit."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _map_norm(module: nn.Module, shape: torch.Size, weight: Tensor) -> float:
    """Return the spectral norm of the linear part of ``module``: Lanczos on AᵀA from one fixed start."""

    def gram(v: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(v).reshape(shape).to(weight).requires_grad_()
        with torch.enable_grad():
            out = module(x)
            linear = (out - module(torch.zeros_like(x))).detach()
            return torch.autograd.grad(out, x, linear)[0].flatten().double().cpu().numpy()

    size = shape.numel()
    if size <= DENSE:
        matrix = np.stack([gram(row) for row in np.eye(size)])
        return math.sqrt(float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[-1]))
    start = np.random.default_rng(0).standard_normal(size)
    operator = LinearOperator((size, size), matvec=gram, dtype=np.float64)
    top = eigsh(operator, k=1, which="LA", v0=start, tol=RELATIVE_ERROR, return_eigenvectors=False)
    return math.sqrt(max(float(top[0]), 0.0))


def _affine(module: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift [C] of BatchNorm in eval mode, float64."""
    assert module.running_var is not None
    assert module.running_mean is not None
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -module.running_mean.double() * scale
    return scale, shift if module.bias is None else shift + module.bias.detach().double()


def _square_batchnorm(module: _BatchNorm) -> None:
    """Let BatchNorm in eval mode apply the squares of its scale and shift."""
    if module.running_var is None or module.running_mean is None:
        raise ValueError("path_norm: got BatchNorm without running statistics; expected them. Track them.")
    scale, shift = _affine(module)
    module.weight, module.bias = nn.Parameter(scale.square()), nn.Parameter(shift.square())
    module.running_mean.zero_()
    module.running_var.fill_(1)
    module.eps = 0.0


def _is_other_norm(module: nn.Module) -> bool:
    """Whether a module normalises, but is no BatchNorm."""
    if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm | _InstanceNorm):
        return True
    is_leaf = next(module.children(), None) is None
    return is_leaf and "norm" in type(module).__name__.lower() and not isinstance(module, _BatchNorm)


def _log(value: float) -> float:
    """Return ln(value), −inf at zero."""
    return math.log(value) if value > 0 else -math.inf if value == 0 else math.nan


def _log_sum(values: Iterable[float]) -> float:
    return sum(map(_log, values))
