"""The Weight-Curvature Index and the Hessian's trace of any classifier on any data, to a given precision.

The examples are cut into chunks. Each chunk is attacked once; then probes of its traces are drawn at the
adversarial examples, held fixed (Danskin), and their mean is one sample. The jackknife over the samples gives
the index and its error (`wci_measurement`); it needs no model of where the variance comes from.

For a target error chunks are taken until the error is small enough, from the 16th on. Stopping where it is
low by chance prefers a low index, the two being correlated: in simulations with samples as skewed as χ² of
one degree the index is low by at most a fifth of a standard error, and ± 1.96 of them cover the truth 90 to
95 % of the time.

By measurement (a residual network after AT and WCI, CIFAR-10 at 16x16, PGD-10): chunks of 25, since the part
of the variance that comes from pairs of examples does not shrink with them, and an attacked example takes 1.2
times as long as in chunks of 100, 2.5 times in chunks of 5; 8 probes need at most 8 % more time for an error
than the best number, 12 to 14.

Groups j of weights that share one variance make Σ_j sqrt(a_j t_j); the finer, the lower the sum, as by Cauchy
and Schwarz Σ_{j in l} sqrt(a_j t_j) <= sqrt(a_l t_l). A prior at the weights before training, which are
independent of the data as well, has a_l = ||W_l − W_l⁰||_F². What holding the images fixed leaves out is in
`response`.
"""

import copy
import math
import sys
import warnings
from collections.abc import Iterable
from itertools import chain
from typing import Annotated, Any

from torch import nn
from tqdm import tqdm

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.curvature.estimator import Estimator
from wcitrain.curvature.estimators import ESTIMATORS, Auto
from wcitrain.curvature.top_layer import TopLayer
from wcitrain.measures.means import Pair, count_examples, in_chunks
from wcitrain.measures.problem import Measure, Problem, Taken, measuring
from wcitrain.measures.wci_measurement import MIN_CHUNKS, WCIMeasurement
from wcitrain.measures.wci_sampler import Groups, Sampler
from wcitrain.method import Choice, InnerShare, PositiveCount, Text, method, refuse, setting
from wcitrain.params import Center, Layers
from wcitrain.preserve import differentiating

CHUNK_SIZE = 25


@method
class WeightCurvatureIndex(Measure):
    """Weight-Curvature Index Σ_l sqrt(||W_l||_F² Tr(H_l)) of the robust (or clean) loss.

    The standard error is the jackknife's over chunks: of the examples as a sample, so take them at random,
    not sorted by class. ``parts``: each layer's share of the sum. `by_layer` returns all there is to know. It
    reads the batches from the front and no further than needed. With ``gauss_newton`` traces are never
    negative, and for piecewise linear networks the Hessian's. With others there is no index where a trace is
    negative beyond its error: the value is NaN, the settings say why.
    """

    estimator: Annotated[Estimator, Choice(ESTIMATORS, without=("num_probes",))] = setting(
        Auto(), "Of the traces; auto: gauss_newton or hutchinson, as a dry run allows."
    )
    layers: Text = setting("weights", "Which tensors count, see params.select_layers.")
    split_qkv: bool = setting(False, "Count query, key and value of a fused projection as layers each.")
    num_probes: PositiveCount | None = setting(
        None, "Probes a chunk; null: 8 with an attack, 2 without or by response."
    )
    target_relative_error: InnerShare | None = setting(
        None, "Take examples until standard error / index is at most this."
    )
    chunk_size: PositiveCount | None = setting(None, "Examples at once; null: 25, fewer for less than 400.")
    center: Center = setting(
        "origin", "Of the prior; initial: the weights before training, so ||W - W0||_F² for ||W||_F²."
    )
    groups: Groups = setting(
        "layer", "What has a term of its own: rows of weights, weights, or the layers of a stage together."
    )
    response: InnerShare | None = setting(
        None,
        "Let the attack answer weights this share of ||W_l|| away, as 0.1; null: images held fixed.",
    )
    name = "wci"
    source = "Xu & Zhang, arXiv 2410.07719v1"
    cost = "1 attack, 1 forward, num_probes backward passes; by response 2 attacks a probe and layer more"

    def __post_init__(self) -> None:
        if self.groups == "filter" and (self.split_qkv or isinstance(self.estimator, TopLayer)):
            other = "split_qkv" if self.split_qkv else "estimator top_layer"
            refuse("groups", f"got filter with {other}; expected one of them. Leave the other out.")

    @property
    def needs_initial(self) -> bool:  # type: ignore[override]
        """Whether the prior is centred there."""
        return self.center == "initial"

    def take(self, problem: Problem) -> Taken:
        """Return the index."""
        result = self.by_layer(problem)
        parts = dict(zip(result.layers, result.per_layer.tolist(), strict=True)) | result.answer()
        value = result.total, result.total_stderr, result.num_examples
        return value, ", ".join(filter(None, (*result.notes(), result.why_none))), parts

    def by_layer(self, problem: Problem, progress: bool = False) -> WCIMeasurement:
        """Return the index layer by layer, with how it was measured; ``progress`` shows a bar on a terminal.

        With a target the problem's ``num_examples`` is the most that may be read; where they do not suffice
        the result says so (``reached``). Labels are classes [N] or soft targets [N, C].

        Raises:
            ValueError: No images or wrong ones, labels that are no classes, weights in half precision.
        """
        if self.response and problem.attack is None:
            raise ValueError("wci.response: got the clean loss; expected an attack to answer. Leave one out.")
        if self.response:
            problem = copy.copy(problem)
            with differentiating():
                problem.model = copy.deepcopy(problem.model).double()  # differences drown in float32
        with measuring(problem.model):
            layers = self.estimator.layers(problem.model, self.layers, split_qkv=self.split_qkv)
            if self.groups == "filter":
                layers = Layers(layers, {name: [*map(str, range(len(layers[name])))] for name in layers})
            num_probes = self.num_probes or (8 if problem.attack and not self.response else 2)
            sampler = Sampler(problem, layers, num_probes, self.center, self.groups, self.response)
            pairs, first = map(sampler.placed, problem.read()), list[Pair]()
            while count_examples(first) < MIN_CHUNKS * CHUNK_SIZE and (pair := next(pairs, None)):
                first.append(pair)
            if not first:
                raise ValueError("wci: got no images; expected at least one batch. Is the data set empty?")
            sampler.choose(self.estimator, *(t[:1] for t in first[0]))
            size = self.chunk_size or max(1, min(CHUNK_SIZE, count_examples(first) // MIN_CHUNKS))
            chunks, is_hidden = in_chunks(chain(first, pairs), size), not (progress and sys.stderr.isatty())
            for x, y in tqdm(chunks, "WCI", unit="chunk", leave=False, disable=is_hidden):
                sampler.draw(x, y)
                if self.target_relative_error and sampler.index(self.target_relative_error).reached:
                    break
            result = sampler.index(self.target_relative_error)
        if math.isinf(result.total_stderr):
            text = "a single chunk has no spread: the standard error is infinite. Pass more examples or a"
            warnings.warn(f"wci: {text} smaller chunk_size.", UserWarning, stacklevel=2)
        return result


@method
class HessianTrace(WeightCurvatureIndex):
    """Trace Σ_l Tr(H_l) of the Hessian, the index without the weights' norms.

    The layers' errors are added as if they were fully correlated, an upper bound. ``parts``: every layer's
    trace. A target error is that of the index.
    """

    def __post_init__(self) -> None:
        WeightCurvatureIndex.__post_init__(self)
        if self.center != "origin":
            refuse("center", f"got {self.center}; expected origin: a trace has none. Leave it out.")

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
    seed: int = 0,
    **settings: Any,
) -> WCIMeasurement:
    """Measure the index in one call: ``WeightCurvatureIndex(**settings).by_layer(Problem(...))``.

    Args:
        model, batches, threat, seed: See `Problem`; here an iterator will do.
        num_examples: By default 1000 or all there are. With a target all there are, or at most this.
        num_steps, step_size: Of PGD from a random start; the step is 2.5 eps / num_steps by default.
        settings: Fields of `WeightCurvatureIndex`: ``estimator``, ``layers``, ``target_relative_error``, ...

    >>> import torch
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    >>> x, y = torch.rand(64, 1, 2, 2), torch.randint(0, 3, (64,))
    >>> measure_wci(model, [(x, y)], ThreatModel(eps=0.1), estimator="hutchinson").estimator
    'hutchinson'
    """
    measure = WeightCurvatureIndex(**settings)
    if num_examples is None and measure.target_relative_error is None:
        num_examples = 1000
    attack: Any = threat
    if isinstance(threat, ThreatModel):
        attack = Attack(threat, num_steps, threat.step_for(num_steps, step_size))
    return measure.by_layer(Problem(model, batches, attack, seed, num_examples), progress=True)
