"""The estimators by name, and which of them a model and its loss allow.

Not every operation can be differentiated twice (fused attention, hardsigmoid, anything compiled). A dry run
of the very derivatives on one batch tells. It leaves weights, gradients, buffers and random state alone.
"""

from typing import NamedTuple

from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.gauss_newton import GaussNewton
from wcitrain.curvature.hutchinson import Hutchinson
from wcitrain.curvature.passes import Passes
from wcitrain.curvature.top_layer import TopLayer
from wcitrain.method import PositiveCount, method, setting
from wcitrain.preserve import kept_random_state, undisturbed

FUSED_ATTENTION = "scaled_dot_product"  # in torch's message about every fused kernel of attention


@method
class Auto(Estimator):
    """Gauss–Newton where a dry run allows it, else an error; to measure only, Hutchinson is second.

    As a penalty `Hutchinson`, which moves the weights, sees the kinks of a ReLU network, which is another
    quantity: it wrecked training there (DESIGN.md). On smooth networks it is right: ask for it by name.
    """

    num_probes: PositiveCount = setting(1, "Random probes for each batch.")
    label = "auto"
    source = "none: it chooses, and says which and why"
    cost = "that of the estimator chosen, and a dry run on one batch before the first step"
    moves_weights = True

    def candidates(self, needs_gradient: bool) -> tuple[Estimator, ...]:
        """Return what is tried, in order."""
        first = GaussNewton(self.num_probes)
        return (first,) if needs_gradient else (first, Hutchinson(self.num_probes))

    def extra_passes(self, is_active: bool) -> tuple[int, int]:
        """Return those of the first candidate."""
        return self.candidates(is_active)[0].extra_passes(is_active)


ESTIMATORS: dict[str, type[Estimator]] = {
    "auto": Auto,
    "gauss_newton": GaussNewton,
    "hutchinson": Hutchinson,
    "top_layer": TopLayer,
}


class Choice(NamedTuple):
    """The estimator, why in one sentence, and whether attention must run by its plain formula for it."""

    estimator: Estimator
    reason: str
    use_math_attention: bool = False


def choose(
    wanted: Estimator, passes: Passes, *, needs_gradient: bool, may_move_weights: bool = True
) -> Choice:
    """Return the estimator to use, after a dry run on one batch; of `Auto` the first possible candidate.

    Measuring (no ``needs_gradient``) needs fewer derivatives; beside a weight perturbation none may move
    weights. Where fused attention is what stands in the way, ``passes.use_math_attention`` is set.

    Raises:
        ValueError: None is possible: what stands in the way, and what to do.
    """
    candidates = wanted.candidates(needs_gradient) if isinstance(wanted, Auto) else (wanted,)
    obstacles: list[str] = []
    for candidate in candidates:
        reason: str | None = "it moves the weights itself, as the perturbation does."
        if may_move_weights or not candidate.moves_weights:
            reason = _refusal(candidate, passes, needs_gradient)
        if reason is None:
            why = "as asked" if candidate is wanted else "; ".join(["the dry run passed", *obstacles])
            why += ", with attention unfused" if passes.use_math_attention else ""
            return Choice(candidate, why, passes.use_math_attention)
        obstacles.append(f"{name_of(candidate)} is not possible here: {reason}")
    text = f"estimator: got {name_of(wanted)}; expected one that this model and loss allow."
    raise ValueError(" ".join([text, *obstacles]))


def name_of(estimator: Estimator) -> str:
    """Return the name of an estimator in the table; of another one its class's name."""
    names = (name for name, kind in ESTIMATORS.items() if type(estimator) is kind)
    return next(names, type(estimator).__name__)


def _refusal(estimator: Estimator, passes: Passes, needs_gradient: bool) -> str | None:
    """Return what stands in the way of an estimator, also with attention by its plain formula."""
    before = passes.use_math_attention
    with undisturbed(passes.model, training=None), kept_random_state(passes.device), passes.local():
        reason = estimator.refuses(passes, needs_gradient)
        if reason is not None and FUSED_ATTENTION in reason:
            passes.use_math_attention = True
            reason = estimator.refuses(passes, needs_gradient)
    if reason is not None:
        passes.use_math_attention = before
    return reason
