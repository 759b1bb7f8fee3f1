"""What every measure needs: the same examples, a model that is left as it was, and its loss under attack.

Legend: N examples, B examples a chunk.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wcitrain.attacks import ThreatModel, pgd
from wcitrain.digest import digest
from wcitrain.measures.examples import Examples
from wcitrain.preserve import full_precision, undisturbed
from wcitrain.seeding import generator_from

Chunks = Sequence[tuple[Tensor, Tensor]]


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, full precision and gradients allowed; all is restored on exit.

    That is modes, buffers, ``requires_grad`` and random state. A frozen model counts as trainable inside.

    Raises:
        ValueError: A weight is not finite: measures of a diverged model would read as flat.
    """
    check_finite(model)
    frozen = [] if any(p.requires_grad for p in model.parameters()) else list(model.parameters())
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        undisturbed(model, training=False),
        full_precision(model),
    ):
        try:
            for p in frozen:
                p.requires_grad_(p.is_floating_point())
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)


def check_finite(model: nn.Module) -> None:
    """Refuse a model with weights that are not finite."""
    bad = [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]
    if bad:
        raise ValueError(f"model: got weights that are not finite in {', '.join(bad[:3])}; expected numbers.")


def held(model: nn.Module, data: Iterable[Any], num_examples: int | None, chunk_size: int = 100) -> Chunks:
    """Return the first ``num_examples`` of ``data`` (by default all) in chunks, on the model's device.

    Args:
        model: Decides the device.
        data: Iterable of (x, y, ...), images in [0, 1] and classes.
        num_examples: How many, >= 1.
        chunk_size: B; the last chunk may be smaller.

    Raises:
        ValueError: No examples, or ``num_examples < 1``.
    """
    if num_examples is not None and num_examples < 1:
        raise ValueError(f"num_examples: got {num_examples}; expected at least 1, or None for all.")
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    chunks = [(x.to(device), y.to(device)) for x, y in Examples(data, num_examples).chunks(chunk_size)]
    if not chunks:
        raise ValueError("data: got no images; expected at least one batch. Is the data set empty?")
    return chunks


def example_losses(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the cross-entropy of every example [B]."""
    return F.cross_entropy(model(x), y, reduction="none")


def attacked(
    model: nn.Module,
    chunks: Chunks,
    threat: ThreatModel | None,
    *,
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    seed: int = 0,
) -> Chunks:
    """Return the chunks with adversarial images: PGD on the cross-entropy, each example's worst restart.

    Starts are functions of ``seed`` and of the chunk alone: two models are attacked from the same points.

    Args:
        model: Inside ``measuring``.
        threat: The adversary; None leaves the images clean.
        num_steps, num_restarts: Of PGD.
        step_size: In the threat's norm; by default 2.5 eps / num_steps.
        seed: Of the starts.
    """
    if threat is None:
        return chunks
    length = threat.step_for(num_steps, step_size)
    key = (
        None if _reused is None else _reused.key(model, chunks, threat, num_steps, length, num_restarts, seed)
    )
    if _reused is not None and (known := _reused.get(key)) is not None:
        return known
    result = []
    for number, (x, y) in enumerate(chunks):
        x_adv = pgd(
            lambda images, y=y: example_losses(model, images, y),  # type: ignore[misc]
            x,
            threat=threat,
            num_steps=num_steps,
            step_size=length,
            num_restarts=num_restarts,
            generator=generator_from(x.device, seed, "attack", number),
        )
        result.append((x_adv, y))
    if _reused is not None:
        _reused.put(key, result)
    return result


class _Reused:
    """Adversarial examples of one model at the weights it has now."""

    def __init__(self, model: nn.Module) -> None:
        self._weights = digest(_tensors(model))
        self._chunks: dict[str, Chunks] = {}

    def key(self, model: nn.Module, chunks: Chunks, *settings: object) -> str | None:
        """Return what the attack's result is a function of, shortened; None at other weights."""
        if digest(_tensors(model)) != self._weights:
            return None
        return digest([tensor for pair in chunks for tensor in pair] + [*settings])

    def get(self, key: str | None) -> Chunks | None:
        return None if key is None else self._chunks.get(key)

    def put(self, key: str | None, chunks: Chunks) -> None:
        if key is not None:
            self._chunks[key] = chunks


_reused: _Reused | None = None


@contextmanager
def reused_attacks(model: nn.Module) -> Iterator[None]:
    """Let measures of ``model`` share adversarial examples where weights, images and attack are the same.

    Those found at perturbed weights are not kept.
    """
    global _reused
    former, _reused = _reused, _Reused(model)
    try:
        yield
    finally:
        _reused = former


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def losses_of(model: nn.Module, chunks: Chunks) -> Tensor:
    """Return the cross-entropy of all examples [N] in float64 on the CPU, no graph."""
    with torch.no_grad():
        return torch.cat([example_losses(model, x, y) for x, y in chunks]).double().cpu()


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean of [N] values and its standard error; NaN for a single one."""
    return float(values.mean()), float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.nan


def attack_text(threat: ThreatModel | None, num_steps: int, num_restarts: int = 1) -> str:
    """Return "PGD-20x10 linf 8/255", or "clean"."""
    times = f"x{num_restarts}" if num_restarts > 1 else ""
    return "clean" if threat is None else f"PGD-{num_steps}{times} {threat}"
