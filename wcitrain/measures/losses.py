"""The losses themselves, and how far test is from train: what the other measures are to predict."""

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import attack_text, attacked, held, losses_of, mean_and_error, measuring
from wcitrain.measures.measurement import Measurement
from wcitrain.params import unwrapped


def robust_loss(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None,
    *,
    num_examples: int | None = None,
    num_steps: int = 10,
    step_size: float | None = None,
    num_restarts: int = 1,
    chunk_size: int = 100,
    seed: int = 0,
) -> Measurement:
    """Measure the mean cross-entropy under PGD, its error over examples; ``parts``: ``accuracy`` in [0, 1].

    Args:
        model: Gives logits [N, C] for images in [0, 1].
        data: Iterable of (x, y, ...), y classes [N].
        threat: The adversary; None measures the clean loss.
        num_examples: How many, by default all.
        num_steps, num_restarts: Of PGD, from random starts; the last iterate counts, of several the worst.
        step_size: In the threat's norm; by default 2.5 eps / num_steps.
        chunk_size: Examples attacked at once; decides, with ``seed``, their starting points.
        seed: Of the starts.

    Raises:
        ValueError: No examples, images outside [0, 1] under attack, an argument out of range.

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(8, 1, 2, 2), torch.arange(8) % 3
    >>> threat = ThreatModel("linf", 0.1)
    >>> robust_loss(model, [(x, y)], threat).value > robust_loss(model, [(x, y)], None).value
    True
    """
    model = unwrapped(model)
    with measuring(model):
        chunks = held(model, data, num_examples, chunk_size)
        chunks = attacked(
            model,
            chunks,
            threat,
            num_steps=num_steps,
            step_size=step_size,
            num_restarts=num_restarts,
            seed=seed,
        )
        losses = losses_of(model, chunks)
        correct = sum(int((model(x).argmax(1) == y).sum()) for x, y in chunks)
    value, stderr = mean_and_error(losses)
    settings = attack_text(threat, num_steps, num_restarts)
    return Measurement(
        "robust_loss", value, stderr, len(losses), settings, {"accuracy": correct / len(losses)}
    )


def robust_gap(
    model: nn.Module, train: Iterable[Any], test: Iterable[Any], threat: ThreatModel | None, **settings: Any
) -> Measurement:
    """Measure the robust generalisation gap: robust loss on test minus robust loss on train.

    ``parts``: ``accuracy_gap`` = robust accuracy on train minus that on test, and both losses and accuracies.
    The errors of the two sets are independent and add up in squares.

    Args:
        model, threat: See ``robust_loss``.
        train, test: Iterables of (x, y, ...); training images without augmentation.
        settings: Further arguments of ``robust_loss``, the same for both sets.
    """
    on_train = robust_loss(model, train, threat, **settings)
    on_test = robust_loss(model, test, threat, **settings)
    parts = {
        "train_loss": on_train.value,
        "test_loss": on_test.value,
        "train_accuracy": on_train.parts["accuracy"],
        "test_accuracy": on_test.parts["accuracy"],
        "accuracy_gap": on_train.parts["accuracy"] - on_test.parts["accuracy"],
    }
    return Measurement(
        "robust_gap",
        on_test.value - on_train.value,
        math.hypot(on_train.stderr, on_test.stderr),
        on_train.num_examples + on_test.num_examples,
        on_train.settings,
        parts,
    )
