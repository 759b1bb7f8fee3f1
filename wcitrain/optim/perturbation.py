"""What a weight perturbation is: a direction times a radius, and a way to combine the gradients found there.

Legend: W weights of the layers, u perturbation, g(·) gradient of the loss at fixed adversarial examples.
Running statistics move in the pass at W if there is one, else in the last.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.passes import Passes, Step, slopes
from wcitrain.method import Method, Nested, NonNegative, PositiveCount, method, setting
from wcitrain.preserve import kept_buffers, perturbed

LastPass = Callable[[], Step]  # made at W + u instead of a plain pass


@method
class StrengthSchedule:
    """Off before ``start``, then a linear ramp to full strength, acting on every ``every``-th optimizer step.

    A penalty is multiplied by ``every`` to keep its mean strength. A perturbation is not: it is a radius.
    """

    start: NonNegative = setting(0.0, "Epochs trained before it acts; steps in plain loops.")
    ramp: NonNegative = setting(0.0, "Epochs over which it grows to full strength.")
    every: PositiveCount = setting(1, "Acts in one of so many optimizer steps.")

    def factor(self, step: int, steps_per_epoch: int = 1) -> float:
        """Return the share of full strength at optimizer step ``step`` (0-based), 0 where it does not act."""
        start, ramp = round(self.start * steps_per_epoch), round(self.ramp * steps_per_epoch)
        if step < start or (step - start) % self.every:
            return 0.0
        return 1.0 if step >= start + ramp else (step - start + 1) / (ramp + 1)


ALWAYS = StrengthSchedule()
SCHEDULE = "When it acts; the ramp scales the radius."
Schedule = Annotated[StrengthSchedule, Nested(), Field(description=SCHEDULE)]


class Combination(NamedTuple):
    """The gradient stepped on: ``here · g(W) + plus · g(W + u) + minus · g(W − u)``."""

    here: float = 0.0
    plus: float = 1.0
    minus: float = 0.0


class WeightPerturbation(Method):
    """The contract of the rules: the gradient that is stepped on, and what it costs beyond the one at W."""

    schedule: StrengthSchedule
    default_layers: ClassVar[str] = "weights"  # see params.select_layers
    measures_traces: ClassVar[bool] = False

    def combination(self, factor: float = 1.0) -> Combination:
        """Return the weights of the gradients at W, W + u and W − u, at ``factor`` of full strength."""
        return Combination()

    def gradient(self, passes: Passes, factor: float, last_pass: LastPass | None) -> Step:
        """Leave the gradient of the rule, at ``factor`` > 0 of full strength, in ``.grad``."""
        raise NotImplementedError

    def extra_passes(self) -> tuple[int, int]:
        """Return the forward and backward passes of a step beyond one each."""
        num_points = sum(weight != 0 for weight in self.combination())
        return num_points - 1, num_points - 1


def visit(
    passes: Passes,
    direction: list[Tensor],
    weights: Combination,
    last_pass: LastPass | None = None,
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
