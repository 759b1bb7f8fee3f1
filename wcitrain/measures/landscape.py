"""Sections through the loss over the weights: how clean and robust loss rise as the weights move away.

Legend: W_l weights of layer l, w one filter (row of a linear map), d a direction, α a distance relative to
the weights' norm, D directions, P points, F_l = ‖W_l‖_F², T_l trace of the loss's Hessian, d_l = numel(W_l).

    L(W + α d),   α in [−radius, radius]                                                                   (1)
    rise(α) = (L(W + α d) + L(W − α d)) / 2 − L(W)                                                         (2)
            = (α²/2) Σ_l F_l T_l / d_l + O(α⁴)                                                             (3)

(3) is the mean over per-layer directions; with one layer it is α² WCI² / (2 d).

Directions. ``random``: Gaussian, every filter scaled to ‖w‖ (Li et al. 2018); ``layer``: Gaussian, every
layer, biases too, scaled to ‖W_l‖ (Stutz et al. 2021); ``adversarial``: the joint worst case of Stutz et al.:
ten steps of ascent on the loss under attack, in the ball ‖ν_l‖ <= radius ‖W_l‖ from a random start, the end
scaled to ‖W_l‖. Parameters of normalisation do not move. The attack is run anew at every point; all points
use the same examples and random starts, so that their differences are the landscape's.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from wcitrain.measures.means import count_examples, losses_of, mean_gradient
from wcitrain.measures.problem import Problem, measuring
from wcitrain.params import Layers, select_layers
from wcitrain.preserve import perturbed
from wcitrain.seeding import generator_from

RADII = {"random": 0.5, "layer": 0.5, "adversarial": 0.025}  # to which each kind is drawn by default
ASCENT_STEPS = 10
ARRAYS = ("alphas", "clean", "robust")

Direction = list[Tensor]


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

    @property
    def kinds(self) -> tuple[str, ...]:
        """The losses there are: clean, and robust under an attack."""
        return ("clean",) if self.attack == "clean" else ("clean", "robust")

    def rise(self, kind: str = "robust") -> tuple[np.ndarray, np.ndarray]:
        """Return the α > 0 [P/2] and the rise (2) of the ``"robust"`` or ``"clean"`` loss there [D, P/2]."""
        if self.is_plane:
            raise ValueError("rise: got a plane; expected single directions. Use landscape_1d.")
        loss, middle = getattr(self, kind), len(self.alphas) // 2
        right, left = loss[:, middle + 1 :], loss[:, :middle][:, ::-1]
        return self.alphas[middle + 1 :], (right + left) / 2 - loss[:, middle, None]

    def __str__(self) -> str:
        """Return one line: where the loss is, and how far it rises at the edge."""
        what = f"{self.directions} directions, {self.attack}, {self.num_examples} examples"
        middle, texts = len(self.alphas) // 2, []
        for kind in self.kinds:
            loss = getattr(self, kind)
            if self.is_plane:
                texts.append(f"{kind} loss {loss[middle, middle]:.4g}, at most {loss.max():.4g}")
            else:
                edge = self.rise(kind)[1][:, -1]
                span = f"{edge.mean():.4g} ({edge.min():.4g} to {edge.max():.4g})"
                texts.append(f"{kind} loss {loss[0, middle]:.4g}, rises by {span}")
        if self.is_plane:
            return f"plane to ±{self.alphas[-1]:g}: {', '.join(texts)} ({what})"
        return f"at ±{self.alphas[-1]:g} ‖W‖: {', '.join(texts)} over {len(self.clean)} {what}"

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


def landscape_1d(
    problem: Problem,
    *,
    directions: str = "random",
    radius: float | None = None,
    num_points: int = 21,
    num_directions: int = 3,
    progress: bool = True,
) -> Landscape:
    """Return clean and robust loss along ``num_directions`` directions through the weights by (1).

    Cost: ``num_directions`` · ``num_points`` times an attack and two forward passes over the examples.

    Args:
        problem: Model, images, attack and the seed of directions and random starts.
        directions: ``"random"``, ``"layer"`` or ``"adversarial"``, see the module's docstring.
        radius: Of the section, relative to the weights' norm, > 0; by default ``RADII``.
        num_points: P, odd, >= 3, so that α = 0 is one of them.
        num_directions: D.
        progress: Show a bar, on a terminal.

    Raises:
        ValueError: An argument out of range, no images.
    """
    if num_directions < 1:
        raise ValueError(f"landscape: got num_directions={num_directions}; expected at least 1. Raise it.")
    alphas = _points(directions, radius, num_points)
    with measuring(problem.model):
        drawing = _Drawing(problem, directions, alphas)
        lines = (drawing.direction(number) for number in range(num_directions))
        offsets = ([a * u for u in line] for line in lines for a in alphas.tolist())
        return drawing.landscape(offsets, num_directions, progress)


def landscape_2d(
    problem: Problem,
    *,
    directions: str = "random",
    radius: float | None = None,
    num_points: int = 11,
    progress: bool = True,
) -> Landscape:
    """Return clean and robust loss in the plane of two directions, at ``num_points``² points.

    The second direction is that of number one of ``landscape_1d``; ``"adversarial"``: a random one of kind
    ``"layer"``, since two worst cases are nearly the same. The others are nearly orthogonal by chance.
    Arguments as ``landscape_1d``.
    """
    alphas = _points(directions, radius, num_points)
    with measuring(problem.model):
        drawing = _Drawing(problem, directions, alphas)
        first = drawing.direction(0)
        second = drawing.gaussian(1) if directions == "adversarial" else drawing.direction(1)
        pairs = itertools.product(alphas.tolist(), repeat=2)
        offsets = ([a * u + b * v for u, v in zip(first, second, strict=True)] for a, b in pairs)
        return drawing.landscape(offsets, num_points, progress, is_plane=True)


class _Drawing:
    """A landscape in the making: its directions, and the losses along them."""

    def __init__(self, problem: Problem, kind: str, alphas: np.ndarray) -> None:
        self.problem, self.kind, self.alphas, self.chunks = problem, kind, alphas, problem.clean()
        self.layers = select_layers(problem.model, "weights" if kind == "random" else "weights+biases")

    def landscape(
        self, offsets: Iterable[Direction], num_rows: int, progress: bool, *, is_plane: bool = False
    ) -> Landscape:
        """Return the losses at W + each offset, a row of α after the other."""
        problem, losses, shape = self.problem, [], (num_rows, len(self.alphas))
        is_hidden = not (progress and sys.stderr.isatty())
        for offset in tqdm(offsets, "landscape", math.prod(shape), unit="point", disable=is_hidden):
            with perturbed(self.layers.tensors, offset) as move:
                move(1)
                clean = losses_of(problem.model, self.chunks).mean()
                attacked = None if problem.attack is None else problem.attacked_anew(self.chunks)
                robust = clean if attacked is None else losses_of(problem.model, attacked).mean()
                losses.append((float(clean), float(robust)))
        clean_losses, robust_losses = np.array(losses).T.reshape(2, *shape)
        how = is_plane, self.kind, problem.attack_text, count_examples(self.chunks), problem.seed
        return Landscape(self.alphas, clean_losses, robust_losses, *how)

    def direction(self, number: int) -> Direction:
        """Return direction ``number`` of the kind."""
        return self._worst(number) if self.kind == "adversarial" else self.gaussian(number)

    def gaussian(self, number: int) -> Direction:
        """Return Gaussian tensors, each filter (``"random"``) or layer scaled to the norm of its weights."""
        noise = []
        for name, tensor in zip(self.layers.names, self.layers.tensors, strict=True):
            place = generator_from(tensor.device, self.problem.seed, "direction", number, name)
            noise.append(torch.randn(tensor.shape, generator=place, device=tensor.device, dtype=tensor.dtype))
        return scaled_like(noise, self.layers, by_filter=self.kind == "random")

    def _worst(self, number: int) -> Direction:
        """Return the end of an ascent on the loss under attack, in that ball, from a random start."""
        radius, tensors = float(self.alphas[-1]), self.layers.tensors
        nu = [radius / 10 * part for part in self.gaussian(number)]
        for _ in range(ASCENT_STEPS):
            with perturbed(tensors, nu) as move:
                move(1)
                _, g = mean_gradient(self.problem.model, self.problem.attacked_anew(self.chunks), tensors)
                ascent = scaled_like(g, self.layers)  # to the norms there
            nu = [u + 2.5 * radius / ASCENT_STEPS * g for u, g in zip(nu, ascent, strict=True)]
            pairs = zip(nu, scaled_like(nu, self.layers), strict=True)
            nu = [torch.where(u.norm() > radius * s.norm(), radius * s, u) for u, s in pairs]
        return scaled_like(nu, self.layers)


def scaled_like(direction: Sequence[Tensor], layers: Layers, *, by_filter: bool = False) -> Direction:
    """Return ``direction`` scaled to the weights' norm by layer, or filter (first index); zero stays zero."""
    result = []
    for d, tensor in zip(direction, layers.tensors, strict=True):
        dims = tuple(range(int(by_filter), tensor.ndim))
        length, size = (torch.linalg.vector_norm(t, dim=dims, keepdim=True) for t in (d, tensor.detach()))
        result.append(d * size / torch.where(length > 0, length, 1.0))
    return result


def _points(directions: str, radius: float | None, num_points: int) -> np.ndarray:
    """Return α [P], after looking at the arguments."""
    if directions not in RADII:
        raise ValueError(f"landscape: got directions={directions!r}; expected one of {', '.join(RADII)}.")
    radius = RADII[directions] if radius is None else radius
    if num_points < 3 or num_points % 2 == 0 or not 0 < radius < float("inf"):
        rule = "expected an odd number of points >= 3 (zero is one of them) and a radius > 0."
        raise ValueError(f"landscape: got num_points={num_points}, radius={radius}; {rule}")
    half = np.linspace(0, radius, num_points // 2 + 1)
    return np.concatenate([-half[:0:-1], half])  # exactly symmetric
