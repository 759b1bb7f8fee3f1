"""Attacks as stages: each attacks the examples that are still robust, and says which it broke.

Legend: N examples, B a batch of them. A restart of PGD is a stage, and so is a part of AutoAttack. An example
that any stage's final iterate breaks is broken, not only by that of the highest loss.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from wcitrain import files
from wcitrain.attacks import ThreatModel
from wcitrain.attacks.ascent import PerExampleLoss, input_gradient
from wcitrain.attacks.losses import margin
from wcitrain.digest import digest
from wcitrain.method import nearest
from wcitrain.params import logits_of, unwrapped
from wcitrain.preserve import full_precision, kept_random_state, undisturbed
from wcitrain.seeding import seed_from


class Clean(NamedTuple):
    """What a model does without an attack."""

    is_right: Tensor  # [N]
    losses: Tensor  # cross-entropies [N]
    is_finite: Tensor  # [N], of all logits
    num_classes: int


@dataclass(frozen=True, eq=False)
class Victim:
    """A model, as ``attackable`` yields it, and the examples it is attacked on."""

    model: nn.Module
    x: Tensor  # [N, *dims], on the CPU
    y: Tensor  # [N], on the CPU
    batch_size: int = 200
    seed: int = 0
    eot: int = 1  # draws of a randomised model behind a gradient, see ``expected``
    has_stand_ins: bool = False  # in the backward pass, see ``stand_ins``

    def expected(self, loss_fn: PerExampleLoss) -> PerExampleLoss:
        """Return the expectation over transformation of a loss [B] (Athalye et al. 2018, section 4.2).

            L(x) = 1/K sum_k loss_k(x),   grad L = 1/K sum_k grad loss_k,   K = ``eot`` draws              (1)

        K times the passes, the memory of one: the gradients are taken draw by draw, and what is returned is
        linear in x with this value and this gradient. With K = 1 it is ``loss_fn`` itself.
        """

        def mean(x: Tensor) -> Tensor:
            total, slope = torch.zeros(len(x), device=x.device), torch.zeros_like(x)
            for _ in range(self.eot):
                losses = loss_fn(x)
                total = total + losses.detach() / self.eot
                if losses.requires_grad and x.requires_grad:
                    slope += torch.autograd.grad(losses.sum(), x)[0] / self.eot
            return total + ((x - x.detach()) * slope).flatten(1).sum(1)

        return loss_fn if self.eot == 1 else mean

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next((p.device for p in self.model.parameters()), torch.device("cpu"))

    def batch(self, places: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Return the images and labels at ``places``, on the device."""
        return self.x[places].to(self.device), self.y[places].to(self.device)

    @cached_property
    def clean(self) -> Clean:
        """What the model does without an attack; ValueError where outputs or labels do not fit."""
        torch.manual_seed(seed_from(self.seed, "clean"))  # a randomised model: the same after a kill
        rows, num_classes, low, high = [], 0, int(self.y.min()), int(self.y.max())
        for places in torch.arange(len(self.x)).split(self.batch_size):
            images, labels = self.batch(places)
            with torch.no_grad():
                logits = logits_of(self.model(images))
            shape, num = tuple(logits.shape), len(images)
            if len(shape) != 2 or shape[0] != num or not 0 <= low <= high < shape[1] or shape[1] < 2:
                got = f"got outputs {shape} for {num} images with labels {low} to {high}"
                raise ValueError(f"model: {got}; expected logits [{num}, C > {high}]. Is it their model?")
            num_classes = shape[1]
            losses = F.cross_entropy(logits, labels, reduction="none")
            rows.append([is_right(logits, labels).cpu(), losses.cpu(), logits.isfinite().all(1).cpu()])
        flags, losses, is_finite = (torch.cat(column) for column in zip(*rows, strict=True))
        return Clean(flags, losses, is_finite, num_classes)

    def digest(self, *, is_attacked: bool) -> str:
        """Return the digest of weights, buffers and names of the modules' classes; under attack of gradients.

        They tell a model that was mended, or has other stand-ins, from the one before.
        """
        parts: list[object] = [type(module).__qualname__ for module in self.model.modules()]
        for name, value in self.model.state_dict().items():
            parts += [name, value]
        images, labels = self.batch(slice(0, 8))
        with kept_random_state(self.device), suppress(RuntimeError, ValueError):
            torch.manual_seed(self.seed)
            if is_attacked:
                parts.append(input_gradient(lambda z: margin(logits_of(self.model(z)), labels), images))
        return digest(parts)


def is_right(logits: Tensor, labels: Tensor) -> Tensor:
    """Return truth values [B]: the largest logit is the label's, and none is NaN or infinite."""
    return (logits.max(1).indices == labels) & logits.isfinite().all(1)


@contextmanager
def attackable(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the user's own module in eval mode, float32 and frozen; put all back.

    ValueError for parameters in another precision.
    """
    module = unwrapped(model)
    parameters = list(module.parameters())
    required = [p.requires_grad for p in parameters]
    if others := {str(p.dtype) for p in parameters if p.is_floating_point()} - {"torch.float32"}:
        got = f"parameters in {', '.join(sorted(others))}"
        raise ValueError(f"model: got {got}; expected float32. Call model.float() first.")
    try:
        with torch.inference_mode(False), undisturbed(module, training=False), full_precision(module):
            for p in parameters:
                p.requires_grad_(False)
            yield module
    finally:
        for p, flag in zip(parameters, required, strict=True):
            p.requires_grad_(flag)


@contextmanager
def stand_ins(
    model: nn.Module, parts: Mapping[str, Callable[[Tensor], Tensor]] | Sequence[str]
) -> Iterator[None]:
    """Backward pass differentiable approximation of named parts f of a model (Athalye et al. 2018, 4.1).

        forward f(x), bit for bit;  backward that of g(x):  f(x) + ( g(x) − g(x) ),  gradients of the first g

    ``parts`` maps names of modules to functions g, or lists names: then g(x) = x, which goes straight through
    a rounding, a JPEG or a denoiser. ValueError for names and shapes that do not fit.
    """
    modules = dict(model.named_modules())
    pairs = dict(parts) if isinstance(parts, Mapping) else dict.fromkeys(parts, lambda x: x)
    for name in pairs.keys() - {known for known in modules if known}:
        known = [one for one in modules if one]
        hint = f"Did you mean {nearest(name, known, 0.0)}?" if known else "This model has none."
        raise ValueError(f"bpda: got {name!r}; expected the name of a module inside the model. {hint}")

    def hook(name: str, module: nn.Module, args: Any, output: Any) -> Tensor | None:
        if not torch.is_grad_enabled():
            return None
        replaced = pairs[name](args[0])
        if replaced.shape != output.shape:
            got = f"got {name!r} with outputs {tuple(output.shape)} and a stand-in {tuple(replaced.shape)}"
            raise ValueError(f"bpda: {got}; expected equal shapes. In Python, give a function for it.")
        return output.detach() + (replaced - replaced.detach())

    with ExitStack() as stack:
        for name in pairs:
            handle = modules[name].register_forward_hook(partial(hook, name))
            stack.callback(handle.remove)
        yield


@dataclass(frozen=True)
class Stage:
    """One pass over examples: ``attack(x, y, places)`` returns x_adv [B, *dims]; places are in the set."""

    name: str
    attack: Callable[[Tensor, Tensor, Tensor], Tensor]
    attacks_all: bool = False  # also those that are misclassified already: all losses are wanted


class AttackState:
    """How far an attack on N examples is, kept in the file ``path``, if any, to go on from after a kill.

    With ``x`` [N, *dims] adversarial images are kept too: of an example that fell the first that fooled the
    model (of one that was wrong at once and is right under attack, the clean one), else the last tried. With
    ``path`` they are in a file beside it, written before the state says so.
    """

    SAVED = ("is_robust", "fell_in", "todo", "losses", "after", "batch", "furthest")

    def __init__(self, is_clean: Tensor, path: Path | None, x: Tensor | None = None) -> None:
        self._path = path
        self.is_robust = is_clean.clone()  # [N] right without an attack and after all that was tried
        self.fell_in = is_clean.short().neg()  # [N] 0: wrong at once, k: broken in stage k, -1: neither
        self.todo = is_clean.clone()  # [N] what the stage under way attacks
        self.losses = torch.full(is_clean.shape, torch.nan)  # [N] cross-entropies after the first restart
        self.after: list[float] = []  # robust accuracy after each finished stage
        self.batch = 0  # finished batches of the stage under way
        self.furthest = 0.0  # longest perturbation that fooled the model, in the threat's norm
        self.images = None if x is None else x.clone()
        if path is None:
            return
        file = path.with_suffix(".npy")
        is_known = path.is_file() and (x is None or file.is_file())
        if x is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            settings: Any = {"mode": "r+" if is_known else "w+", "dtype": np.float32, "shape": tuple(x.shape)}
            self._file = np.lib.format.open_memmap(file, **settings)
            if not is_known:
                self._file[:] = x.numpy()
            self.images = torch.from_numpy(self._file)
        if is_known:
            with np.load(path, allow_pickle=False) as saved:
                for name in self.SAVED:
                    is_tensor = isinstance(getattr(self, name), Tensor)
                    setattr(self, name, torch.from_numpy(saved[name]) if is_tensor else saved[name].tolist())

    def save(self) -> None:
        """Write the file, if there is one."""
        if self._path is not None:
            if self.images is not None:
                self._file.flush()
            files.save_arrays(self._path, {name: getattr(self, name) for name in self.SAVED})


@torch.no_grad()
def run_stages(
    stages: Sequence[Stage], victim: Victim, threat: ThreatModel, state: AttackState, title: str
) -> None:
    """Run what ``state`` has not seen yet, and save it after every batch.

    The batches of a stage are cut from what was robust at its start, in the order of the set. The global
    random state is seeded for each batch: a randomised model meets the same numbers after an interruption.
    """
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[threat.norm]
    with tqdm(unit=" images", desc=title, disable=None) as bar:
        for stage in stages[len(state.after) :]:
            if state.batch == 0:
                state.todo = state.is_robust | stage.attacks_all
            places = state.todo.nonzero().flatten()
            if not len(places):
                break
            for batch, chosen in list(enumerate(places.split(victim.batch_size)))[state.batch :]:
                images, labels = victim.batch(chosen)
                torch.manual_seed(seed_from(victim.seed, stage.name, batch))
                x_adv = stage.attack(images, labels, chosen)
                logits = victim.model(x_adv)
                if stage.attacks_all:
                    state.losses[chosen] = F.cross_entropy(logits.float(), labels, reduction="none").cpu()
                is_fooled = ~is_right(logits, labels).cpu()
                lengths = torch.linalg.vector_norm((x_adv - images).double().flatten(1), order, dim=1).cpu()
                broken = lengths[is_fooled & state.is_robust[chosen]]
                state.furthest = max([state.furthest, *broken.tolist()])
                if state.images is not None:
                    kept = is_fooled | state.is_robust[chosen]
                    state.images[chosen[kept]] = x_adv.cpu()[kept]
                state.fell_in[chosen[is_fooled & state.is_robust[chosen]]] = len(state.after) + 1
                state.is_robust[chosen[is_fooled]] = False
                state.batch = batch + 1
                state.save()
                bar.set_postfix_str(f"{stage.name}, {int(state.is_robust.sum())} robust", refresh=False)
                bar.update(len(chosen))
            state.after.append(float(state.is_robust.double().mean()))
            state.batch = 0
            state.save()
