"""A `Problem` is a model on images under an attack, a `Measure` is taken of it, a `Measurement` comes out.

Legend: N examples, B examples a chunk.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.digest import digest
from wcitrain.measures.means import Chunks, Pair, in_chunks, mean_and_error, read_pairs
from wcitrain.method import Method
from wcitrain.params import unwrapped
from wcitrain.preserve import differentiating, full_precision, undisturbed
from wcitrain.seeding import generator_from
from wcitrain.text import with_error

Taken = tuple[Tensor | tuple[float, float, int], str, Mapping[str, float]]  # see `Measure.take`


@dataclass(frozen=True)
class Measurement:
    """One number about a model."""

    name: str
    value: float  # may be infinite, NaN only where there is no value (``settings`` say why)
    stderr: float = math.nan  # over examples, draws or both, as the measure documents; NaN: none or unknown
    num_examples: int = 0
    settings: str = ""  # for humans: "xi 0.5, 10 draws, PGD-20 linf 8/255"
    parts: Mapping[str, float] = field(default_factory=dict)  # further numbers, such as those of layers

    def __str__(self) -> str:
        """Return "average_flatness 1.21 ± 0.04 (xi 0.5, 10 draws, PGD-20 linf 8/255, 1000 examples)"."""
        number = with_error(self.value, self.stderr) if math.isfinite(self.stderr) else f"{self.value:.4g}"
        examples = f", {self.num_examples} examples" if self.num_examples else ""
        return f"{self.name} {number} ({self.settings}{examples})"

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON; a number that is not finite becomes None."""
        parts = {key: finite(value) for key, value in self.parts.items()}
        return vars(self) | {"value": finite(self.value), "stderr": finite(self.stderr), "parts": parts}


def finite(value: float) -> float | None:
    """Return a number as JSON can have it."""
    return value if math.isfinite(value) else None


class Problem:
    """What is measured, as in ``LossGradientNorm().measure(Problem(model, batches, ThreatModel()))``.

    Args:
        model: Gives logits [N, C] for images in [0, 1]; DDP and ``torch.compile`` are looked through.
        batches: (x, y, ...), read anew for another size of chunks; an iterator is refused then.
        attack: The adversary. A ``ThreatModel`` is PGD on the cross-entropy with ten steps of 2.5 eps / 10
            from a uniform start; None for the clean loss.
        seed: Of everything random. Two models are attacked from the same points.
        num_examples: At most so many, the first; None takes all.
        test_batches: Test images, for the gap.
        initial: State dict before training, for distances.
        chunk_size: Examples at once, where a measure has no size of its own; decides the attack's starts.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        attack: Attack | ThreatModel | None = None,
        seed: int = 0,
        num_examples: int | None = None,
        test_batches: Iterable[Any] = (),
        initial: Mapping[str, Tensor] | None = None,
        chunk_size: int = 100,
    ) -> None:
        if num_examples is not None and num_examples < 1:
            raise ValueError(f"num_examples: got {num_examples}; expected at least 1, or None for all.")
        if isinstance(attack, ThreatModel):
            attack = Attack(attack, 10, attack.step_for(10))
        if not isinstance(attack, Attack | None):
            rule = "expected an Attack, a ThreatModel or None. Write ThreatModel('linf', 8/255)."
            raise TypeError(f"attack: got {attack!r}; {rule}")
        self.model, self.attack = unwrapped(model), attack
        self.batches, self.test_batches, self.num_examples = batches, test_batches, num_examples
        self.seed, self.initial, self.chunk_size = seed, initial, chunk_size
        self._known: dict[object, Chunks] = {}
        self._read: list[Iterable[Any]] = []  # kept, so that no other object takes over an id

    def read(self) -> Iterator[Pair]:
        """Return the batches from the front, at most ``num_examples``; an iterator can be read only once."""
        if isinstance(self.batches, Iterator) and any(one is self.batches for one in self._read):
            rule = "expected batches that can be read anew. Pass a list or a loader."
            raise ValueError(f"batches: got an iterator, which another measure has used up; {rule}")
        self._read.append(self.batches)
        return read_pairs(self.batches, self.num_examples)

    def clean(self, chunk_size: int | None = None) -> Chunks:
        """Return the examples in chunks of B, the last perhaps smaller; read once."""
        size = chunk_size or self.chunk_size
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        key = size, id(self.batches), self.num_examples, device  # other images are read anew
        if key not in self._known:
            chunks = [(x.to(device), y.to(device)) for x, y in in_chunks(self.read(), size)]
            if not chunks:
                raise ValueError("data: got no images; expected at least one batch. Is the data set empty?")
            self._known[key] = chunks
        return self._known[key]

    def adversarial(self, chunk_size: int | None = None) -> Chunks:
        """Return the examples attacked at the weights as they are now; the same weights are attacked once."""
        chunks = self.clean(chunk_size)
        if self.attack is None:
            return chunks
        weights = digest([*self.model.parameters(), *self.model.buffers()])
        key = id(chunks), self.attack, self.seed, weights  # another attack or seed finds other images
        if key not in self._known:
            self._known[key] = self.attacked_anew(chunks)
        return self._known[key]

    def attacked_anew(self, chunks: Chunks) -> Chunks:
        """Return chunks attacked at the weights as they are now, from the same starts; kept nowhere."""
        if self.attack is None:
            return chunks
        return [
            (self.attack(self.model, x, y, generator_from(x.device, self.seed, "attack", number)), y)
            for number, (x, y) in enumerate(chunks)
        ]


class Measure(Method):
    """A measure with its settings, which are its fields: in Python, in recipes and on the command line."""

    name: ClassVar[str]
    needs_initial: ClassVar[bool] = False  # the weights before training
    can_lack_initial: ClassVar[bool] = False  # ... for some of its parts alone
    needs_test: ClassVar[bool] = False  # test images beside the others

    def measure(self, problem: Problem) -> Measurement:
        """Return the ``Measurement``; the model is left as it was, on exceptions too."""
        with measuring(problem.model):
            value, settings, parts = self.take(problem)
        if isinstance(value, Tensor):
            value = (*mean_and_error(value), len(value))
        return Measurement(self.name, *value, settings, parts)

    def take(self, problem: Problem) -> Taken:
        """Return the value, how it was taken, and further numbers; the model is ready to be measured.

        The value is its number for every example [N], or ``(value, stderr, num_examples)``.
        """
        raise NotImplementedError


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Eval mode, full precision and gradients allowed; all is restored on exit.

    That is modes, buffers, ``requires_grad`` and random state. A frozen model counts as trainable inside.
    A weight that is not finite is refused: measures of a diverged model would read as flat.
    """
    if bad := [name for name, p in model.named_parameters() if not bool(torch.isfinite(p).all())]:
        raise ValueError(f"model: got weights that are not finite in {', '.join(bad[:3])}; expected numbers.")
    frozen = [] if any(p.requires_grad for p in model.parameters()) else list(model.parameters())
    with differentiating(), undisturbed(model, training=False), full_precision(model):
        try:
            for p in frozen:
                p.requires_grad_(p.is_floating_point())
            yield
        finally:
            for p in frozen:
                p.requires_grad_(False)


def attack_text(attack: Attack | None) -> str:
    """Return "PGD-20x10 linf 8/255", or "clean"."""
    if attack is None:
        return "clean"
    times = f"x{attack.num_restarts}" if attack.num_restarts > 1 else ""
    return f"PGD-{attack.num_steps}{times} {attack.threat}"
