"""Which weight perturbation goes with which penalty."""

from wcitrain.optim.penalty import Penalty
from wcitrain.optim.perturbation import Combination, WeightPerturbation


def refuse_what_does_not_compose(perturbation: WeightPerturbation, penalty: Penalty) -> None:
    """Raise where the two would not be one well-defined objective.

    A norm penalty goes with everything. A curvature penalty is evaluated at W + u, so it needs a rule that takes the gradient
    there and nowhere else, and an estimator that moves no weights itself.

    Raises:
        ValueError: With the reason.
    """
    if not penalty.measures_curvature:
        return
    if penalty.estimator not in ("auto", "gauss_newton"):
        what = "whose only layer is the head" if penalty.estimator == "top_layer" else "which moves the weights itself"
        raise ValueError(
            f"penalty.estimator: got {penalty.estimator!r}, {what}, beside {perturbation}; expected gauss_newton. Change it, or "
            "leave one of the two out."
        )
    if perturbation.measures_traces or perturbation.combination() != Combination():
        why = (
            "it measures the traces by itself"
            if perturbation.measures_traces
            else "it mixes gradients of several points, of which the penalty would see one"
        )
        raise ValueError(
            f"penalty: got {penalty} beside {perturbation}; expected a rule that takes the gradient at W + u alone (SAM, ASAM, "
            f"AWP, VaSSO, RWP with mixing 1): {why}. Leave one of the two out."
        )
