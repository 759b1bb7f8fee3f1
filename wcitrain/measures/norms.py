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
follows is not visible from outside. So (1) and (4) change when a convolution before a BatchNorm is rescaled.
(2) does not: BatchNorm in eval mode is a diagonal map and counts as one more layer. (3) uses its affine map.
For a chain of layers and 1-Lipschitz activations exp((2) / 2) bounds the network's Lipschitz constant.
"""

import copy
import math
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from wcitrain.measures.problem import Measure, Problem, Taken
from wcitrain.method import Text, method
from wcitrain.models import Classifier
from wcitrain.params import Layers, select_layers

OTHER_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _InstanceNorm)
Counted = Annotated[Text, Field(description="What counts, see params.select_layers.")]


@method
class FrobeniusNorms(Measure):
    """Sum Σ_l ‖W_l‖_F² of the layers' squared Frobenius norms.

    ``parts``: ``log_product``, and every layer's ‖W_l‖_F² under its name.
    """

    layers: Counted = "weights"
    name = "frobenius_norms"
    source = "Jiang et al., arXiv 1912.02178"
    cost = "none"

    def take(self, problem: Problem) -> Taken:
        """Return (1)."""
        chosen = select_layers(problem.model, self.layers)
        squares = dict(zip(chosen, chosen.squared_norms().tolist(), strict=True))
        parts = {"log_product": _log_sum(squares.values()), **squares}
        return (sum(squares.values()), math.nan, 0), f"{len(squares)} layers", parts


@method
class SpectralNorms(Measure):
    """Sum Σ_l ln ‖A_l‖_σ² over layers of their spectral norms, convolutions as the maps they are.

    Other weights of dimension >= 2 count as matrices [d_0, rest]. ``parts``: every layer's norm ‖A_l‖_σ,
    BatchNorm layers included.
    """

    name = "spectral_norms"
    source = "Bartlett, Foster & Telgarsky, arXiv 1706.08498"
    cost = "20 to 100 forward and backward passes through each convolution, one image"

    def take(self, problem: Problem) -> Taken:
        """Return (2). A convolution that no image reaches is refused."""
        refuse_program(problem.model, self.name)
        modules, norms = dict(problem.model.named_modules()), {}
        maps = {f"{name}.weight".lstrip("."): m for name, m in modules.items() if isinstance(m, _ConvNd)}
        shapes = _input_shapes(problem, maps) if maps else {}
        for name, weight in select_layers(problem.model, "weights").items():
            if name in maps:
                norms[name] = max(_map_norm(maps[name], shape, weight) for shape in shapes[name])
            else:
                norms[name] = float(torch.linalg.matrix_norm(weight.detach().flatten(1).double(), 2))
        for name, module in modules.items():
            if isinstance(module, _BatchNorm) and module.running_var is not None:
                norms[name] = float(_affine(module)[0].abs().max())
        return (2 * _log_sum(norms.values()), math.nan, 0), f"{len(norms)} layers, sum of ln σ²", norms


def refuse_program(model: nn.Module, where: str) -> None:
    """Refuse TorchScript and exported programs: convolution and BatchNorm would count as plain matrices."""
    if any(isinstance(module, torch.jit.ScriptModule | torch.fx.GraphModule) for module in model.modules()):
        rule = "Python code, which says what each layer is. Give module:function with --checkpoint"
        raise ValueError(f"{where}: got a compiled program; expected {rule}.")


def _input_shapes(problem: Problem, maps: Mapping[str, nn.Module]) -> dict[str, set[torch.Size]]:
    """Return the shapes of the inputs that every convolution gets when one image goes through the model."""
    shapes: dict[str, set[torch.Size]] = {name: set() for name in maps}
    first = next(problem.model.parameters())
    with ExitStack() as hooks, torch.no_grad():
        for name, module in maps.items():
            hook = module.register_forward_pre_hook(lambda _, x, own=shapes[name]: own.add(x[0].shape))
            hooks.callback(hook.remove)
        problem.model(torch.zeros_like(problem.clean()[0][0][:1], dtype=first.dtype))
    if unused := [name for name, reached in shapes.items() if not reached]:
        got = f"got {', '.join(unused[:3])}, which no image reaches"
        raise ValueError(f"spectral_norms: {got}; expected every convolution to be used. Remove them.")
    return shapes


def _map_norm(module: nn.Module, shape: torch.Size, weight: Tensor) -> float:
    """Return the spectral norm of the linear part of ``module``: Lanczos on AᵀA from one fixed start."""
    from scipy.sparse.linalg import LinearOperator, eigsh  # slow to import

    def gram(v: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(v).reshape(shape).to(weight).requires_grad_()
        out = module(x)
        linear = (out - module(torch.zeros_like(x))).detach()
        return torch.autograd.grad(out, x, linear)[0].flatten().double().cpu().numpy()

    size = shape.numel()
    if size <= 64:  # few enough inputs to write the map out as a matrix
        matrix = np.stack([gram(row) for row in np.eye(size)])
        return math.sqrt(float(np.linalg.eigvalsh((matrix + matrix.T) / 2)[-1]))
    start = np.random.default_rng(0).standard_normal(size)
    operator = LinearOperator((size, size), matvec=gram, dtype=np.float64)
    top = eigsh(operator, k=1, which="LA", v0=start, tol=1e-4, return_eigenvectors=False)
    return math.sqrt(max(float(top[0]), 0.0))


@method
class PathNorm(Measure):
    """Logarithm of the squared path norm: of the sum over all input-output paths of their squared weights.

    Every weight and bias is squared, BatchNorm is its affine map with both numbers squared, and ones go in:
    with ReLU and average pooling that is the sum over paths. Of a ``Classifier`` it is the backbone's. In
    float64, on a copy. ``parts``: ``sum``.
    """

    name = "path_norm"
    source = "Neyshabur et al., arXiv 1506.02617"
    cost = "1 forward pass of one image"

    def take(self, problem: Problem) -> Taken:
        """Return (3). A normalisation other than BatchNorm, whose paths have no weights, is refused."""
        refuse_program(problem.model, self.name)
        model = problem.model.backbone if isinstance(problem.model, Classifier) else problem.model
        others = [m for m in model.modules() if not isinstance(m, _BatchNorm)]
        named = [m for m in others if "norm" in type(m).__name__.lower() and not list(m.children())]
        if strange := sorted({type(m).__name__ for m in others if isinstance(m, OTHER_NORMS) or m in named}):
            rule = "expected BatchNorm or none: others are not affine in eval mode. Leave this measure out."
            raise ValueError(f"path_norm: got a model with {', '.join(strange)}; {rule}")
        squared = copy.deepcopy(model).double()
        with torch.no_grad():
            affine = {m: _affine(m) for m in squared.modules() if isinstance(m, _BatchNorm)}
            for p in squared.parameters():
                p.square_()
            for module, (scale, shift) in affine.items():
                module.weight, module.bias = nn.Parameter(scale.square()), nn.Parameter(shift.square())
                module.running_mean, module.running_var = torch.zeros_like(scale), torch.ones_like(scale)
                module.eps = 0.0
            total = float(squared(torch.ones_like(problem.clean()[0][0][:1], dtype=torch.float64)).sum())
        return (_log_sum([total]), math.nan, 0), "ln of the sum of squared paths", {"sum": total}


def _affine(module: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return scale and shift [C] of BatchNorm in eval mode, float64."""
    if module.running_var is None or module.running_mean is None:
        raise ValueError("path_norm: got BatchNorm without running statistics; expected them. Track them.")
    scale = (module.running_var.double() + module.eps).rsqrt()
    if module.weight is not None:
        scale = scale * module.weight.detach().double()
    shift = -module.running_mean.double() * scale
    return scale, shift if module.bias is None else shift + module.bias.detach().double()


@method
class DistanceFromInitialisation(Measure):
    """Distance sqrt(Σ_l ‖W_l − W_l⁰‖_F²) of the weights from those before training.

    ``parts``: ``relative`` to ‖W⁰‖, each layer's squared distance.
    """

    layers: Counted = "weights"
    needs_initial = True
    name = "distance_from_initialisation"
    source = "Jiang et al., arXiv 1912.02178"
    cost = "none"

    def take(self, problem: Problem) -> Taken:
        """Return (4)."""
        chosen = select_layers(problem.model, self.layers)
        before = initial_weights(chosen, problem.initial, self.name)
        squares = chosen.squares([t.detach() - w0 for t, w0 in zip(chosen.tensors, before, strict=True)])
        value = math.sqrt(float(squares.sum()))
        start = math.sqrt(float(chosen.squares(before).sum()))
        parts = {"relative": value / start if start else math.inf}
        parts |= dict(zip(chosen, squares.tolist(), strict=True))
        return (value, math.nan, 0), f"{len(chosen)} layers", parts


def initial_weights(layers: Layers, initial: Mapping[str, Tensor] | None, where: str) -> list[Tensor]:
    """Return the layers' tensors, on their device, out of a state dict from before training.

    It may be that of the backbone alone. One that is missing or of another shape is refused.
    """
    known = {name.removeprefix("module."): t for name, t in (initial or {}).items()}
    found = (known.get(name, known.get(name.removeprefix("backbone."))) for name in layers.names)
    pairs = list(zip(layers.tensors, found, strict=True))
    before = [then.to(now) for now, then in pairs if then is not None and then.shape == now.shape]
    if len(before) < len(pairs):
        got = f"got initial weights of the right shape for {len(before)} of {len(pairs)} tensors"
        raise ValueError(f"{where}: {got}; expected the state dict of this model before training.")
    return before


def _log_sum(values: Iterable[float]) -> float:
    """Return Σ ln of values, −inf with a zero."""
    return sum(math.log(x) if x > 0 else -math.inf if x == 0 else math.nan for x in values)
