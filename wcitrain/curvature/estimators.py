"""The estimators by name, and which of them a model and its loss allow.

Not every operation can be differentiated twice (hardsigmoid, anything compiled): a dry run on one batch
tells, and leaves no trace.
"""

import re
from typing import NamedTuple

import torch
from torch import nn

from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.gauss_newton import GaussNewton
from wcitrain.curvature.hutchinson import Hutchinson
from wcitrain.curvature.passes import Passes
from wcitrain.curvature.top_layer import TopLayer
from wcitrain.method import PositiveCount, method, setting
from wcitrain.params import is_compiled
from wcitrain.text import name_some


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

    def candidates(self, needs_gradient: bool) -> list[Estimator]:
        """Return what is tried, in order."""
        first = GaussNewton(self.num_probes)
        return [first] if needs_gradient else [first, Hutchinson(self.num_probes)]

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
    """The estimator, and why in one sentence."""

    estimator: Estimator
    reason: str


def choose(wanted: Estimator, passes: Passes, *, needs_gradient: bool) -> Choice:
    """Return the estimator to use, after a dry run on one batch; of `Auto` the first possible candidate.

    Measuring (no ``needs_gradient``) needs fewer derivatives. ValueError where none is possible: what stands
    in the way, and what to do.
    """
    candidates = wanted.candidates(needs_gradient) if isinstance(wanted, Auto) else [wanted]
    obstacles: list[str] = []
    for candidate in candidates:
        obstacle = _obstacle(candidate, passes, needs_gradient)
        if obstacle is None:
            why = "as asked" if candidate is wanted else "; ".join(["the dry run passed", *obstacles])
            return Choice(candidate, why)
        obstacles.append(f"{name_of(candidate)} is not possible here: {obstacle}")
    text = f"estimator: got {name_of(wanted)}; expected one that this model and loss allow."
    raise ValueError(" ".join([text, *obstacles]))


def name_of(estimator: Estimator) -> str:
    """Return the name of an estimator in the table; of another one its class's name."""
    names = (name for name, kind in ESTIMATORS.items() if type(estimator) is kind)
    return next(names, type(estimator).__name__)


def _obstacle(estimator: Estimator, passes: Passes, needs_gradient: bool) -> str | None:
    """Try the estimator on a batch; return what stands in the way, and the way out."""
    model = passes.model
    with passes.undone(on_success=True), passes.local():
        try:
            if needs_gradient:
                estimator.add_gradient(passes, torch.ones_like(passes.layers.sizes()), 1.0)
            else:
                estimator.draw(passes, 1, passes.generator("dry run"))
        except ValueError as error:  # a loss or a derivative that does not fit, seen without failing
            return str(error)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            compiled = any(map(is_compiled, model.modules()))
            way_out = "the model before torch.compile" if compiled else "the rule WCIPosterior (wci)"
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            return f"its passes fail: {reason}{_found_at(model, reason)}. Use {way_out}."
    return None


def _found_at(model: nn.Module, reason: str) -> str:
    """Return the modules that bear the name of the operation in torch's words, where there are any."""
    found = re.search(r"aten::(\w+)_backward", reason)
    operation = found[1].replace("_", "") if found else ""
    places = [name for name, m in model.named_modules() if type(m).__name__.lower() == operation]
    return f" (modules {name_some(places, 3)})" if places else ""
