"""The Weight-Curvature Index and the Hessian's trace of any classifier on any data, to a given precision.

The examples are cut into chunks. Each chunk is attacked once; then probes of its traces are drawn at the
adversarial examples, held fixed (Danskin), and their mean is one sample. The jackknife over the samples gives
the index and its error (`wci_measurement`); it needs no model of where the variance comes from. How many
chunks and probes a target error needs is planned in `wci_stages`.

Choices by measurement (a residual network of 0.3 M weights after AT and WCI, CIFAR-10 at 16x16, PGD-10, one
CPU thread): chunks of 25, since the part of the variance that comes from pairs of examples does not shrink
with them, and an attacked example takes 1.2 times as long as in chunks of 100, 2.5 times in chunks of 5. The
plan of `wci_stages` had 12 and 14 probes; 8 need at most 8 % more time for the same error.
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.estimators import ESTIMATORS, Auto, name_of
from wcitrain.measures.examples import Examples
from wcitrain.measures.problem import Measure, Problem, Taken, measuring
from wcitrain.measures.wci_measurement import WCIMeasurement
from wcitrain.measures.wci_stages import PILOT_CHUNKS, ModelLoss, Stages, progress_bar, to_target
from wcitrain.method import Choice, InnerShare, PositiveCount, Text, method, refuse

CHUNK_SIZE = 25


@method
class WeightCurvatureIndex(Measure):
    """Weight-Curvature Index Σ_l sqrt(||W_l||_F² Tr(H_l)) of the robust (or clean) loss.

    The standard error is the jackknife's over chunks: of the examples as a sample, so take them at random,
    not sorted by class. ``parts``: each layer's share of the sum. `by_layer` returns all there is to know. It
    reads the batches from the front and no further than needed.

    Estimators: ``gauss_newton`` (one backward a probe, never negative, every model; equals the Hessian for
    piecewise linear networks), ``hutchinson`` (the Hessian, by double backward), ``top_layer`` (the head
    alone, exact; ``layers`` stays "weights").
    """

    estimator: Annotated[Estimator, Choice(ESTIMATORS, without=("num_probes",))] = Field(
        default=Auto(), description="Of the traces; auto: gauss_newton or hutchinson, as a dry run allows."
    )
    layers: Text = Field(default="weights", description="Which tensors count, see params.select_layers.")
    split_qkv: bool = Field(
        default=False, description="Count query, key and value of a fused projection as three layers."
    )
    num_probes: PositiveCount | None = Field(
        default=None, description="Probes a chunk; null: 8 with an attack, 2 without, or as a target needs."
    )
    target_relative_error: InnerShare | None = Field(
        default=None, description="Take examples and probes until standard error / index is at most this."
    )
    chunk_size: PositiveCount | None = Field(
        default=None, description="Examples at once; null: 25, fewer for fewer than 400 examples."
    )
    name = "wci"
    source = "Xu & Zhang, arXiv 2410.07719v1"
    cost = "1 attack, 1 forward, num_probes backward passes"

    def __post_init__(self) -> None:
        if self.target_relative_error is not None and self.num_probes is not None:
            text = f"got {self.num_probes} beside target_relative_error={self.target_relative_error:g}"
            refuse("num_probes", f"{text}; expected one of the two: a target plans the probes. Remove one.")

    def take(self, problem: Problem) -> Taken:
        """Return the index."""
        result = self.by_layer(problem)
        parts = dict(zip(result.layers, result.per_layer.tolist(), strict=True))
        value = result.total, result.total_stderr, result.num_examples
        return value, f"{result.loss}, {result.estimator}", parts

    def by_layer(
        self, problem: Problem, loss: ModelLoss | None = None, progress: bool = False
    ) -> WCIMeasurement:
        """Return the index layer by layer, with how it was measured.

        Args:
            problem: Its attack climbs the same loss. With a target ``num_examples`` is the most that may be
                read; where they do not suffice the result says so (``reached``, ``limited_by``).
            loss: ``loss(model, x, y)`` returns a ``Loss`` or, for hutchinson, the mean over the
                examples as a tensor; by default cross-entropy, labels [N] or soft [N, C].
            progress: Show a bar, on a terminal.

        Raises:
            ValueError: Images outside [0, 1] under attack, labels that are no classes, outputs that are not
                [N, C], weights in half precision, no images.
        """
        model, attack = problem.model, problem.attack
        first = next(model.parameters(), None)
        if first is None or first.dtype not in (torch.float32, torch.float64):
            got = "no weights" if first is None else f"weights in {first.dtype}"
            rule = "weights in float32 or float64: half precision drowns curvature in rounding"
            raise ValueError(f"wci: got a model with {got}; expected {rule}. Convert it with model.float().")
        with measuring(model):
            layers = self.estimator.layers(model, self.layers, split_qkv=self.split_qkv)
            examples = Examples(problem.batches, problem.num_examples)
            available = examples.ahead(PILOT_CHUNKS * CHUNK_SIZE)
            if not available:
                raise ValueError("wci: got no images; expected at least one batch. Is the data set empty?")
            stages = Stages(problem, layers, self.estimator, loss, examples.peek())
            size = self.chunk_size or max(1, min(CHUNK_SIZE, available // PILOT_CHUNKS))
            chunks = examples.chunks(size)
            if self.target_relative_error is None:
                bar = progress_bar(progress, math.ceil((problem.num_examples or 0) / size))
                result, _ = stages.draw(chunks, self.num_probes or (8 if attack else 2), 0, bar)
            else:
                result = to_target(stages, chunks, self.target_relative_error, progress)
        if not math.isfinite(result.total_stderr):
            text = f"got {result.num_examples} examples in a single chunk, which has no spread"
            advice = "the standard error is infinite. Pass more examples or a smaller chunk_size."
            warnings.warn(f"wci: {text}: {advice}", UserWarning, stacklevel=2)
        label = f"robust loss {attack.threat} PGD-{attack.num_steps}" if attack else "clean loss"
        return replace(result, estimator=name_of(stages.estimator), loss=label)


@method
class HessianTrace(WeightCurvatureIndex):
    """Trace Σ_l Tr(H_l) of the Hessian, the index without the weights' norms.

    The layers' errors are added as if they were fully correlated, an upper bound. ``parts``: every layer's
    trace. A target error is that of the index.
    """

    name = "hessian_trace"
    source = "definition; estimators as in Xu & Zhang, arXiv 2410.07719v1"

    def take(self, problem: Problem) -> Taken:
        """Return the trace."""
        result = self.by_layer(problem)
        t = result.trace
        parts = dict(zip(result.layers, t.mean.tolist(), strict=True))
        value = float(t.mean.sum()), float(t.stderr.sum()), result.num_examples
        return value, f"{result.loss}, {result.estimator}", parts


def measure_wci(
    model: nn.Module,
    batches: Iterable[Any],
    threat: ThreatModel | None = None,
    *,
    num_examples: int | None = None,
    num_steps: int = 10,
    step_size: float | None = None,
    loss: ModelLoss | None = None,
    seed: int = 0,
    progress: bool = True,
    **settings: Any,
) -> WCIMeasurement:
    """Measure the index in one call: ``WeightCurvatureIndex(**settings).by_layer(Problem(...))``.

    Args:
        model, batches, threat, seed: See `Problem`.
        num_examples: By default 1000 or all there are. With a target all there are, or at most this.
        num_steps, step_size: Of PGD from a random start; the step is 2.5 eps / num_steps by default.
        loss, progress: See `WeightCurvatureIndex.by_layer`.
        settings: Fields of `WeightCurvatureIndex`: ``estimator``, ``layers``, ``target_relative_error``, ...

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> measure_wci(model, [(x, y)], ThreatModel(eps=0.1), estimator="hutchinson").estimator
    'hutchinson'
    """
    measure = WeightCurvatureIndex(**settings)
    if num_examples is None and measure.target_relative_error is None:
        num_examples = 1000
    attack = Attack(threat, num_steps, threat.step_for(num_steps, step_size)) if threat else None
    problem = Problem(model, batches, attack, seed, num_examples)
    return measure.by_layer(problem, loss, progress)
