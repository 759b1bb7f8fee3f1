"""Clean and robust accuracy of a model, and the layer-wise WCI of its robust loss, in one pass over a set.

The model is measured in eval mode on the weights it has, and left as it was. Batches are dealt whole to the
processes and random starts depend on the batch alone, so any number of processes measures the same thing.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wcitrain.attacks import Attack
from wcitrain.curvature.gauss_newton import gauss_newton_samples
from wcitrain.evaluation.intervals import wilson_interval
from wcitrain.measures import WCIMeasurement
from wcitrain.params import Layers, precise
from wcitrain.preserve import differentiating, full_precision, normal, undisturbed
from wcitrain.seeding import generator_from

if TYPE_CHECKING:
    from accelerate import Accelerator

TRACE_EXAMPLES = 50  # behind one draw of the traces: several draws a batch, so that their spread is known


@dataclass(frozen=True)
class AccuracyMeasurement:
    """Accuracies in [0, 1], mean cross-entropies on ``num_examples`` images, ``wci`` where asked for."""

    num_examples: int
    clean_accuracy: float
    clean_loss: float
    robust_accuracy: float
    robust_loss: float
    wci: WCIMeasurement | None = None

    def summary(self) -> dict[str, float | int | tuple[float, float]]:
        """Return the numbers with 95 % Wilson intervals of the accuracies, for ``summary.json``."""
        numbers = {key: value for key, value in asdict(self).items() if key != "wci"}
        for key in ("clean_accuracy", "robust_accuracy"):
            numbers[f"{key}_interval"] = wilson_interval(numbers[key], self.num_examples)
        return numbers


def measure_accuracy(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    attack: Attack,
    *,
    seed: int = 0,
    layers: Mapping[str, Tensor] | None = None,
    accelerator: "Accelerator | None" = None,
) -> AccuracyMeasurement:
    """Measure a model on images ``(x, y, index)`` in [0, 1], clean and under an attack.

    Args:
        model: Gives logits; in float32 even where Accelerate prepared it for bfloat16.
        batches: All of them on every process; process r takes each batch r, r + world, ...
        layers: Tensors whose Gauss–Newton trace is measured at the adversarial examples, one backward more.
    """
    rank, world = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    rows: list[tuple[int, Tensor, Tensor]] = []  # number of the batch, sums [5], traces [K, 1 + L]
    with differentiating(), undisturbed(model, training=False), full_precision(model):
        for number, (x, y, _) in enumerate(batches):
            if number % world == rank:
                x, y = normal(x), normal(y)
                generator = generator_from(x.device, seed, "evaluation", number)
                rows.append((number, *_measure_batch(model, x, y, attack, generator, layers)))
    if world > 1:
        from accelerate.utils import gather_object

        rows = sorted(gather_object(rows), key=itemgetter(0))  # the order one process would have
    num, *sums = torch.stack([sums for _, sums, _ in rows]).sum(0).tolist()
    clean, clean_loss, robust, robust_loss = (value / num for value in sums)
    wci = None
    if layers:
        samples, norms = torch.cat([samples for *_, samples in rows]), Layers(layers).squared_norms()
        wci = WCIMeasurement.from_samples(tuple(layers), norms, samples[:, 1:], samples[:, 0])
    return AccuracyMeasurement(int(num), clean, clean_loss, robust, robust_loss, wci)


def _measure_batch(
    model: nn.Module, x: Tensor, y: Tensor, attack: Attack, generator: torch.Generator, layers: Any
) -> tuple[Tensor, Tensor]:
    """Return number, clean correct and loss, robust ones [5]; examples and traces of the draws [K, 1 + L]."""
    x_adv = attack.maximise(lambda z: F.cross_entropy(precise(model(z)), y, reduction="none"), x, generator)
    samples, parts = [torch.zeros(0)] if not layers else [], []
    with torch.set_grad_enabled(bool(layers)):
        for part in x_adv.split(TRACE_EXAMPLES) if layers else [x_adv]:
            logits = precise(model(part))
            parts.append(logits.detach())
            if layers:
                trace = gauss_newton_samples(logits, layers, generator=generator)[0]
                samples.append(torch.cat([trace.new_tensor([len(part)]), trace]))
    with torch.no_grad():
        sums = [torch.tensor(float(len(y)))]
        for logits in (precise(model(x)), torch.cat(parts)):
            sums += [(logits.argmax(1) == y).sum(), F.cross_entropy(logits, y, reduction="sum")]
    return torch.stack([value.double().cpu() for value in sums]), torch.stack(samples).double().cpu()
