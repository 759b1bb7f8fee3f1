"""What an estimator of the layers' traces is: draws of them, and for a penalty the gradient of their sum.

Legend: L layers, K probes, t_l = Tr(H_l), W weights, g(W) gradient of the loss, shape_l ≥ 0 held constant.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from wcitrain.curvature.passes import Passes, Step, carry_nan
from wcitrain.method import Method
from wcitrain.params import Layers, is_compiled, select_layers

UNCOMPILED = "Use the model as it was before torch.compile"
FIRST_ORDER = "Use the weight perturbation WCIPosterior (wci), which needs first derivatives only"


class Estimator(Method):
    """The contract."""

    # It takes differences of gradients at moved weights: these must be float32, and move for nothing else.
    moves_weights: ClassVar[bool] = False
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
        """Return the forward and backward passes beyond one each; a differentiated backward counts twice."""
        raise NotImplementedError

    def refuses(self, passes: Passes, needs_gradient: bool) -> str | None:
        """Try the derivatives on one batch; return what stands in the way, in a sentence, or None."""
        raise NotImplementedError


def obstacle(passes: Passes, attempt: Callable[[], object]) -> str | None:
    """Return why the derivatives that ``attempt`` takes are refused or wrong, and the way out."""
    try:
        attempt()
    except ValueError as error:  # a derivative that is wrong without a word, seen in the graph
        return str(error)
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        way_out = UNCOMPILED if any(map(is_compiled, passes.model.modules())) else FIRST_ORDER
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        return f"second derivatives are needed, which fail: {reason}. {way_out}."
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
