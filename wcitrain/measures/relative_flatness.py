"""Relative flatness of a layer: curvature weighted by products of its rows, blind to scale between layers.

Legend: W [C, D] a layer's weight, rows w_s; H_ss' [D, D] blocks of the Hessian of the mean loss between rows
s and s'; h [N, D] features entering the last layer, p softmax of its outputs; Z random signs; L Lᵀ = W Wᵀ.

    κ = Σ_{s,s'} ⟨w_s, w_s'⟩ Tr(H_ss')      (Petzka et al., NeurIPS 2021, arXiv 2001.00939, definition 3)  (1)

Cross-entropy at the last layer, exact without any Hessian, where z is linear in W:

    κ = (1/N) Σ_n ||h_n||² [ Σ_s p_s ||w_s||² − ||Wᵀ p||² ]                                                (2)

Any linear layer, by random signs Z [r, D] (r = min(C, D)); never negative where H is positive semidefinite:

    κ = E ⟨U, H U⟩,   U = L Z                                                                              (3)

since the covariance of U is (W Wᵀ) ⊗ I. L is the triangular factor of Wᵀ = Q Lᵀ. Convolutions count as
matrices [out, in·k·k], an extension of ours. The bias does not enter. The code of FAM (a regulariser) has
||W|| Tr(H) in place of (1).
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wcitrain.attacks import ThreatModel
from wcitrain.curvature.hvp import gradients_with_graph, hvp, signs
from wcitrain.curvature.top_layer import HeadFeatures
from wcitrain.measures.adversarial import (
    attack_text,
    attacked,
    example_losses,
    held,
    mean_and_error,
    measuring,
)
from wcitrain.measures.chunk_sums import chunk_mean_and_error, sizes
from wcitrain.measures.measurement import Measurement
from wcitrain.params import Layers, select_layers, unwrapped, wide
from wcitrain.seeding import generator_from

HEAD = "head"


def relative_flatness(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    layers: str = HEAD,
    num_probes: int = 8,
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 25,
    seed: int = 0,
) -> Measurement:
    """Measure the relative flatness κ of the last layer exactly (2), or of any layers by random probes (3).

    Adversarial examples are found once and held fixed (Danskin).

    Args:
        model: Gives logits [N, C] for images in [0, 1].
        data: Iterable of (x, y, ...).
        threat: The adversary; None measures the clean loss.
        num_examples: How many, by default all.
        layers: ``"head"``: the model's last ``nn.Linear`` by (2). Otherwise a choice of
            ``params.select_layers`` that selects tensors of two or more dimensions (``"weights"``, a glob),
            by (3), each layer with a Hessian product of its own.
        num_probes: Probes a chunk and layer for (3), >= 1; the head needs none.
        num_steps, step_size, num_restarts: Of PGD; the step is 2.5 eps / num_steps by default.
        chunk_size: Examples at once. With (3) chunks are the samples of the error, hence the small default.
        seed: Of the attack's starts and of the probes.

    Returns:
        The sum of κ over the layers, ``parts``: each layer's. Standard error over examples for the head;
        otherwise over chunks, examples and probes together (NaN for a single chunk).

    Raises:
        ValueError: No linear head, or its outputs are not the model's; a layer of one dimension; ``num_probes
            < 1``; and what ``hvp`` refuses.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> list(relative_flatness(model, [(x, y)], None).parts)
    ['1.weight']
    """
    if num_probes < 1:
        raise ValueError(f"relative_flatness.num_probes: got {num_probes}; expected at least 1. Raise it.")
    model = unwrapped(model)
    with measuring(model):
        selected = None if layers == HEAD else _matrices(select_layers(model, layers))
        head = HeadFeatures(model) if selected is None else None
        chunks = attacked(
            model,
            held(model, data, num_examples, chunk_size),
            threat,
            num_steps=num_steps,
            step_size=step_size,
            num_restarts=num_restarts,
            seed=seed,
        )
        num = int(sizes(chunks).sum())
        if head is not None:
            samples = torch.cat([_at_head(model, x) for x, _ in chunks])
            value, stderr = mean_and_error(samples)
            parts = {f"{head.name}.weight".lstrip("."): value}  # the model may be the layer
            how = "closed form"
        else:
            assert selected is not None
            generator = generator_from(selected.tensors[0].device, seed, "relative_flatness")
            # [K, L]
            rows = torch.stack([_probed(model, x, y, selected, num_probes, generator) for x, y in chunks])
            value, stderr = chunk_mean_and_error(rows.sum(1), sizes(chunks))
            parts = {
                name: chunk_mean_and_error(column, sizes(chunks))[0]
                for name, column in zip(selected, rows.unbind(1), strict=True)
            }
            how = f"{num_probes} probes a chunk"
    settings = f"layers {layers}, {how}, {attack_text(threat, num_steps, num_restarts)}"
    return Measurement("relative_flatness", value, stderr, num, settings, parts)


def _at_head(model: nn.Module, x: Tensor) -> Tensor:
    """Return the terms of (2) [B]."""
    with torch.no_grad(), HeadFeatures(model) as head:
        logits = model(x)
        (h,) = head.features_of(logits)
        p, W = wide(logits).softmax(1), wide(head.head.weight)
        spread = p @ W.square().sum(1) - (p @ W).square().sum(1)
        return (wide(h).square().sum(1) * spread).double().cpu()


def _probed(
    model: nn.Module, x: Tensor, y: Tensor, layers: Layers, num_probes: int, generator: torch.Generator
) -> Tensor:
    """Return the mean of (3) over the probes, a number a layer [L]."""
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative
        loss = example_losses(model, x, y).mean()
    gradients = gradients_with_graph(loss, layers.tensors)
    values = []
    for tensor, gradient in zip(layers.tensors, gradients, strict=True):
        W = tensor.detach().flatten(1)
        L = torch.linalg.qr(W.T, mode="r").R.T  # [C, r]
        draws = []
        for _ in range(num_probes):
            (Z,) = signs([W.new_empty(L.shape[1], W.shape[1])], generator)
            U = (L @ Z).reshape(tensor.shape)
            (HU,) = hvp([gradient], [tensor], [U])
            draws.append(wide(U * HU).sum())
        values.append(torch.stack(draws).mean())
    return torch.stack(values).cpu()


def _matrices(layers: Layers) -> Layers:
    """Refuse layers without rows."""
    flat = [name for name, t in layers.items() if t.ndim < 2]
    if flat:
        raise ValueError(
            f"relative_flatness.layers: got {flat[0]} (+{len(flat) - 1}) of one dimension; expected weight "
            "matrices. Use layers='weights', or a glob such as '*weight' that selects no normalisation."
        )
    return layers
