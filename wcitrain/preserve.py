"""Leave the model as it was found: weights, module modes, buffers, random state, numeric precision.

These context managers restore on exceptions too. Gradients need none: attacks and measures use
``autograd.grad``, and the optimizer wrapper undoes its own (`Passes.undone`).
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook


@contextmanager
def differentiating() -> Iterator[None]:
    """Allow gradients, also under ``no_grad`` and ``inference_mode``, whose tensors must pass ``normal``."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def normal(t: Tensor) -> Tensor:
    """Return ``t``, or where it was made in inference mode a copy that autograd accepts."""
    return t.clone() if t.is_inference() else t


@contextmanager
def module_mode(model: nn.Module, *, training: bool | None) -> Iterator[None]:
    """Put the model in train or eval mode (None: leave it); on exit every submodule has its own flag back."""
    flags = [(module, module.training) for module in model.modules()]
    if training is not None:
        model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:  # train() would switch on layers that the user froze in eval mode too
            module.training = flag


SavedBuffers = list[tuple[nn.Module, str, Tensor, Tensor]]


def saved_buffers(model: nn.Module) -> SavedBuffers:
    """Return what ``put_back_buffers`` needs: running statistics, counters and any other buffer."""
    own = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    return [(module, name, buffer, buffer.detach().clone()) for module, name, buffer in own]


def put_back_buffers(saved: SavedBuffers) -> None:
    """Restore every buffer, also where a module replaced the tensor instead of writing into it."""
    with torch.no_grad():
        for module, name, buffer, value in saved:
            buffer.copy_(value)
            module._buffers[name] = buffer


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Restore every buffer on exit."""
    saved = saved_buffers(model)
    try:
        yield
    finally:
        put_back_buffers(saved)


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of the generators a pass on ``device`` may draw from: CPU, and CUDA or MPS."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type == "mps":
        states.append(torch.mps.get_rng_state())
    return states


def set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type == "mps":
        torch.mps.set_rng_state(states[1])


@contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Restore the global generators on exit."""
    states = random_state(device)
    try:
        yield
    finally:
        set_random_state(states, device)


@contextmanager
def perturbed(layers: Sequence[Tensor], direction: Sequence[Tensor]) -> Iterator[Callable[[int], None]]:
    """Yield ``move(sign)``: it puts the weights at W + sign·u; W comes back bit for bit.

    By copy from a clone: subtracting u would be off by a rounding, rebinding ``.data`` would break views. A
    forward that rebinds it itself (norm constraints) has W back too. The tensors of ``direction`` are read
    anew at every move, so an ascent may change them in place meanwhile. Autocast's copies of the weights are
    dropped at every move: it keeps those of W as long as it lasts.
    """
    saved = [p.detach().clone() for p in layers]

    def move(sign: int) -> None:
        weights = [p.detach() for p in layers]
        torch._foreach_copy_(weights, saved)
        torch._foreach_add_(weights, list(direction), alpha=sign)
        torch.clear_autocast_cache()

    try:
        yield move
    finally:
        torch._foreach_copy_([p.detach() for p in layers], saved)
        torch.clear_autocast_cache()


class _Protected(threading.local):
    def __init__(self) -> None:
        self.models: list[nn.Module] = []


_protected = _Protected()  # the models inside ``undisturbed`` of this thread, the innermost last


@contextmanager
def undisturbed(model: nn.Module, *, training: bool | None) -> Iterator[None]:
    """Run passes that must leave no trace: modes, buffers, random state of its device restored on exit.

    ``training`` is the mode inside; None: as it is, so layers that the user froze in eval mode stay frozen.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with module_mode(model, training=training), kept_buffers(model), kept_random_state(device):
        _protected.models.append(model)
        try:
            yield
        finally:
            _protected.models.pop()


def is_undisturbed(model: nn.Module) -> bool:
    """Whether a caller protects this very model already."""
    return any(model is one for one in _protected.models)


def watched(function: Callable[[Tensor], Tensor], where: str) -> Callable[[Tensor], Tensor]:
    """Return ``function``, in whose first call no module may move its buffers or the random state.

    Inside ``undisturbed`` it is the function itself: there all is put back.
    """
    contexts = iter([refusing_traces(where)] if not _protected.models else [])

    def call(x: Tensor) -> Tensor:
        with next(contexts, nullcontext()):
            return function(x)

    return function if _protected.models else call


@contextmanager
def refusing_traces(where: str) -> Iterator[None]:
    """Refuse calls of modules that move their buffers (BatchNorm in train mode) or random state (dropout).

    Outermost modules with a part in train mode are compared before and after a call, so nothing has to be
    known of their parts, compiled ones included. What moved is put back before ValueError is raised.
    """
    handles: list[Any] = []

    def before(module: nn.Module, args: object) -> None:
        trained = [m for m in module.modules() if m.training]
        if not trained:
            return
        handles[-1].remove()  # what is called inside belongs to this module
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        names = {id(m): f"{name}." if name else "" for name, m in module.named_modules()}
        saved, states = saved_buffers(module), random_state(device)

        def after(*_: object) -> None:
            handles[-1].remove()
            moved = [
                names[id(owner)] + name
                for owner, name, buffer, value in saved
                if owner._buffers.get(name) is not buffer or not torch.equal(buffer, value)
            ]
            drawn = [a for a, b in zip(states, random_state(device), strict=True) if not torch.equal(a, b)]
            if moved or drawn:
                put_back_buffers(saved)
                set_random_state(states, device)
                what = " and ".join(moved[:2] + ["the random state"] * bool(drawn))
                got = f"a loss that calls {type(module).__name__} in train mode, which moves {what}"
                advice = f"Use {where}(model, x, y, ...), or give a loss its model=model"
                raise ValueError(f"{where}: got {got}; expected one that changes nothing. {advice}.")
            handles.append(register_module_forward_pre_hook(before))

        handles.append(module.register_forward_hook(after))

    handles.append(register_module_forward_pre_hook(before))
    try:
        with warnings.catch_warnings():  # the hook has gone before what is inside is called
            warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def naming_reentrant() -> Iterator[None]:
    """Turn torch's error about reentrant activation checkpoints under ``autograd.grad`` into a ValueError."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        got = "got activation checkpoints with use_reentrant=True, which hide gradients from this pass"
        raise ValueError(f"model: {got}; expected use_reentrant=False. Change the model.") from error


@contextmanager
def full_precision(model: nn.Module) -> Iterator[None]:
    """Run forward passes in float32 although the model was prepared for mixed precision; TF32 is off too.

    Accelerate replaces ``model.forward`` by a version with autocast inside; ``_original_forward`` is put back
    for the duration. An autocast entered inside raises RuntimeError when the model is called.
    """
    patched = [m for m in model.modules() if "_original_forward" in m.__dict__ and "forward" in m.__dict__]
    forwards = [m.__dict__["forward"] for m in patched]
    for module in patched:
        module.forward = module.__dict__["_original_forward"]
    kind = next((p.device.type for p in model.parameters()), "cpu")

    def refuse(module: nn.Module, args: object) -> None:
        if torch.is_autocast_enabled(kind):
            text = "this pass needs float32, but the model is called under autocast; expected none. Remove it"
            raise RuntimeError(f"{text} from your loss function, or use WCIPosterior.")

    hook = model.register_forward_pre_hook(refuse)
    try:
        with torch.autocast(kind, enabled=False), _no_tf32():
            yield
    finally:
        hook.remove()
        for module, forward in zip(patched, forwards, strict=True):
            module.forward = forward


@contextmanager
def _no_tf32() -> Iterator[None]:
    """Compute float32 products in float32 on CUDA.

    By torch's older switches where they can be read, else (somebody has used them) by the newer ones: mixing
    the two makes every later read of the older raise.
    """
    cudnn, matmul = cast(Any, torch.backends.cudnn), torch.backends.cuda.matmul
    try:
        places, name, off = [cudnn, matmul], "allow_tf32", cast(Any, False)
        former = [getattr(place, name) for place in places]
    except RuntimeError:
        places, name, off = [cudnn.conv, matmul], "fp32_precision", "ieee"
        former = [getattr(place, name) for place in places]
    for place in places:
        setattr(place, name, off)
    try:
        yield
    finally:
        for place, value in zip(places, former, strict=True):
            setattr(place, name, value)
