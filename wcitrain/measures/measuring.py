"""``measure_wci``: the index of any classifier on any data, to a given precision.

Legend: N examples, B examples a chunk, K chunks, m probes a chunk, L layers, x_kj [L] the traces drawn in
chunk k by probe j, a_l = ||W_l||_F², t_l = Tr(H_l).

The examples are cut into chunks. Each chunk is attacked once; then m probes of its traces are drawn at the
adversarial examples, held fixed (Danskin), and their mean is one sample. The jackknife over the K samples
gives the index and its error (`wci`); it needs no model of where the variance comes from.

How many chunks and probes a target error needs is `planning`'s.

Choices by measurement (a residual network of 0.3 M weights after AT and WCI, CIFAR-10 at 16x16, PGD-10, one
CPU thread): B = 25, since the part of σ_w² that comes from pairs of examples does not shrink with B, and an
attacked example takes 1.2 times as long as in chunks of 100, in chunks of 5 it takes 2.5 times as long.
`planning` (2) gave 12 and 14 probes; 8 need at most 8 % more time for the same error.
"""

import copy
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from wcitrain.attacks import ThreatModel, pgd
from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.estimators import ESTIMATORS, choose, name_of
from wcitrain.curvature.loss import Loss, as_loss, cross_entropy
from wcitrain.curvature.passes import Passes
from wcitrain.measures.examples import Examples
from wcitrain.measures.planning import (
    MAX_PROBES_WITHOUT_EXAMPLES,
    MAX_STAGES,
    PILOT_CHUNKS,
    PILOT_PROBES,
    plan,
    probes_for,
    safety,
)
from wcitrain.measures.wci import WCIMeasurement
from wcitrain.params import Layers, unwrapped
from wcitrain.preserve import full_precision, undisturbed
from wcitrain.seeding import generator_from

CHUNK_SIZE = 25  # B

ModelLoss = Callable[[nn.Module, Tensor, Tensor], Tensor | Loss]


def measure_wci(
    model: nn.Module,
    batches: Iterable[Any],
    threat: ThreatModel | None = None,
    *,
    estimator: str = "auto",
    layers: str = "weights",
    split_qkv: bool = False,
    num_examples: int | None = None,
    num_probes: int | None = None,
    target_relative_error: float | None = None,
    num_steps: int = 10,
    step_size: float | None = None,
    loss: ModelLoss | None = None,
    chunk_size: int | None = None,
    seed: int = 0,
    progress: bool = True,
    device: torch.device | str | None = None,
) -> WCIMeasurement:
    """Measure the Weight-Curvature Index of a model's robust (or clean) loss, with its standard error.

    The model runs in eval mode and float32; modes, buffers, weights, ``.grad``, ``requires_grad`` and the
    global random state are afterwards what they were, on exceptions too. The error is that of the examples as
    a sample of an endless supply: take them at random, at least not sorted by class. One process only.

    Args:
        model: Gives logits [N, C] for images in [0, 1], normalisation inside. DDP and ``torch.compile``
            are looked through. If it is frozen throughout, all parameters count as trainable.
        batches: Iterable of (x, y, ...), read once from the front and no further than needed. With a target,
            what was read stays in memory.
        threat: The adversary, PGD from a random start against the same loss; None measures the clean loss.
        estimator: A name of ``curvature.ESTIMATORS``: ``"gauss_newton"`` (one backward a probe, never
            negative, every model; equals the Hessian for piecewise linear networks), ``"hutchinson"`` (the
            Hessian, by double backward), ``"two_point"`` (smoothed over 1 % of the weights' norm; gradients
            only; ReLU networks: not the Hessian, often negative at adversarial examples), ``"top_layer"``
            (the head alone, exact; ``layers`` stays "weights") or ``"auto"`` (the first of the first two that
            a dry run allows; the result says which).
        layers, split_qkv: What counts as a layer, see ``params.select_layers``.
        num_examples: Examples measured, by default 1000 or all there are. With a target: the most that may be
            read, by default all there are.
        num_probes: Probes a chunk, by default 8 with an attack and 2 without. With a target they are planned.
        target_relative_error: Choose examples and probes such that standard error / index is at most this, in
            (0, 1). Where the examples do not suffice the result says so (``reached``, ``limited_by``).
        num_steps, step_size: Of the attack; the step is 2.5 eps / num_steps by default.
        loss: ``loss(model, x, y)`` returns a ``Loss`` or, for hutchinson and two_point, the mean over the
            examples as a tensor; by default cross-entropy, labels [N] or soft [N, C].
        chunk_size: Examples attacked and measured at once; by default 25, fewer for fewer than 400 examples.
        seed: Of random starts and probes.
        progress: Show a bar, on a terminal.
        device: Where to compute, on a copy of the model if it is elsewhere; by default where the model is.

    Raises:
        ValueError: An argument out of range, images outside [0, 1] under attack, labels that are no classes,
            outputs that are not [N, C], no images.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> result = measure_wci(model, [(x, y)], ThreatModel(eps=0.1))
    >>> result.layers, result.num_examples, result.total > 0
    (('1.weight',), 64, True)
    """
    _check_arguments(estimator, num_examples, num_probes, target_relative_error, num_steps, chunk_size)
    model = unwrapped(model)
    first = next(model.parameters(), None)
    if first is None or first.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "measure_wci: got a model with "
            f"{'no weights' if first is None else f'weights in {first.dtype}'}; expected weights in float32 "
            "or float64: half precision drowns curvature in rounding. Convert it with model.float()."
        )
    if device is not None and torch.empty(0, device=device).device != first.device:
        model = copy.deepcopy(model).to(device)
    wanted = ESTIMATORS[estimator]()
    frozen = [] if any(p.requires_grad for p in model.parameters()) else list(model.parameters())
    if num_examples is None and target_relative_error is None:
        num_examples = 1000
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        undisturbed(model, training=False),
        full_precision(model),
    ):
        try:
            for p in frozen:
                p.requires_grad_(p.is_floating_point())
            measuring = _Measuring(
                model=model,
                layers=wanted.layers(model, layers, split_qkv=split_qkv),
                estimator=wanted,
                loss=loss,
                threat=threat,
                num_steps=num_steps,
                step_size=step_size,
                seed=seed,
                has_bar=progress and sys.stderr.isatty(),
            )
            examples = Examples(batches, num_examples)
            available = examples.ahead(PILOT_CHUNKS * CHUNK_SIZE)
            if not available:
                raise ValueError(
                    "measure_wci: got no images; expected at least one batch. Is the data set empty?"
                )
            measuring = measuring.checked(*examples.peek())
            size = chunk_size or max(1, min(CHUNK_SIZE, available // PILOT_CHUNKS))
            chunks = examples.chunks(size)
            if target_relative_error is None:
                probes = num_probes or (8 if threat else 2)
                result = measuring.stage(
                    chunks, probes, 0, math.ceil((num_examples or 0) / size)
                ).measurement()
            else:
                result = _to_target(measuring, chunks, target_relative_error)
        finally:
            for p in frozen:
                p.requires_grad_(False)
    if not math.isfinite(result.total_stderr):
        warnings.warn(
            f"measure_wci: got {result.num_examples} examples in a single chunk, which has no spread: the "
            "standard error is infinite. Pass more examples or a smaller chunk_size.",
            UserWarning,
            stacklevel=2,
        )
    label = "clean loss" if threat is None else f"robust loss {threat} PGD-{num_steps}"
    return replace(result, estimator=name_of(measuring.estimator), loss=label)


@dataclass(frozen=True)
class _Stage:
    """The draws of one stage: samples [K, m, L], examples [K] and mean loss [K] of each chunk."""

    layers: Layers
    samples: Tensor
    weights: Tensor
    losses: Tensor

    def measurement(self, **details: Any) -> WCIMeasurement:
        """Return the index from the chunks' means."""
        return WCIMeasurement.from_samples(
            tuple(self.layers),
            self.layers.squared_norms(),
            self.samples.mean(1),
            self.weights,
            sizes=self.layers.sizes().cpu(),
            num_probes=self.samples.shape[1],
            mean_loss=float((self.weights * self.losses).sum() / self.weights.sum()),
            **details,
        )

    def spread(self, index: WCIMeasurement, within: float = 0.0) -> tuple[float, float]:
        """Return σ_b² and σ_w² of `planning` (1); ``within`` is the latter for single probes."""
        t, num_probes = index.trace.mean, self.samples.shape[1]
        c = torch.where(t > 0, (index.squared_norms / t).sqrt() / 2, 0)
        draws = self.samples @ c  # [K, m]
        within = float(draws.var(1).mean()) if num_probes > 1 else within
        return max(0.0, float(draws.mean(1).var()) - within / num_probes), within


@dataclass(frozen=True)
class _Measuring:
    """What every chunk of a measurement has in common."""

    model: nn.Module
    layers: Layers
    estimator: Estimator
    loss: ModelLoss | None
    threat: ThreatModel | None
    num_steps: int
    step_size: float | None
    seed: int
    has_bar: bool

    @property
    def passes(self) -> int:
        """c_a of `planning` (2): the attack's passes and the forward at the adversarial examples."""
        return 1 + (2 * self.num_steps if self.threat else 0)

    def checked(self, x: Tensor, y: Tensor) -> "_Measuring":
        """Refuse what would fail or be silently wrong later; choose an estimator that is possible."""
        x, y = self._placed(x, y)
        if self.loss is None:
            self._check_outputs(x, y)
        passes = Passes(self.model, self.layers, lambda: self._loss_at(x, y))
        return replace(self, estimator=choose(self.estimator, passes, needs_gradient=False).estimator)

    def _check_outputs(self, x: Tensor, y: Tensor) -> None:
        """Refuse a model that does not give one row of logits an image, and labels that do not fit."""
        with torch.no_grad():
            logits = self.model(x)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(x):
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise ValueError(
                f"measure_wci: got outputs {got} for {len(x)} images; expected logits [{len(x)}, C]."
            )
        self._check_labels(y, logits.shape[1])

    def stage(
        self, chunks: Iterable[tuple[Tensor, Tensor]], num_probes: int, stage: int, total: int | None = None
    ) -> _Stage:
        """Attack every chunk once and draw its traces; randomness depends on seed, stage and chunk alone."""
        rows = [
            self._chunk(
                x, y, num_probes, generator_from(self._device, self.seed, "measure_wci", stage, number)
            )
            for number, (x, y) in enumerate(
                tqdm(
                    chunks, f"WCI, stage {stage}", total, unit="chunk", leave=False, disable=not self.has_bar
                )
            )
        ]
        samples, losses, weights = zip(*rows, strict=True)
        return _Stage(
            self.layers,
            torch.stack(samples).double().cpu(),
            torch.tensor(weights, dtype=torch.float64),
            torch.stack(losses).double().cpu(),
        )

    def _chunk(
        self, x: Tensor, y: Tensor, num_probes: int, generator: torch.Generator
    ) -> tuple[Tensor, Tensor, int]:
        """Return samples [m, L], mean loss, and the number of examples."""
        x, y = self._placed(x, y)

        if self.threat is not None:
            # The attack sums over examples: N times the mean loss, whatever that is.
            x = pgd(
                lambda images: self._loss_at(images, y).total.expand(len(images)),
                x,
                threat=self.threat,
                num_steps=self.num_steps,
                step_size=self.threat.step_for(self.num_steps, self.step_size),
                generator=generator,
            )
        passes = Passes(self.model, self.layers, lambda: self._loss_at(x, y))
        samples, loss = self.estimator.draw(passes, num_probes, generator)
        if not bool(torch.isfinite(loss)):
            raise ValueError(
                f"measure_wci: got a loss of {float(loss)}; expected a finite number. Has the model diverged?"
            )
        return samples, loss.detach(), len(x)

    def _loss_at(self, images: Tensor, y: Tensor) -> Loss:
        """Return the mean loss at images."""
        if self.loss is not None:
            return as_loss(self.loss(self.model, images, y))
        logits = self.model(images)
        self._check_labels(y, logits.shape[1])
        return cross_entropy(logits, y)

    @property
    def _device(self) -> torch.device:
        return self.layers.tensors[0].device

    def _placed(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return images and labels on the model's device, images in its dtype."""
        if not x.is_floating_point():
            raise ValueError(
                f"measure_wci: got images of dtype {x.dtype}; expected floats in [0, 1]. Divide them by 255, "
                "or use ToTensor()."
            )
        weights = self.layers.tensors[0]
        return x.detach().to(weights.device, weights.dtype), y.to(weights.device)

    @staticmethod
    def _check_labels(y: Tensor, num_classes: int) -> None:
        """Refuse labels that are no classes; soft ones are checked by ``cross_entropy``."""
        if y.ndim == 2 and y.shape[1] == num_classes and y.is_floating_point():
            return
        if y.ndim != 1 or y.is_floating_point():
            raise ValueError(
                f"measure_wci: got labels of shape {tuple(y.shape)} and dtype {y.dtype}; expected classes "
                f"[N] as integers, or soft targets [N, {num_classes}]. Pass loss= for other targets."
            )
        if int(y.min()) < 0 or int(y.max()) >= num_classes:
            raise ValueError(
                f"measure_wci: got labels from {int(y.min())} to {int(y.max())}; expected 0 to "
                f"{num_classes - 1}, the model's outputs. Are model and data of the same classes?"
            )


def _to_target(
    measuring: _Measuring, chunks: Iterator[tuple[Tensor, Tensor]], target: float
) -> WCIMeasurement:
    """Plan and make stages until the error of one is small enough; see `planning`.

    When fresh examples run out, a stage takes *all* examples once, those of earlier stages too, with fresh
    random starts and signs: its size then depends on no estimate. From there on only probes can be added.
    """
    read = list(islice(chunks, PILOT_CHUNKS))
    used, within, limited_by = len(read), 0.0, "stages"
    last = measuring.stage(read, PILOT_PROBES, 0, len(read))
    index = last.measurement()
    if used < 2:
        return replace(index, target_relative_error=target, limited_by="examples")
    for stage in range(1, MAX_STAGES + 1):
        between, within = last.spread(index, within)
        variance = (target * float(index.per_layer.sum())) ** 2 / safety(len(last.samples) - 1)
        num_chunks, num_probes = plan(
            between, within, variance, measuring.passes, measuring.estimator.probe_cost
        )
        if stage > 1:
            num_chunks = max(num_chunks, math.ceil(1.5 * len(last.samples)))
        read += islice(chunks, max(0, used + num_chunks - len(read)))
        if len(read) - used >= num_chunks:
            taken, used = read[used : used + num_chunks], used + num_chunks
        else:
            more = min(MAX_PROBES_WITHOUT_EXAMPLES, probes_for(between, within, variance, len(read)))
            if limited_by == "examples" and more <= last.samples.shape[1]:
                break  # the probes are not what is missing
            taken, num_probes, limited_by = read, max(more, num_probes), "examples"
        last = measuring.stage(taken, num_probes, stage, len(taken))
        index = last.measurement(target_relative_error=target)
        if index.reached:
            return index
    return replace(index, limited_by=limited_by)


def _check_arguments(
    estimator: str,
    num_examples: int | None,
    num_probes: int | None,
    target: float | None,
    num_steps: int,
    chunk_size: int | None,
) -> None:
    """Refuse numbers out of range before anything is read."""
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator: got {estimator!r}; expected one of {', '.join(ESTIMATORS)}. Choose one of them."
        )
    if target is not None and not 0 < target < 1:
        raise ValueError(f"target_relative_error: got {target!r}; expected a share in (0, 1). 0.05 is 5 %.")
    if target is not None and num_probes is not None:
        raise ValueError(
            f"num_probes: got {num_probes} beside target_relative_error={target:g}; expected one of the two: "
            "a target plans the probes. Remove one."
        )
    counts = {"num_examples": num_examples, "num_probes": num_probes, "chunk_size": chunk_size}
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(
                f"{name}: got {value}; expected at least 1. Raise it, or leave it out for the default."
            )
    if num_steps < 0:
        raise ValueError(f"num_steps: got {num_steps}; expected at least 0 attack steps. Raise it.")
