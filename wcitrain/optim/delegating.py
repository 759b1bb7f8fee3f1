"""An optimizer that owns nothing: everything torch keeps in an optimizer is the base optimizer's.

Aliases go stale (``accelerate.prepare`` and ``load_state_dict`` replace the group list at once), so groups, state and
defaults are properties. torch's ``Optimizer.__init__`` is not called: hooks and profiling live in the base, and run once.
"""

from typing import Any

from torch.optim import Optimizer


class DelegatingOptimizer(Optimizer):
    """Base of optimizer wrappers; see the module docstring.

    Args:
        base: The optimizer that steps.

    Raises:
        TypeError: ``base`` is not a ``torch.optim.Optimizer`` instance.
    """

    base: Optimizer

    def __init__(self, base: Optimizer) -> None:
        if not isinstance(base, Optimizer):
            raise TypeError(f"base: got {base!r}; expected a torch.optim.Optimizer instance, not its class.")
        self.base = base

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's groups."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> Any:
        """The base optimizer's state."""
        return self.base.state

    @state.setter
    def state(self, state: Any) -> None:
        self.base.state = state

    @property
    def defaults(self) -> dict[str, Any]:
        """The base optimizer's defaults."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, defaults: dict[str, Any]) -> None:
        self.base.defaults = defaults

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer."""
        self.base.add_param_group(param_group)

    def __getattr__(self, name: str) -> Any:
        """Hand hooks, ``train``/``eval`` of schedule-free optimizers and the like to the base optimizer."""
        if name == "base":  # not there yet: unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "step"}  # a scheduler's patch of step

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
