"""Sections through the loss over the weights: how clean and robust loss rise as the weights move away.

Legend: W_l weights of layer l, w one filter (row of a linear map), d a direction, α a distance relative to
the weights' norm, D directions, P points, F_l = ‖W_l‖_F², T_l trace of the loss's Hessian, d_l = numel(W_l).

    L(W + α d),   α in [−radius, radius]                                                                   (1)
    rise(α) = (L(W + α d) + L(W − α d)) / 2 − L(W)                                                         (2)
            = (α²/2) Σ_l F_l T_l / d_l + O(α⁴)                                                             (3)

(3) is the mean over per-layer directions; with one layer it is α² WCI² / (2 d).

Directions. ``random``: Gaussian, every filter scaled to ‖w‖ (Li et al. 2018); ``layer``: Gaussian, every
layer, biases too, scaled to ‖W_l‖ (Stutz et al. 2021, who divide by norms in the text and by maxima in their
plotting code); ``adversarial``: the joint worst case of Stutz et al. along which the robust loss rises most:
ten steps of ascent on the loss under attack, in the ball ‖ν_l‖ <= radius ‖W_l‖ from a random start, the end
scaled to ‖W_l‖. Parameters of normalisation do not move.

The attack is run anew at every point: old adversarial examples would make the robust loss look flat. All
points use the same examples and random starts, so that their differences are the landscape's.
"""

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from wcitrain.attacks import ThreatModel
from wcitrain.measures.adversarial import (
    Chunks,
    attack_text,
    attacked,
    example_losses,
    held,
    losses_of,
    measuring,
)
from wcitrain.params import Layers, select_layers, unwrapped
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from

DIRECTIONS = {"random": 0.5, "layer": 0.5, "adversarial": 0.025}  # and the radius each is drawn to by default
ASCENT_STEPS = 10

Direction = list[Tensor]


@dataclass(frozen=True)
class Landscape:
    """Losses along sections through the weights.

    Args:
        alphas: α [P], ascending, symmetric about zero.
        clean: Mean cross-entropy: [D, P] of sections, [P, P] of a plane (first index: first direction).
        robust: The same under attack; equal to ``clean`` without one.
        is_plane: Whether it is a plane.
        directions: Their kind.
        attack: The attack in words; ``"clean"`` without one.
        num_examples: Examples behind every point.
        seed: Of directions and random starts; None where unknown.
    """

    alphas: np.ndarray
    clean: np.ndarray
    robust: np.ndarray
    is_plane: bool
    directions: str
    attack: str
    num_examples: int
    seed: int | None = None

    def rise(self, kind: str = "robust") -> tuple[np.ndarray, np.ndarray]:
        """Return the α > 0 [P/2] and the rise (2) of the ``"robust"`` or ``"clean"`` loss there [D, P/2]."""
        if self.is_plane:
            raise ValueError(
                "rise: got a plane; expected sections along single directions. Use landscape_1d."
            )
        loss, middle = getattr(self, kind), len(self.alphas) // 2
        right, left = loss[:, middle + 1 :], loss[:, :middle][:, ::-1]
        return self.alphas[middle + 1 :], (right + left) / 2 - loss[:, middle, None]

    def __str__(self) -> str:
        """Return one line: where the loss is, and how far it rises at the edge."""
        what = f"{self.directions} directions, {self.attack}, {self.num_examples} examples"
        middle = len(self.alphas) // 2
        kinds = ("clean",) if self.attack == "clean" else ("clean", "robust")
        if self.is_plane:
            losses = ", ".join(
                f"{kind} loss {getattr(self, kind)[middle, middle]:.4g}, at most "
                f"{getattr(self, kind).max():.4g}"
                for kind in kinds
            )
            return f"plane to ±{self.alphas[-1]:g}: {losses} ({what})"
        texts = []
        for kind in kinds:
            edge = self.rise(kind)[1][:, -1]
            texts.append(
                f"{kind} loss {getattr(self, kind)[0, middle]:.4g}, rises by {edge.mean():.4g} "
                f"({edge.min():.4g} to {edge.max():.4g})"
            )
        return f"at ±{self.alphas[-1]:g} ‖W‖: {', '.join(texts)} over {len(self.clean)} {what}"

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` of the arrays and a JSON header; nothing pickled."""
        header = {
            "directions": self.directions,
            "attack": self.attack,
            "num_examples": self.num_examples,
            "is_plane": self.is_plane,
            "seed": self.seed,
        }
        with open(path, "wb") as file:  # an open file: numpy would append .npz to another name
            np.savez_compressed(
                file,
                alphas=self.alphas,
                clean=self.clean,
                robust=self.robust,
                header=np.array(json.dumps(header)),
            )

    @classmethod
    def load(cls, path: str | Path) -> "Landscape":
        """Read what ``save`` wrote.

        Raises:
            ValueError: It is another file.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                header = json.loads(str(arrays["header"]))
                return cls(**{name: arrays[name] for name in ("alphas", "clean", "robust")}, **header)
        except (KeyError, ValueError, TypeError, EOFError) as error:
            raise ValueError(
                f"{path}: got {error}; expected a file that Landscape.save wrote. Draw it anew."
            ) from error


def landscape_1d(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None = None,
    *,
    directions: str = "random",
    radius: float | None = None,
    num_points: int = 21,
    num_directions: int = 3,
    num_examples: int | None = None,
    num_steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Landscape:
    """Return clean and robust loss along ``num_directions`` directions through the weights by (1).

    Cost: ``num_directions`` · ``num_points`` times an attack and two forward passes over the examples;
    adversarial directions ten attacks more each.

    Args:
        model: Gives logits for images in [0, 1]; left as it was, weights bit for bit.
        data: Iterable of (x, y, ...).
        threat: The adversary (PGD on the cross-entropy); None: clean loss only.
        directions: ``"random"``, ``"layer"`` or ``"adversarial"``, see the module's docstring.
        radius: Of the section, relative to the weights' norm, > 0; by default ``DIRECTIONS``.
        num_points: P, odd, >= 3, so that α = 0 is one of them.
        num_directions: D.
        num_examples: The first that many; all by default.
        num_steps, step_size: Of PGD; the step is 2.5 eps / num_steps by default.
        seed: Of directions and random starts.
        progress: Show a bar, on a terminal.

    Raises:
        ValueError: An argument out of range, no images.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> landscape_1d(model, [(torch.rand(20, 1, 2, 2), torch.arange(20) % 3)], num_points=5).clean.shape
    (3, 5)
    """
    alphas = _points("landscape_1d", directions, radius, num_points, num_directions)
    model = unwrapped(model)
    with measuring(model):
        frame = _Frame(model, held(model, data, num_examples), threat, num_steps, step_size, seed, directions)
        with _bar(num_directions * num_points, progress) as bar:
            losses = []
            for number in range(num_directions):
                d = frame.direction(number, float(alphas[-1]))
                losses.append([frame.losses([alpha * part for part in d], bar) for alpha in alphas.tolist()])
    return frame.landscape(alphas, np.array(losses), is_plane=False)


def landscape_2d(
    model: nn.Module,
    data: Iterable[Any],
    threat: ThreatModel | None = None,
    *,
    directions: str = "random",
    radius: float | None = None,
    num_points: int = 11,
    num_examples: int | None = None,
    num_steps: int = 10,
    step_size: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Landscape:
    """Return clean and robust loss in the plane of two directions, at ``num_points``² points.

    The second direction is that of number one of ``landscape_1d``; ``"adversarial"``: a random one of kind
    ``"layer"``, since two worst cases are nearly the same. The others are nearly orthogonal by chance.
    Arguments as ``landscape_1d``.
    """
    alphas = _points("landscape_2d", directions, radius, num_points, 2)
    model = unwrapped(model)
    with measuring(model):
        frame = _Frame(model, held(model, data, num_examples), threat, num_steps, step_size, seed, directions)
        first = frame.direction(0, float(alphas[-1]))
        second = frame.gaussian(1) if directions == "adversarial" else frame.direction(1, float(alphas[-1]))
        with _bar(num_points**2, progress) as bar:
            losses = [
                [
                    frame.losses([a * u + b * v for u, v in zip(first, second, strict=True)], bar)
                    for b in alphas.tolist()
                ]
                for a in alphas.tolist()
            ]
    return frame.landscape(alphas, np.array(losses), is_plane=True)


class _Frame:
    """Model, examples, attack and layers of one landscape."""

    def __init__(
        self,
        model: nn.Module,
        chunks: Chunks,
        threat: ThreatModel | None,
        num_steps: int,
        step_size: float | None,
        seed: int,
        kind: str,
    ) -> None:
        self.model, self.chunks, self.threat, self.seed, self.kind = model, chunks, threat, seed, kind
        self.attack: dict[str, Any] = {"num_steps": num_steps, "step_size": step_size, "seed": seed}
        self.layers = select_layers(model, "weights" if kind == "random" else "weights+biases")

    def losses(self, offset: Sequence[Tensor], bar: Any) -> tuple[float, float]:
        """Return clean and robust loss at W + offset."""
        with perturbed(self.layers.tensors, offset) as move:
            move(1)
            clean = float(losses_of(self.model, self.chunks).mean())
            robust = clean if self.threat is None else float(losses_of(self.model, self._attacked()).mean())
        bar.update()
        return clean, robust

    def direction(self, number: int, radius: float) -> Direction:
        """Return direction ``number`` of the landscape's kind."""
        return self._worst(number, radius) if self.kind == "adversarial" else self.gaussian(number)

    def gaussian(self, number: int) -> Direction:
        """Return Gaussian tensors, each filter (``"random"``) or layer scaled to the norm of its weights."""
        noise = []
        for name, tensor in zip(self.layers.names, self.layers.tensors, strict=True):
            place = generator_from(tensor.device, self.seed, "direction", number, name)
            noise.append(torch.randn(tensor.shape, generator=place, device=tensor.device, dtype=tensor.dtype))
        return scaled_like(noise, self.layers, by_filter=self.kind == "random")

    def _worst(self, number: int, radius: float) -> Direction:
        """Return the end of an ascent on the loss under attack, in that ball, from a random start."""
        nu = [radius / 10 * part for part in self.gaussian(number)]
        for _ in range(ASCENT_STEPS):
            with perturbed(self.layers.tensors, nu) as move:
                move(1)
                gradient = scaled_like(self._gradient(), self.layers)
            nu = [u + 2.5 * radius / ASCENT_STEPS * g for u, g in zip(nu, gradient, strict=True)]
            sphere = scaled_like(nu, self.layers)
            nu = [
                torch.where(u.norm() > radius * s.norm(), radius * s, u)
                for u, s in zip(nu, sphere, strict=True)
            ]
        return scaled_like(nu, self.layers)

    def _gradient(self) -> Direction:
        """Return the gradient of the mean loss under attack."""
        total = [torch.zeros_like(t) for t in self.layers.tensors]
        num = sum(len(y) for _, y in self.chunks)
        for x, y in self._attacked():
            loss = example_losses(self.model, x, y).sum() / num
            parts = torch.autograd.grad(loss, self.layers.tensors, allow_unused=True, materialize_grads=True)
            torch._foreach_add_(total, list(parts))
        return total

    def _attacked(self) -> Chunks:
        return attacked(self.model, self.chunks, self.threat, **self.attack)

    def landscape(self, alphas: np.ndarray, losses: np.ndarray, *, is_plane: bool) -> Landscape:
        """Return the result, from losses [..., 2]."""
        text = attack_text(self.threat, self.attack["num_steps"])
        num = sum(len(y) for _, y in self.chunks)
        return Landscape(alphas, losses[..., 0], losses[..., 1], is_plane, self.kind, text, num, self.seed)


def scaled_like(direction: Sequence[Tensor], layers: Layers, *, by_filter: bool = False) -> Direction:
    """Return ``direction`` scaled to the weights' norm by layer, or filter (first index); zero stays zero."""
    result = []
    for d, tensor in zip(direction, layers.tensors, strict=True):
        w = tensor.detach()
        dims = tuple(range(1, w.ndim)) if by_filter else tuple(range(w.ndim))
        length = torch.linalg.vector_norm(d, dim=dims, keepdim=True)
        size = torch.linalg.vector_norm(w, dim=dims, keepdim=True)
        result.append(d * size / torch.where(length > 0, length, 1.0))
    return result


def _points(
    where: str, directions: str, radius: float | None, num_points: int, num_directions: int
) -> np.ndarray:
    """Return α [P], after looking at the arguments."""
    if directions not in DIRECTIONS:
        raise ValueError(
            f"{where}: got directions={directions!r}; expected {', '.join(DIRECTIONS)}. Choose one of them."
        )
    radius = DIRECTIONS[directions] if radius is None else radius
    if num_points < 3 or num_points % 2 == 0 or num_directions < 1 or not 0 < radius < float("inf"):
        raise ValueError(
            f"{where}: got num_points={num_points}, num_directions={num_directions}, radius={radius}; "
            "expected an odd number of points >= 3 (zero is one of them), directions >= 1, radius > 0."
        )
    half = np.linspace(0, radius, num_points // 2 + 1)
    return np.concatenate([-half[:0:-1], half])  # exactly symmetric


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, desc="landscape", unit="point", disable=not (progress and sys.stderr.isatty()))
