"""What a weight perturbation is: a direction times a radius, and a way to combine the gradients found there.

Legend: W weights of the layers, u perturbation, g(·) gradient of the loss at fixed adversarial examples.
Running statistics move in the pass at W if there is one, else in the last.
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Annotated, ClassVar, NamedTuple, cast

import torch
from pydantic import Field
from torch import Tensor

from wcitrain.curvature.passes import Passes, Step
from wcitrain.method import Method, Nested, NonNegative, PositiveCount, method, setting
from wcitrain.params import Center, wide
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
CENTER = "What norms are distances from; initial: the weights before training, W - W0 for W."
Centered = Annotated[Center, Field(description=CENTER)]


class Combination(NamedTuple):
    """The gradient stepped on: ``here · g(W) + plus · g(W + u) + minus · g(W − u)``."""

    here: float = 0.0
    plus: float = 1.0
    minus: float = 0.0


class Displacement(NamedTuple):
    """A perturbation u, drawn without a look at the gradient, and what is known of it."""

    u: list[Tensor]
    relative_size: Tensor  # as the rule counts it
    sigma: Tensor | None = None  # of the layers [L], where ⟨u, g⟩ gives their traces
    strength: Tensor | None = None  # λ, NaN where it is not defined
    frobenius: Tensor | None = None  # gradient coefficients of W_l [L]
    weight: Tensor | None = None  # of its traces in their average [L], see ``Step``

    def noted(self, step: Step, slopes: Tensor | None, num_points: int = 1) -> Step:
        """Return a step with t_l [L] from ⟨u_l, g_l⟩ or a difference of two, NaN where σ_l is zero."""
        step = step._replace(relative_size=self.relative_size, strength=self.strength)
        if slopes is None:
            return step
        variance = wide(cast(Tensor, self.sigma)).square()
        traces = slopes / torch.where(variance > 0, num_points * variance, torch.nan)
        return step._replace(traces=traces, is_seen=~torch.isnan(slopes), weight=self.weight)


class WeightPerturbation(Method):
    """The contract of the rules: the gradient that is stepped on, and what it costs beyond the one at W."""

    schedule: StrengthSchedule
    center: str = "origin"  # what norms are distances from, see params.Center
    default_layers: ClassVar[str] = "weights"  # see params.select_layers
    measures_traces: ClassVar[bool] = False
    has_memory: ClassVar[bool] = False  # carries smoothed gradients from step to step
    # What follows from the settings, by ``__post_init__``:
    is_one_pass: bool = False  # a step is an ordinary one at W + u, with u by ``displace``
    is_paired: bool = False  # it takes two steps for one estimate of the traces
    attacks_perturbed: bool = False  # the trainer's attack sees W + u

    def combination(self, factor: float = 1.0) -> Combination:
        """Return the weights of the gradients at W, W + u and W − u, at ``factor`` of full strength."""
        return Combination()

    def displace(self, passes: Passes, factor: float) -> Displacement:
        """Draw u at ``factor`` > 0 of full strength, for a rule that needs no gradient for it."""
        raise NotImplementedError

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
) -> tuple[list[Step], Tensor | None]:
    """Add the weighed gradients at W + u and W − u; return the passes and, if needed, ⟨u, g+ − g−⟩ [L]."""
    places = [(+1, weights.plus), (-1, weights.minus)] if weights.minus else [(+1, weights.plus)]
    steps, difference = list[Step](), None
    with perturbed(passes.layers.tensors, direction) as move:
        for sign, weight in places:
            is_last = (sign, weight) == places[-1]
            with ExitStack() as stack:
                if not is_last:
                    stack.enter_context(passes.local())
                if keep_statistics or not is_last:
                    stack.enter_context(kept_buffers(passes.model))
                move(sign)
                if last_pass and is_last:
                    steps.append(last_pass())
                    continue
                loss, slopes = passes.plain(weight, direction if needs_slopes else ())
                steps.append(Step(loss))
                if slopes is not None:
                    difference = slopes if difference is None else difference - slopes
    return steps, difference
