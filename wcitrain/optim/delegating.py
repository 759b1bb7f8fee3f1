"""An optimizer that owns nothing: everything torch keeps in an optimizer is the base optimizer's.

Aliases go stale (``accelerate.prepare`` and ``load_state_dict`` replace the group list), so groups, state and
defaults are properties. torch's ``Optimizer.__init__`` is not called: hooks live in the base, and run once.
"""

from typing import Any

from torch.optim import Optimizer


def _of_the_base(name: str) -> Any:
    """Return a property that reads and sets the base optimizer's attribute ``name``."""
    return property(lambda self: getattr(self.base, name), lambda self, new: setattr(self.base, name, new))


class DelegatingOptimizer(Optimizer):
    """Hands everything but the step to ``base``, the optimizer that steps."""

    param_groups = _of_the_base("param_groups")
    state = _of_the_base("state")
    defaults = _of_the_base("defaults")

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base: got {base!r}; expected a torch.optim.Optimizer instance, not its class.")
        self.base = base

    def __getattr__(self, name: str) -> Any:
        """Hand hooks, ``train``/``eval`` of schedule-free optimizers and the like to the base optimizer."""
        if name == "base":  # not there yet: unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        # torch's keeps groups and state alone; ``step`` is there only where a scheduler patched it.
        return {key: value for key, value in vars(self).items() if key != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
