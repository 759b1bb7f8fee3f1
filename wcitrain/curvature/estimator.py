"""What an estimator of the layers' traces is: draws of them, and for a penalty the gradient of their sum.

Legend: L layers, K probes, t_l = Tr(H_l), W weights, g(W) gradient of the loss, shape_l ≥ 0 held constant.

Each estimator is one class in one file. Passes are counted as forward and backward beyond one each; a
backward that is differentiated counts as two.
"""

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from wcitrain.curvature.differentiability import TWO_POINT, explain, failing_modules
from wcitrain.curvature.passes import Passes, Step, carry_nan
from wcitrain.method import Method
from wcitrain.params import Layers, select_layers


class Estimator(Method):
    """The contract; a class says what it needs in its docstring, and ``refuses`` tries it."""

    takes_differences: ClassVar[bool] = True  # of gradients, so it needs float32 weights and passes
    moves_weights: ClassVar[bool] = True  # in its passes, so it cannot stand beside a weight perturbation
    has_all_layers: ClassVar[bool] = True  # of the model, so it goes with whatever else acts on them
    probe_cost: ClassVar[int]  # of a draw: a forward counts 1, a backward 2, one through its graph 4

    def layers(self, model: nn.Module, layers: str, *, split_qkv: bool = False) -> Layers:
        """Return the layers whose traces it can estimate, of those asked for."""
        return select_layers(model, layers, split_qkv=split_qkv)

    def draw(self, passes: Passes, num_probes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return independent draws of t_l [K, L], no graph, and the loss."""
        raise NotImplementedError

    def add_gradient(self, passes: Passes, shape: Tensor, strength: float) -> Step:
        """Leave g(W) + strength · ∇ Σ_l shape_l t_l in ``.grad`` and return the loss and estimates of t_l.

        With ``strength`` zero it only measures, and the gradient left is the plain one, bit for bit.
        """
        raise NotImplementedError

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return the extra passes of ``add_gradient``, with a strength above zero or without."""
        raise NotImplementedError

    def refuses(self, passes: Passes, needs_gradient: bool) -> str | None:
        """Try the derivatives on one batch; return what stands in the way, in a sentence, or None."""
        raise NotImplementedError


def obstacle(passes: Passes, order: Literal[2, 3], attempt: Callable[[], object]) -> str | None:
    """Return why the derivatives that ``attempt`` takes are refused or wrong, with the modules at fault."""
    try:
        attempt()
    except ValueError as error:  # a derivative that is wrong without a word, found in the graph
        return str(error)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        what = f"{'second' if order == 2 else 'third'} derivatives are needed"
        try:
            failures = failing_modules(passes.model, passes.evaluate, order=order)
        except Exception:  # no memory, or the loss calls parts of the model: the culprit cannot be named
            failures = []
        if failures:
            return explain(failures, what)
        return f"{what}, which fail: {str(error).splitlines()[0]} Use {TWO_POINT}."
    return None


def backward_with(passes: Passes, total: Tensor, added: Tensor | None) -> Tensor:
    """Backward through ``total + added`` and return ``total``, NaN where what was added is not finite."""
    passes.backward(total if added is None else total + added)
    return total.detach() if added is None else carry_nan(total.detach(), added.detach())


def weighted(traces: Tensor, coefficients: Tensor, like: Tensor) -> Tensor:
    """Return Σ_l c_l t_l with its graph, in the loss's dtype."""
    return (coefficients.to(traces) * traces).sum().to(like.dtype)


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that gradients are taken in."""
    return [p for p in model.parameters() if p.requires_grad]
