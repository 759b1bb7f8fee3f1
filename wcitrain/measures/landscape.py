"""Sections through the loss over the weights: how clean and robust loss rise as the weights move away.

Legend: W_l weights of layer l, w one filter (row of a linear map), d a direction, α a distance relative to
the weights' norm, D directions, P points, F_l = ‖W_l‖_F², T_l trace of the loss's Hessian, d_l = numel(W_l).

    L(W + α d),   α in [−radius, radius]                                                                   (1)
    rise(α) = (L(W + α d) + L(W − α d)) / 2 − L(W)                                                         (2)
            = (α²/2) Σ_l F_l T_l / d_l + O(α⁴)                                                             (3)

What is drawn is (1); (2) and (3) say how it goes with the index: (3) is the mean over ``layer`` directions,
with one layer α² WCI² / (2 d).

Directions. ``random``: Gaussian, every filter scaled to ‖w‖ (Li et al. 2018); ``layer``: Gaussian, every
layer, biases too, scaled to ‖W_l‖ (Stutz et al. 2021); ``adversarial``: the joint worst case of Stutz et al.:
ten steps of ascent on the loss under attack, in the ball ‖ν_l‖ <= radius ‖W_l‖ from a random start, the end
scaled to ‖W_l‖. Parameters of normalisation do not move. The attack is run anew at every point; all points
use the same examples and random starts, so that their differences are the landscape's.
"""

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wcitrain.measures.means import Chunks, count_examples, losses_of, mean_gradient
from wcitrain.measures.problem import Problem, attack_text, measuring
from wcitrain.params import Layers, select_layers
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from

RADII = {"random": 0.5, "layer": 0.5, "adversarial": 0.025}  # to which each kind is drawn by default
ASCENT_STEPS = 10
ARRAYS = ("alphas", "clean", "robust")


@dataclass(frozen=True)
class Landscape:
    """Mean cross-entropy of sections [D, P], or of a plane [P, P] (first index: first direction)."""

    alphas: np.ndarray  # α [P], ascending, symmetric about zero
    clean: np.ndarray
    robust: np.ndarray  # under attack; equal to ``clean`` without one
    is_plane: bool
    directions: str  # their kind
    attack: str  # for humans; "clean" without one
    num_examples: int
    seed: int | None = None  # None where unknown

    def __str__(self) -> str:
        """Return one line: the loss at the weights, and the highest that was found around them."""
        middle = len(self.alphas) // 2
        texts = []
        for kind in ("clean",) if self.attack == "clean" else ("clean", "robust"):
            loss = getattr(self, kind)
            at_zero = loss[middle if self.is_plane else 0, middle]
            texts.append(f"{kind} loss {at_zero:.4g}, at most {loss.max():.4g}")
        over = "the plane of two" if self.is_plane else len(self.clean)
        what = f"{over} {self.directions} directions, {self.attack}, {self.num_examples} examples"
        return f"to ±{self.alphas[-1]:g} ‖W‖: {', '.join(texts)} over {what}"

    def save(self, path: str | Path) -> None:
        """Write an ``.npz`` of the arrays and a JSON header; nothing pickled."""
        header = asdict(self)
        arrays = {name: header.pop(name) for name in ARRAYS}
        with open(path, "wb") as file:  # an open file: numpy would append .npz to another name
            np.savez_compressed(file, **arrays, header=np.array(json.dumps(header)))

    @classmethod
    def load(cls, path: str | Path) -> "Landscape":
        """Read what ``save`` wrote; another file is a ``ValueError``."""
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(**{name: arrays[name] for name in ARRAYS}, **json.loads(str(arrays["header"])))
        except (KeyError, ValueError, TypeError, EOFError) as error:
            text = f"{path}: got {error}; expected a file that Landscape.save wrote. Draw it anew."
            raise ValueError(text) from error


def take_landscape(
    problem: Problem,
    directions: str = "random",
    radius: float | None = None,
    num_points: int = 21,
    num_directions: int = 3,
    is_plane: bool = False,
) -> Landscape:
    """Return clean and robust loss along directions through the weights by (1), or in the plane of two.

    Cost: at every point an attack and two forward passes over the examples.

    Args:
        problem: Model, images, attack and the seed of directions and random starts.
        directions: ``"random"``, ``"layer"`` or ``"adversarial"``, see the module's docstring.
        radius: Of the section, relative to the weights' norm, > 0; by default ``RADII``.
        num_points: P, odd, >= 3, so that α = 0 is one of them.
        num_directions: D of the sections.
        is_plane: Take the plane of the first two at P² points, nearly orthogonal by chance. Of adversarial
            ones the second is random, of kind ``"layer"``: two worst cases are nearly the same.

    Raises:
        ValueError: Other directions, numbers or radii than these, or what `Problem` refuses.
    """
    if directions not in RADII:
        raise ValueError(f"landscape: got directions={directions!r}; expected one of {', '.join(RADII)}.")
    radius = RADII[directions] if radius is None else radius
    if num_points < 3 or num_points % 2 == 0 or num_directions < 1 or not 0 < radius < float("inf"):
        got = f"num_points={num_points}, num_directions={num_directions}, radius={radius}"
        rule = "expected an odd number of points >= 3 (zero is one of them), a direction and a radius > 0."
        raise ValueError(f"landscape: got {got}; {rule}")
    half = np.linspace(0, radius, num_points // 2 + 1)
    alphas = np.concatenate([-half[:0:-1], half])  # exactly symmetric
    with measuring(problem.model):
        chunks, places = problem.clean(), alphas.tolist()
        layers = select_layers(problem.model, "weights" if directions == "random" else "weights+biases")

        def direction(number: int) -> list[Tensor]:
            start = _gaussian(problem.seed, number, layers, by_filter=directions == "random")
            is_worst = directions == "adversarial" and not (is_plane and number)
            return _worst(problem, layers, start, float(alphas[-1])) if is_worst else start

        if is_plane:
            u, v = direction(0), direction(1)
            pairs = itertools.product(places, repeat=2)
            offsets = ([a * x + b * y for x, y in zip(u, v, strict=True)] for a, b in pairs)
        else:
            offsets = ([a * x for x in u] for u in map(direction, range(num_directions)) for a in places)
        shape = (num_points if is_plane else num_directions), num_points
        bar = tqdm(offsets, "landscape", shape[0] * shape[1], unit="point", disable=not sys.stderr.isatty())
        losses = [_losses(problem, chunks, layers, offset) for offset in bar]
    clean, robust = np.array(losses).T.reshape(2, *shape)
    how = is_plane, directions, attack_text(problem.attack), count_examples(chunks), problem.seed
    return Landscape(alphas, clean, robust, *how)


def _losses(problem: Problem, chunks: Chunks, layers: Layers, offset: list[Tensor]) -> tuple[float, float]:
    """Return clean and robust loss at W + offset."""
    with perturbed(layers.tensors, offset) as move:
        move(1)
        clean = float(losses_of(problem.model, chunks).mean())
        if problem.attack is None:
            return clean, clean
        return clean, float(losses_of(problem.model, problem.attacked_anew(chunks)).mean())


def _gaussian(seed: int, number: int, layers: Layers, *, by_filter: bool) -> list[Tensor]:
    """Return random direction ``number``."""
    noise = []
    for name, tensor in zip(layers.names, layers.tensors, strict=True):
        generator = generator_from(tensor.device, seed, "direction", number, name)
        noise.append(torch.randn(tensor.shape, generator=generator, device=tensor.device, dtype=tensor.dtype))
    return scaled_like(noise, layers, by_filter=by_filter)


def _worst(problem: Problem, layers: Layers, start: list[Tensor], radius: float) -> list[Tensor]:
    """Return the end of an ascent on the loss under attack, in that ball, from a random start."""
    chunks, tensors = problem.clean(), layers.tensors
    nu = [radius / 10 * part for part in start]
    for _ in range(ASCENT_STEPS):
        with perturbed(tensors, nu) as move:
            move(1)
            _, g = mean_gradient(problem.model, problem.attacked_anew(chunks), tensors)
            ascent = scaled_like(g, layers)  # to the norms there
        nu = [u + 2.5 * radius / ASCENT_STEPS * g for u, g in zip(nu, ascent, strict=True)]
        pairs = zip(nu, scaled_like(nu, layers), strict=True)
        nu = [torch.where(u.norm() > radius * s.norm(), radius * s, u) for u, s in pairs]
    return scaled_like(nu, layers)


def scaled_like(direction: Sequence[Tensor], layers: Layers, *, by_filter: bool = False) -> list[Tensor]:
    """Return ``direction`` scaled to the weights' norm by layer, or filter (first index); zero stays zero."""
    result = []
    for d, tensor in zip(direction, layers.tensors, strict=True):
        dims = tuple(range(int(by_filter), tensor.ndim))
        length, size = (torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (d, tensor.detach()))
        result.append(d * size / torch.where(length > 0, length, 1.0))
    return result
