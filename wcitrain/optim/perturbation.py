"""What a weight perturbation is: a direction times a radius, and a way to combine the gradients found there.

Legend: W weights of the layers, u perturbation, g(·) gradient of the loss at fixed adversarial examples.

The passes are made in the order W, W + u, W − u, each only where its gradient has a weight; all but the last
run on their own process. Running statistics move in the pass at W if there is one, else in the last.
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from wcitrain.curvature.passes import Passes, Step, slopes
from wcitrain.method import Method, Nested
from wcitrain.optim.schedule import StrengthSchedule
from wcitrain.preserve import kept_buffers, perturbed

TINY = 1e-30
LastPass = Callable[[], Step]  # made at W + u instead of a plain pass
SCHEDULE = "When it acts; the ramp scales the radius."
Schedule = Annotated[StrengthSchedule, Nested(), Field(description=SCHEDULE)]


class Combination(NamedTuple):
    """The gradient stepped on: ``here · g(W) + plus · g(W + u) + minus · g(W − u)``."""

    here: float = 0.0
    plus: float = 1.0
    minus: float = 0.0


class State(NamedTuple):
    """What a rule knows of earlier steps: running averages of t_l [L], and what it asked to carry."""

    traces: Tensor | None = None
    memory: Sequence[Tensor] | None = None


class WeightPerturbation(Method):
    """The contract of the rules."""

    schedule: StrengthSchedule
    default_layers: ClassVar[str] = "weights"  # see params.select_layers
    measures_traces: ClassVar[bool] = False

    def combination(self, factor: float = 1.0) -> Combination:
        """Return the weights of the gradients at W, W + u and W − u, at ``factor`` of full strength."""
        return Combination()

    def gradient(self, passes: Passes, state: State, factor: float, last_pass: LastPass | None) -> Step:
        """Leave the gradient of the rule, at ``factor`` > 0 of full strength, in ``.grad``.

        ``last_pass`` is a penalty, where it `goes_with_penalties`.
        """
        raise NotImplementedError

    def extra_passes(self, model: nn.Module) -> tuple[int, int]:
        """Return the forward and backward passes of a step beyond one each."""
        raise NotImplementedError

    @property
    def goes_with_penalties(self) -> bool:
        """Whether g is taken at W + u alone, on a ramp too: then a penalty there is one objective with it."""
        is_alone = all(self.combination(factor) == Combination() for factor in (0.5, 1.0))
        return is_alone and not self.measures_traces


def moved_passes(
    passes: Passes,
    direction: list[Tensor],
    weights: Combination,
    last_pass: LastPass | None,
    *,
    keep_statistics: bool,
    needs_slopes: bool = False,
) -> tuple[list[Step], list[Tensor]]:
    """Add the weighed gradients at W + u and W − u; return the passes and, if needed, the slopes [L]."""
    layers = passes.layers
    places = [(+1, weights.plus), (-1, weights.minus)] if weights.minus else [(+1, weights.plus)]
    steps, sums = [], []
    with perturbed(layers.tensors, direction) as move:
        for sign, weight in places:
            is_last = (sign, weight) == places[-1]
            with ExitStack() as stack:
                if not is_last:
                    stack.enter_context(passes.local())
                if keep_statistics or not is_last:
                    stack.enter_context(kept_buffers(passes.model))
                if needs_slopes:
                    sums.append(stack.enter_context(slopes(layers, direction)))
                move(sign)
                steps.append(last_pass() if last_pass and is_last else Step(passes.plain(weight)))
    return steps, [layers.joined(s, torch.nan) for s in sums]


def relative_size(passes: Passes, direction: list[Tensor]) -> Tensor:
    """Return ||u|| / ||W||."""
    layers = passes.layers
    return (layers.squares(direction).sum() / layers.squared_norms().sum().clamp_min(TINY)).sqrt()
