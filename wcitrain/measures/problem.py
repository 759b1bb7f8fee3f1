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
from wcitrain.measures.examples import Examples
from wcitrain.measures.means import Chunks, mean_and_error
from wcitrain.method import Method
from wcitrain.params import unwrapped
from wcitrain.preserve import full_precision, undisturbed
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
        notes = [self.settings, f"{self.num_examples} examples" if self.num_examples else ""]
        context = ", ".join(note for note in notes if note)
        return f"{self.name} {number}" + (f" ({context})" if context else "")

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
        batches: (x, y, ...), read anew for another size of chunks: a list, not an iterator.
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
        self.model, self.attack = unwrapped(model), attack
        self.batches, self.test_batches, self.num_examples = batches, test_batches, num_examples
        self.seed, self.initial, self.chunk_size = seed, initial, chunk_size
        self._known: dict[object, Chunks] = {}
        self._read: list[Iterable[Any]] = []  # kept, so that no other object takes over an id

    @property
    def threat(self) -> ThreatModel | None:
        """The ball of the attack; None without one."""
        return None if self.attack is None else self.attack.threat

    @property
    def attack_text(self) -> str:
        """ "PGD-20x10 linf 8/255", or "clean"."""
        return attack_text(self.attack)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def clean(self, chunk_size: int | None = None) -> Chunks:
        """Return the examples in chunks of B, the last perhaps smaller; read once."""
        size = chunk_size or self.chunk_size
        key = size, id(self.batches), self.num_examples, self.device  # other images are read anew
        if key not in self._known:
            self._read.append(self.batches)
            dealt = Examples(self.batches, self.num_examples).chunks(size)
            self._known[key] = [(x.to(self.device), y.to(self.device)) for x, y in dealt]
        if not self._known[key]:
            raise ValueError("data: got no images; expected at least one batch. Is the data set empty?")
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
        """Return chunks attacked at the weights as they are now, always from the same starts; kept nowhere.

        Each example's image is that of its worst restart.
        """
        if self.attack is None:
            return chunks
        return [
            (self.attack(self.model, x, y, generator_from(x.device, self.seed, "attack", number)), y)
            for number, (x, y) in enumerate(chunks)
        ]

    def test(self) -> "Problem":
        """Return the same problem on the test images; a ``ValueError`` where there are none."""
        if not self.test_batches:
            raise ValueError("test_batches: got none; expected batches (x, y). Give test images for the gap.")
        own = self.attack, self.seed, self.num_examples, (), self.initial, self.chunk_size
        return Problem(self.model, self.test_batches, *own)


class Measure(Method):
    """A measure with its settings, which are its fields: in Python, in recipes and on the command line."""

    name: ClassVar[str]
    needs_initial: ClassVar[bool] = False  # the weights before training
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
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        undisturbed(model, training=False),
        full_precision(model),
    ):
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
