"""Margins of the outputs: how far the right class is ahead, on clean or on adversarial examples.

Legend: z [C] logits, γ margin of an example, q quantile of the margins, A_l the linear map of layer l.

    γ(x, y) = z_y − max_{j ≠ y} z_j        (> 0: classified rightly)                                       (1)
    normalised margin = q(γ) / Π_l ‖A_l‖_σ                                                                 (2)

Margins alone grow with the scale of the weights; (2) divides it out (Bartlett, Foster & Telgarsky 2017, whose
bound also has a factor from the distance to initialisation). The product is that of ``norms.spectral_norms``.
"""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import Chunks, attack_text, attacked, held, mean_and_error, measuring
from wcitrain.measures.measurement import Measurement
from wcitrain.measures.norms import spectral_norms
from wcitrain.params import unwrapped


def margins(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None = None,
    *,
    num_examples: int | None = None,
    quantile: float = 0.1,
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    seed: int = 0,
) -> Measurement:
    """Return the ``quantile`` of the output margins (1).

    ``parts``: ``mean``, ``mean_stderr``, ``median``, ``min``, ``accuracy``. Its standard error is half the
    distance between the quantiles one binomial standard error, sqrt(q (1 − q) / N), to either side: of the
    examples as a sample.

    Args:
        model: Gives logits [B, C] with C >= 2 for images in [0, 1].
        data: Iterable of (x, y, ...).
        threat: The adversary: PGD on the cross-entropy; None takes clean images.
        num_examples: The first that many; all by default.
        quantile: In (0, 1); 0.1 is the tenth percentile, which bounds use in place of the minimum.
        num_steps, step_size, num_restarts: Of PGD; the step is 2.5 eps / num_steps by default.
        seed: Of the random starts.

    Raises:
        ValueError: A quantile out of range, one output, labels that are no classes, no images.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> margins(model, [(torch.rand(20, 1, 2, 2), torch.arange(20) % 3)]).num_examples
    20
    """
    if not 0 < quantile < 1:
        raise ValueError(f"margins: got quantile={quantile}; expected a number in (0, 1). 0.1 is usual.")
    model = unwrapped(model)
    with measuring(model):
        chunks = held(model, data, num_examples)
        chunks = attacked(
            model,
            chunks,
            threat,
            num_steps=num_steps,
            step_size=step_size,
            num_restarts=num_restarts,
            seed=seed,
        )
        values = output_margins(model, chunks)
    mean, error = mean_and_error(values)
    num = len(values)
    spread = math.sqrt(quantile * (1 - quantile) / num)
    low, value, high = (_quantile(values, quantile + side * spread) for side in (-1, 0, 1))
    return Measurement(
        "margins",
        value,
        (high - low) / 2 if num > 1 else math.nan,
        num,
        f"{100 * quantile:g} % quantile, {attack_text(threat, num_steps, num_restarts)}",
        {
            "mean": mean,
            "mean_stderr": error,
            "median": _quantile(values, 0.5),
            "min": float(values.min()),
            "accuracy": float((values > 0).double().mean()),
        },
    )


def normalised_margin(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None = None,
    *,
    num_examples: int | None = None,
    quantile: float = 0.1,
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    seed: int = 0,
) -> Measurement:
    """Return (2), the ``quantile`` of the margins over the product of the layers' spectral norms.

    Parts: ``margin``, ``log_spectral_product`` = Σ ln ‖A_l‖_σ (the product itself may overflow),
    ``log_complexity`` = 2 Σ ln ‖A_l‖_σ − 2 ln margin, NaN where the margin is not positive. The error is that
    of the margin. Arguments: see ``margins``.
    """
    model = unwrapped(model)
    batches = list(_limited(data, num_examples))
    found = margins(
        model,
        batches,
        threat,
        num_examples=num_examples,
        quantile=quantile,
        num_steps=num_steps,
        step_size=step_size,
        num_restarts=num_restarts,
        seed=seed,
    )
    log_product = spectral_norms(model, image_shape=batches[0][0].shape[1:]).value / 2
    scale = math.exp(-log_product) if log_product < 700 else 0.0
    return Measurement(
        "normalised_margin",
        found.value * scale,
        found.stderr * scale,
        found.num_examples,
        found.settings,
        {
            "margin": found.value,
            "log_spectral_product": log_product,
            "log_complexity": 2 * log_product - 2 * math.log(found.value) if found.value > 0 else math.nan,
        },
    )


def output_margins(model: nn.Module, chunks: Chunks) -> Tensor:
    """Return the margins (1) of all examples [N], float64 on the CPU, no graph."""
    values = []
    with torch.no_grad():
        for x, y in chunks:
            z = model(x).double()
            if z.ndim != 2 or z.shape[1] < 2 or y.ndim != 1 or int(y.min()) < 0 or int(y.max()) >= z.shape[1]:
                raise ValueError(
                    f"margins: got outputs {tuple(z.shape)} and labels {tuple(y.shape)} up to "
                    f"{int(y.max())}; expected [B, C], C >= 2, and classes [B] below C."
                )
            right = z.gather(1, y[:, None]).squeeze(1)
            others = z.scatter(1, y[:, None], -math.inf).amax(1)
            values.append((right - others).cpu())
    return torch.cat(values)


def _quantile(values: Tensor, share: float) -> float:
    return float(torch.quantile(values, min(max(share, 0.0), 1.0)))


def _limited(data: Iterable[Any], num_examples: int | None) -> Iterable[Any]:
    """Yield no more batches than hold ``num_examples``."""
    seen = 0
    for batch in data:
        yield batch
        seen += len(batch[0])
        if num_examples is not None and seen >= num_examples:
            return
