"""What the paper and the code of Stutz, Hein & Schiele (ICCV 2021) do differently, see `flatness`."""

import math
from typing import Any

from wcitrain.measures.strongest import SAMPLERS

PROTOCOLS: dict[str, dict[str, Any]] = {
    "paper": {"sampler": "ball", "shared_nu": False, "weight_lr": 0.001, "keep": "best"},
    "code": {"sampler": "sphere", "shared_nu": True, "weight_lr": 0.01, "keep": "last"},
}
KEEPS = ("best", "last")


def protocol_options(where: str, protocol: str, **given: Any) -> dict[str, Any]:
    """Return the options that ``given`` names, the protocol's where they are None."""
    check_choice(f"{where}.protocol", protocol, tuple(PROTOCOLS))
    options = {name: PROTOCOLS[protocol][name] if value is None else value for name, value in given.items()}
    check_choice(f"{where}.sampler", options["sampler"], SAMPLERS)
    check_choice(f"{where}.keep", options.get("keep", "best"), KEEPS)
    if not 0 < options.get("weight_lr", 1) < math.inf:
        raise ValueError(
            f"{where}.weight_lr: got {options['weight_lr']}; expected a number > 0. 0.001 is the paper's."
        )
    return options


def check_numbers(where: str, xi: float, **counts: int) -> None:
    """Refuse numbers out of range."""
    if not 0 < xi < math.inf:
        raise ValueError(
            f"{where}.xi: got {xi}; expected a relative radius > 0. 0.5 (average), 0.00075 (worst) are usual."
        )
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{where}.{name}: got {value}; expected at least 1. Raise it.")


def check_choice(where: str, value: str, choices: tuple[str, ...]) -> None:
    """Refuse a name that is none of the choices."""
    if value not in choices:
        raise ValueError(f"{where}: got {value!r}; expected one of {', '.join(choices)}. Choose one of them.")
