"""Draws of the layers' traces of a problem's loss, and the index of what was drawn: see `wci`."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from wcitrain.curvature.estimator import Estimator, TraceEstimate
from wcitrain.curvature.estimators import choose, name_of
from wcitrain.curvature.loss import Loss, cross_entropy, gradients_of
from wcitrain.curvature.passes import Passes
from wcitrain.measures.means import Pair
from wcitrain.measures.norms import initial_weights
from wcitrain.measures.problem import Problem
from wcitrain.measures.response import answers
from wcitrain.measures.wci_measurement import WCIMeasurement
from wcitrain.params import Center, Layers, logits_of
from wcitrain.seeding import generator_from

Groups = Literal["filter", "layer", "stage"]


class Sampler:
    """Draws of the traces, chunk by chunk; the settings are those of ``WeightCurvatureIndex``."""

    def __init__(
        self,
        problem: Problem,
        layers: Layers,
        num_probes: int,
        center: Center,
        groups: Groups,
        response: float | None,
    ) -> None:
        self.problem, self.layers, self.num_probes, self.response = problem, layers, num_probes, response
        self.how: dict[str, Any] = {"num_probes": num_probes, "center": center, "groups": groups}
        self.rows: list[tuple[Tensor, Tensor, int]] = []  # traces [m, L], mean loss, number of examples
        self.held: list[Tensor] = []  # with a response: the traces [m, L] at images held fixed
        self.weight = layers.tensors[0]
        names = [stage_of(name) for name in layers] if groups == "stage" else [*layers]
        self.groups = list(dict.fromkeys(names))
        self.group = torch.tensor([self.groups.index(name) for name in names])  # [L]
        if self.weight.dtype.itemsize < 4:
            rule = "float32 or float64: half precision drowns curvature in rounding. Use model.float()."
            raise ValueError(f"wci: got a model with weights in {self.weight.dtype}; expected {rule}")
        before: list[Any] = [0.0] * len(layers.tensors)
        if center == "initial":
            before = initial_weights(layers, problem.initial, "wci.center")
        away = [t.detach() - w0 for t, w0 in zip(layers.tensors, before, strict=True)]
        self.a = self.grouped(layers.squares(away))  # a_l [G]

    def placed(self, pair: Pair) -> Pair:
        """Return images and labels on the model's device, images in its dtype."""
        x, y = pair
        if not x.is_floating_point():
            rule = "expected floats in [0, 1]. Divide them by 255, or use ToTensor()."
            raise ValueError(f"wci: got images of dtype {x.dtype}; {rule}")
        return x.detach().to(self.weight.device, self.weight.dtype), y.to(self.weight.device)

    def loss_at(self, x: Tensor, y: Tensor) -> Loss:
        """Return the mean loss at images."""
        logits = logits_of(self.problem.model(x))
        if y.ndim == 1 and (int(y.min()) < 0 or int(y.max()) >= logits.shape[1]):
            rule = f"0 to {logits.shape[1] - 1}, the model's outputs. Are model and data of the same classes?"
            raise ValueError(f"wci: got labels from {int(y.min())} to {int(y.max())}; expected {rule}")
        return cross_entropy(logits, y)

    def choose(self, estimator: Estimator, x: Tensor, y: Tensor) -> None:
        """Try the derivatives on the first example."""
        with torch.no_grad():
            self.loss_at(x, y)  # wrong outputs and labels are refused as such, not as a derivative
        gradients_of(self.loss_at(x, y).total, self.layers.tensors, lambda: self.loss_at(x, y).total)
        passes = Passes(self.problem.model, self.layers, lambda: self.loss_at(x, y))
        self.estimator = choose(estimator, passes, needs_gradient=False).estimator

    def attacked(self, x: Tensor, y: Tensor, generator: torch.Generator) -> Tensor:
        """Return the images that the attack finds at the weights as they are."""
        attack = self.problem.attack

        # The attack sums over examples: N times the mean loss, whatever that is.
        def losses(z: Tensor) -> Tensor:
            return self.loss_at(z, y).total.expand(len(z))

        return attack.maximise(losses, x, generator) if attack else x

    def draw(self, x: Tensor, y: Tensor) -> None:
        """Attack a chunk and draw its traces; randomness depends on the seed and its number alone."""
        names = self.problem.seed, "measure_wci", 0, len(self.rows)
        generator = generator_from(x.device, *names)
        x_adv = self.attacked(x, y, generator)
        passes = Passes(self.problem.model, self.layers, lambda: self.loss_at(x_adv, y))
        draws, loss = self.estimator.draw(passes, self.num_probes, generator)
        if radius := self.response:
            self.held.append(draws)

            def anew() -> Tensor:  # from the same start
                return self.value_at(self.attacked(x, y, generator_from(x.device, *names)), y)

            def held() -> Tensor:
                return self.value_at(x_adv, y)

            added = [answers(anew, held, self.layers, radius, generator) for _ in range(self.num_probes)]
            draws = draws.double().cpu() + torch.stack(added)
        if not bool(torch.isfinite(loss)):
            rule = "expected a finite number. Has the model diverged?"
            raise ValueError(f"wci: got a loss of {float(loss)}; {rule}")
        self.rows.append((draws, loss.detach(), len(x)))

    def value_at(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss at images, no graph."""
        with torch.no_grad():
            return self.loss_at(x, y).total

    def index(self, target: float | None) -> WCIMeasurement:
        """Return the index of what was drawn."""
        attack = self.problem.attack
        draws, losses, sizes = zip(*self.rows, strict=True)
        weights = torch.tensor(sizes, dtype=torch.float64)
        details: dict[str, Any] = self.how | {
            "sizes": self.grouped(self.layers.sizes()),
            "estimator": name_of(self.estimator),
            "loss": f"robust loss {attack.threat} PGD-{attack.num_steps}" if attack else "clean loss",
            "mean_loss": float((weights * torch.stack(losses).double().cpu()).sum() / weights.sum()),
        }

        def samples_of(draws: Sequence[Tensor]) -> Tensor:  # [K, G]
            return self.grouped(torch.stack([*draws]).mean(1))

        def made(draws: Sequence[Tensor], **more: Any) -> WCIMeasurement:
            own = self.groups, self.a, samples_of(draws), weights
            return WCIMeasurement.from_samples(*own, **details | more)

        if not self.response:
            return made(draws, target_relative_error=target)
        held, pairs = made(self.held), [samples_of(one) for one in (draws, self.held)]
        details["loss"] += f" answering at W ± {self.response:g} ‖W‖"
        sums = TraceEstimate.from_samples((pairs[0] - pairs[1]).sum(1, keepdim=True), weights)
        more = {"held": held, "added": (float(sums.mean), float(sums.stderr))}
        return made(draws, target_relative_error=target, **more)

    def grouped(self, values: Tensor) -> Tensor:
        """Return sums [..., G] over the groups of values [..., L], in float64 on the CPU."""
        values = values.double().cpu()
        return values.new_zeros(*values.shape[:-1], len(self.groups)).index_add(-1, self.group, values)


def stage_of(name: str) -> str:
    """Return the stage of a tensor: the first part of its name, with the number that follows a list's.

    >>> [stage_of(name) for name in ("backbone.layer1.0.conv1.weight", "stages.2.blocks.0.mlp.fc1.weight")]
    ['layer1', 'stages.2']
    >>> [stage_of(name) for name in ("conv1.weight", "blocks.3.attn.qkv.weight", "fc.weight", "0.weight")]
    ['conv1', 'blocks.3', 'fc', '0']
    """
    first, *rest = name.removeprefix("backbone.").split(".")
    return f"{first}.{rest[0]}" if rest[:1] and rest[0].isdigit() and first.isalpha() else first
