"""Every measure by its name, called in one way by recipes, ``wcitrain measure`` and the correlation study.

A measure takes what it needs of the shared arguments (``Shared``); everything else keeps its default unless
``settings`` name it. The two flatness measures of Stutz et al. come with a protocol of their own: the shared
attack does not reach them.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import check_finite
from wcitrain.measures.flatness import average_flatness, worst_flatness
from wcitrain.measures.gradients import gradient_norm, input_curvature, input_gradient_norm
from wcitrain.measures.losses import robust_loss
from wcitrain.measures.m_sharpness import average_sharpness, worst_sharpness
from wcitrain.measures.margins import margins, normalised_margin
from wcitrain.measures.measurement import Measurement
from wcitrain.measures.measuring import measure_wci
from wcitrain.measures.norms import distance_from_initialisation, frobenius_norms, path_norm, spectral_norms
from wcitrain.measures.pac_bayes_sharpness import pac_bayes_sharpness
from wcitrain.measures.relative_flatness import relative_flatness
from wcitrain.measures.sharpness import asam_sharpness, awp_sharpness, sam_sharpness
from wcitrain.measures.spectrum import lambda_max


def wci(model: nn.Module, data: Iterable[Any], threat: ThreatModel | None, **settings: Any) -> Measurement:
    """Measure the Weight-Curvature Index; ``parts``: every layer's share of the sum. See ``measure_wci``."""
    result = measure_wci(model, data, threat, progress=False, **settings)
    parts = dict(zip(result.layers, result.per_layer.tolist(), strict=True))
    return Measurement(
        "wci",
        result.total,
        result.total_stderr,
        result.num_examples,
        f"{result.loss}, {result.estimator}",
        parts,
    )


def hessian_trace(
    model: nn.Module, data: Iterable[Any], threat: ThreatModel | None, **settings: Any
) -> Measurement:
    """Measure Σ_l Tr(H_l), the index without the weights' norms; ``parts``: every layer's trace.

    See ``measure_wci``. The layers' errors are added as if they were fully correlated, an upper bound.
    """
    result = measure_wci(model, data, threat, progress=False, **settings)
    parts = dict(zip(result.layers, result.trace.mean.tolist(), strict=True))
    return Measurement(
        "hessian_trace",
        float(result.trace.mean.sum()),
        float(result.trace.stderr.sum()),
        result.num_examples,
        f"{result.loss}, {result.estimator}",
        parts,
    )


def clean_loss(
    model: nn.Module, data: Iterable[Any], threat: ThreatModel | None, **settings: Any
) -> Measurement:
    """Measure the mean cross-entropy of the clean images, whatever the threat. See ``robust_loss``."""
    found = robust_loss(model, data, None, **settings)
    return Measurement(
        "clean_loss", found.value, found.stderr, found.num_examples, found.settings, found.parts
    )


def magnitude_aware_sharpness(
    model: nn.Module, data: Iterable[Any], threat: ThreatModel | None, **settings: Any
) -> Measurement:
    """``pac_bayes_sharpness`` with noise in proportion to the weights."""
    found = pac_bayes_sharpness(model, data, threat, magnitude_aware=True, **settings)
    return Measurement(
        "magnitude_aware_sharpness",
        found.value,
        found.stderr,
        found.num_examples,
        found.settings,
        found.parts,
    )


MEASURES: dict[str, Callable[..., Measurement]] = {
    "wci": wci,
    "hessian_trace": hessian_trace,
    "lambda_max": lambda_max,
    "average_flatness": average_flatness,
    "worst_flatness": worst_flatness,
    "relative_flatness": relative_flatness,
    "sam_sharpness": sam_sharpness,
    "asam_sharpness": asam_sharpness,
    "awp_sharpness": awp_sharpness,
    "average_sharpness": average_sharpness,
    "worst_sharpness": worst_sharpness,
    "pac_bayes_sharpness": pac_bayes_sharpness,
    "magnitude_aware_sharpness": magnitude_aware_sharpness,
    "gradient_norm": gradient_norm,
    "input_gradient_norm": input_gradient_norm,
    "input_curvature": input_curvature,
    "margins": margins,
    "normalised_margin": normalised_margin,
    "frobenius_norms": frobenius_norms,
    "spectral_norms": spectral_norms,
    "path_norm": path_norm,
    "distance_from_initialisation": distance_from_initialisation,
    "robust_loss": robust_loss,
    "clean_loss": clean_loss,
}
OWN_PROTOCOL = ("average_flatness", "worst_flatness")
NEED_INITIAL = frozenset({"distance_from_initialisation", "pac_bayes_sharpness", "magnitude_aware_sharpness"})
# What functions that pass their settings on take of ``Shared``.
_PASSED_ON: dict[str, Callable[..., Any]] = {
    "wci": measure_wci,
    "hessian_trace": measure_wci,
    "clean_loss": robust_loss,
    "magnitude_aware_sharpness": pac_bayes_sharpness,
}


@dataclass(frozen=True)
class Shared:
    """The arguments that measures share.

    Args:
        num_examples: How many; None leaves each measure's default.
        num_steps, step_size: Of the attack; None leaves each measure's default. Measures with a protocol of
            their own only take them from ``settings``.
        seed: Of everything random.
        initial: Weights before training, for distances; None where they are unknown.
        image_shape: (C, H, W), for norms of convolutions.
    """

    num_examples: int | None = None
    num_steps: int | None = None
    step_size: float | None = None
    seed: int = 0
    initial: Mapping[str, Tensor] | None = None
    image_shape: tuple[int, ...] | None = None


def measure(
    name: str,
    model: nn.Module,
    data: Sequence[Any],
    threat: ThreatModel | None,
    shared: Shared | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Measurement:
    """Take one measure by its name.

    Args:
        name: A key of ``MEASURES``.
        model: Gives logits [N, C] for images in [0, 1].
        data: Batches (x, y, ...), read anew by every measure: a list, not an iterator.
        threat: The adversary; None measures the clean loss.
        shared: What measures share.
        settings: Further arguments of this measure, which win over ``shared``.

    Raises:
        ValueError: An unknown measure or setting, or what the measure itself refuses.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    >>> measure("average_flatness", model, [(x, y)], None, settings={"num_draws": 2}).name
    'average_flatness'
    """
    check_settings([name], {name: settings or {}})
    check_finite(model)
    function = MEASURES[name]
    accepted = {*inspect.signature(function).parameters, *_parameters(name)}
    given = {
        key: value for key, value in vars(shared or Shared()).items() if value is not None or key == "initial"
    }
    if name in OWN_PROTOCOL:
        given = {key: value for key, value in given.items() if key not in ("num_steps", "step_size")}
    given = {key: value for key, value in given.items() if key in accepted} | dict(settings or {})
    return function(model, data, threat, **given) if "data" in accepted else function(model, **given)


def check_settings(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuse names and settings that no measure has.

    Raises:
        ValueError: With what is allowed.
    """
    for name in (*names, *settings):
        if name not in MEASURES:
            raise ValueError(
                f"measures: got {name!r}; expected names of {', '.join(MEASURES)}. Correct the spelling."
            )
    for name, values in settings.items():
        if name not in names:
            raise ValueError(
                f"measures.settings: got settings of {name}, which is not measured. Add it, or drop them."
            )
        allowed = _accepted(name)
        for key in values:
            if key not in allowed:
                raise ValueError(
                    f"measures.settings.{name}: got {key!r}; expected one of {', '.join(allowed)}."
                )


def _accepted(name: str) -> list[str]:
    """Return the keyword arguments of a measure."""
    hidden = (
        "initial",
        "image_shape",
        "loss",
        "progress",
        "device",
        "magnitude_aware" * (name != "pac_bayes_sharpness"),
    )
    return [key for key, p in _parameters(name).items() if p.kind is p.KEYWORD_ONLY and key not in hidden]


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the function that takes a measure's settings in the end."""
    function = _PASSED_ON.get(name, MEASURES[name])
    return inspect.signature(function).parameters
