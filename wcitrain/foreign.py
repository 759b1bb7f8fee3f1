"""Models from elsewhere: programs in a file, functions of the user's own; and which images a model takes.

A TorchScript or ``torch.export`` file and ``module:function`` are programs: they are run, as `read_weights`
never does. Open only what you trust.
"""

import importlib
import importlib.util
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from wcitrain.digest import digest
from wcitrain.evaluation.intervals import mcnemar
from wcitrain.evaluation.results import percent
from wcitrain.finding import program_kind
from wcitrain.models import Classifier, by_channel
from wcitrain.params import logits_of, precise
from wcitrain.preserve import undisturbed

# What images are normalised with, by who does it: channel means and deviations in [0, 1] units.
SCALES: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "[0, 1] as they are": ([0.0], [1.0]),
    "[-1, 1]": ([0.5], [0.5]),
    "[0, 255]": ([0.0], [1 / 255]),
    "ImageNet's normalisation": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
    "CIFAR-10's normalisation": ([0.4914, 0.4822, 0.4465], [0.2471, 0.2435, 0.2616]),
    "CIFAR-100's normalisation": ([0.5071, 0.4865, 0.4409], [0.2673, 0.2564, 0.2762]),
    "MNIST's normalisation": ([0.1307], [0.3081]),
}
SIGNIFICANT = 0.001  # p-value of McNemar's test below which another scale is better than the model's own
ALIKE = 0.05  # and from which on two others are equally good


class Program(nn.Module):
    """An exported program, which has no train mode to leave."""

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program

    def forward(self, x: Tensor) -> Any:
        """Run it."""
        return self.program(x)

    def train(self, mode: bool = True) -> Self:
        """Do nothing: what was exported is in one mode for good."""
        return self


def load_program(path: Path) -> nn.Module:
    """Return the program in a TorchScript or ``torch.export`` file; ValueError for damaged ones."""
    try:
        with warnings.catch_warnings():
            for category in (DeprecationWarning, FutureWarning):  # of TorchScript as a whole
                warnings.simplefilter("ignore", category)
            if program_kind(path) == "TorchScript":
                return torch.jit.load(path, map_location="cpu")
            return Program(torch.export.load(path).module())
    except Exception as error:
        cause = str(error).strip().partition("\n")[0]
        text = f"got a {program_kind(path)} file that cannot be read ({cause})"
        raise ValueError(f"{path}: {text}; expected a whole one of this version of torch.") from error


def call_function(target: str) -> nn.Module:
    """Import ``module:function`` (from the current folder, too) or ``file.py:function`` and call it.

    A class of modules is called as well, a module is taken as it is. ValueError for all else.
    """
    place, _, name = target.rpartition(":")
    is_file = place.endswith(".py")
    if is_file and not Path(place).is_file():
        raise ValueError(f"{target}: got no file {place}; expected one. Check the path.")
    with _importing(Path(place).parent if is_file else Path()):
        try:
            module = _module_of(Path(place)) if is_file else importlib.import_module(place)
        except Exception as error:
            raise ValueError(f"{target}: importing {place} failed: {_cause(error)}.") from error
        if not hasattr(module, name):
            known = [key for key, value in vars(module).items() if callable(value) and key[0] != "_"]
            rule = f"a function that returns an nn.Module, such as one of {', '.join(known[:6])}"
            raise ValueError(f"{target}: got no {name!r} in {module.__file__}; expected {rule}.")
        value = getattr(module, name)
        try:
            model = value if isinstance(value, nn.Module) or not callable(value) else value()
        except Exception as error:
            advice = "Give a function without arguments"
            raise ValueError(f"{target}: calling it failed: {_cause(error)}. {advice}.") from error
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        advice = f"Return {model.__name__}()" if isinstance(model, type) else "Return the model"
        raise ValueError(f"{target}: got {got}; expected an nn.Module. {advice}.")
    return model


def _module_of(path: Path) -> ModuleType:
    """Run a file as a module of its own: another of the same name is another."""
    spec = importlib.util.spec_from_file_location(f"_{path.stem}_{digest([str(path.resolve())])[:8]}", path)
    module = importlib.util.module_from_spec(cast(ModuleSpec, spec))
    sys.modules[module.__name__] = module  # dataclasses and pickles look there
    cast(Any, cast(ModuleSpec, spec).loader).exec_module(module)
    return module


@contextmanager
def _importing(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder.resolve()))
    try:
        yield
    finally:
        sys.path.remove(str(folder.resolve()))


def _cause(error: Exception) -> str:
    """Return the error, and the line of the user's code that it comes from."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


@torch.no_grad()
def check_outputs(model: nn.Module, x: Tensor, num_classes: int, source: str) -> None:
    """Raise ValueError where a model fails on a batch of images or gives no logits of these classes."""
    if others := {str(p.dtype) for p in model.parameters() if p.is_floating_point() and p.dtype != x.dtype}:
        got = f"got parameters in {', '.join(sorted(others))}"
        raise ValueError(
            f"{source}: {got}; expected {x.dtype}, as images are. Call float() in your function."
        )
    with undisturbed(model, training=False):
        for images in (x, x[:1]):
            try:
                logits = model(images)
            except Exception as error:
                cause = ([repr(error)] + [line for line in str(error).splitlines() if line.strip()])[-1]
                got = f"the model fails on images {tuple(images.shape)}: {cause.strip()}"
                first = next((t for t in model.state_dict().values() if t.ndim == 4), images)
                advice = "Set data.image_size; export programs with a dynamic batch size (dynamic_shapes)"
                if first.shape[1] in {1, 3} - {images.shape[1]}:
                    advice = f"Set data.channels={first.shape[1]}"
                raise ValueError(f"{source}: {got}. {advice}.") from error
            if (shape := tuple(logits_of(logits).shape)) != (num := len(images), num_classes):
                got = f"got outputs {shape} for {num} images of {num_classes} classes"
                raise ValueError(f"{source}: {got}; expected [{num}, {num_classes}]. Is it their model?")


@torch.no_grad()
def check_scale(model: Classifier, x: Tensor, y: Tensor, source: str, *, is_given: bool) -> str:
    """Return how often a model is right on images [N, C, H, W] in [0, 1], and behind other normalisations.

    It is measured: a model behind the wrong one is another network, whose accuracies look plausible. Another
    of ``SCALES`` that is right more often, beyond chance (McNemar), is a ValueError that says how to set it;
    where the caller has set the normalisation himself (``is_given``) it is only said.
    """
    kept, pairs = (model.mean, model.std), {}
    for name, constants in SCALES.items():
        values = [by_channel("mean", None, one, x.shape[1]) for one in constants]
        pairs[name] = [torch.tensor(one).view(1, -1, 1, 1).to(kept[0]) for one in values]

    def is_right(mean: Tensor, std: Tensor) -> Tensor:
        model.mean, model.std = mean, std
        logits = torch.cat([precise(model(images)) for images in x.split(100)])
        return (logits.argmax(1) == y) & logits.isfinite().all(1)

    with undisturbed(model, training=False):
        try:
            own, flags = is_right(*kept), {}
            for name, pair in pairs.items():
                if not all(torch.allclose(a, b, atol=1e-3) for a, b in zip(pair, kept, strict=True)):
                    flags[name] = is_right(*pair)
        finally:
            model.mean, model.std = kept
    best = max(flags, key=lambda name: int(flags[name].sum()))
    alike = [name for name in flags if mcnemar(flags[best], flags[name])[2] >= ALIKE]
    shares = {name: percent(float(value.double().mean())) for name, value in ({"": own} | flags).items()}
    others = ", ".join(f"{shares[name]} % ({name})" for name in sorted(alike, key=[best, *flags].index))
    told = f"{shares['']} % of {len(x)} images right as it is, behind others {others}"
    more, fewer, p_value = mcnemar(flags[best], own)
    if more > fewer and p_value < SIGNIFICANT and not is_given:
        both = pairs[best], kept
        new, now = ([[float(f"{v:.6g}") for v in t.flatten().tolist()] for t in pair] for pair in both)
        fix = f"'model.mean={new[0]}' 'model.std={new[1]}'"
        advice = f"Give --recipe {fix}; to leave it so, {now[0]} and {now[1]}"
        if len(alike) > 1:
            advice = f"Chance does not tell these {len(alike)} apart: give that of its training. {advice}"
        raise ValueError(f"{source}: got {told}; expected its own normalisation to be best. {advice}.")
    return f"normalisation: {told}"
