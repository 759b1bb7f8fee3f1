"""Training objectives: what the adversary does with a batch, and the differentiable loss at what it found.

`objective` has the contract. Each objective is a class with its settings; `pgd_at`, `trades`, `mart` and
`alp` are functions, for one's own loop.

>>> import torch
>>> from wcitrain.models import create_model
>>> model = create_model("preact_resnet18", num_classes=3, in_chans=1, width=4, rotation_head=True)
>>> x, y = torch.rand(8, 1, 8, 8), torch.arange(8) % 3
>>> trades(model, x, y, beta=6.0, num_steps=2).total.backward()
>>> for name, kind in OBJECTIVES.items():
...     print(f"{name}: {kind()},", *kind()(model, x, y).parts)
standard: standard, cross_entropy
pgd_at: AT, cross_entropy
trades: TRADES β=6, cross_entropy kl
mart: MART λ=5, bce kl
alp: ALP 0.5, cross_entropy pairing
fgsm_rs: FGSM-RS, cross_entropy
grad_align: GradAlign λ=0.2, cross_entropy alignment
free: free AT m=8, cross_entropy
rotation: AT + rotations 0.5, cross_entropy rotation
union: AT max of linf, l2, cross_entropy
"""

from collections.abc import Callable
from typing import Any

from torch import Generator, Tensor, nn

from wcitrain.curvature.loss import Loss
from wcitrain.objectives.free import FreeAT
from wcitrain.objectives.input_regularizers import CURE, InputGradient, InputRegularizer, WithInputRegularizer
from wcitrain.objectives.objective import Objective
from wcitrain.objectives.pairing import ALP, MART, TRADES
from wcitrain.objectives.plain import PGDAT, Standard
from wcitrain.objectives.rotation import RotationAT
from wcitrain.objectives.single_step import FGSMRS, CatastrophicOverfittingGuard, GradAlign
from wcitrain.objectives.union import UnionAT, UnionThreat

OBJECTIVES: dict[str, type] = {
    "standard": Standard,
    "pgd_at": PGDAT,
    "trades": TRADES,
    "mart": MART,
    "alp": ALP,
    "fgsm_rs": FGSMRS,
    "grad_align": GradAlign,
    "free": FreeAT,
    "rotation": RotationAT,
    "union": UnionAT,
}
INPUT_REGULARIZERS: dict[str, type] = {"cure": CURE, "input_gradient": InputGradient}


def _function(name: str) -> Callable[..., Loss]:
    """Return an objective as a function of a batch, whose other arguments are the objective's settings."""
    kind = OBJECTIVES[name]

    def loss(
        model: nn.Module, x: Tensor, y: Tensor, *, generator: Generator | None = None, **settings: Any
    ) -> Loss:
        return kind(**settings)(model, x, y, generator)

    loss.__name__ = loss.__qualname__ = name
    loss.__doc__ = f"""Return the loss of ``{kind.__name__}`` on one batch; ``settings`` are its own.

    >>> import torch
    >>> from wcitrain import ThreatModel
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    >>> {name}(model, x, y, threat=ThreatModel("linf", 0.1), num_steps=2).total.requires_grad
    True
    """
    return loss


pgd_at, trades, mart, alp = map(_function, ("pgd_at", "trades", "mart", "alp"))
