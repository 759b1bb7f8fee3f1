"""PAC-Bayes sharpness: how much Gaussian noise the weights bear before the accuracy falls.

Legend: w weights, w⁰ before training, ω their number, m examples, u noise, K draws, acc the accuracy.

    σ = the largest in [0, σ_max] with  |E acc(w + u) − acc(w)| <= 0.1,   u_i ~ N(0, σ²)                   (1)
    sharpness = 1 / σ²                                                                                     (2)
    bound = ‖w‖² / (4 σ²) + ln(m / σ) + 10,     with w − w⁰ for w beside it                                (3)

    magnitude-aware:  u_i ~ N(0, σ'² w_i² + e²),   e = 1e-3,   sharpness = 1 / σ'²                         (4)
    bound = ¼ Σ_i ln [ (e² + (σ'² + 1) ‖r‖² / ω) / (e² + σ'² r_i²) ] + ln(m / σ') + 10,  r = w, or w − w⁰  (5)

Definitions of Jiang et al. 2020 (arXiv 1912.02178), as Dziugaite et al. 2020 (2010.11924) compute them:
bisection, ten draws. What differs here. Their code hands σ² to a sampler that expects a standard deviation;
here u has variance σ². Normalisation is not folded into the convolutions; its parameters are not moved. The K
draws are the same at every σ, only scaled, so the bisection compares like with like. The accuracy may be
robust: then the attack is run anew on every perturbed model.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import attack_text, attacked, held, mean_and_error, measuring
from wcitrain.measures.margins import output_margins
from wcitrain.measures.measurement import Measurement
from wcitrain.measures.norms import initial_weights
from wcitrain.params import Layers, select_layers, unwrapped
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from

FLOOR = 1e-3  # e


def pac_bayes_sharpness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None = None,
    *,
    num_examples: int | None = None,
    magnitude_aware: bool = False,
    max_drop: float = 0.1,
    num_draws: int = 10,
    max_sigma: float = 2.0,
    num_bisections: int = 15,
    initial: Mapping[str, Tensor] | None = None,
    layers: str = "weights",
    num_steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
) -> Measurement:
    """Return 1/σ² by (1) and (2), or 1/σ'² by (4); infinite where even the smallest σ tried is too much.

    Parts: ``sigma`` (known to max_sigma / 2^num_bisections; where it is ``max_sigma`` itself the value is an
    upper end, and the settings say so), ``accuracy``, ``perturbed_accuracy`` at σ with its standard error
    over draws, ``bound_origin`` and, given ``initial``, ``bound_initial`` by (3) or (5), ``rate_...`` =
    sqrt(bound / m). The value's own error is unknown: NaN.

    Cost: ``num_bisections`` · ``num_draws`` evaluations of the accuracy, attack included.

    Args:
        model: Gives logits for images in [0, 1].
        data: Iterable of (x, y, ...).
        threat: The adversary (PGD on the cross-entropy); None takes the clean accuracy.
        num_examples: m, also of the bounds, which are about the examples measured; by default all.
        magnitude_aware: (4) and (5) instead of (1) and (3).
        max_drop: Accuracy that may be lost, in (0, 1).
        num_draws: K.
        max_sigma: σ_max > 0.
        num_bisections: Halvings of [0, σ_max].
        initial: State dict before training, for the bounds around it.
        layers: Which weights move, see ``params.select_layers``.
        num_steps, step_size: Of PGD; the step is 2.5 eps / num_steps by default.
        seed: Of noise and random starts.

    Raises:
        ValueError: An argument out of range, initial weights that do not fit, no images.
    """
    if not (0 < max_drop < 1 and num_draws >= 1 and 0 < max_sigma < math.inf and num_bisections >= 1):
        raise ValueError(
            f"pac_bayes_sharpness: got max_drop={max_drop}, num_draws={num_draws}, max_sigma={max_sigma}, "
            f"num_bisections={num_bisections}; expected max_drop in (0, 1), max_sigma > 0, the others >= 1."
        )
    model = unwrapped(model)
    with measuring(model):
        chosen = select_layers(model, layers)
        before = None if initial is None else initial_weights(chosen, initial, "pac_bayes_sharpness")
        chunks = held(model, data, num_examples)

        def accuracy() -> float:
            worst = attacked(model, chunks, threat, num_steps=num_steps, step_size=step_size, seed=seed)
            return float((output_margins(model, worst) > 0).double().mean())

        def accuracies(sigma: float) -> Tensor:
            found = []
            for draw in range(num_draws):
                with perturbed(chosen.tensors, _noise(chosen, sigma, magnitude_aware, seed, draw)) as move:
                    move(1)
                    found.append(accuracy())
            return torch.tensor(found, dtype=torch.float64)

        reference = accuracy()
        if reference <= max_drop:
            note = f"accuracy {reference:.3g} is at most max_drop {max_drop:g}: no noise can lose that much"
            parts = {"accuracy": reference}
            return Measurement(
                "pac_bayes_sharpness", math.nan, math.nan, sum(len(y) for _, y in chunks), note, parts
            )
        sigma, limit, tried = 0.0, max_sigma, max_sigma
        at_sigma = torch.tensor([reference], dtype=torch.float64)
        for _ in range(num_bisections + 1):
            values = accuracies(tried)
            # A drop that is exactly allowed, such as 2 of 20, must not fall to rounding.
            if abs(float(values.mean()) - reference) <= max_drop + 1e-9:
                sigma, at_sigma = tried, values
            else:
                limit = tried
            if sigma == limit:  # even the largest is borne
                break
            tried = (sigma + limit) / 2
        m = sum(len(y) for _, y in chunks)
        bounds = _bounds(chosen, before, sigma, m, magnitude_aware) if sigma > 0 else {}
    notes = [
        "magnitude-aware" if magnitude_aware else "isotropic",
        f"drop {max_drop:g}",
        f"{num_draws} draws",
        attack_text(threat, num_steps),
        *([f"sigma at its limit {max_sigma:g}"] if sigma == max_sigma else []),
    ]
    mean, error = mean_and_error(at_sigma)
    parts = {
        "sigma": sigma,
        "accuracy": reference,
        "perturbed_accuracy": mean,
        "perturbed_accuracy_stderr": error,
    }
    value = 1 / sigma**2 if sigma > 0 else math.inf
    return Measurement("pac_bayes_sharpness", value, math.nan, m, ", ".join(notes), parts | bounds)


def _noise(layers: Layers, sigma: float, magnitude_aware: bool, seed: int, draw: int) -> list[Tensor]:
    """Return draw number ``draw`` of u by (1) or (4): the same numbers at every sigma, scaled."""
    noise = []
    for name, tensor in zip(layers.names, layers.tensors, strict=True):
        w = tensor.detach()
        standard = torch.randn(
            w.shape,
            generator=generator_from(w.device, seed, "noise", draw, name),
            device=w.device,
            dtype=w.dtype,
        )
        noise.append(
            standard * (sigma**2 * w.square() + FLOOR**2).sqrt() if magnitude_aware else sigma * standard
        )
    return noise


def _bounds(
    layers: Layers, before: Sequence[Tensor] | None, sigma: float, m: int, magnitude_aware: bool
) -> dict[str, float]:
    """Return (3) or (5) around the origin and, where they are known, around the initial weights."""
    now = [t.detach() for t in layers.tensors]
    around = {"origin": now}
    if before is not None:
        around["initial"] = [w - w0 for w, w0 in zip(now, before, strict=True)]
    parts: dict[str, float] = {}
    for name, tensors in around.items():
        r = torch.cat([t.flatten().double().cpu() for t in tensors])
        if magnitude_aware:
            spread = FLOOR**2 + (sigma**2 + 1) * r.square().mean()
            size = (spread / (FLOOR**2 + sigma**2 * r.square())).log().sum() / 4
        else:
            size = r.square().sum() / (4 * sigma**2)
        bound = float(size) + math.log(m / sigma) + 10
        parts |= {f"bound_{name}": bound, f"rate_{name}": math.sqrt(max(bound, 0.0) / m)}
    return parts
